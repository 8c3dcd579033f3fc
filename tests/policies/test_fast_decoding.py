"""Decoding with shared prompts: the numbers of transformers' own steps, and when it is used."""

import pytest
import torch
from fixtures_tokens import COMMON, image_prompts, text_prompts, tiny_text, tiny_vision
from torch.nn.functional import scaled_dot_product_attention

from mmgrpo.playground.tokenizer import build_tokenizer
from mmgrpo.policies.autoregressive import AutoregressivePolicy
from mmgrpo.policies.multimodal import VisionLanguagePolicy
from mmgrpo.policies.prefix_cache import PrefixCache
from mmgrpo.rollout.autoregressive import AutoregressiveEngine

EOS = 256
KNOWN = {
    "qwen2": {},
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 16},
}
UNKNOWN = {
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0},
    "llama": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
}


def tiny(family, **changes):
    """A random model of a family, whose rows end at different lengths."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = build_tokenizer()
    options = {"vocab_size": len(tokenizer), "eos_token_id": EOS, "bos_token_id": None}
    config = AutoConfig.for_model(family, **{**COMMON, **options, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.dim() > 1 else parameter.add_(
                0.1 * torch.randn_like(parameter)
            )
    return model, tokenizer


def eager_to_end(policy, by=3.0):
    policy.model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: output.index_add(
            -1, torch.tensor([EOS]), output.new_full((*output.shape[:-1], 1), by)
        )
    )
    return policy


def sample(policy, prompts, *, group_size=6, **options):
    engine = AutoregressiveEngine(policy, max_new_tokens=40, **options)
    return engine.generate(prompts, group_size=group_size, seed=3)


def compare(policy, prompts, **options):
    """The rollout of the fast steps, after comparing it with those of transformers."""
    assert policy._fast
    found = sample(policy, prompts, **options)
    policy._fast = False
    plain = sample(policy, prompts, **options)
    policy._fast = True
    assert [s.completion for s in found.samples] == [s.completion for s in plain.samples]
    assert found.cost.forwards == plain.cost.forwards
    ours, theirs = found.trajectories, plain.trajectories
    torch.testing.assert_close(ours.old_log_prob, theirs.old_log_prob, atol=2e-5, rtol=0)
    torch.testing.assert_close(ours.entropy, theirs.entropy, atol=2e-5, rtol=0)
    again = policy.evaluate_plain(ours).log_prob
    torch.testing.assert_close(ours.old_log_prob, again, atol=2e-5, rtol=0)
    return found


@pytest.mark.parametrize("options", [{}, {"max_rows": 5}], ids=["all", "refilled"])
@pytest.mark.parametrize("family", KNOWN)
def test_samples_and_log_probs_are_those_of_the_models_own_steps(family, options):
    policy = eager_to_end(AutoregressivePolicy(tiny(family, **KNOWN[family])), by=2.0)
    found = compare(policy, text_prompts(), **options)
    lengths = found.trajectories.lengths
    assert len(set(lengths.tolist())) > 3
    assert int(lengths.max()) > 34  # more than the rotations that are computed at once


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_so_they_are_behind_images(family):
    compare(VisionLanguagePolicy(tiny_vision(family)), image_prompts(), group_size=3)


def test_so_they_are_with_an_adapter_that_has_learned():
    policy = AutoregressivePolicy(tiny_text(), lora={"rank": 4, "alpha": 8.0})
    with torch.no_grad():
        for name, parameter in policy.network.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter))
    compare(policy, text_prompts())


def test_weights_that_change_between_rollouts_are_seen():
    policy = AutoregressivePolicy(tiny_text())
    first = compare(policy, text_prompts())
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.data.mul_(1.1)  # as an optimiser or another policy's weights would
    assert sample(policy, text_prompts()).samples != first.samples
    compare(policy, text_prompts())


@pytest.mark.parametrize("limits", [{"PACKED": 1}, {"JOINED": 1}, {"PACKED": 1, "JOINED": 1}])
def test_large_weights_are_computed_in_another_order_or_one_by_one(monkeypatch, limits):
    for name, weights in limits.items():
        monkeypatch.setattr(f"mmgrpo.policies.prefix_decoding.{name}", weights)
    compare(AutoregressivePolicy(tiny("qwen2")), text_prompts())


@pytest.mark.parametrize("family", UNKNOWN)
def test_layers_that_do_something_else_keep_their_own_steps(family):
    policy = AutoregressivePolicy(tiny(family, **UNKNOWN[family]))
    assert not policy._fast
    found = sample(policy, text_prompts()).trajectories
    torch.testing.assert_close(
        found.old_log_prob, policy.evaluate_plain(found).log_prob, atol=2e-5, rtol=0
    )


def test_a_step_that_would_be_wrong_is_found_out(monkeypatch):
    monkeypatch.setattr("mmgrpo.policies.prefix_decoding.AHEAD", 0)
    assert not AutoregressivePolicy(tiny_text())._fast
    monkeypatch.undo()
    right = PrefixCache.attend
    wrong = lambda cache, layer, queries, pair: right(cache, layer, 2 * queries, pair)  # noqa: E731
    monkeypatch.setattr(PrefixCache, "attend", wrong)
    assert not AutoregressivePolicy(tiny_text())._fast


def test_it_can_be_switched_off():
    policy = AutoregressivePolicy(tiny_text(), fast_decoding=False)
    assert not policy._fast
    assert AutoregressivePolicy(tiny_text())._fast


def test_prompts_can_be_evaluated_once_per_completion():
    shared, apart = (AutoregressivePolicy(tiny_text(), share_prompts=s) for s in (True, False))
    assert (shared._shares_prompts, apart._shares_prompts) == (True, False)
    found = sample(shared, text_prompts()).trajectories
    torch.testing.assert_close(
        apart.evaluate(found).log_prob, shared.evaluate(found).log_prob, atol=2e-5, rtol=0
    )


def test_half_precision_stays_within_its_tolerance():
    policy = AutoregressivePolicy(tiny_text(), dtype="bfloat16")
    assert policy._fast
    found = sample(policy, text_prompts()).trajectories
    again = policy.evaluate_plain(found).log_prob
    assert (found.old_log_prob - again).abs().max() < policy.ratio_tolerance["bfloat16"]


@pytest.mark.parametrize("copied", [0, 1000, 2**18], ids=["shared", "some copied", "copied"])
def test_rows_that_come_and_go_attend_to_their_own_tokens(monkeypatch, copied):
    """Against plain attention over each row's tokens, kept in lists."""
    monkeypatch.setattr("mmgrpo.policies.prefix_cache.COPIED", copied)
    monkeypatch.setattr("mmgrpo.policies.prefix_cache.MIN_ROOM", 8)  # room is made several times
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=generator)

    def prompts(lengths):
        width = max(lengths)
        mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
        pair = rand(len(lengths), 2, width, 8), rand(len(lengths), 2, width, 8)
        rows = [[x[i, :, width - n :] for x in pair] for i, n in enumerate(lengths)]
        return PrefixCache([pair], mask), rows

    def step(cache, rows):
        queries, keys, values = rand(len(rows), 4, 8), rand(len(rows), 2, 8), rand(len(rows), 2, 8)
        cache.open()
        found = cache.attend(0, queries, torch.stack([keys, values], dim=1))
        for i, row in enumerate(rows):
            row[0] = torch.cat([row[0], keys[i, :, None]], dim=1)
            row[1] = torch.cat([row[1], values[i, :, None]], dim=1)
            plain = scaled_dot_product_attention(
                queries[i].view(2, 2, 8), row[0], row[1], scale=1.0
            )
            torch.testing.assert_close(found[i], plain.flatten(), atol=1e-5, rtol=1e-5)

    def select(cache, rows, kept):
        cache.select(torch.tensor(kept))
        return [list(rows[i]) for i in kept]

    cache, rows = prompts([5, 3, 7])
    rows = select(cache, rows, [0, 0, 1, 2, 2, 2])
    for _ in range(20):
        step(cache, rows)
    rows = select(cache, rows, [5, 1, 2])  # ragged groups in another order
    step(cache, rows)
    other, others = prompts([2, 9])
    others = select(other, others, [1, 1, 0])
    cache.join(other)
    rows += others
    for _ in range(18):
        step(cache, rows)
    assert cache._mask.shape == (5, {0: 9, 1000: 7}.get(copied, 0))
    rows = select(cache, rows, [1, 3, 4])  # of prompts with 5 and 9 tokens
    step(cache, rows)
    rows = select(cache, rows, [1, 2])  # of one prompt, which is no longer padded
    assert cache._mask.shape[0] == 1
    assert cache._mask.all()
    step(cache, rows)
