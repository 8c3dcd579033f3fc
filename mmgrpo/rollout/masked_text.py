"""Writes responses by unmasking: all tokens hidden at first, a few filled in at each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mmgrpo.core.masked_diffusion import (
    MaskedRule,
    Views,
    elbo_views,
    path_views,
    reveal_order,
    site_views,
    step_plan,
)
from mmgrpo.core.seeding import mix_seed
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import ConfigError
from mmgrpo.protocols import Cost, Evaluation, Prompt, Rollout, Sample
from mmgrpo.rollout.sampling import draw_uniforms, filter_logits, sample_inverse_cdf

PATH = MaskedRule()


class MaskedModel(Protocol):
    """What the engine asks of a policy."""

    forwards: int
    mask_id: int
    eos_ids: tuple[int, ...]

    def encode(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> Any:
        """Return P prompts as tokens."""
        ...

    def states(self, prompts: Any, prompt_row: Tensor, responses: Tensor, keep: Tensor) -> Tensor:
        """Return the ``[M, V]`` logits at ``keep``."""
        ...

    def log_distribution(self, logits: Tensor, temperature: float) -> Tensor:
        """Return ``[M, V]`` float32 log-probabilities."""
        ...

    def masked_payload(
        self,
        prompts: Any,
        prompt_row: Tensor,
        response_ids: Tensor,
        temperature: float,
        views: Views,
        *,
        by_token: bool,
    ) -> Any:
        """Bind responses to their prompts and views."""
        ...

    def evaluate(self, trajectories: Trajectories) -> Evaluation:
        """Return the log-probabilities of the decisions."""
        ...

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts."""
        ...


class MaskedEngine:
    """Samples from a masked diffusion model in this process.

    Sample g of prompt p has its own random streams, named by (seed, p.index, g).

    Args:
        policy: what to sample from.
        max_new_tokens: length L of the response; what follows its end token does not count.
        num_steps: network calls of a response; None: one for each token.
        block: length of blocks that are completed from left to right; None: one block.
        order: ``random``, drawn beforehand, so that the path's log-probability is exact; or
            ``confidence``, which keeps the likeliest of what was sampled.
        temperature: of the softmax; 0 takes the likeliest token.
        rule: what the decisions are.

    Raises:
        ConfigError: a number out of its range.
    """

    def __init__(
        self,
        policy: MaskedModel,
        *,
        max_new_tokens: int,
        num_steps: int | None = None,
        block: int | None = None,
        order: Literal["random", "confidence"] = "random",
        temperature: float = 1.0,
        rule: MaskedRule = PATH,
    ) -> None:
        self.policy = policy
        self.room = max_new_tokens
        self.num_steps = num_steps or max_new_tokens
        self.block = block
        if not 1 <= self.num_steps <= max_new_tokens:
            raise ConfigError(
                f"num_steps must be from 1 to max_new_tokens {max_new_tokens}; got {num_steps}."
            )
        try:
            self._plan = step_plan(max_new_tokens, self.num_steps, block)
        except ValueError as error:
            raise ConfigError(f"rollout.block_length does not fit: {error}") from error
        self._choose = {"random": self._drawn_order, "confidence": self._by_confidence}[order]
        self._temperature = temperature
        self.rule = rule

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
        """Write ``group_size`` responses per prompt.

        Args:
            prompts: prompts with distinct indices.
            group_size: responses per prompt.
            seed: names the rollout.
            version: of the weights.
            iteration: not used.
        """
        del iteration
        before = self.policy.forwards
        encoded = self.policy.encode(prompts, max_new_tokens=self.room)
        device = encoded.ids.device
        streams = [(prompt.index, member) for prompt in prompts for member in range(group_size)]
        prompt_row = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
        ids, step = self._write(encoded, prompt_row, streams, seed)
        length = self._lengths(ids)
        if self.rule.likelihood != "path":  # what follows the end was never looked at
            ended = torch.arange(self.room, device=device) >= length[:, None]
            for eos in self.policy.eos_ids[:1]:  # a model without one never ends
                ids = torch.where(ended, eos, ids)
        views = self._views(step, length, [(seed, *stream) for stream in streams])
        by_token = self.rule.likelihood != "elbo"
        payload = self.policy.masked_payload(
            encoded, prompt_row, ids, self._temperature or 1.0, views, by_token=by_token
        )
        trajectories = Trajectories(
            group=torch.tensor([index for index, _ in streams], device=device),
            mask=payload.decisions(),
            version=torch.full_like(prompt_row, version),
            truncated=~self._ends(ids).any(dim=1),
            tokens=None if by_token else length.float(),
            payload=payload,
        )
        old = self.policy.evaluate(trajectories).log_prob
        texts = self.policy.decode(
            [row[:n] for row, n in zip(ids.tolist(), length.tolist(), strict=True)]
        )
        owners = [prompt for prompt in prompts for _ in range(group_size)]
        columns = zip(owners, texts, trajectories.truncated.tolist(), length.tolist(), strict=True)  # type: ignore[union-attr]
        return Rollout(
            trajectories.replace(old_log_prob=old),
            [Sample(p, completion=t, truncated=cut, length=n) for p, t, cut, n in columns],
            Cost(self.policy.forwards - before, decisions=int(trajectories.mask.sum())),
        )

    def _write(
        self, encoded: Any, prompt_row: Tensor, streams: Sequence[tuple[int, int]], seed: int
    ) -> tuple[Tensor, Tensor]:
        """Token ids ``[B, L]``, and the step in which each was unmasked."""
        device = prompt_row.device
        uniforms = draw_uniforms(seed, streams, self.room).to(device)
        keys = draw_uniforms(mix_seed(seed, 1), streams, self.room).to(device)
        order = reveal_order(keys, self.num_steps, self.block)
        ids = torch.full_like(order, self.policy.mask_id)
        step = torch.full_like(order, self.num_steps)
        for number in range(self.num_steps):
            candidates = self._choose(number, order, step)
            sampled, log_p = self._sample(encoded, prompt_row, ids, candidates, uniforms)
            chosen = self._most_confident(number, candidates, log_p)
            ids = torch.where(chosen, sampled, ids)
            step = torch.where(chosen, number, step)
        return ids, step

    def _drawn_order(self, number: int, order: Tensor, step: Tensor) -> Tensor:
        """``[B, L]``: the tokens whose turn it is."""
        del step
        return order == number

    def _by_confidence(self, number: int, order: Tensor, step: Tensor) -> Tensor:
        """``[B, L]``: all hidden tokens of the block that is being written."""
        del order
        place = torch.arange(self.room, device=step.device)
        blocks = place // (self.block or self.room)
        now = blocks[self._plan.to(step.device) == number]
        return (step == self.num_steps) & torch.isin(blocks, now)

    def _most_confident(self, number: int, candidates: Tensor, log_p: Tensor) -> Tensor:
        """``[B, L]``: of the candidates, the likeliest ones that this step may unmask."""
        count = int((self._plan == number).sum())
        score = torch.where(candidates, log_p, -torch.inf)
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return candidates & (rank < count)

    def _sample(
        self,
        encoded: Any,
        prompt_row: Tensor,
        ids: Tensor,
        candidates: Tensor,
        uniforms: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, L]`` for the candidates, and their log-probabilities."""
        if not bool(candidates.any()):
            return ids, torch.zeros_like(ids, dtype=torch.float32)
        logits = self.policy.states(encoded, prompt_row, ids, candidates)
        log_p = self.policy.log_distribution(logits, self._temperature or 1.0)
        weights = filter_logits(log_p, temperature=0) if self._temperature == 0 else log_p
        found = sample_inverse_cdf(weights.exp(), uniforms[candidates])
        likelihood = log_p.gather(1, found[:, None]).squeeze(1)
        blank = torch.zeros_like(ids, dtype=likelihood.dtype)
        return (
            ids.masked_scatter(candidates, found),
            blank.masked_scatter(candidates, likelihood),
        )

    def _ends(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, torch.tensor(self.policy.eos_ids, device=ids.device))

    def _lengths(self, ids: Tensor) -> Tensor:
        """``[B]``: tokens up to the first end token, which counts."""
        ends = self._ends(ids)
        first = ends.to(torch.uint8).argmax(dim=1) + 1
        return torch.where(ends.any(dim=1), first, ids.shape[1])

    def _views(self, step: Tensor, length: Tensor, names: Sequence[tuple[int, ...]]) -> Views:
        make = {
            "path": lambda: path_views(step, length, self.num_steps),
            "sites": lambda: site_views(self.room, length),
            "elbo": lambda: elbo_views(
                self.room, length, [(*name, 2) for name in names], self.rule
            ),
        }
        return make[self.rule.likelihood]()
