"""The configuration of runs whose decisions are denoising steps."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from mmgrpo.config.schema import Config, Data, Eval, Model, Rollout


class ImageModel(Model):
    """A flow pipeline."""

    max_prompt_tokens: PositiveInt | None = None
    """Length of the T5 part of a prompt; null: the pipeline's own."""


class ImageData(Data):
    """The prompts, and images where somebody has stated which are preferred."""

    image_column: str | None = None
    """The image to edit, for an editing model."""
    preferred_column: str | None = None
    """Paths of preferred images, from the data's folder on; for methods with pairs: given."""
    rejected_column: str | None = None
    """Paths of rejected images; null: samples take their place."""


class ImageRollout(Rollout):
    """How images are drawn; the method's preset names the sampler's kernel."""

    num_steps: PositiveInt = 10
    height: PositiveInt | None = None
    """Pixels; null: the model's own size."""
    width: PositiveInt | None = None
    guidance_scale: NonNegativeFloat = 1.0
    """Classifier-free guidance (1: none), or the model's embedded guidance."""
    shift: PositiveFloat | None = None
    """Time shift of the sigma schedule; null: the pipeline's scheduler decides."""


class ImageEval(Eval):
    """Evaluation of images."""

    num_steps: PositiveInt | None = None
    """null: as in the rollout."""
    guidance_scale: NonNegativeFloat | None = None
    """null: as in the rollout."""


class VideoRollout(ImageRollout):
    """How videos are drawn."""

    height: PositiveInt | None = 480
    width: PositiveInt | None = 832
    num_frames: PositiveInt | None = None
    """A multiple of the model's compression in time, plus 1; null: the pipeline's own number."""
    negative_prompt: str = ""
    """What classifier-free guidance leads away from."""


class ImageConfig(Config):
    """A run that trains a flow or diffusion image model."""

    modality: Literal["image"]
    model: ImageModel
    data: ImageData
    rollout: ImageRollout = ImageRollout()
    eval: ImageEval = ImageEval()


class VideoConfig(Config):
    """A run that trains a flow video model."""

    modality: Literal["video"]
    model: ImageModel
    rollout: VideoRollout = VideoRollout()
    eval: ImageEval = ImageEval()
