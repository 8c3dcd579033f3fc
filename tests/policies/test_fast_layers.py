"""Layers that compute the same in other steps: against PyTorch's own, and whole models."""

import copy

import pytest
import torch
from fixtures_tokens import (
    image_prompts,
    relative_error,
    text_prompts,
    tiny_text,
    tiny_vision,
    trajectories_of,
)
from test_fast_decoding import KNOWN, tiny
from torch import nn
from torch.nn.functional import linear

from mmgrpo.policies import products
from mmgrpo.policies.adapters import trainable_parameters
from mmgrpo.policies.autoregressive import AutoregressivePolicy
from mmgrpo.policies.fast_layers import inverse_length, use_fast_layers
from mmgrpo.policies.multimodal import VisionLanguagePolicy
from mmgrpo.policies.products import multiply, packed, product, transposed_product
from mmgrpo.protocols import Request

ROUNDING = 1e-5
ROWS = [0, 0, 0, 1, 2, 2]


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(products, "WORTH", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def replaced(network):
    return {type(m).__name__ for m in network.modules() if "forward" in vars(m)}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 5), (3, 7, 5), (1, 5)])
def test_a_product_and_its_gradients(shape, bias):
    given = [torch.randn(shape), torch.randn(9, 5), *([torch.randn(9)] if bias else [])]
    upstream = torch.randn(*shape[:-1], 9)

    def found(compute, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in given]
        out = compute(*leaves)
        return [out.detach(), *torch.autograd.grad((out * upstream).sum(), leaves)]

    exact = found(linear, torch.float64)
    for mine, theirs in zip(found(product, torch.float32), exact, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs, atol=1e-5, rtol=1e-5)


def test_products_in_any_order_of_memory():
    a, b = torch.randn(6, 4), torch.randn(6, 9)
    torch.testing.assert_close(transposed_product(a, b), a.T @ b)
    torch.testing.assert_close(transposed_product(b, a), b.T @ a)
    weight = torch.randn(4, 9)
    torch.testing.assert_close(multiply(b, weight), b @ weight.T)
    torch.testing.assert_close(multiply(b, packed(weight)), b @ weight.T)
    torch.testing.assert_close(multiply(a, weight.T), a @ weight)


def test_what_it_is_not_made_for_stays_with_pytorch(monkeypatch):
    monkeypatch.setattr(products, "multiply", None)
    for dtype in (torch.float64, torch.bfloat16):
        x, weight = torch.randn(3, 5, dtype=dtype), torch.randn(4, 5, dtype=dtype)
        assert torch.equal(product(x, weight), linear(x, weight))
    monkeypatch.setattr(products, "WORTH", 3 * 5 * 4 + 1)
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    assert torch.equal(product(x, weight), linear(x, weight))


def gradients(policy, trajectories):
    found = policy.evaluate(trajectories, Request(entropy=True))
    weight = torch.linspace(0.5, 2.0, found.log_prob.numel()).view_as(found.log_prob)
    loss = (found.log_prob * weight).sum() + 0.3 * (found.entropy * weight).sum()
    trained = list(trainable_parameters(policy.network).values())
    return found, torch.autograd.grad(loss, trained)


MODELS = {
    **{family: (lambda f=family: tiny(f, **KNOWN[f]), {}) for family in KNOWN},
    **{family: (lambda f=family: tiny_text(f), {}) for family in ("gpt2", "gemma2", "granite")},
    "an adapter": (
        tiny_text,
        {"lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "up_proj", "down_proj"]}},
    ),
    "checkpointing": (tiny_text, {"gradient_checkpointing": True}),
    "vision": (tiny_vision, {}),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_keeps_its_values_and_gradients(case):
    build, options = MODELS[case]
    kind = VisionLanguagePolicy if case == "vision" else AutoregressivePolicy
    fast, plain = (kind(build(), fast_layers=on, **options) for on in (True, False))
    for policy in (fast, plain):  # a fresh adapter changes nothing, and would hide mistakes
        torch.manual_seed(1)
        with torch.no_grad():
            for name, value in trainable_parameters(policy.network).items():
                value.add_(0.2 * torch.randn_like(value) if "lora" in name else 0)
    assert "Linear" in replaced(fast.network)
    assert not replaced(plain.network)
    prompts = image_prompts() if case == "vision" else text_prompts()
    trajectories = trajectories_of(plain, prompts, ROWS, temperature=0.7)
    found, grads = gradients(fast, trajectories)
    expected, own = gradients(plain, trajectories)
    torch.testing.assert_close(found.log_prob, expected.log_prob, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(found.entropy, expected.entropy, atol=ROUNDING, rtol=0)
    assert relative_error(grads, own) < ROUNDING


KINDS = {
    "qwen2": {"Qwen2RMSNorm", "Qwen2MLP"},
    "llama": {"LlamaRMSNorm", "LlamaMLP"},
    "mistral": {"MistralRMSNorm", "MistralMLP"},
    "qwen3": {"Qwen3RMSNorm", "Qwen3MLP"},
}


@pytest.mark.parametrize("family", KINDS)
def test_known_kinds_of_layers_are_replaced(family):
    model, _ = tiny(family, **KNOWN[family])
    use_fast_layers(model)
    assert replaced(model) == {"Linear"} | KINDS[family]


def test_layers_that_compute_something_else_stay():
    class Norm(nn.Module):
        variance_epsilon = 1e-6

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x):
            scale = inverse_length(x, torch.tensor(self.variance_epsilon))
            return x * scale * self.weight**self.power

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))
            self.act_fn = nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.scale * self.up_proj(x))

    class Two(Norm):
        def forward(self, x, scale):
            return x * scale

    kinds = [
        type("Same", (Norm,), {"power": 1}), type("Other", (Norm,), {"power": 2}),
        type("Sum", (Gated,), {"scale": 1}), Two,
    ]  # fmt: skip
    network = nn.ModuleList(kind() for kind in kinds)
    use_fast_layers(network)
    assert replaced(network) == {"Linear", "Same"}


def test_half_precision_takes_a_layers_own_way():
    model, _ = tiny_text()
    use_fast_layers(model)
    model.to(torch.bfloat16)
    ids = torch.arange(6)[None]
    found = model(input_ids=ids).logits
    for module in model.modules():
        vars(module).pop("forward", None)
    assert torch.equal(found, model(input_ids=ids).logits)


def test_a_copy_of_a_network_computes_with_its_own_weights():
    network = nn.Sequential(nn.Linear(4, 4))
    use_fast_layers(network)
    other = copy.deepcopy(network)
    with torch.no_grad():
        other[0].weight.zero_()
        other[0].bias.zero_()
    x = torch.randn(2, 4)
    assert not other(x).any()
    assert network(x).any()


def test_where_there_is_a_gpu_nothing_is_replaced(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    network = nn.Sequential(nn.Linear(4, 4))
    use_fast_layers(network)
    assert not replaced(network)
