"""Entropy held at a target: one coefficient per segment, moved by Adam after each update.

ReasonGen-R1 (Zhang et al., 2025, arXiv:2505.24875) keeps the entropies of its text and its image
tokens apart in this way. The state is a handful of float64 numbers, equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmgrpo.core.collective import LOCAL, Collective
from mmgrpo.core.trajectories import Trajectories

BETAS = (0.9, 0.999)
EPS = 1e-8


class EntropyControl:
    """Coefficients ``alpha_s = sinh(psi_s)`` of the mean entropy H_s of the segments s.

    The loss gets ``sum_s alpha_s H_s``: alpha > 0 lowers the entropy, alpha < 0 raises it. After an
    update psi takes a step of Adam on ``-alpha (H - target)``, so alpha rises while H is above its
    target; then alpha is clamped to +- limit, and psi follows. A segment without decisions in an
    update stays as it is.
    """

    def __init__(
        self, targets: Sequence[float], *, learning_rate: float = 5e-5, limit: float = 5e-3
    ) -> None:
        """Start with coefficients 0.

        Args:
            targets: entropy in nats that segment 0, 1, ... is held at.
            learning_rate: of psi.
            limit: largest absolute coefficient.
        """
        self.targets = torch.tensor(targets, dtype=torch.float64)
        self.learning_rate, self.limit = learning_rate, limit
        names = ("psi", "first_moment", "second_moment", "steps")
        self._state = {name: torch.zeros_like(self.targets) for name in names}
        self._seen = torch.zeros(2, len(targets), dtype=torch.float64)

    @property
    def coefficients(self) -> Tensor:
        """``[S]`` float64 alpha of each segment."""
        return self._state["psi"].sinh()

    def weigh(self, trajectories: Trajectories, collective: Collective = LOCAL) -> Trajectories:
        """Fill ``entropy_weight``: what each decision's entropy is multiplied by in the loss.

        Args:
            trajectories: a whole update (of this rank), with ``segment``.
            collective: reaches the other ranks.

        Raises:
            ValueError: no segments.
        """
        segment = self._segment(trajectories)
        counts = collective.sum(self._sums(segment, trajectories.decision_weight))
        share = self.coefficients / counts.clamp(min=1e-12)
        share = torch.cat([share, share.new_zeros(1)]).to(segment.device)
        weight = (share[segment] * trajectories.decision_weight).float()
        return trajectories.replace(entropy_weight=weight)

    def observe(self, trajectories: Trajectories, entropy: Tensor) -> None:
        """Take in the entropies ``[B, T]`` that a micro-batch of the update was found to have."""
        segment, weight = self._segment(trajectories), trajectories.decision_weight
        known = torch.where(trajectories.mask, entropy.detach(), torch.zeros_like(entropy))
        self._seen += torch.stack(
            [self._sums(segment, known * weight), self._sums(segment, weight)]
        )

    def update(self, collective: Collective = LOCAL) -> dict[str, float]:
        """Move the coefficients; call once after each optimiser step, on every rank.

        Returns:
            ``entropy/segment_S`` in nats, and ``entropy_coefficient/segment_S`` for the next
            update.
        """
        totals, counts = collective.sum(self._seen)
        self._seen = torch.zeros_like(self._seen)
        met = counts > 0
        entropy = totals / counts.clamp(min=1e-12)
        moved = self._adam(-self._state["psi"].cosh() * (entropy - self.targets))
        moved["psi"] = moved["psi"].sinh().clamp(-self.limit, self.limit).asinh()
        self._state = {
            name: torch.where(met, value, self._state[name]) for name, value in moved.items()
        }
        found: dict[str, float] = {}
        for place in met.nonzero().flatten().tolist():
            found[f"entropy/segment_{place}"] = float(entropy[place])
            name = f"entropy_coefficient/segment_{place}"
            found[name] = float(self.coefficients[place])
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint keeps."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._state = {name: state[name].clone() for name in self._state}

    def _adam(self, gradient: Tensor) -> dict[str, Tensor]:
        """The state after one step of Adam (arXiv:1412.6980) against the gradient ``[S]``."""
        beta1, beta2 = BETAS
        steps = self._state["steps"] + 1
        first = beta1 * self._state["first_moment"] + (1 - beta1) * gradient
        second = beta2 * self._state["second_moment"] + (1 - beta2) * gradient**2
        scale = (second / (1 - beta2**steps)).sqrt() + EPS
        psi = self._state["psi"] - self.learning_rate * (first / (1 - beta1**steps)) / scale
        return {"psi": psi, "first_moment": first, "second_moment": second, "steps": steps}

    def _segment(self, trajectories: Trajectories) -> Tensor:
        """``[B, T]`` segments; those without a target, and masked decisions, are S."""
        if trajectories.segment is None:
            raise ValueError("entropy control needs trajectories.segment")
        count = len(self.targets)
        known = trajectories.mask & (trajectories.segment < count)
        return torch.where(
            known, trajectories.segment, torch.full_like(trajectories.segment, count)
        )

    def _sums(self, segment: Tensor, values: Tensor) -> Tensor:
        """``[S]`` float64 sums of ``values [B, T]`` over each segment, on the CPU."""
        count = len(self.targets)
        totals = torch.zeros(count + 1, dtype=torch.float64, device=segment.device)
        return totals.index_add_(0, segment.flatten(), values.double().flatten())[:count].cpu()
