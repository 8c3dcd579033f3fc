"""Assembly: the one place that turns a configuration into objects, and the doors' verbs.

Everything that can be wrong is looked at before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mmgrpo.config import Config, dump_config
from mmgrpo.config.schema import Reward
from mmgrpo.data import PromptSource, check_columns, read_prompts
from mmgrpo.errors import ConfigError, MethodError, ModelError, UsageError
from mmgrpo.methods import Method, load_method
from mmgrpo.policies.adapters import Ema, trainable_parameters
from mmgrpo.protocols import Policy, Prompt, RolloutEngine
from mmgrpo.registry import resolve
from mmgrpo.scoring import RewardRunner, load_reward
from mmgrpo.tracking import Console, JsonlTracker, write_samples
from mmgrpo.trainer.checkpoint import latest_checkpoint, read_state
from mmgrpo.trainer.distributed import EvaluationModule, make_collective
from mmgrpo.trainer.evaluate import evaluate as run_evaluation
from mmgrpo.trainer.loop import fit
from mmgrpo.trainer.optim import make_optimizer
from mmgrpo.trainer.parts import Evaluator, Parts
