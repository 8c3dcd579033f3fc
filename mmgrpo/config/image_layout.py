"""How a language model's vocabulary holds pictures: ``image_tokens.json`` in the model's folder.

Read without torch, so that a plan can say how many tokens a picture has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from annotated_types import Len
from pydantic import AfterValidator, NonNegativeInt, PositiveInt, ValidationError, model_validator

from mmgrpo.config.schema import Section
from mmgrpo.errors import ModelError, nearest

FILE = "image_tokens.json"


def _containing(*places: str) -> AfterValidator:
    """A validator for texts that must have each of the places once."""

    def validate(text: str) -> str:
        for place in places:
            if text.count(place) != 1:
                raise ValueError(f"must contain {place} once; got {text!r}")
        return text

    return AfterValidator(validate)


class ImageLayout(Section):
    """Where the image codes are among the token ids, and how a prompt leads to them.

    A picture is ``begin_id``, then the codes of the grid row by row, then ``end_id``.
    """

    grid: Annotated[list[PositiveInt], Len(2, 2)]
    """Rows and columns of codes."""
    code_offset: NonNegativeInt
    """Token id of code 0; the others follow."""
    num_codes: PositiveInt
    begin_id: NonNegativeInt
    end_id: NonNegativeInt
    plan_tokens: NonNegativeInt = 0
    """Most tokens of the text plan before the picture; 0: the picture follows the prompt."""
    plan_begin_id: NonNegativeInt | None = None
    """Token that opens a plan; null: it follows the prompt directly."""
    prompt_format: Annotated[str, _containing("{prompt}")] = "{prompt}"
    question_format: Annotated[str, _containing("{image}", "{question}")] = "{image}{question}"
    """How the model is asked about a picture."""

    @model_validator(mode="after")
    def _check_ids(self) -> Self:
        special = [self.begin_id, self.end_id]
        special += [] if self.plan_begin_id is None else [self.plan_begin_id]
        codes = range(self.code_offset, self.code_offset + self.num_codes)
        if len(set(special)) < len(special) or any(token in codes for token in special):
            raise ValueError(
                f"begin_id, end_id and plan_begin_id must differ and not be codes "
                f"({codes.start} to {codes.stop - 1}); got {special}"
            )
        return self

    @property
    def cells(self) -> int:
        """Codes of a picture."""
        return self.grid[0] * self.grid[1]

    @property
    def room(self) -> int:
        """Tokens of a sample at most: the plan and ``begin_id``, if there is a plan, and codes."""
        return (self.plan_tokens + 1 if self.plan_tokens else 0) + self.cells

    @property
    def opening(self) -> int | None:
        """Token that follows the prompt: it opens the plan, or the picture."""
        return self.plan_begin_id if self.plan_tokens else self.begin_id

    def with_plan(self, plan_tokens: int | None) -> Self:
        """Return the layout with another length of the plan; None keeps it."""
        return self if plan_tokens is None else self.model_copy(update={"plan_tokens": plan_tokens})

    def write(self, folder: str | Path) -> None:
        """Write what :func:`read_layout` reads."""
        text = self.model_dump_json(indent=2) + "\n"
        (Path(folder) / FILE).write_text(text, encoding="utf-8")


def read_layout(folder: str | Path) -> ImageLayout:
    """Read the layout in a model's local folder.

    Raises:
        ModelError: there is no such file, or something in it cannot be.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise ModelError(
            f"{folder} has no {FILE}, which says where its vocabulary holds image codes; expected "
            "a local folder with a causal language model, that file and a `vq` decoder (for Janus, "
            "mmgrpo.policies.janus.write_layout makes the file)."
        )
    try:
        return ImageLayout.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise ModelError(f"{file}: {_first_problem(error)}.") from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}'{nearest(key, ImageLayout.model_fields)}".rstrip(".")
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message
