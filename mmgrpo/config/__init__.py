"""Typed configuration: a YAML file and overrides in, a checked object or all errors out.

Never imports torch, so validation and ``--help`` answer at once.
"""

from mmgrpo.config.flow_schema import ImageConfig
from mmgrpo.config.load import dump_config, load_config
from mmgrpo.config.presets import check_preset, list_presets, read_preset
from mmgrpo.config.schema import Config, Reward
from mmgrpo.config.token_schema import TextConfig, VisionConfig

__all__ = [
    "Config",
    "ImageConfig",
    "Reward",
    "TextConfig",
    "VisionConfig",
    "check_preset",
    "dump_config",
    "list_presets",
    "load_config",
    "read_preset",
]
