"""The last rewards of every prompt, for methods that compare a sample with earlier ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmgrpo.core.collective import LOCAL, Collective
from mmgrpo.trainer.parts import Collected, Parts


class RewardHistory:
    """Keeps the last ``size`` rewards of each prompt (DDPO's tracker, arXiv:2305.13301).

    Every rank keeps all prompts, in the order in which one process would draw them. What a step
    adds is kept for good only by :meth:`commit`, so that a step which fails leaves no trace.
    """

    def __init__(self, *, size: int, enough: int) -> None:
        """Start empty.

        Args:
            size: rewards kept per prompt.
            enough: fewer say nothing about a prompt.
        """
        self.size, self.enough = size, enough
        self._kept: dict[int, list[float]] = {}
        self._added: dict[int, list[float]] = {}

    def add(
        self, prompt: Tensor, score: Tensor, collective: Collective = LOCAL
    ) -> tuple[Tensor, Tensor]:
        """Add a step's rewards; return the statistics of each sample's prompt, these included.

        Args:
            prompt: ``[B]`` int64, which prompt.
            score: ``[B]`` reward; NaN: it does not apply.
            collective: reaches the other ranks.

        Returns:
            Mean and population standard deviation ``[B]`` float64; NaN where there are fewer than
            ``enough`` rewards.
        """
        self._added = {}
        everyone = zip(
            collective.gather(prompt).tolist(), collective.gather(score).tolist(), strict=True
        )
        for name, value in everyone:
            if value == value:  # noqa: PLR0124 - not NaN
                earlier = self._added.get(name, self._kept.get(name, []))
                self._added[name] = [*earlier, value][-self.size :]
        found = [self._statistics(name) for name in prompt.tolist()]
        mean, std = torch.tensor(found, dtype=torch.float64, device=prompt.device).reshape(-1, 2).T
        return mean, std

    def _statistics(self, prompt: int) -> tuple[float, float]:
        rewards = self._added.get(prompt, self._kept.get(prompt, []))
        if len(rewards) < self.enough:
            return torch.nan, torch.nan
        exact = torch.tensor(rewards, dtype=torch.float64)
        return float(exact.mean()), float(exact.std(correction=0))

    def commit(self) -> None:
        """Keep what the last step added."""
        self._kept |= self._added
        self._added = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return ``prompt [P]``, ``count [P]`` int64, and the rewards one prompt after another."""
        names = sorted(self._kept)
        return {
            "prompt": torch.tensor(names, dtype=torch.int64),
            "count": torch.tensor([len(self._kept[name]) for name in names], dtype=torch.int64),
            "reward": torch.tensor(
                [value for name in names for value in self._kept[name]], dtype=torch.float64
            ),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        rewards = state["reward"].split(state["count"].tolist())
        self._kept = {
            name: values.tolist()
            for name, values in zip(state["prompt"].tolist(), rewards, strict=True)
        }
        self._added = {}


def remember(parts: Parts, collected: Collected) -> Collected:
    """Tell the trajectories how their prompts were rewarded so far, if the method asks."""
    if parts.history is None:
        return collected
    trajectories = collected.trajectories
    prompt = torch.tensor(
        [sample.prompt.index for sample in collected.samples], device=trajectories.group.device
    )
    mean, std = parts.history.add(prompt, parts.method.score(trajectories), parts.collective)
    told = trajectories.replace(history_mean=mean, history_std=std)
    return Collected(told, collected.samples)
