"""What a next-scale image generator is made of: ``config.json`` in its folder.

Read without torch, so that a plan can say how many tokens a picture has.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

from annotated_types import Len
from pydantic import PositiveInt, ValidationError, model_validator

from mmgrpo.config.schema import Section
from mmgrpo.errors import ModelError, nearest

FILE = "config.json"
NUM_BYTES = 256


class ScaleShape(Section):
    """Sizes of the transformer and of the quantiser that it writes codes for (VAR).

    A picture is one map of codes per scale, coarse to fine, arXiv:2404.02905.
    """

    model_type: Literal["image_scales"] = "image_scales"
    scales: Annotated[list[Annotated[list[PositiveInt], Len(2, 2)]], Len(1)]
    """Rows and columns of the codes of each scale; the last is the grid of the latent."""
    num_codes: PositiveInt
    """Codes of the codebook, which the scales share."""
    code_dim: PositiveInt
    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    mlp_ratio: PositiveInt = 3
    classes: list[str] | None = None
    """Names of the classes that a prompt may be; null: a prompt is any text, read as bytes."""
    max_prompt_bytes: PositiveInt = 64
    """Most bytes of a text prompt."""
    decoder_width: PositiveInt = 24
    """Channels inside the quantiser's encoder and decoder."""
    doublings: PositiveInt = 1
    """How often the decoder doubles the latent's rows and columns."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads {self.num_heads}; "
                f"got {self.hidden_size}"
            )
        for small, large in pairwise(self.scales):
            if small[0] > large[0] or small[1] > large[1]:
                raise ValueError(f"scales must grow from coarse to fine; got {self.scales}")
        return self

    @property
    def lengths(self) -> list[int]:
        """Codes of each scale."""
        return [rows * columns for rows, columns in self.scales]

    @property
    def room(self) -> int:
        """Codes of a picture, all scales together."""
        return sum(self.lengths)

    @property
    def prompt_vocabulary(self) -> int:
        """Different tokens of prompts: bytes, or classes."""
        return NUM_BYTES if self.classes is None else len(self.classes)

    @property
    def prompt_room(self) -> int:
        """Most tokens of a prompt."""
        return self.max_prompt_bytes if self.classes is None else 1


def read_shape(folder: str | Path) -> ScaleShape:
    """Read the shape in a model's local folder.

    Raises:
        ModelError: there is no such file, it is of another kind of model, or something in it
            cannot be.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise ModelError(
            f"{folder} has no {FILE}; expected a local folder with a next-scale image generator: "
            f"{FILE} and model.safetensors."
        )
    text = file.read_text(encoding="utf-8")
    try:
        return ScaleShape.model_validate_json(text)
    except ValidationError as error:
        raise ModelError(f"{file}: {_first_problem(error)}.") from None


def _first_problem(error: ValidationError) -> str:
    kinds = [problem for problem in error.errors() if problem["loc"] == ("model_type",)]
    if kinds:
        return f"holds a '{kinds[0]['input']}' model; expected model_type 'image_scales'"
    problem = error.errors()[0]
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}'{nearest(key, ScaleShape.model_fields)}".rstrip(".")
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message
