"""The gradient of a plain output head that is written down, against the recorded one."""

from functools import partial

import pytest
import torch
from fixtures_tokens import tiny_text
from torch import nn

from mmgrpo.policies import linear_head, products
from mmgrpo.policies.autoregressive import AutoregressivePolicy
from mmgrpo.policies.linear_head import logit_gradient, read_linear, tile_reader
from mmgrpo.policies.token_logits import entropy, read_hidden, read_tokens, unchanged

N, D, V = 11, 6, 23


@pytest.fixture
def given():
    torch.manual_seed(0)
    temperature = torch.linspace(0.5, 1.5, N)
    temperature[:4] = 1.0
    return {
        "hidden": torch.randn(N, D, requires_grad=True),
        "weight": torch.randn(V, D, requires_grad=True),
        "bias": torch.randn(V, requires_grad=True),
        "ids": torch.randint(0, 20, (N,)),
        "temperature": temperature,
        "forbidden": torch.tensor([21, 22]),
    }


def compare(given, rows, *, log_prob=1.0, entropies=1.0, leaves=("hidden", "weight", "bias")):
    """Values and gradients in tiles, against those of all logits, recorded in float64."""
    scale = torch.linspace(-1.0, 2.0, N)

    def both(read, values):
        reading = read(values)
        loss = log_prob * (reading.log_prob * scale).sum()
        loss = loss + entropies * (reading.entropy * scale.flip(0)).sum()
        grads = torch.autograd.grad(loss, [values[name] for name in leaves])
        return [reading.log_prob, reading.entropy, *grads]

    def whole(values):
        logits = values["hidden"] @ values["weight"].T + values["bias"]
        scaled = logits / values["temperature"][:, None]
        log_p = scaled.index_fill(-1, values["forbidden"], -torch.inf).log_softmax(-1)
        chosen = log_p.gather(-1, values["ids"][:, None]).squeeze(-1)
        return linear_head.TokenReading(chosen, entropy(log_p))

    found = both(lambda values: read_linear(**values, rows=rows, with_entropy=True), given)
    exact = {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if value.is_floating_point()
        else value
        for name, value in given.items()
    }
    for mine, theirs in zip(found, both(whole, exact), strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("worth", [1, 10**9], ids=["onednn", "pytorch"])
@pytest.mark.parametrize("kept", [0, 5 * V, 10**6], ids=["none", "some", "all"])
@pytest.mark.parametrize("rows", [1, 3, 4, 100])
def test_tiles_kept_or_computed_again_give_the_recorded_gradient(
    monkeypatch, given, rows, kept, worth
):
    monkeypatch.setattr(linear_head, "KEPT_ELEMENTS", kept)
    monkeypatch.setattr(products, "WORTH", worth)
    compare(given, rows)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_each_result_by_itself(given, weights):
    compare(given, 4, log_prob=weights[0], entropies=weights[1])


@pytest.mark.parametrize("leaf", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(given, leaf):
    for name in ("hidden", "weight", "bias"):
        given[name].requires_grad_(name == leaf)
    compare(given, 4, leaves=[leaf])


def test_without_entropies_and_twice(given):
    read = partial(read_linear, **given, rows=4)
    reading = read(with_entropy=False)
    assert reading.entropy is None
    first, second = (
        torch.autograd.grad(reading.log_prob.sum(), given["weight"], retain_graph=True)[0]
        for _ in range(2)
    )
    assert torch.equal(first, second)
    with torch.no_grad():
        assert torch.equal(read(with_entropy=False).log_prob, reading.log_prob)


def test_the_gradient_of_the_logits_sums_to_zero():
    """A constant added to all logits changes nothing."""
    log_p = torch.randn(5, 9).log_softmax(-1)
    grad, of_entropy = torch.randn(5, 1), torch.randn(5, 1)
    ids = torch.randint(0, 9, (5, 1))
    change = logit_gradient(log_p, ids, grad, of_entropy, entropy(log_p)[:, None])
    torch.testing.assert_close(change.sum(-1), torch.zeros(5), atol=1e-5, rtol=0)


def test_which_heads_are_read_so():
    head = nn.Linear(D, V, bias=False)
    head.register_forward_pre_hook(lambda *_: None)
    read = partial(tile_reader, head, size=V, rows=None)
    assert read(unchanged).func is read_linear
    assert read(lambda logits: logits / 2).func is read_hidden
    head.register_forward_hook(lambda *_: None)  # somebody else's
    assert read(unchanged).func is read_hidden
    kinds = {
        family: AutoregressivePolicy(tiny_text(family))._tile_reader().func
        for family in ("qwen2", "gemma2", "granite")
    }
    assert kinds == {"qwen2": read_linear, "gemma2": read_hidden, "granite": read_hidden}
    lora = {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "lm_head"]}
    assert AutoregressivePolicy(tiny_text(), lora=lora)._tile_reader().func is read_hidden


@pytest.mark.parametrize(
    ("size", "rows"), [(512, 8192), (2**14, 256), (2**15, 128), (151936, 110), (2**25, 1)]
)
def test_tiles_by_the_size_of_the_vocabulary(size, rows):
    head = nn.Linear(1, 1)
    assert tile_reader(head, unchanged, size=size, rows=None).keywords["rows"] == rows
    assert tile_reader(head, unchanged, size=size, rows=7).keywords["rows"] == 7


def test_entropy_counts_impossible_tokens_as_nothing():
    log_p = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log()
    expected = torch.tensor([1.5]) * torch.tensor(2.0).log()
    torch.testing.assert_close(entropy(log_p), expected)
    torch.testing.assert_close(entropy(log_p, log_p.exp()), expected)


def test_logits_already_there_are_read_the_same(given):
    logits = given["hidden"] @ given["weight"].T + given["bias"]
    plain = read_tokens(
        logits, given["ids"], given["temperature"], given["forbidden"], with_entropy=True
    )
    tiles = read_linear(**given, rows=3, with_entropy=True)
    torch.testing.assert_close(tiles.log_prob, plain.log_prob)
    torch.testing.assert_close(tiles.entropy, plain.entropy)
