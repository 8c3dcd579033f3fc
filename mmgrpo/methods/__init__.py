"""Methods: a preset (YAML of component choices) composed into one object with two verbs.

``prepare`` turns rewards into advantages, ``loss`` turns log-probabilities into a number.
"""

from mmgrpo.config.presets import list_presets
from mmgrpo.methods.load import load_method
from mmgrpo.methods.loss import LossOutput
from mmgrpo.methods.method import Method

__all__ = ["LossOutput", "Method", "list_presets", "load_method"]
