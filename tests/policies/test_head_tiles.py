"""The output head in tiles: the plain path's values and gradients, and never all the logits."""

import pytest
import torch
from fixtures_tokens import (
    TEXT_FAMILIES,
    gradients,
    image_prompts,
    relative_error,
    text_prompts,
    tiny_text,
    tiny_vision,
    trajectories_of,
    with_moved_adapter,
)
from torch.utils._python_dispatch import TorchDispatchMode

from mmgrpo.policies.autoregressive import AutoregressivePolicy
from mmgrpo.policies.multimodal import VisionLanguagePolicy
from mmgrpo.policies.token_evaluator import TokenEvaluator
from mmgrpo.policies.token_logits import finish_logits, read_hidden, read_tokens
from mmgrpo.protocols import Request

ROWS = [0, 0, 0, 1, 2, 2]
LORA = {"rank": 4, "alpha": 8.0}
HEAD_LORA = {**LORA, "targets": ["q_proj", "lm_head"]}
ROUNDING = 1e-5


def make_policy(family="qwen2", *, lora=None, kind=AutoregressivePolicy, **options):
    changes = options.pop("changes", {})
    model = tiny_vision() if kind is VisionLanguagePolicy else tiny_text(family, **changes)
    return with_moved_adapter(kind(model, lora=lora, **options))


CASES = {
    **{family: {"family": family} for family in TEXT_FAMILIES},
    "lora": {"lora": LORA},
    "an adapter on the head": {"lora": HEAD_LORA},
    "tied embeddings": {"changes": {"tie_word_embeddings": True}},
    "checkpointing": {"gradient_checkpointing": True},
    "vision": {"kind": VisionLanguagePolicy},
}


@pytest.mark.parametrize("case", CASES)
def test_tiles_give_the_values_and_gradients_of_the_plain_path(case):
    policy = make_policy(**CASES[case], head_tile_rows=5)
    prompts = image_prompts() if policy.modality == "vision" else text_prompts()
    trajectories = trajectories_of(policy, prompts, ROWS, temperature=0.7)
    assert policy._tiled
    found = policy.evaluate(trajectories, Request(entropy=True))
    plain = policy.evaluate_plain(trajectories, Request(entropy=True))
    torch.testing.assert_close(found.log_prob, plain.log_prob, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(found.entropy, plain.entropy, atol=ROUNDING, rtol=0)
    assert relative_error(gradients(policy, found), gradients(policy, plain)) < ROUNDING


class LargestTensor(TorchDispatchMode):
    """Remembers the most numbers that any tensor with a dimension of V has held."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor) and value.dim() > 1:
                rows = value.numel() // self.vocabulary
                self.rows = max(self.rows, rows if self.vocabulary in value.shape else 0)
        return out


@pytest.mark.parametrize(("tile", "most"), [(40, 40), (0, 6 * 61)])
def test_there_are_never_more_logits_than_a_tile_has(tile, most):
    """Also in the backward pass, of V x D weights too: D is 32, below the tile."""
    policy = make_policy(head_tile_rows=tile, changes={"vocab_size": 997})
    trajectories = trajectories_of(policy, text_prompts(), [0, 0, 1, 1, 2, 2], length=61)
    trajectories = trajectories.replace(mask=torch.ones_like(trajectories.mask))
    with LargestTensor(997) as seen:
        gradients(policy, policy.evaluate(trajectories, Request(entropy=True)))
    assert seen.rows == most


def test_a_model_that_does_more_to_its_logits_does_without_tiles():
    model, tokenizer = tiny_text()
    forward = model.forward

    def shifted(*args, **kwargs):
        output = forward(*args, **kwargs)
        size = output.logits.shape[-1]
        output.logits = output.logits + torch.linspace(0, 1, size)
        return output

    shifted.__signature__ = __import__("inspect").signature(forward)
    model.forward = shifted
    policy = AutoregressivePolicy((model, tokenizer), head_tile_rows=5)
    assert policy._selective
    assert not policy._tiled
    trajectories = trajectories_of(policy, text_prompts(), ROWS)
    torch.testing.assert_close(
        policy.evaluate(trajectories).log_prob,
        policy.evaluate_plain(trajectories).log_prob,
        atol=ROUNDING,
        rtol=0,
    )


def test_zero_switches_tiles_off():
    assert not make_policy(head_tile_rows=0)._tiled
    assert isinstance(make_policy(), TokenEvaluator)
    assert make_policy()._tiled


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_any_tile_size_reads_the_same(rows):
    torch.manual_seed(0)
    weight = torch.randn(23, 6, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    ids, temperature = torch.randint(0, 20, (7,)), torch.linspace(0.5, 1.5, 7)
    forbidden, scale = torch.tensor([21, 22]), torch.randn(7)

    def both(reading):
        loss = (reading.log_prob * scale).sum() + (reading.entropy * scale.flip(0)).sum()
        return [reading.log_prob, *torch.autograd.grad(loss, [weight, hidden])]

    whole = both(read_tokens(hidden @ weight.T, ids, temperature, forbidden, with_entropy=True))
    tiles = both(
        read_hidden(
            hidden, ids, temperature, forbidden,
            head=lambda h: h @ weight.T, rows=rows, with_entropy=True,
        )
    )  # fmt: skip
    for found, expected in zip(tiles, whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_models_do_after_the_head():
    class Config:
        logit_scale, logits_scaling, final_logit_softcapping = 0.5, 4.0, 2.0

    logits = torch.tensor([8.0, -1.0])
    torch.testing.assert_close(finish_logits(Config())(logits), 2 * torch.tanh(logits / 16))
    assert finish_logits(object())(logits) is logits
