"""The in-process engine for token policies: prompts read once, rows leave as they finish.

Shapes: P prompts, R = P * group size rows, of which r are still being written, T new tokens at
most, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import ConfigError
from mmgrpo.protocols import Cost, Prompt, Rollout, Sample
from mmgrpo.rollout.sampling import draw_uniforms, filter_logits, sample_inverse_cdf


class TokenPolicy(Protocol):
    """What the engine needs of a policy whose decisions are tokens."""

    forwards: int

    @property
    def context(self) -> int | None:
        """How many tokens a prompt and its completion may have together."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion."""
        ...

    @property
    def pad_id(self) -> int:
        """Token that fills what follows the end."""
        ...

    def encode(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> Any:
        """Turn prompts into tokens; refuse those that leave no room for the new ones."""
        ...

    def begin(self, prompts: Any) -> Any:
        """Read encoded prompts; return rows on a cache with ``logits``, select() and advance()."""
        ...

    def log_distribution(self, logits: Tensor, temperature: float) -> Tensor:
        """Return ``[r, V]`` log-probabilities of the next token."""
        ...

    def entropy(self, log_p: Tensor) -> Tensor:
        """Return the ``[r]`` entropy of ``[r, V]`` log-probabilities."""
        ...

    def payload(self, prompts: Any, prompt_row: Tensor, ids: Tensor, temperature: float) -> Any:
        """Bind completions to their prompts."""
        ...

    def decode(self, ids: Sequence[Sequence[int]], *, special: bool = False) -> list[str]:
        """Turn tokens into text."""
        ...


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda value: value >= 1, "at least 1"),
    "temperature": (lambda value: 0 <= value < math.inf, "at least 0"),
    "top_k": (lambda value: value >= 0, "at least 0"),
    "top_p": (lambda value: 0 < value <= 1, "in (0, 1]"),
    "min_p": (lambda value: 0 <= value < 1, "in [0, 1)"),
    "stop": (all, "non-empty strings"),
    "max_rows": (lambda value: value is None or value >= 1, "at least 1"),
}


def _check_ranges(**settings: Any) -> None:
    for name, value in settings.items():
        holds, expected = _RANGES[name]
        if not holds(value):
            raise ConfigError(f"rollout.{name} must be {expected}; got {value!r}.")


@dataclass
class _Written:
    """What has been written so far: ``[R, T]`` each, and ``[R]`` whether a row ended by itself."""

    ids: Tensor
    log_prob: Tensor
    entropy: Tensor
    mask: Tensor
    ended: Tensor

    @classmethod
    def blank(cls, rows: int, width: int, pad_id: int, device: torch.device) -> _Written:
        return cls(
            ids=torch.full((rows, width), pad_id, device=device),
            log_prob=torch.zeros(rows, width, device=device),
            entropy=torch.zeros(rows, width, device=device),
            mask=torch.zeros(rows, width, dtype=torch.bool, device=device),
            ended=torch.zeros(rows, dtype=torch.bool, device=device),
        )


class AutoregressiveEngine:
    """Samples completions token by token, with the policy's own weights and log-probabilities.

    The behaviour log-probability and the entropy of a token are those of the softmax of
    ``logits / temperature`` over the whole vocabulary, before top-k, top-p and min-p: that is what
    ``policy.evaluate`` computes, so the first ratio is 1 although the filters change what is drawn.
    At temperature 0 (greedy) they are those of temperature 1.

    Attributes:
        room: how many tokens a completion may have; a prompt must leave that much.
    """

    def __init__(
        self,
        policy: TokenPolicy,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        min_p: float = 0.0,
        stop: Sequence[str] = (),
        max_rows: int | None = None,
    ) -> None:
        """Choose how to sample.

        Args:
            policy: what to sample from.
            max_new_tokens: a completion that has not ended by then is truncated.
            temperature: 0 is greedy.
            top_p: see :func:`filter_logits`; 1 is off.
            top_k: see :func:`filter_logits`; None or 0 is off.
            min_p: see :func:`filter_logits`; 0 is off.
            stop: strings that end a completion, and stay in it.
            max_rows: how many completions are written at the same time; None: all. Fewer need less
                memory.

        Raises:
            ConfigError: a number out of its range, or no room for a prompt in the context.
        """
        filters = {"top_k": top_k or 0, "top_p": top_p, "min_p": min_p}
        _check_ranges(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop=stop,
            max_rows=max_rows,
            **filters,
        )
        if policy.context is not None and max_new_tokens >= policy.context:
            raise ConfigError(
                f"rollout.max_new_tokens is {max_new_tokens}, and the model's context of "
                f"{policy.context} tokens must also hold the prompt."
            )
        self.policy = policy
        self.room = max_new_tokens
        self._temperature = temperature
        self._filters: dict[str, Any] = filters
        self._stop = tuple(stop)
        self._max_rows = max_rows

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
        """Sample ``group_size`` completions per prompt.

        Sample g of prompt p depends only on (seed, p.index, g) and the weights; nothing follows
        ``iteration``.

        Raises:
            DataError: a prompt that cannot be encoded or is too long.
        """
        del iteration
        forwards = self.policy.forwards
        encoded = self.policy.encode(prompts, max_new_tokens=self.room)
        streams = [(prompt.index, sample) for prompt in prompts for sample in range(group_size)]
        uniforms = draw_uniforms(seed, streams, self.room).to(encoded.ids.device)
        prompt_row = torch.arange(len(prompts), device=uniforms.device)
        prompt_row = prompt_row.repeat_interleave(group_size)
        size = self._max_rows or len(prompt_row)
        parts = [
            self._write(encoded, rows, numbers)
            for rows, numbers in zip(prompt_row.split(size), uniforms.split(size), strict=True)
        ]
        trajectories = self._assemble(parts, encoded, prompt_row, prompts, version)
        samples = self._samples(trajectories, prompts)
        decisions = int(trajectories.mask.sum())
        return Rollout(trajectories, samples, Cost(self.policy.forwards - forwards, 0, decisions))

    def _write(self, encoded: Any, prompt_row: Tensor, uniforms: Tensor) -> _Written:
        """Write the completions of some rows, which shrink to those not yet ended."""
        unique, inverse = torch.unique(prompt_row, return_inverse=True)
        state = self.policy.begin(encoded.select(unique))
        state.select(inverse)
        rows = torch.arange(len(prompt_row), device=prompt_row.device)
        written = _Written.blank(len(rows), self.room, self.policy.pad_id, rows.device)
        eos = torch.tensor(self.policy.eos_ids, dtype=torch.int64, device=rows.device)
        for step in range(self.room):
            log_p = self.policy.log_distribution(state.logits, self._temperature or 1.0)
            tokens = self._draw(log_p, uniforms[rows, step])
            written.ids[rows, step] = tokens
            written.log_prob[rows, step] = log_p.gather(-1, tokens[:, None]).squeeze(-1)
            written.entropy[rows, step] = self.policy.entropy(log_p)
            written.mask[rows, step] = True
            ended = torch.isin(tokens, eos) | self._has_stop(written.ids[rows, : step + 1])
            if bool(ended.any()):
                written.ended[rows] = ended
                rows, tokens = rows[~ended], tokens[~ended]
                if len(rows) == 0:
                    break
                state.select((~ended).nonzero().squeeze(1))
            if step + 1 < self.room:
                state.advance(tokens[:, None])
        return written

    def _draw(self, log_p: Tensor, uniforms: Tensor) -> Tensor:
        if self._temperature == 0:
            return log_p.argmax(dim=-1)
        return sample_inverse_cdf(filter_logits(log_p, **self._filters).exp(), uniforms)

    def _has_stop(self, ids: Tensor) -> Tensor:
        """Return ``[r]`` whether a stop string has just been completed in ``ids [r, t]``."""
        if not self._stop:
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        # A token is at least one byte of text; a few more cover tokens that decode to nothing.
        window = max(len(text.encode()) for text in self._stop) + 8
        tails = self.policy.decode(ids[:, -window:].tolist(), special=True)
        found = [any(text in tail for text in self._stop) for tail in tails]
        return torch.tensor(found, device=ids.device)

    def _assemble(
        self,
        parts: Sequence[_Written],
        encoded: Any,
        prompt_row: Tensor,
        prompts: Sequence[Prompt],
        version: int,
    ) -> Trajectories:
        mask = torch.cat([part.mask for part in parts])
        width = int(mask.sum(dim=1).max())

        def join(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])[:, :width]

        index = torch.tensor([prompt.index for prompt in prompts], device=prompt_row.device)
        ids, temperature = join("ids"), self._temperature or 1.0
        return Trajectories(
            group=index[prompt_row],
            mask=mask[:, :width],
            old_log_prob=join("log_prob"),
            entropy=join("entropy"),
            version=torch.full_like(prompt_row, version),
            truncated=~torch.cat([part.ended for part in parts]),
            payload=self.policy.payload(encoded, prompt_row, ids, temperature),
        )

    def _samples(self, trajectories: Trajectories, prompts: Sequence[Prompt]) -> list[Sample]:
        lengths = trajectories.lengths.tolist()
        ids = trajectories.payload.completion_ids.tolist()
        texts = self.policy.decode([row[:n] for row, n in zip(ids, lengths, strict=True)])
        truncated = [] if trajectories.truncated is None else trajectories.truncated.tolist()
        owners = [prompt for prompt in prompts for _ in range(len(texts) // len(prompts))]
        return [
            Sample(prompt, completion=text, truncated=cut, length=n)
            for prompt, text, cut, n in zip(owners, texts, truncated, lengths, strict=True)
        ]
