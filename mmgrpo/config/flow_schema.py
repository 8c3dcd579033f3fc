"""The configuration of runs whose decisions are denoising steps."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from mmgrpo.config.schema import Config, Eval, Model, Rollout


class ImageModel(Model):
    """A flow image pipeline."""

    max_prompt_tokens: PositiveInt | None = None
    """Length of the T5 part of a prompt; null: the pipeline's own."""


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


class ImageConfig(Config):
    """A run that trains a flow or diffusion image model."""

    modality: Literal["image"]
    model: ImageModel
    rollout: ImageRollout = ImageRollout()
    eval: ImageEval = ImageEval()
