"""Rewards of groups that are finished, while others are still being made."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from mmgrpo.protocols import Prompt, Sample, Scores
from mmgrpo.scoring.call import Caller, Outcome, is_async
from mmgrpo.scoring.load import NamedReward
from mmgrpo.scoring.worker import Worker

logger = logging.getLogger(__name__)

Finish = Callable[[Sequence[Sample], int, Mapping[str, Outcome]], Scores]
"""(samples, step, outcomes that are known) -> scores."""

SKIPPED = Outcome(error="an earlier call failed")


class Ahead:
    """Implements :class:`mmgrpo.protocols.AheadScorer`: calls rewards on each group of a rollout.

    Async rewards start at once. Sync ones wait for each other in one thread, so that they need no
    more locks than without; after a call that failed, the other calls of the reward are left out.

    Args:
        rewards: those that see of a group alone what they see of it among others.
        caller: makes the calls.
        worker: where sync rewards run.
        finish: does the rest of scoring.
    """

    def __init__(
        self,
        rewards: Sequence[NamedReward],
        caller: Caller,
        worker: Worker[Outcome],
        finish: Finish,
    ) -> None:
        self._rewards = sorted(rewards, key=is_async, reverse=True)
        self._caller = caller
        self._worker = worker
        self._finish = finish
        self._groups: list[Sequence[Sample]] = []
        self._calls: dict[str, list[Callable[[], Outcome]]] = defaultdict(list)
        self._failed: set[str] = set()

    def add(self, samples: Sequence[Sample]) -> None:
        """Start the rewards of one whole group."""
        self._groups.append(samples)
        for reward in self._rewards:
            self._calls[reward.name].append(self._start(reward, samples))

    def score(self, samples: Sequence[Sample], *, step: int) -> Scores:
        """Wait for the calls and score all samples of the rollout, in its order.

        Rewards of which a call failed as a whole, or all where other samples were added than these,
        are called again with all samples, as if nothing had been called.

        Raises:
            RewardError: see :class:`~mmgrpo.scoring.runner.RewardRunner`.
        """
        return self._finish(samples, step, self._outcomes(samples))

    def _outcomes(self, samples: Sequence[Sample]) -> dict[str, Outcome]:
        """Name -> outcome over ``samples``, where there is one."""
        place = {id(sample): row for row, sample in enumerate(samples)}
        rows = [[place.get(id(sample), -1) for sample in group] for group in self._groups]
        if sorted(row for group in rows for row in group) != list(range(len(samples))):
            return {}
        found = {
            reward.name: _joined(rows, [finish() for finish in self._calls[reward.name]])
            for reward in self._rewards
        }
        for name, outcome in found.items():
            if outcome.error:
                logger.warning(
                    "reward '%s' failed beside the rollout (%s); it is called again after it",
                    name, outcome.error,
                )  # fmt: skip
        return {name: outcome for name, outcome in found.items() if not outcome.error}

    def _start(self, reward: NamedReward, samples: Sequence[Sample]) -> Callable[[], Outcome]:
        if is_async(reward):
            return self._caller.start(reward, samples)

        def call() -> Outcome:
            if reward.name in self._failed:
                return SKIPPED
            outcome = self._caller.start(reward, samples)()
            if outcome.error:
                self._failed.add(reward.name)
            return outcome

        return self._worker.submit(call).result


def separable(prompts: Sequence[Prompt]) -> bool:
    """Whether rewards are told of each prompt's samples alone what they are told among all.

    Not if contents are equal, by which a reward may tell groups apart, or if only some prompts have
    a column or images.
    """
    names = {(frozenset(prompt.columns), bool(prompt.images)) for prompt in prompts}
    return len(names) == 1 and len({str(prompt.content) for prompt in prompts}) == len(prompts)


def _joined(rows: Sequence[Sequence[int]], parts: Sequence[Outcome]) -> Outcome:
    """One outcome of the parts, whose samples are at ``rows``; or the first that failed."""
    for part in parts:
        if part.error:
            return part
    values: dict[int, float | None] = {}
    failures: dict[int, str] = {}
    for place, part in zip(rows, parts, strict=True):
        values.update(zip(place, part.values or (), strict=True))
        failures.update({place[index]: cause for index, cause in part.failures.items()})
    return Outcome(
        [values[row] for row in range(len(values))],
        dict(sorted(failures.items())),
        seconds=sum(part.seconds for part in parts),
    )
