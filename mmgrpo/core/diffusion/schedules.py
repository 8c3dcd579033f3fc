"""Noise-level schedules: float32 ``[N + 1]``, strictly decreasing from (about) 1 and ending at 0.

A run takes its steps from the stored schedule, never from integer timesteps: truncation would make
the replay differ from the rollout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor


def linear_shift(num_steps: int, *, shift: float = 3.0) -> Tensor:
    """Uniform grid, shifted towards noise: ``s u / (1 + (s - 1) u)``, u from 1 to 0.

    Used by DanceGRPO, MixGRPO and BranchGRPO (shift 3 for FLUX, 5 for HunyuanVideo).
    """
    return _finish(_shift(_uniform(num_steps), shift))


def sd3_shift(num_steps: int, *, shift: float = 3.0, num_train_timesteps: int = 1000) -> Tensor:
    """The grid of the Stable Diffusion 3 scheduler, which shifts twice.

    The table's smallest sigma is already shifted, then the grid from 1 to it is shifted again, so
    that the next-to-last sigma is tiny.
    """
    return _finish(_shift(_table_grid(num_steps, shift, num_train_timesteps), shift))


def dynamic_shift(
    num_steps: int,
    *,
    num_tokens: int,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_tokens: int = 256,
    max_tokens: int = 4096,
) -> Tensor:
    """Uniform grid with a shift that grows with the number of image tokens (FLUX).

    ``e^mu / (e^mu + 1/u - 1)``, mu linear in the tokens: base_shift at base_tokens, max_shift at
    max_tokens.
    """
    mu = _mu(num_tokens, base_shift, max_shift, base_tokens, max_tokens)
    return _finish(_exponential(_uniform(num_steps), mu))


def from_scheduler_config(
    config: Mapping[str, Any], num_steps: int, *, num_tokens: int | None = None, uniform: bool
) -> Tensor:
    """Return the schedule that a diffusers ``FlowMatchEulerDiscreteScheduler`` would use.

    Args:
        config: the scheduler's configuration.
        num_steps: number of denoising steps N.
        num_tokens: image tokens of the transformer; needed with ``use_dynamic_shifting``.
        uniform: True where the pipeline hands the scheduler ``linspace(1, 1/N, N)`` (FLUX), False
            where the scheduler makes its own grid (Stable Diffusion 3).

    Raises:
        ValueError: ``num_tokens`` is missing, or the configuration asks for Karras, exponential,
            beta, inverted or stochastic sigmas.
    """
    for key in _UNSUPPORTED:
        if config.get(key):
            raise ValueError(f"scheduler option {key} is not supported; expected it to be off.")
    dynamic = bool(config.get("use_dynamic_shifting", False))
    shift = 1.0 if dynamic else float(config.get("shift", 1.0))
    table = int(config.get("num_train_timesteps", 1000))
    grid = _uniform(num_steps) if uniform else _table_grid(num_steps, shift, table)
    sigmas = _dynamic(grid, config, num_tokens) if dynamic else _shift(grid, shift)
    terminal = config.get("shift_terminal")
    if terminal:
        sigmas = 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])
    return _finish(sigmas)


def from_multistep_config(
    config: Mapping[str, Any], num_steps: int, *, num_tokens: int | None = None, uniform: bool
) -> Tensor:
    """Return the schedule that a diffusers ``UniPCMultistepScheduler`` of a flow would use.

    Its own grid has N + 1 points from 1 to 1/T, of which the last is replaced by 0; Wan shifts it
    by 3 (480p) or 5 (720p).

    Args:
        config: the scheduler's configuration, with ``use_flow_sigmas``.
        num_steps: number of denoising steps N.
        num_tokens: not used.
        uniform: True where the pipeline hands the scheduler ``linspace(1, 1/N, N)``.

    Raises:
        ValueError: the configuration asks for sigmas that are no flow's, or for another spacing.
    """
    del num_tokens
    for key in (*_UNSUPPORTED, "use_dynamic_shifting", "shift_terminal"):
        if config.get(key):
            raise ValueError(f"scheduler option {key} is not supported; expected it to be off.")
    if not config.get("use_flow_sigmas"):
        raise ValueError("scheduler option use_flow_sigmas is off; expected it to be on.")
    table = int(config.get("num_train_timesteps", 1000))
    points = torch.linspace(1.0, 1 / table, num_steps + 1, dtype=torch.float64)[:-1]
    grid = _uniform(num_steps) if uniform else points
    return _finish(_shift(grid, float(config.get("flow_shift", 1.0))))


SCHEDULES: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "FlowMatchEulerDiscreteScheduler": from_scheduler_config,
        "UniPCMultistepScheduler": from_multistep_config,
    }
)
"""Class of a pipeline's scheduler -> ``(config, num_steps, *, num_tokens, uniform)``."""

_UNSUPPORTED = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)


def _dynamic(grid: Tensor, config: Mapping[str, Any], num_tokens: int | None) -> Tensor:
    if num_tokens is None:
        raise ValueError("the scheduler shifts dynamically: num_tokens is needed, got None.")
    mu = _mu(
        num_tokens,
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
    )
    return _TIME_SHIFTS[config.get("time_shift_type", "exponential")](grid, mu)


def _mu(tokens: int, low: float, high: float, low_tokens: int, high_tokens: int) -> float:
    return low + (high - low) * (tokens - low_tokens) / (high_tokens - low_tokens)


def _exponential(grid: Tensor, mu: float) -> Tensor:
    return _linear(grid, math.exp(mu))


def _linear(grid: Tensor, mu: float) -> Tensor:
    return mu / (mu + (1 / grid - 1))


_TIME_SHIFTS: Mapping[str, Callable[[Tensor, float], Tensor]] = MappingProxyType(
    {"exponential": _exponential, "linear": _linear}
)


def _uniform(num_steps: int) -> Tensor:
    """``[N]`` float64 from 1 to 1/N."""
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1; got {num_steps}.")
    return 1 - torch.arange(num_steps, dtype=torch.float64) / num_steps


def _table_grid(num_steps: int, shift: float, num_train_timesteps: int) -> Tensor:
    """``[N]`` float64 from 1 to the smallest sigma of the shifted training table."""
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1; got {num_steps}.")
    smallest = _shift(torch.tensor(1 / num_train_timesteps, dtype=torch.float64), shift).item()
    return torch.linspace(1.0, smallest, num_steps, dtype=torch.float64)


def _shift(grid: Tensor, shift: float) -> Tensor:
    return shift * grid / (1 + (shift - 1) * grid)


def _finish(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()
