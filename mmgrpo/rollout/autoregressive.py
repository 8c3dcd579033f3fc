"""The in-process engine for token policies: prompts read once, rows leave as they finish.

Where not all rows are written at the same time, waiting ones take the places of finished ones.

Shapes: P prompts, R = P * group size rows, of which r are being written, T new tokens at most, V
tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import ConfigError
from mmgrpo.protocols import Cost, OnSamples, Prompt, Rollout, Sample
from mmgrpo.rollout.announcing import Announcer
from mmgrpo.rollout.sampling import draw_uniforms, filter_logits, sample_inverse_cdf
from mmgrpo.rollout.written import Written


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
        """Read encoded prompts; return rows on a cache, with ``logits``.

        ``select(rows)`` keeps rows, ``advance(tokens)`` reads one token more, and ``join(other)``
        takes over the rows of another such state, or returns False if it cannot.
        """
        ...

    def log_distribution(self, logits: Tensor, temperature: float) -> Tensor:
        """Return ``[r, V]`` log-probabilities of the next token."""
        ...

    def entropy(self, log_p: Tensor, probs: Tensor) -> Tensor:
        """Return the ``[r]`` entropy of ``[r, V]`` log-probabilities and their exponentials."""
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


class AutoregressiveEngine:
    """Samples completions token by token, with the policy's own weights and log-probabilities.

    The behaviour log-probability and the entropy of a token are those of the softmax of
    ``logits / temperature`` over the whole vocabulary, before top-k, top-p and min-p: that is what
    ``policy.evaluate`` computes, so the first ratio is 1 although the filters change what is drawn.
    At temperature 0 (greedy) they are those of temperature 1.

    Attributes:
        room: how many tokens a completion may have; a prompt must leave that much.
    """

    announces = True

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
                memory; the others wait until a quarter of the places is free.

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
        on_samples: OnSamples | None = None,
    ) -> Rollout:
        """Sample ``group_size`` completions per prompt.

        Sample g of prompt p depends only on (seed, p.index, g) and the weights; nothing follows
        ``iteration``. ``on_samples`` gets each group when its last completion has ended.

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
        written = Written.blank(len(prompt_row), self.room, self.policy.pad_id, uniforms.device)

        def group(place: int, rows: Tensor) -> list[Sample]:
            one, alone = [prompts[place]], torch.zeros_like(rows)
            parts = written.select(rows), encoded.select(prompt_row[rows[:1]])
            return self._samples(self._assemble(*parts, alone, one, version), one)

        told = None if on_samples is None else Announcer(prompt_row, group, on_samples)
        self._write(written, encoded, prompt_row, uniforms, told)
        trajectories = self._assemble(written, encoded, prompt_row, prompts, version)
        samples = self._samples(trajectories, prompts) if told is None else told.samples
        decisions = int(trajectories.mask.sum())
        return Rollout(trajectories, samples, Cost(self.policy.forwards - forwards, 0, decisions))

    def _write(
        self,
        written: Written,
        encoded: Any,
        prompt_row: Tensor,
        uniforms: Tensor,
        told: Announcer | None,
    ) -> None:
        """Write all completions.

        ``rows`` are those in work, ``count`` how far each of them is, ``most`` the furthest.
        """
        device, size = prompt_row.device, self._max_rows or len(prompt_row)
        eos = torch.tensor(self.policy.eos_ids, dtype=torch.int64, device=device)
        rows = count = torch.zeros(0, dtype=torch.int64, device=device)
        state: Any = None
        started, most, joins = 0, 0, True
        while True:
            free = min(size - len(rows), len(prompt_row) - started)
            if free and (state is None or (joins and 4 * len(rows) <= 3 * size)):
                fresh = self._begin(encoded, prompt_row[started : started + free])
                if state is None or state.join(fresh):
                    state = fresh if state is None else state
                    rows = torch.cat([rows, torch.arange(started, started + free, device=device)])
                    count = torch.cat([count, count.new_zeros(free)])
                    started += free
                else:  # rows of this model cannot join others: the rest waits for all of these
                    joins = False
            tokens = self._write_token(written, rows, count, state.logits, uniforms)
            count, most = count + 1, most + 1
            ended = torch.isin(tokens, eos) | self._has_stop(written.ids, rows, count)
            if most >= self.room or bool(ended.any()):
                left = ~ended & (count < self.room)
                written.finish(rows, count, ended)
                if told is not None:
                    told.finished(rows[~left])
                rows, count, tokens = rows[left], count[left], tokens[left]
                if len(rows) == 0 and started == len(prompt_row):
                    return
                most = int(count.max()) if len(rows) else 0
                if len(rows) == 0:
                    state = None
                    continue
                state.select(left.nonzero().squeeze(1))
            state.advance(tokens[:, None])

    def _begin(self, encoded: Any, prompt_row: Tensor) -> Any:
        """Read the prompts of some rows, each once."""
        unique, inverse = torch.unique(prompt_row, return_inverse=True)
        state = self.policy.begin(encoded.select(unique))
        state.select(inverse)
        return state

    def _write_token(
        self, written: Written, rows: Tensor, count: Tensor, logits: Tensor, uniforms: Tensor
    ) -> Tensor:
        """Draw the next token of ``rows [r]`` and write it at ``count [r]``."""
        log_p = self._distribution(logits, written.ids, rows, count)
        place = rows * self.room + count
        probs = log_p.softmax(dim=-1)  # faster than the exponential, on a CPU
        tokens = self._draw(log_p, probs, uniforms.take(place))
        log_prob = log_p.gather(-1, tokens[:, None]).squeeze(-1)
        written.put(place, tokens, log_prob, self.policy.entropy(log_p, probs))
        return tokens

    def _distribution(self, logits: Tensor, ids: Tensor, rows: Tensor, count: Tensor) -> Tensor:
        """Return the ``[r, V]`` log-probabilities of token ``count [r]`` of ``rows [r]``."""
        del ids, rows, count  # the logits alone decide
        return self.policy.log_distribution(logits, self._temperature or 1.0)

    def _draw(self, log_p: Tensor, probs: Tensor, uniforms: Tensor) -> Tensor:
        if self._temperature == 0:
            return log_p.argmax(dim=-1)
        kept = filter_logits(log_p, **self._filters)
        return sample_inverse_cdf(probs if kept is log_p else kept.exp(), uniforms)

    def _has_stop(self, ids: Tensor, rows: Tensor, count: Tensor) -> Tensor:
        """Return ``[r]``: the first ``count`` of ``rows [r]`` in ``ids [R, T]`` end in a stop."""
        if not self._stop:
            return torch.zeros_like(rows, dtype=torch.bool)
        # A token is at least one byte of text; a few more cover tokens that decode to nothing.
        window = max(len(text.encode()) for text in self._stop) + 8
        pairs = zip(ids[rows].tolist(), count.tolist(), strict=True)
        tails = self.policy.decode([row[max(n - window, 0) : n] for row, n in pairs], special=True)
        found = [any(text in tail for text in self._stop) for tail in tails]
        return torch.tensor(found, device=ids.device)

    def _assemble(
        self,
        written: Written,
        encoded: Any,
        prompt_row: Tensor,
        prompts: Sequence[Prompt],
        version: int,
    ) -> Trajectories:
        width = int(written.length.max())
        index = torch.tensor([prompt.index for prompt in prompts], device=prompt_row.device)
        ids, temperature = written.ids[:, :width], self._temperature or 1.0
        return Trajectories(
            group=index[prompt_row],
            mask=written.mask[:, :width],
            old_log_prob=written.log_prob[:, :width],
            entropy=written.entropy[:, :width],
            version=torch.full_like(prompt_row, version),
            truncated=~written.ended,
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
