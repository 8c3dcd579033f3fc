"""The configuration of runs whose decisions are sampled tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from mmgrpo.config.schema import Config, Data, Eval, Model, Rollout, Section, Share, Speed


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


class Engine(Section):
    """What samples the completions."""

    name: Literal["native", "vllm"] = "native"
    """native: the policy itself."""
    url: str | None = None
    """A server that `mmgrpo serve` started; null: vLLM in the trainer's process."""
    folder: str | None = None
    """Where the server finds the weights, on a disk that it sees; null: a temporary folder."""
    options: dict[str, Any] = Field(default={})
    """Further arguments of vLLM, such as gpu_memory_utilization."""

    @model_validator(mode="after")
    def _only_vllm_has_options(self) -> Engine:
        if self.name != "vllm" and (self.url or self.folder or self.options):
            raise ValueError(f"url, folder and options are vllm's, and name is '{self.name}'")
        return self


def _as_engine(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class TokenRollout(Rollout):
    """How tokens are drawn."""

    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: PositiveInt | None = None
    min_p: Share = 0.0


class TextRollout(TokenRollout):
    """How completions are drawn."""

    max_new_tokens: PositiveInt = 512
    stop: list[str] = Field(default=[])
    """Strings that end a completion."""
    engine: Annotated[Engine, BeforeValidator(_as_engine)] = Engine()
    """native or vllm, or a mapping with name."""


class TokenSpeed(Speed):
    """What makes a step with a causal language model cheaper."""

    share_prompts: bool = True
    """Evaluate a prompt once for its group, not once per completion."""
    pack: bool = True
    """Evaluate prompts and completions as one row without padding, where share_prompts is on."""
    head_tile_rows: NonNegativeInt | None = None
    """Positions that the output head reads at a time; null: by their size; 0: all."""
    fast_decoding: bool = True
    """Sample without what transformers does around the layers in each step."""
    max_rows: PositiveInt | None = None
    """Samples drawn at the same time, finished ones making room for others; null: all."""


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
    speed: TokenSpeed = TokenSpeed()
    eval: TextEval = TextEval()


class VisionConfig(Config):
    """A run that trains a vision-language model."""

    modality: Literal["vision"]
    model: VisionModel
    data: VisionData
    rollout: TextRollout = TextRollout()
    speed: TokenSpeed = TokenSpeed()
    eval: TextEval = TextEval()


class ImageTokensModel(TextModel):
    """A causal language model whose vocabulary holds image codes, with their decoder."""

    plan_tokens: NonNegativeInt | None = None
    """Most tokens of the plan in words before the picture; 0: none; null: as the folder says."""


class ImageTokensRollout(TokenRollout):
    """How pictures are drawn."""

    ask_questions: bool = False
    """Let the model answer the column `questions` about its own picture, for `self_answer`."""
    train_answers: bool = False
    """Draw these answers and train them too, with the advantage of the picture."""
    max_answer_tokens: PositiveInt = 16

    @model_validator(mode="after")
    def _only_what_is_asked_is_answered(self) -> ImageTokensRollout:
        if self.train_answers and not self.ask_questions:
            raise ValueError("train_answers is true, and nothing is asked: set ask_questions")
        return self


class ImageTokensEval(Eval):
    """Evaluation of pictures."""

    temperature: NonNegativeFloat = 1.0
    """0: greedy."""


class ImageTokensConfig(Config):
    """A run that trains an autoregressive image generator."""

    modality: Literal["image_tokens"]
    model: ImageTokensModel
    rollout: ImageTokensRollout = ImageTokensRollout()
    speed: TokenSpeed = TokenSpeed()
    eval: ImageTokensEval = ImageTokensEval()


class MaskedTextRollout(Rollout):
    """How responses are unmasked."""

    max_new_tokens: PositiveInt = 128
    """Length of a response; what follows its end token does not count."""
    num_steps: PositiveInt | None = None
    """Network calls of a response; null: one for each token."""
    block_length: PositiveInt | None = None
    """Blocks of this length are completed from left to right; null: one block."""
    order: Literal["random", "confidence"] = "random"
    """Which tokens go first; only random has exact log-probabilities."""
    temperature: PositiveFloat = 1.0


class MaskedTextEval(TextEval):
    """Evaluation of responses."""

    order: Literal["random", "confidence"] = "confidence"


class MaskedTextConfig(Config):
    """A run that trains a masked diffusion language model."""

    modality: Literal["masked_text"]
    model: TextModel
    data: TextData
    rollout: MaskedTextRollout = MaskedTextRollout()
    eval: MaskedTextEval = MaskedTextEval()


class ImageScalesRollout(Rollout):
    """How pictures are drawn, scale by scale: from the softmax itself, without filters."""

    temperature: PositiveFloat = 1.0


class ImageScalesConfig(Config):
    """A run that trains a next-scale image generator."""

    modality: Literal["image_scales"]
    model: Model
    data: Data
    rollout: ImageScalesRollout = ImageScalesRollout()
    eval: ImageTokensEval = ImageTokensEval()
