"""Tensor maths on trajectories: torch only, no state, no input or output.

One module per question: :mod:`groups` (statistics), :mod:`advantages` (baseline and scale),
:mod:`credit` (over decisions), :mod:`ratios` (level), :mod:`trust_regions` and :mod:`objectives`
(surrogate), :mod:`divergence` (KL), :mod:`aggregation` (to one number), :mod:`multi_reward`,
:mod:`shaping`, :mod:`filters`, :mod:`corrections`; :mod:`diffusion` for denoising steps.
"""

from mmgrpo.core import diffusion
from mmgrpo.core.aggregation import Denominators, denominators
from mmgrpo.core.collective import LOCAL, Collective
from mmgrpo.core.objectives import Decisions, Surrogate
from mmgrpo.core.trajectories import Payload, Trajectories
from mmgrpo.core.trust_regions import Region

__all__ = [
    "LOCAL",
    "Collective",
    "Decisions",
    "Denominators",
    "Payload",
    "Region",
    "Surrogate",
    "Trajectories",
    "denominators",
    "diffusion",
]
