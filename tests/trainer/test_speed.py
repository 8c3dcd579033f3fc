"""The section ``speed``: each switch changes what a step costs, and not what it computes."""

from itertools import pairwise

import pytest
import torch
from fixtures_runs import document
from hypothesis import given
from hypothesis import strategies as st
from test_split_invariance import distance, gradient, policies, prepared  # noqa: F401

from mmgrpo import build
from mmgrpo.config import load_config
from mmgrpo.config.token_schema import TokenSpeed
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.trainer.batches import micro_batches
from mmgrpo.trainer.parts import State
from mmgrpo.trainer.step import train_step

SWITCHES = {
    "share_prompts": False,
    "pack": False,
    "head_tile_rows": 0,
    "fast_decoding": False,
    "fast_layers": False,
    "max_rows": 3,
    "micro_batch_decisions": 20,
    "skip_idle": False,
    "overlap_rewards": False,
    "keep_memory": False,
}
ROUNDING = 2e-4
"""What other orders of the same sums may change of a metric in two steps."""
METRICS = ("loss", "kl", "reward/mean", "grad_norm", "entropy", "count/generated_decisions")


def test_every_switch_is_tried_here():
    assert set(SWITCHES) == set(TokenSpeed.model_fields)


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    size=st.none() | st.integers(1, 5),
    decisions=st.none() | st.integers(1, 20),
    whole_groups=st.booleans(),
)
def test_pieces_keep_the_limits_the_order_and_the_groups(lengths, size, decisions, whole_groups):
    group = torch.arange(len(lengths)) // 3
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    batch = Trajectories(group=group, mask=mask)
    pieces = micro_batches(batch, size, decisions=decisions, whole_groups=whole_groups)
    assert torch.equal(torch.cat(list(pieces)), torch.arange(len(lengths)))

    def fits(rows):
        longest = max(lengths[row] for row in rows.tolist())
        small = size is None or len(rows) <= size
        return small and (decisions is None or len(rows) * longest <= decisions)

    units = [[row] for row in range(len(lengths))]
    if whole_groups:
        units = [(group == g).nonzero().flatten().tolist() for g in group.unique()]
    for piece in pieces:
        assert fits(piece) or piece.tolist() in units
    for one, two in pairwise(pieces):  # no piece could have had more
        first = next(unit for unit in units if int(two[0]) in unit)
        assert not fits(torch.cat([one, torch.tensor(first)]))


@pytest.mark.parametrize("preset", ["grpo", "gspo", "opo"])
def test_pieces_of_few_decisions_give_the_whole_gradient(
    policies, models, tmp_path, preset  # noqa: F811
):  # fmt: skip
    parts, config, trajectories = prepared(
        policies, models, "text", preset, tmp_path, trainer={"max_grad_norm": None}
    )
    whole, metrics = gradient(parts, config, trajectories, None)
    few = config.model_copy(update={"speed": TokenSpeed(micro_batch_decisions=12)})
    pieces, of_pieces = gradient(parts, few, trajectories, None)
    assert distance(pieces, whole) < 1e-5
    assert of_pieces["count/forward"] > metrics["count/forward"]
    assert of_pieces["loss"] == pytest.approx(metrics["loss"], rel=1e-5, abs=1e-6)


def two_steps(models, folder, speed):
    """The metrics of two steps, and what was drawn in each."""
    changes = {"speed": speed, "trainer": {"learning_rate": 1e-3}}
    config = load_config(document(models, "text", folder, method="dr-grpo", **changes))
    parts, state, found = build.assemble(config), State(), []
    for _ in range(2):
        collected = train_step(parts, state, config)
        texts = [sample.completion for sample in collected.samples]
        found.append(({name: state.metrics[name] for name in METRICS}, texts))
    return found


@pytest.fixture(scope="module")
def usual(models, tmp_path_factory):
    return two_steps(models, tmp_path_factory.mktemp("runs") / "usual", {})


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_leaves_the_steps_as_they_are(models, tmp_path, usual, switch):
    found = two_steps(models, tmp_path / "run", {switch: SWITCHES[switch]})
    for (ours, texts), (theirs, drawn) in zip(found, usual, strict=True):
        assert texts == drawn
        assert ours == pytest.approx(theirs, rel=ROUNDING, abs=1e-6)


@pytest.mark.parametrize("on", [True, False])
def test_a_run_keeps_its_memory_unless_it_is_told_not_to(models, tmp_path, monkeypatch, on):
    asked = []
    monkeypatch.setattr(build, "keep_freed_memory", lambda: asked.append(True))
    speed = {"keep_memory": on}
    build.assemble(load_config(document(models, "text", tmp_path / "run", speed=speed)))
    assert bool(asked) == on


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("modality", ["text", "image"])
def test_layers_are_the_fast_ones_unless_they_are_switched_off(models, tmp_path, modality, on):
    config = document(models, modality, tmp_path / "run", speed={"fast_layers": on})
    network = build.assemble(load_config(config)).policy.network
    assert any("forward" in vars(module) for module in network.modules()) == on
