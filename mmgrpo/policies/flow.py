"""Policies whose decisions are denoising steps: latent flow models of diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmgrpo.core.diffusion import MatchingRule, StepRule
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import DataError
from mmgrpo.policies.adapters import add_lora, make_reference
from mmgrpo.policies.fast_layers import use_fast_layers
from mmgrpo.policies.flow_export import load_weights, save_weights
from mmgrpo.policies.flow_families import family_of
from mmgrpo.policies.flow_loading import load_pipeline, prepare_pipeline
from mmgrpo.policies.latent_payload import FlowPayload, LatentPayload, LatentPrompts
from mmgrpo.policies.loading import parse_dtype
from mmgrpo.policies.matching_payload import MatchingPayload
from mmgrpo.policies.prompt_cache import PromptCache
from mmgrpo.protocols import Evaluation, Prompt, Request

_PLAIN = Request()


class FlowPolicy:
    """A text-to-image or text-to-video flow model; its decisions are stochastic denoising steps.

    Or (noise, level) draws on its clean samples: the trajectories' payload knows.

    Only the denoising network trains; text encoders and VAE are frozen. The network runs in its own
    dtype; latents, velocities and log-probabilities are float32. The log-probability of a decision
    is the mean over the latent elements (see :func:`mmgrpo.core.diffusion.step`).

    Attributes:
        pipe: the diffusers pipeline.
        family: what is particular to its architecture.
        network: the denoising network, or what peft or a trainer wrapped around it.
        modality: what it draws, ``image`` or ``video``.
        guidance_scale: of rollouts that do not say otherwise.
        negative_prompt: what guidance leads away from, where it compares with a second prompt.
        forwards: network calls made so far.
    """

    ratio_tolerance: Mapping[str, float] = {"float32": 1e-5, "bfloat16": 2e-3, "float16": 1e-3}
    """Tight, because a log-probability is a mean over the latent: so are the clip ranges."""

    def __init__(  # noqa: PLR0913 - each names one choice
        self,
        source: str | Path | Any,
        *,
        lora: Mapping[str, Any] | None = None,
        reference: str = "auto",
        reference_decay: float = 0.99,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        guidance_scale: float = 1.0,
        negative_prompt: str = "",
        max_prompt_tokens: int | None = None,
        max_decisions: int | None = None,
        fast_layers: bool = True,
        seed: int = 0,
    ) -> None:
        """Load the pipeline and choose what trains.

        Args:
            source: a pipeline folder, a hub id or a diffusers pipeline.
            lora: options of :func:`add_lora` (rank, alpha, targets, ...); None trains the whole
                transformer. Targets default to the family's attention projections, the initial A
                to a normal distribution.
            reference: kind of reference, see :func:`make_reference`.
            reference_decay: decay per update of an ``ema`` reference.
            dtype: dtype of the transformer's and the encoders' weights.
            gradient_checkpointing: compute activations again in the backward pass.
            guidance_scale: 1 is none; classifier-free or embedded, as the model has it.
            negative_prompt: what classifier-free guidance leads away from.
            max_prompt_tokens: length of the T5 part of a prompt; None takes the model's own.
            max_decisions: evaluate at most this many denoising steps in one network call.
            fast_layers: compute float32 layers on a CPU in fewer and faster steps.
            seed: seed of the adapter's initial weights.

        Raises:
            ModelError: the folder is missing, incomplete or of another kind.
            ConfigError: an option that does not fit.
        """
        is_path = isinstance(source, str | Path)
        pipe: Any = load_pipeline(source, dtype=dtype) if is_path else source
        self.pipe = pipe
        prepare_pipeline(self.pipe, parse_dtype(dtype))
        self.family = family_of(self.pipe)
        self.family.needs_negative(guidance_scale)
        self.family.check_prompt_length(max_prompt_tokens)
        self.modality = self.family.modality
        self.guidance_scale = guidance_scale
        self.negative_prompt = negative_prompt
        self.max_decisions = max_decisions
        self.forwards = 0
        network = self.family.network
        if gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if lora is None:
            network.requires_grad_(True)
        else:
            targets = self.family.present_targets()
            network = add_lora(
                network, **{"targets": targets, "init": "gaussian", "seed": seed, **_set(lora)}
            )
        if fast_layers:
            use_fast_layers(network)
        self.network: torch.nn.Module = network
        self._saved = network  # a trainer may wrap self.network
        self._prompts = PromptCache(self.family, max_length=max_prompt_tokens)
        self.reference_weights = make_reference(reference, network, decay=reference_decay)

    @property
    def device(self) -> torch.device:
        """Where the network's weights are."""
        return next(self.family.network.parameters()).device

    def encode(
        self,
        prompts: Sequence[Prompt],
        *,
        guidance_scale: float | None = None,
        size: tuple[int, int] | None = None,
    ) -> LatentPrompts:
        """Return the embeddings of the prompts and how strongly they guide.

        Args:
            prompts: plain texts; for an editing model each with its image.
            guidance_scale: None takes the policy's.
            size: height and width in pixels to which the images to edit are resized; None takes the
                model's own.

        Raises:
            DataError: a prompt that is no plain text, or has no or too many images.
            ConfigError: the model has no guidance of that scale.
        """
        self.check(prompts)
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        texts = [str(prompt.content) for prompt in prompts]
        pictures = {"image": self._pictures(prompts, size)} if self.family.edits else {}
        return LatentPrompts(
            embeddings={**self._prompts.get(texts, self.device), **pictures},
            guidance_scale=scale,
            negative=self._prompts.get([self.negative_prompt], self.device)
            if self.family.needs_negative(scale)
            else None,
        )

    def _pictures(self, prompts: Sequence[Prompt], size: tuple[int, int] | None) -> Tensor:
        """``[P, C, h, w]`` latents of the prompts' images, each encoded alone."""
        height, width = size or (self.family.default_size,) * 2
        encoded = [
            self.family.from_images(
                [prompt.images[0]], height=height, width=width, device=self.device
            )
            for prompt in prompts
        ]
        return torch.cat(encoded)

    def check(self, prompts: Sequence[Prompt], *, room: int = 0) -> None:
        """Refuse prompts that are no plain text, or have not the images the model takes.

        Args:
            prompts: all prompts of the run.
            room: not used: denoising steps take no place in a prompt's context.

        Raises:
            DataError: names the row.
        """
        del room
        takes = int(self.family.edits)
        for prompt in prompts:
            if not isinstance(prompt.content, str):
                raise DataError(
                    f"{prompt.place}: a flow model takes plain text prompts; got chat messages."
                )
            if len(prompt.images) != takes:
                raise DataError(
                    f"{prompt.place}: this {type(self.pipe).__name__} takes plain text prompts "
                    f"with {takes} images; got {len(prompt.images)} images."
                )

    def release_encoders(self) -> None:
        """Move the text encoders to the CPU; a prompt that is not cached brings them back."""
        for encoder in self.family.text_encoders:
            encoder.to("cpu")

    def velocity(
        self, latents: Tensor, sigma: Tensor, prompts: LatentPrompts, prompt_row: Tensor
    ) -> Tensor:
        """Return the guided velocity ``[N, ...]`` float32; the one place that calls the network.

        Args:
            latents: ``[N, ...]`` states.
            sigma: ``[N]`` their noise levels.
            prompts: P prompts.
            prompt_row: ``[N]`` the prompt of each state.
        """
        self.forwards += 1
        return self.family.velocity(
            self.network,
            latents,
            sigma,
            prompts.rows(prompt_row),
            guidance=prompts.guidance_scale,
            negative=prompts.negative,
        )

    def payload(
        self,
        prompts: LatentPrompts,
        prompt_row: Tensor,
        latents: Tensor,
        sigmas: Tensor,
        rule: StepRule,
        *,
        owner: Tensor | None = None,
    ) -> LatentPayload:
        """Bind ``[B, S + 1, ...]`` states to their prompts and to how they were sampled."""
        return LatentPayload(prompts, prompt_row, latents, sigmas, rule, owner)

    def matching_payload(
        self, prompts: LatentPrompts, prompt_row: Tensor, clean: Tensor, rule: MatchingRule
    ) -> MatchingPayload:
        """Bind ``[B, ...]`` clean latents, which are noised again, to their prompts."""
        return MatchingPayload(prompts, prompt_row, clean, rule, self.family.process)

    def evaluate(self, trajectories: Trajectories, request: Request = _PLAIN) -> Evaluation:
        """Return the log-probability of every decision in the mask, and what the request adds.

        A state that several decisions start from goes through the network once.

        Raises:
            MethodError: a divergence is asked for and the prediction it is measured from is absent.
        """
        rows, steps = trajectories.mask.nonzero(as_tuple=True)
        payload: FlowPayload = trajectories.payload
        found = None
        if len(rows):
            velocity = self._velocities(trajectories, rows, steps)
            found = payload.decide(trajectories, rows, steps, velocity, request)

        def scatter(name: str, shape: tuple[int, ...] = ()) -> Tensor:
            blank = torch.zeros(*trajectories.mask.shape, *shape, device=rows.device)
            return blank if found is None else blank.index_put((rows, steps), getattr(found, name))

        return Evaluation(
            log_prob=scatter("log_prob"),
            entropy=scatter("entropy") if request.entropy else None,
            divergence=scatter("divergence") if request.divergence else None,
            prediction=scatter("prediction", payload.shape) if request.prediction else None,
        )

    def _velocities(self, trajectories: Trajectories, rows: Tensor, steps: Tensor) -> Tensor:
        """Velocity ``[N, ...]`` at the state of each decision."""
        payload: FlowPayload = trajectories.payload
        first, index = payload.distinct(rows, steps)
        shared = len(first) < len(index)
        if shared:
            rows, steps = rows[first], steps[first]
        size = self.max_decisions or len(rows)
        parts = [
            self.velocity(
                *payload.states(trajectories, row, step), payload.prompts, payload.prompt_row[row]
            )
            for row, step in zip(rows.split(size), steps.split(size), strict=True)
        ]
        velocity = torch.cat(parts)
        return velocity[index] if shared else velocity

    @property
    def has_reference(self) -> bool:
        """Whether there are weights to compare with."""
        return self.reference_weights.available

    def reference(self) -> AbstractContextManager[None]:
        """Within the context, evaluate() answers with the reference's weights."""
        return self.reference_weights.active()

    def export(self, directory: Path) -> None:
        """Write a whole pipeline folder, or the adapter alone if there is one."""
        save_weights(self.pipe, self._saved, Path(directory), denoiser=self.family.denoiser)

    def load_export(self, directory: Path) -> None:
        """Load the weights that :meth:`export` wrote, into the present tensors.

        Raises:
            ModelError: the folder is missing, or holds weights that do not fit.
        """
        load_weights(self._saved, Path(directory), denoiser=self.family.denoiser)


def _set(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
