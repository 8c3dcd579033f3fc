"""Data sets in, prompts out."""

from mmgrpo.data.read import check_columns, read_prompts, rows_to_prompts
from mmgrpo.data.source import PromptSource

__all__ = ["PromptSource", "check_columns", "read_prompts", "rows_to_prompts"]
