"""Per-prompt reward statistics: against a plain tracker, over ranks, through a failed step."""

import math
import statistics
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fixtures_runs import REWARDS, document, merged, metrics_of, weight_bytes
from safetensors.torch import load_file

from mmgrpo import build
from mmgrpo.config import load_config
from mmgrpo.core import Collective
from mmgrpo.core.seeding import generator
from mmgrpo.errors import ConfigError, MethodError, MmgrpoError
from mmgrpo.methods import load_method
from mmgrpo.trainer import step as step_module
from mmgrpo.trainer.history import RewardHistory

NAN = math.nan


def steps(count, *, prompts=5, size=6, seed=0):
    """Prompts and scores of some training steps, a few scores missing."""
    stream = generator(seed)
    for _ in range(count):
        names = torch.randint(prompts, (size,), generator=stream).sort().values
        scores = torch.rand(size, generator=stream)
        yield names, scores.masked_fill(torch.rand(size, generator=stream) < 0.1, NAN)


def test_statistics_are_those_of_a_plain_tracker():
    history, buffers = RewardHistory(size=7, enough=4), {}
    for names, scores in steps(12):
        for name, value in zip(names.tolist(), scores.tolist(), strict=True):
            if not math.isnan(value):
                buffers.setdefault(name, deque(maxlen=7)).append(value)
        mean, std = history.add(names, scores)
        history.commit()
        for row, name in enumerate(names.tolist()):
            known = list(buffers.get(name, ()))
            if len(known) < 4:
                assert math.isnan(mean[row])
                assert math.isnan(std[row])
            else:
                assert mean[row].item() == pytest.approx(statistics.fmean(known), abs=1e-14)
                assert std[row].item() == pytest.approx(statistics.pstdev(known), abs=1e-14)
    assert max(map(len, buffers.values())) == 7
    assert mean.dtype == torch.float64


def test_what_is_not_committed_is_forgotten():
    one, other = RewardHistory(size=9, enough=1), RewardHistory(size=9, enough=1)
    first, second = list(steps(2))
    one.add(*first)
    one.add(*second)  # the step was done again
    one.commit()
    other.add(*second)
    other.commit()
    assert {k: v.tolist() for k, v in one.state_dict().items()} == {
        k: v.tolist() for k, v in other.state_dict().items()
    }


def test_the_state_goes_through_a_file_bit_for_bit(tmp_path):
    from safetensors.torch import save_file

    one, other = RewardHistory(size=5, enough=2), RewardHistory(size=5, enough=2)
    *early, last = list(steps(6))
    for names, scores in early:
        one.add(names, scores)
        one.commit()
    save_file(one.state_dict(), tmp_path / "state.safetensors")
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for a, b in zip(one.add(*last), other.add(*last), strict=True):
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
    empty = RewardHistory(size=5, enough=2)
    empty.load_state_dict(RewardHistory(size=5, enough=2).state_dict())
    assert empty.state_dict()["reward"].numel() == 0


class Ranks:
    """Two ranks, played by threads."""

    def __init__(self):
        import threading

        self.barrier, self.values = threading.Barrier(2, timeout=10), [None, None]

    def of(self, rank):
        outer = self

        class One(Collective):
            size = 2

            def gather(self, value):
                outer.values[rank] = value
                outer.barrier.wait()
                found = torch.cat(list(outer.values))
                outer.barrier.wait()
                return found

        return One()


@pytest.mark.parametrize("cut", [3, 1, 6])
def test_two_ranks_know_what_one_process_knows(cut):
    """A rank may have any share of the samples; also none with a reward."""
    ranks, batches = Ranks(), list(steps(8))

    def follow(slices, collective=None):
        history, found = RewardHistory(size=6, enough=3), []
        for names, scores in batches:
            extra = {} if collective is None else {"collective": collective}
            found.append(torch.stack(history.add(names[slices], scores[slices], **extra)))
            history.commit()
        return found, history.state_dict()

    whole, state = follow(slice(None))
    with ThreadPoolExecutor(2) as pool:
        parts = [slice(0, cut), slice(cut, None)]
        one, two = pool.map(follow, parts, [ranks.of(0), ranks.of(1)])
    for rank, part in ((one, parts[0]), (two, parts[1])):
        for mine, all_of_it in zip(rank[0], whole, strict=True):
            assert torch.equal(mine.nan_to_num(-1), all_of_it[:, part].nan_to_num(-1))
        assert all(torch.equal(rank[1][name], state[name]) for name in state)


# -- runs -----------------------------------------------------------------------------------------

DDPO = {
    "method": {"id": "ddpo", "advantage": {"history_size": 6, "history_min": 5}},
    "trainer": {"steps": 5, "save_every": 2, "keep_checkpoints": 9},
    "rollout": {"prompts_per_step": 3},
    "rewards": [f"{REWARDS}:brightness"],
}


def run(models, folder, **changes):
    doc = document(models, "image", folder, **merged(DDPO, changes))
    doc["data"]["train"] = doc["data"]["train"].replace("train.jsonl", "eval.jsonl")  # 3 prompts
    build.train(load_config(doc))
    return folder


def saved(folder, step):
    tensors = load_file(folder / f"checkpoints/step_{step:06d}/state.safetensors")
    return {k.removeprefix("history/"): v for k, v in tensors.items() if k.startswith("history/")}


def test_a_run_remembers_and_resumes_bit_for_bit(models, tmp_path, monkeypatch):
    whole = run(models, tmp_path / "whole")
    assert saved(whole, 5)["prompt"].tolist() == [0, 1, 2]
    assert saved(whole, 5)["count"].tolist() == [6, 6, 6]  # the size bounds them
    real = step_module.update
    calls = []

    def fail_once(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise MmgrpoError("made to fail after the rewards of step 4 were seen")
        return real(*arguments)

    monkeypatch.setattr(step_module, "update", fail_once)
    with pytest.raises(MmgrpoError, match="made to fail"):
        run(models, tmp_path / "cut")
    assert saved(tmp_path / "cut", 3)["reward"].numel() == 18
    run(models, tmp_path / "cut")
    assert metrics_of(tmp_path / "cut") == metrics_of(whole)
    assert weight_bytes(tmp_path / "cut") == weight_bytes(whole)
    assert all(torch.equal(v, saved(tmp_path / "cut", 5)[k]) for k, v in saved(whole, 5).items())


def test_the_history_changes_the_update(models, tmp_path):
    """Else the tests above would prove little."""
    one = run(models, tmp_path / "one", trainer={"steps": 2})
    never = {"advantage": {"history_size": 40, "history_min": 40}}
    other = run(models, tmp_path / "other", trainer={"steps": 2}, method=never)
    assert weight_bytes(one) != weight_bytes(other)


def test_only_methods_that_ask_get_a_history():
    assert "history" in load_method("ddpo").needs
    assert "history" not in load_method("loop").needs
    assert build.make_history(load_method("loop")) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"reward": {"shaping": "clip"}}, "remembers the weighted sum of the rewards as it is"),
        ({"reward": {"combine": "gdpo"}}, "a combine other than 'sum_then_normalise'"),
        ({"advantage": {"history_min": 40}}, "history_min is 40, and only the last 32"),
        ({"rollout": {"kernel": "ddim"}}, "kernel 'ddim' draws no noise"),
        ({"rollout": {"kernel": "autp"}}, "unknown rollout.kernel 'autp'; did you mean 'auto'"),
    ],
)
def test_what_does_not_go_with_it_is_refused(overrides, message):
    with pytest.raises(MethodError, match=message):
        load_method("ddpo", **overrides)


def test_a_diffusion_kernel_on_a_flow_model_stops_before_anything_is_written(models, tmp_path):
    with pytest.raises(ConfigError, match="kernel 'ddim_eta' does not fit a flow model"):
        run(models, tmp_path / "run", method={"rollout": {"kernel": "ddim_eta"}})
    assert not (tmp_path / "run").exists()


def test_the_reinforce_variant_of_ddpo():
    method = load_method("ddpo", objective="reinforce", trust_region=None)
    assert method.component("objective") == "reinforce"
    assert method.needs == {"history"}
