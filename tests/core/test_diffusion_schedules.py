"""Schedules: worked numbers, shape, and agreement with the diffusers scheduler."""

from __future__ import annotations

import math

import pytest
import torch

from mmgrpo.core.diffusion import dynamic_shift, from_scheduler_config, linear_shift, sd3_shift

NUMBERS = 1e-6


def test_worked_linear_shift():
    expected = [
        1, 0.964286, 0.923077, 0.875, 0.818182, 0.75, 0.666667, 0.5625, 0.428571, 0.25, 0
    ]  # fmt: skip
    torch.testing.assert_close(
        linear_shift(10, shift=3.0), torch.tensor(expected), rtol=0, atol=NUMBERS
    )


def test_worked_sd3_shift():
    expected = [
        1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876, 0.278049,
        0.008929, 0,
    ]  # fmt: skip
    torch.testing.assert_close(sd3_shift(10), torch.tensor(expected), rtol=0, atol=NUMBERS)


def test_dynamic_shift_by_its_formula():
    for tokens, mu in ((256, 0.5), (4096, 1.15), (2176, 0.825)):
        u = torch.arange(8, 0, -1) / 8
        expected = math.exp(mu) / (math.exp(mu) + 1 / u - 1)
        found = dynamic_shift(8, num_tokens=tokens)
        torch.testing.assert_close(found[:-1], expected, rtol=0, atol=NUMBERS)


@pytest.mark.parametrize("count", [1, 2, 10, 50])
@pytest.mark.parametrize(
    "make", [linear_shift, sd3_shift, lambda n: dynamic_shift(n, num_tokens=64)]
)
def test_a_schedule_falls_from_one_to_zero_in_float32(make, count):
    sigmas = make(count)
    assert sigmas.dtype == torch.float32
    assert sigmas.shape == (count + 1,)
    assert sigmas[0] == pytest.approx(1.0, abs=NUMBERS)
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


CONFIGS = [
    {"shift": 3.0},
    {"shift": 1.0},
    {"shift": 1.7, "num_train_timesteps": 500},
    {"use_dynamic_shifting": True, "shift": 3.0},
    {"use_dynamic_shifting": True, "base_shift": 0.3, "max_shift": 2.0, "max_image_seq_len": 1024},
    {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    {"use_dynamic_shifting": True, "shift_terminal": 0.02},
    {"shift": 3.0, "shift_terminal": 0.1},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("count", [4, 28])
def test_agreement_with_the_diffusers_scheduler(config, uniform, count):
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_flow_match_euler_discrete")
    scheduler = scheduling.FlowMatchEulerDiscreteScheduler(**config)
    tokens, full = 1500, scheduler.config
    mu = full.base_shift + (full.max_shift - full.base_shift) * (
        (tokens - full.base_image_seq_len) / (full.max_image_seq_len - full.base_image_seq_len)
    )
    grid = [1 - i / count for i in range(count)] if uniform else None
    scheduler.set_timesteps(
        None if uniform else count, sigmas=grid, mu=mu if full.use_dynamic_shifting else None
    )
    found = from_scheduler_config(full, count, num_tokens=tokens, uniform=uniform)
    torch.testing.assert_close(found, scheduler.sigmas, rtol=0, atol=NUMBERS)


def test_what_is_not_supported_is_named():
    with pytest.raises(ValueError, match="use_karras_sigmas"):
        from_scheduler_config({"use_karras_sigmas": True}, 4, uniform=False)
    with pytest.raises(ValueError, match="num_tokens is needed"):
        from_scheduler_config({"use_dynamic_shifting": True}, 4, uniform=True)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        linear_shift(0)
