"""Diffusion and flow policies: step kernels, schedules, divergences, step selection."""

from mmgrpo.core.diffusion.divergence import DIVERGENCES, step_divergence
from mmgrpo.core.diffusion.gaussian import STD_FLOOR, StepOutput, gaussian_log_prob
from mmgrpo.core.diffusion.kernels import KERNELS, step, transition
from mmgrpo.core.diffusion.matching import MatchingRule
from mmgrpo.core.diffusion.processes import AUTO, DIFFUSION, FLOW, Process
from mmgrpo.core.diffusion.rule import StepRule
from mmgrpo.core.diffusion.schedules import (
    SCHEDULES,
    dynamic_shift,
    from_scheduler_config,
    linear_shift,
    sd3_shift,
)
from mmgrpo.core.diffusion.selection import SELECTORS, Selection, select_steps
from mmgrpo.core.diffusion.solvers import ddim_eta, dpmpp_2m
from mmgrpo.core.diffusion.suffix import Suffix, respace
from mmgrpo.core.diffusion.topology import Tree, fan_out
from mmgrpo.core.diffusion.windows import PACES, Pace, window_start

__all__ = [
    "AUTO",
    "DIFFUSION",
    "DIVERGENCES",
    "FLOW",
    "KERNELS",
    "PACES",
    "SCHEDULES",
    "SELECTORS",
    "STD_FLOOR",
    "MatchingRule",
    "Pace",
    "Process",
    "Selection",
    "StepOutput",
    "StepRule",
    "Suffix",
    "Tree",
    "ddim_eta",
    "dpmpp_2m",
    "dynamic_shift",
    "fan_out",
    "from_scheduler_config",
    "gaussian_log_prob",
    "linear_shift",
    "respace",
    "sd3_shift",
    "select_steps",
    "step",
    "step_divergence",
    "transition",
    "window_start",
]
