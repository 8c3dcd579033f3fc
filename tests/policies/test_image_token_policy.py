"""Image-token policies: their grammar, and log-probabilities that rollout and training share."""

import json

import pytest
import torch
from fixtures_image_tokens import CODES, GRID, drawing_prompts, save_parts, tiny_parts, tiny_vq
from fixtures_tokens import relative_error

from mmgrpo.config.image_layout import FILE, read_layout
from mmgrpo.errors import ModelError
from mmgrpo.policies.image_grammar import Kind
from mmgrpo.policies.image_tokens import ImageTokenPolicy
from mmgrpo.protocols import Request
from mmgrpo.rollout.image_tokens import ImageTokenEngine

PLANS = (0, 1, 4)
CELLS = GRID[0] * GRID[1]


def policy_with(plan, **options):
    return ImageTokenPolicy(tiny_parts(), plan_tokens=plan, **options)


def rollout_of(policy, *, temperature=1.0, group_size=4, **options):
    engine = ImageTokenEngine(policy, temperature=temperature, **options)
    return engine.generate(drawing_prompts(), group_size=group_size, seed=3)


def walk(ids, plan, begin):
    """The kinds of a row's places, one token after the other."""
    kinds, codes = [], None if plan else 0
    for place in range(len(ids)):
        if codes is None:
            kinds.append(Kind.TEXT if place < plan else Kind.BEGIN)
            codes = 0 if ids[place] == begin else None
        else:
            kinds.append(Kind.IMAGE if codes < CELLS else Kind.DONE)
            codes += 1
    return kinds


@pytest.mark.parametrize("plan", PLANS)
def test_kinds_are_those_of_a_walk_through_the_row(plan):
    grammar = policy_with(plan).grammar
    begin = grammar.layout.begin_id
    rows = []
    for length in range(plan + 1):  # every length of a plan, then begin and codes, then padding
        row = [65] * length + ([begin] if plan else []) + [grammar.layout.code_offset] * CELLS
        rows.append((row + [0] * 20)[: plan + CELLS + 4])
    ids = torch.tensor(rows)
    found = grammar.kinds(ids, torch.arange(ids.shape[1]))
    assert found.tolist() == [walk(row, plan, begin) for row in rows]
    single = [grammar.kinds(ids, torch.full((len(rows), 1), t)) for t in range(ids.shape[1])]
    assert torch.equal(torch.cat(single, dim=1), found)
    for row, kinds in zip(ids, found, strict=True):  # what comes later does not count
        for place in range(len(row)):
            cut = row.clone()
            cut[place:] = 0
            assert grammar.kinds(cut[None], torch.tensor([place])).item() == kinds[place]


def test_what_each_kind_allows():
    policy = policy_with(4)
    layout, allowed = policy.layout, policy.grammar.allowed
    codes = range(layout.code_offset, layout.code_offset + CODES)
    special = [policy.tokenizer.eos_token_id, policy.tokenizer.pad_token_id, layout.end_id]
    special += [layout.plan_begin_id, *range(len(policy.tokenizer), allowed.shape[1])]
    for kind in Kind:
        ids = set(allowed[kind].nonzero().flatten().tolist())
        assert ids.isdisjoint(set(special) - ({layout.end_id} | set(policy.answer_end_ids)))
        assert (ids & set(codes)) == (set(codes) if kind == Kind.IMAGE else set())
        assert (layout.begin_id in ids) == (kind in (Kind.TEXT, Kind.BEGIN))
        assert (policy.tokenizer.eos_token_id in ids) == (kind == Kind.ANSWER)
        assert (65 in ids) == (kind in (Kind.TEXT, Kind.ANSWER))
    assert allowed[Kind.IMAGE].sum() == CODES
    assert allowed[Kind.BEGIN].sum() == 1


@torch.no_grad()
def row_by_row(policy, trajectories, temperature):
    """Log-probabilities and entropies from whole rows, without cache, padding or tricks."""
    payload, allowed = trajectories.payload, policy.grammar.allowed
    log_prob, entropy = torch.zeros(trajectories.mask.shape), torch.zeros(trajectories.mask.shape)
    for i in range(len(trajectories)):
        number = payload.prompt_row[i]
        prompt = payload.prompts.ids[number][payload.prompts.mask[number]]
        ids = payload.completion_ids[i]
        logits = policy.model(input_ids=torch.cat([prompt, ids])[None]).logits[0]
        kinds = walk(ids.tolist(), policy.layout.plan_tokens, policy.layout.begin_id)
        for t, kind in enumerate(kinds):
            choice = allowed[kind].nonzero().flatten()
            log_p = (logits[len(prompt) - 1 + t][choice] / temperature).log_softmax(-1)
            if kind in (Kind.TEXT, Kind.IMAGE):
                log_prob[i, t] = log_p[choice.tolist().index(ids[t])]
                entropy[i, t] = -(log_p.exp() * log_p).sum()
    return log_prob, entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("plan", PLANS)
def test_rollout_and_evaluation_have_the_same_constrained_distribution(plan, temperature):
    policy = policy_with(plan, head_tile_rows=3)
    assert policy._shares_prompts
    assert policy._tiled
    found = rollout_of(policy, temperature=temperature).trajectories
    expected = row_by_row(policy, found, temperature)
    evaluations = (
        policy.evaluate(found, Request(entropy=True)),
        policy.evaluate_plain(found, Request(entropy=True)),
    )
    for log_prob, entropy in [(found.old_log_prob, found.entropy)] + [
        (e.log_prob, e.entropy) for e in evaluations
    ]:
        assert (log_prob - expected[0])[found.mask].abs().max() < 1e-5
        assert (entropy - expected[1])[found.mask].abs().max() < 1e-5
    assert expected[0][found.mask].max() < 0  # every decision had a choice


@pytest.mark.parametrize("plan", [0, 4])
def test_gradients_do_not_depend_on_how_rows_are_read(plan):
    policy = policy_with(plan, head_tile_rows=3)
    found = rollout_of(policy).trajectories
    parameters = list(policy.model.parameters())

    def gradient(evaluate):
        evaluation = evaluate(found, Request(entropy=True))
        loss = (evaluation.log_prob + 0.3 * evaluation.entropy)[found.mask].sum()
        return torch.autograd.grad(loss, parameters)

    assert relative_error(gradient(policy.evaluate), gradient(policy.evaluate_plain)) < 1e-4


def test_an_exported_folder_is_the_same_policy(tmp_path):
    policy = ImageTokenPolicy(save_parts(tiny_parts(), tmp_path / "model"), plan_tokens=4)
    found = rollout_of(policy)
    policy.export(tmp_path / "hf")
    again = ImageTokenPolicy(tmp_path / "hf")
    assert again.layout == policy.layout
    other = rollout_of(again)
    assert torch.equal(found.trajectories.old_log_prob, other.trajectories.old_log_prob)
    for one, two in zip(found.samples, other.samples, strict=True):
        assert one.image.tobytes() == two.image.tobytes()


def broken_file(folder, **changes):
    document = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({**document, **changes}))


MISTAKES = {
    "no layout": (lambda f: (f / FILE).unlink(), "has no image_tokens.json"),
    "no decoder": (lambda f: (f / "vq" / "config.json").unlink(), "has no decoder"),
    "unknown key": (lambda f: broken_file(f, grit=[2, 3]), "unknown key 'grit'; did you mean 'gr"),
    "no grid": (lambda f: broken_file(f, grid=[2]), "grid: "),
    "codes": (lambda f: broken_file(f, num_codes=9), "num_codes 9, and the decoder has 10"),
    "ids": (lambda f: broken_file(f, begin_id=7, end_id=7), "must differ and not be codes"),
    "beyond": (lambda f: broken_file(f, begin_id=4000), "names token id 4000, and the model has"),
    "question": (lambda f: broken_file(f, question_format="?"), "must contain {image} once"),
    "too large": (lambda f: broken_file(f, grid=[20, 20]), "the model's context of 160"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_folder_that_cannot_be_used_is_refused_in_one_sentence(name, tmp_path):
    folder = save_parts(tiny_parts(), tmp_path / "model")
    spoil, message = MISTAKES[name]
    spoil(folder)
    with pytest.raises(ModelError) as error:
        ImageTokenPolicy(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_decoder_of_another_class_is_refused(tmp_path):
    folder = save_parts(tiny_parts(), tmp_path / "model")
    config = folder / "vq" / "config.json"
    config.write_text(config.read_text().replace("VQModel", "AutoencoderKL"))
    with pytest.raises(ModelError, match="holds a AutoencoderKL; expected a diffusers VQModel"):
        ImageTokenPolicy(folder)


def test_the_layout_of_a_file_is_what_was_written(tmp_path):
    parts = tiny_parts()
    folder = save_parts(parts, tmp_path / "model")
    assert read_layout(folder) == parts.layout
    assert read_layout(folder).with_plan(4).room == 4 + 1 + CELLS
    assert tiny_vq().quantize.n_e == CODES
