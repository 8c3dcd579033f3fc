"""The optimiser against a plain AdamW and its own definition; schedules in closed form."""

import math

import pytest
import torch
from torch import nn

from mmgrpo.trainer.optim import Optimizer, learning_rate_at


def parameters(dtype, seed=0):
    torch.manual_seed(seed)
    return {
        "a": nn.Parameter(torch.randn(5, 3).to(dtype)),
        "b": nn.Parameter(torch.randn(4).to(dtype)),
    }


def set_gradients(parameters, seed):
    torch.manual_seed(seed)
    for p in parameters.values():
        p.grad = torch.randn(p.shape).to(p.dtype)


def optimizer(parameters, **changes):
    return Optimizer(parameters, **{"betas": [0.9, 0.99], "weight_decay": 0.1, **changes})


def adamw(x, gradients, rates, *, betas, weight_decay, eps=1e-8):
    """AdamW written out, in float64."""
    x, m, v = x.double(), 0.0, 0.0
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = betas[0] * m + (1 - betas[0]) * g.double()
        v = betas[1] * v + (1 - betas[1]) * g.double() ** 2
        x = x - rate * weight_decay * x
        x = x - rate * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)) ** 0.5 + eps)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_adamw(dtype):
    params, rates, gradients = parameters(dtype), (0.1, 0.05, 0.2), []
    start = params["a"].detach().clone()
    optim = optimizer(params)
    for seed, rate in enumerate(rates):
        set_gradients(params, seed)
        gradients.append(params["a"].grad.clone())
        optim.step(rate)
        assert params["a"].grad is None
    expected = adamw(start, gradients, rates, betas=(0.9, 0.99), weight_decay=0.1)
    torch.testing.assert_close(
        optim.state_dict()["weight/a"].double(), expected, rtol=1e-5, atol=1e-6
    )
    assert torch.equal(params["a"], optim.state_dict()["weight/a"].to(dtype))


def test_bfloat16_weights_take_updates_below_their_own_precision():
    weight = nn.Parameter(torch.full((3,), 1.0, dtype=torch.bfloat16))
    optim = optimizer({"w": weight}, weight_decay=0.0)
    plain = nn.Parameter(torch.full((3,), 1.0, dtype=torch.bfloat16))
    naive = torch.optim.AdamW([plain], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        weight.grad, plain.grad = torch.ones_like(weight), torch.ones_like(plain)
        optim.step(1e-4)
        naive.step()
    assert plain.tolist() == [1.0, 1.0, 1.0]  # what this guards against
    torch.testing.assert_close(weight.float(), torch.full((3,), 0.99), rtol=0, atol=2**-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_it_goes_on_bit_for_bit(dtype):
    whole = parameters(dtype)
    first = optimizer(whole)
    for seed in range(3):
        set_gradients(whole, seed)
        first.step(0.1)
    saved = {name: value.clone() for name, value in first.state_dict().items()}
    resumed = parameters(dtype, seed=9)
    second = optimizer(resumed)
    second.load_state_dict(saved)
    for name in whole:
        assert torch.equal(whole[name], resumed[name])
    for params, optim in ((whole, first), (resumed, second)):
        for seed in (7, 8):
            set_gradients(params, seed)
            optim.step(0.05)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_parameter_without_a_gradient_stays():
    params = parameters(torch.float32)
    before = params["b"].detach().clone()
    optim = optimizer(params)
    params["a"].grad = torch.ones_like(params["a"])
    optim.step(0.1)
    assert torch.equal(params["b"], before)
    other = optimizer(parameters(torch.float32, seed=4))
    other.load_state_dict(optim.state_dict())
    assert torch.equal(other.parameters["b"], before)


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        ("constant", lambda p: 1.0),
        ("linear", lambda p: 1.0 - p),
        ("cosine", lambda p: (1 + math.cos(math.pi * p)) / 2),
    ],
)
def test_schedules(schedule, at):
    def rate(update):
        return learning_rate_at(update, base=2.0, schedule=schedule, warmup=4, total=24)

    assert [rate(n) for n in range(4)] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    for update in range(4, 25):
        assert rate(update) == pytest.approx(2.0 * at((update - 4) / 20), abs=1e-12)


def test_no_warmup_and_a_run_of_one_update():
    assert learning_rate_at(0, base=1.0, schedule="cosine", warmup=0, total=1) == 1.0
    assert learning_rate_at(0, base=1.0, schedule="linear", warmup=0, total=0) == 1.0
