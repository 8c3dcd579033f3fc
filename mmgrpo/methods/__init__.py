"""Methods: a preset (YAML of component choices) composed into one object with two verbs.

``prepare`` turns rewards into advantages, ``loss`` turns log-probabilities into a number.
"""

from mmgrpo.methods.load import list_presets, load_method
from mmgrpo.methods.method import LossOutput, Method

__all__ = ["LossOutput", "Method", "list_presets", "load_method"]
