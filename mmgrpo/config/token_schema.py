"""The configuration of runs whose decisions are sampled tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from mmgrpo.config.schema import Config, Data, Eval, Model, Rollout, Share


class TextModel(Model):
    """A causal language model."""

    attention: str = "sdpa"
    """Attention implementation of transformers."""
    max_prompt_tokens: PositiveInt | None = None
    """A longer prompt is an error; null: what the model's context leaves beside the completion."""


class VisionModel(TextModel):
    """A vision-language model."""

    train_vision: bool = False
    """Whether the vision tower trains too."""


class TextData(Data):
    """Prompts for a language model."""

    system_prompt: str | None = None


class VisionData(TextData):
    """Prompts with images."""

    image_column: str = "images"


class TextRollout(Rollout):
    """How completions are drawn."""

    max_new_tokens: PositiveInt = 512
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: PositiveInt | None = None
    min_p: Share = 0.0
    stop: list[str] = Field(default=[])
    """Strings that end a completion."""


class TextEval(Eval):
    """Evaluation of completions."""

    temperature: NonNegativeFloat = 0.0
    """0: greedy."""

    @model_validator(mode="after")
    def _no_equal_samples(self) -> TextEval:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples is {self.samples}, but temperature 0 makes them all equal")
        return self


class TextConfig(Config):
    """A run that trains a language model."""

    modality: Literal["text"]
    model: TextModel
    data: TextData
    rollout: TextRollout = TextRollout()
    eval: TextEval = TextEval()


class VisionConfig(Config):
    """A run that trains a vision-language model."""

    modality: Literal["vision"]
    model: VisionModel
    data: VisionData
    rollout: TextRollout = TextRollout()
    eval: TextEval = TextEval()
