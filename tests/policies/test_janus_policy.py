"""Janus as an image-token policy, held to its own modules and to its own generate()."""

from __future__ import annotations

import pytest
import torch
from fixtures_image_tokens import drawing_prompts
from fixtures_janus import CELLS, CODES, janus_parts, save_janus
from fixtures_tokens import relative_error

from mmgrpo.config.image_layout import read_layout
from mmgrpo.errors import ConfigError, ModelError
from mmgrpo.policies.image_tokens import Parts
from mmgrpo.policies.janus import PROMPT_FORMAT, JanusPolicy, write_layout
from mmgrpo.protocols import Request
from mmgrpo.rollout.image_tokens import ImageTokenEngine


@pytest.fixture
def policy():
    return JanusPolicy(janus_parts(), head_tile_rows=3)


def rollout_of(policy, *, temperature=1.0, group_size=4, **options):
    engine = ImageTokenEngine(policy, temperature=temperature, **options)
    return engine.generate(drawing_prompts(), group_size=group_size, seed=3)


def prompt_ids(policy):
    """Prompts as the tokenizer alone makes them, with the token that begins a picture."""
    texts = [str(prompt.content) for prompt in drawing_prompts()]
    return [[*policy.tokenizer(text)["input_ids"], policy.layout.begin_id] for text in texts]


@torch.no_grad()
def step_by_step(model, prompt, codes, temperature):
    """Log-probabilities and entropies of codes, as Janus's own loop over its modules has them."""
    inner = model.model
    embeds, found = inner.language_model.embed_tokens(torch.tensor([prompt])), []
    for code in codes:
        hidden = inner.language_model(inputs_embeds=embeds).last_hidden_state[:, -1]
        log_p = (inner.generation_head(hidden)[0] / temperature).log_softmax(dim=-1)
        found.append((log_p[code], -(log_p.exp() * log_p).sum()))
        drawn = inner.generation_aligner(inner.generation_embeddings(torch.tensor([[code]])))
        embeds = torch.cat([embeds, drawn], dim=1)
    return torch.tensor(found).T


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_those_of_the_model_s_own_modules(policy, temperature):
    found = rollout_of(policy, temperature=temperature).trajectories
    untouched, prompts = janus_parts().model, prompt_ids(policy)
    codes = (found.payload.completion_ids - policy.layout.code_offset).tolist()
    rows = zip(found.payload.prompt_row.tolist(), codes, strict=True)
    wanted = torch.stack([step_by_step(untouched, prompts[p], c, temperature) for p, c in rows])
    assert found.mask.all()
    assert found.mask.shape == (8, CELLS)
    evaluations = (
        policy.evaluate(found, Request(entropy=True)),
        policy.evaluate_plain(found, Request(entropy=True)),
    )
    assert policy._tiled
    assert policy._fast
    for log_prob, entropy in [(found.old_log_prob, found.entropy)] + [
        (e.log_prob, e.entropy) for e in evaluations
    ]:
        torch.testing.assert_close(log_prob, wanted[:, 0], rtol=0, atol=2e-6)
        torch.testing.assert_close(entropy, wanted[:, 1], rtol=0, atol=2e-6)


def test_greedy_pictures_are_those_of_generate(policy):
    """Transformers' own loop, which needs a guidance above 1: the same codes and colours."""
    drawn = rollout_of(policy, temperature=0.0, group_size=1)
    codes = drawn.trajectories.payload.completion_ids - policy.layout.code_offset
    model = janus_parts().model
    model.generation_config.generation_kwargs = {"boi_token_id": policy.layout.begin_id}
    for row, ids in enumerate(prompt_ids(policy)):
        wanted = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            generation_mode="image", do_sample=False, guidance_scale=1 + 1e-6, bos_token_id=0,
            pad_token_id=0, max_new_tokens=CELLS,
        )  # fmt: skip
        assert wanted[0].tolist() == codes[row].tolist()
        pixels = model.decode_image_tokens(wanted)[0]
        colours = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        assert drawn.samples[row].image.tobytes() == colours.numpy().tobytes()


@pytest.mark.parametrize("plan", [0, 3])
def test_before_an_update_every_ratio_is_one(plan):
    """With and without a plan in words, which the text head writes."""
    policy = JanusPolicy(janus_parts(), plan_tokens=plan)
    found = rollout_of(policy).trajectories
    moved = (policy.evaluate(found).log_prob - found.old_log_prob)[found.mask]
    assert (moved.exp() - 1).abs().max() < 1e-6
    assert found.segment[found.mask].unique().tolist() == ([0, 1] if plan else [1])


def test_a_step_moves_what_draws_and_nothing_else(policy):
    found, before = rollout_of(policy).trajectories, janus_parts().model.state_dict()
    trained = [p for p in policy.network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    evaluations = [evaluate(found).log_prob.sum() for evaluate in (policy.evaluate,
                   policy.evaluate_plain)]  # fmt: skip
    shared, plain = (torch.autograd.grad(value, trained) for value in evaluations)
    assert relative_error(shared, plain) < 1e-4
    for parameter, gradient in zip(trained, shared, strict=True):
        parameter.grad = gradient
    optimizer.step()
    after = policy.model.state_dict()
    assert after.keys() == before.keys()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    still = ("model.vision_model", "model.aligner", "model.vqmodel")
    assert moved == {name for name in before if not name.startswith(still)}
    assert {"model.generation_head.vision_head.weight", "lm_head.weight"} <= moved
    assert after["lm_head.weight"].data_ptr() == (
        after["model.language_model.embed_tokens.weight"].data_ptr()  # tied, as they were
    )


def test_adapters_are_in_the_language_model_only():
    policy = JanusPolicy(janus_parts(), lora={"rank": 2, "alpha": 4})
    names = [name for name, p in policy.network.named_parameters() if p.requires_grad]
    assert names
    assert all("language_model.layers" in name and "lora_" in name for name in names)
    found = rollout_of(policy).trajectories
    assert (policy.evaluate(found).log_prob - found.old_log_prob).abs().max() < 1e-5


def test_an_exported_folder_is_a_plain_janus_and_the_same_policy(tmp_path, policy):
    from transformers import JanusForConditionalGeneration

    with torch.no_grad():
        policy.model.model.generation_head.proj_out.bias.add_(0.5)
    found = rollout_of(policy)
    policy.export(tmp_path)
    plain = JanusForConditionalGeneration.from_pretrained(tmp_path)
    for name, value in policy.model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value), name
    again = JanusPolicy(tmp_path)
    assert again.layout == policy.layout
    other = rollout_of(again)
    assert torch.equal(found.trajectories.old_log_prob, other.trajectories.old_log_prob)
    assert found.samples[0].image.tobytes() == other.samples[0].image.tobytes()
    fresh = JanusPolicy(janus_parts())
    fresh.load_export(tmp_path)
    assert torch.equal(rollout_of(fresh).trajectories.old_log_prob, found.trajectories.old_log_prob)


def test_a_published_folder_gets_its_layout(tmp_path):
    parts = janus_parts()
    folder = save_janus(parts, tmp_path / "model")
    with pytest.raises(ModelError, match=r"janus.write_layout makes the file"):
        JanusPolicy(folder)
    layout = write_layout(folder)
    assert read_layout(folder) == layout
    assert layout == parts.layout.model_copy(update={"prompt_format": PROMPT_FORMAT})
    assert (layout.cells, layout.num_codes) == (CELLS, CODES)
    assert JanusPolicy(folder).layout == layout
    other = tmp_path / "other"
    save_janus(Parts(parts.model, _without_markers(), layout, None), other)
    with pytest.raises(ModelError, match="has no token <begin_of_image>"):
        write_layout(other)


def _without_markers():
    from mmgrpo.playground.tokenizer import build_tokenizer

    return build_tokenizer()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": [3, 2]}, r"says grid \[3, 2\], and the model has \[2, 2\]"),
        ({"num_codes": 9}, "says num_codes 9, and the model has 11"),
        ({"code_offset": 280}, "says code_offset 280, and the model has"),
    ],
)
def test_a_layout_that_is_not_the_model_s_is_refused(change, message):
    parts = janus_parts()
    layout = parts.layout.model_copy(update=change)
    with pytest.raises(ModelError, match=message):
        JanusPolicy(Parts(parts.model, parts.tokenizer, layout, None))


def test_it_cannot_be_asked_about_its_pictures(policy):
    with pytest.raises(ConfigError, match="reads pictures through another encoder"):
        ImageTokenEngine(policy, ask_questions=True)
