"""Score samples with every reward of a run; a reward that fails is never counted as 0."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from mmgrpo.errors import ConfigError, RewardError, nearest
from mmgrpo.protocols import Prompt, Sample, Scores
from mmgrpo.scoring.ahead import Ahead, separable
from mmgrpo.scoring.call import Caller, Outcome, is_async
from mmgrpo.scoring.failures import save_failures
from mmgrpo.scoring.load import NamedReward
from mmgrpo.scoring.worker import Worker

logger = logging.getLogger(__name__)

FAILURE_MODES = ("stop", "drop")
SEARCH_FACTOR = 10.0
"""The search for a culprit may take this many times as long as the call that failed,"""
SEARCH_FLOOR_S = 10.0
"""and at least this many seconds."""


class RewardRunner:
    """Implements :class:`mmgrpo.protocols.Scorer`.

    Each reward is called once with all samples, or once with each group (:meth:`ahead`). One that
    raises, exceeds the time limit, returns NaN or infinity, or the wrong number of values has
    failed; if the sample at fault is not known, the samples are tried one by one. Then, by
    ``failure``:

    - ``stop``: :class:`~mmgrpo.errors.RewardError` names the reward, the sample and the cause.
    - ``drop``: the samples at fault are marked in ``Scores.dropped``, for the trainer to leave
      out. If all fail, or finding them takes too long, this too is an error.

    Either way the samples at fault are saved in ``save_dir/failed_rewards/``.

    Args:
        rewards: see :func:`~mmgrpo.scoring.load.load_rewards`.
        failure: ``stop`` or ``drop``.
        timeout_s: limit of one call of one reward, in seconds.
        save_dir: the run folder; None saves nothing.

    Raises:
        ConfigError: no rewards, two of one name, an unknown ``failure``, or a limit that is not
            positive.
    """

    def __init__(
        self,
        rewards: Sequence[NamedReward],
        *,
        failure: str = "stop",
        timeout_s: float | None = None,
        save_dir: Path | None = None,
    ) -> None:
        names = [reward.name for reward in rewards]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"rewards need different names, and at least one; got {names}.")
        if failure not in FAILURE_MODES:
            raise ConfigError(
                f"unknown reward failure mode '{failure}'{nearest(failure, FAILURE_MODES)}"
            )
        if timeout_s is not None and not timeout_s > 0:
            raise ConfigError(f"reward timeout must be positive seconds; got {timeout_s}.")
        self.rewards = list(rewards)
        self._drops = failure == "drop"
        self._save_dir = save_dir
        self._caller = Caller(timeout_s)
        self._worker: Worker[Outcome] | None = None

    @property
    def weights(self) -> dict[str, float]:
        """Name -> weight in the combined reward."""
        return {reward.name: reward.weight for reward in self.rewards}

    def ahead(self, prompts: Sequence[Prompt], *, sync: bool = True) -> Ahead | None:
        """Return what takes in the finished groups of a rollout while it goes on.

        None where that would change what rewards see, see :func:`~mmgrpo.scoring.ahead.separable`,
        or where none is left: a reward that keeps time itself stays in the calling thread, one with
        the attribute ``whole_batch`` gets all samples at once, a sync one waits unless ``sync``.
        """
        rewards = [
            reward
            for reward in self.rewards
            if not (reward.keeps_time or reward.whole_batch) and (sync or is_async(reward))
        ]
        if not rewards or len(prompts) < 2 or not separable(prompts):
            return None
        if self._worker is None:
            self._worker = Worker()
        return Ahead(rewards, self._caller, self._worker, self._score)

    def score(self, samples: Sequence[Sample], *, step: int) -> Scores:
        """Score all samples with every reward.

        Raises:
            RewardError: see the class.
        """
        return self._score(samples, step, {})

    def _score(self, samples: Sequence[Sample], step: int, known: Mapping[str, Outcome]) -> Scores:
        """Call the rewards whose outcomes are not known, and turn all outcomes into scores."""
        dropped = torch.zeros(len(samples), dtype=torch.bool)
        if not samples:
            nothing = dict.fromkeys(self.weights, torch.zeros(0))
            return Scores(nothing, dropped, dict.fromkeys(self.weights, 0.0))
        missing = [reward for reward in self.rewards if reward.name not in known]
        outcomes = {**known, **self._call(missing, samples)}
        values = {}
        for reward in self.rewards:
            outcome = outcomes[reward.name]
            if outcome.error or outcome.failures:
                outcome = self._handle(reward, samples, outcome, step)
            dropped[list(outcome.failures)] = True
            values[reward.name] = torch.tensor(
                [math.nan if value is None else value for value in outcome.values or ()],
                dtype=torch.float32,
            )
        return Scores(values, dropped, {name: outcomes[name].seconds for name in values})

    def close(self) -> None:
        """Stop the event loop of async rewards, and the thread beside the rollout."""
        self._caller.close()
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _call(
        self, rewards: Sequence[NamedReward], samples: Sequence[Sample]
    ) -> dict[str, Outcome]:
        """Async rewards start first and run while the sync ones have this thread."""
        rewards = sorted(rewards, key=is_async, reverse=True)
        waiting = [(reward, self._caller.start(reward, samples)) for reward in rewards]
        return {reward.name: finish() for reward, finish in reversed(waiting)}

    def _handle(
        self, reward: NamedReward, samples: Sequence[Sample], outcome: Outcome, step: int
    ) -> Outcome:
        """Find the samples at fault; then stop, or return an outcome that names them."""
        whole = outcome.error
        if whole:
            outcome = self._one_by_one(reward, samples, outcome)
        failures = dict(outcome.failures)
        if self._drops and not outcome.error and len(failures) < len(samples):
            if failures:
                place = self._save(reward, samples, failures, outcome, step)
                logger.warning(
                    "reward '%s' failed on %d of %d samples, which are dropped%s",
                    reward.name, len(failures), len(samples), place,
                )  # fmt: skip
            return outcome
        culprits = failures or dict.fromkeys(range(len(samples)), whole or "")
        first, cause = next(iter(culprits.items()))
        who = f"sample {first}" if failures else f"a call with {len(samples)} samples"
        alone = "" if failures or outcome.error else " (each sample alone succeeds)"
        place = self._save(reward, samples, culprits, outcome, step)
        raise RewardError(
            f"reward '{reward.name}' failed on {who} at step {step}: {cause}{alone}{place}."
        ) from outcome.exception

    def _one_by_one(
        self, reward: NamedReward, samples: Sequence[Sample], failed: Outcome
    ) -> Outcome:
        """Try every sample alone; ``error`` stays set if that takes too long to finish."""
        deadline = time.monotonic() + max(SEARCH_FLOOR_S, SEARCH_FACTOR * failed.seconds)
        values: list[float | None] = []
        failures: dict[int, str] = {}
        exception = failed.exception
        calls: Sequence[Callable[[], Outcome]] | None = None
        if is_async(reward):
            calls = [self._caller.start(reward, [sample]) for sample in samples]
        for index, sample in enumerate(samples):
            if time.monotonic() > deadline:
                return Outcome(None, failures, failed.error, exception, failed.seconds)
            finish = calls[index] if calls else self._caller.start(reward, [sample])
            outcome = finish()
            values += outcome.values or [None]
            problem = outcome.error or outcome.failures.get(0)
            if problem:
                failures[index] = problem
                exception = outcome.exception or exception
                if not self._drops:
                    break
        return Outcome(values, failures, None, exception, failed.seconds)

    def _save(
        self,
        reward: NamedReward,
        samples: Sequence[Sample],
        causes: dict[int, str],
        outcome: Outcome,
        step: int,
    ) -> str:
        if self._save_dir is None:
            return ""
        file = save_failures(
            self._save_dir, step=step, reward=reward.name, samples=samples, causes=causes,
            exception=outcome.exception,
        )  # fmt: skip
        return f"; saved in {file}"
