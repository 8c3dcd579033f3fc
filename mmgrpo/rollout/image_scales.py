"""The engine for next-scale image generators: one network call for all codes of a scale.

Shapes: B rows of K scales of n_k codes, N in all; V codes to choose from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import ConfigError
from mmgrpo.protocols import Cost, Prompt, Rollout, Sample
from mmgrpo.rollout.rows import lay_out
from mmgrpo.rollout.sampling import draw_uniforms, filter_logits, sample_inverse_cdf


class ScaleGenerator(Protocol):
    """What the engine asks of a policy."""

    forwards: int

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    @property
    def lengths(self) -> list[int]:
        """Codes of each scale."""
        ...

    def encode(self, prompts: Sequence[Prompt]) -> Any:
        """Return P prompts as tokens."""
        ...

    def logits(self, prompts: Any, prompt_row: Tensor, codes: Tensor) -> Tensor:
        """Return the logits of the scales of ``codes [B, m]`` and of the next."""
        ...

    def log_distribution(self, logits: Tensor, temperature: float) -> Tensor:
        """Return ``[..., V]`` float32 log-probabilities."""
        ...

    def scale_of(self, rows: int) -> Tensor:
        """Return ``[rows, N]``: the scale of each code."""
        ...

    def payload(self, prompts: Any, prompt_row: Tensor, codes: Tensor, temperature: float) -> Any:
        """Bind codes to their prompts."""
        ...

    def draw(self, codes: Tensor) -> list[Image]:
        """Return the pictures of ``codes [B, N]``."""
        ...


class ImageScalesEngine:
    """Samples pictures scale by scale in this process; ``segment`` is the scale of a decision.

    Sample g of prompt p has its own random stream, named by (seed, p.index, g).

    Args:
        policy: what to sample from.
        temperature: of the softmax; 0 takes the likeliest code.

    Raises:
        ConfigError: a negative temperature.
    """

    def __init__(self, policy: ScaleGenerator, *, temperature: float = 1.0) -> None:
        if temperature < 0:
            raise ConfigError(f"temperature must be at least 0; got {temperature}.")
        self.policy = policy
        self.room = sum(policy.lengths)
        self._temperature = temperature

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        seed: int,
        version: int = 0,
        iteration: int = 0,
    ) -> Rollout:
        """Draw ``group_size`` pictures per prompt, in K network calls.

        Args:
            prompts: prompts with distinct indices.
            group_size: pictures per prompt.
            seed: names the rollout.
            version: of the weights.
            iteration: not used.
        """
        del iteration
        before, device = self.policy.forwards, self.policy.device
        encoded = self.policy.encode(prompts)
        rows = lay_out(prompts, group_size=group_size, strata=1, seed=seed, device=device)
        streams = [(prompt, member) for _, prompt, member in rows.names]
        uniforms = draw_uniforms(seed, streams, self.room).to(device)
        codes = torch.zeros(len(uniforms), 0, dtype=torch.int64, device=device)
        log_prob = torch.zeros(len(uniforms), 0, device=device)
        for length in self.policy.lengths:
            logits = self.policy.logits(encoded, rows.prompt_row, codes)[:, -length:]
            place = slice(codes.shape[1], codes.shape[1] + length)
            chosen, found = self._sample(logits, uniforms[:, place])
            codes = torch.cat([codes, chosen], dim=1)
            log_prob = torch.cat([log_prob, found], dim=1)
        trajectories = Trajectories(
            group=torch.tensor([prompt.index for prompt in rows.prompts], device=device),
            mask=torch.ones_like(codes, dtype=torch.bool),
            old_log_prob=log_prob,
            segment=self.policy.scale_of(len(codes)),
            version=torch.full_like(rows.prompt_row, version),
            payload=self.policy.payload(encoded, rows.prompt_row, codes, self._temperature or 1.0),
        )
        pairs = zip(rows.prompts, self.policy.draw(codes), strict=True)
        samples = [Sample(prompt, image=image, length=self.room) for prompt, image in pairs]
        cost = Cost(self.policy.forwards - before, decisions=codes.numel())
        return Rollout(trajectories, samples, cost)

    def _sample(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Codes ``[B, n]`` and their log-probabilities, from ``[B, n, V]`` logits."""
        log_p = self.policy.log_distribution(logits, self._temperature or 1.0)
        flat = log_p.flatten(0, 1)
        weights = filter_logits(flat, temperature=0) if self._temperature == 0 else flat
        chosen = sample_inverse_cdf(weights.exp(), uniforms.flatten()).view_as(uniforms)
        return chosen, log_p.gather(-1, chosen[..., None]).squeeze(-1)
