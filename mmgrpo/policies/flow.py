"""Policies whose decisions are denoising steps: latent flow models of diffusers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmgrpo.core.diffusion import StepOutput, StepRule
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import DataError, MethodError
from mmgrpo.policies.adapters import add_lora, make_reference
from mmgrpo.policies.flow_export import load_weights, save_weights
from mmgrpo.policies.flow_families import family_of
from mmgrpo.policies.flow_loading import load_pipeline, prepare_pipeline
from mmgrpo.policies.latent_payload import LatentPayload, LatentPrompts
from mmgrpo.policies.loading import parse_dtype
from mmgrpo.policies.prompt_cache import PromptCache
from mmgrpo.protocols import Evaluation, Prompt, Request

_PLAIN = Request()


@dataclass(frozen=True)
class _Decisions:
    """N decisions of a batch, evaluated; each field ``[N, ...]``, None where not asked for."""

    log_prob: Tensor
    entropy: Tensor | None
    divergence: Tensor | None
    prediction: Tensor | None


class FlowPolicy:
    """A text-to-image flow model whose stochastic denoising steps are the decisions.

    Only the transformer trains; text encoders and VAE are frozen. The network runs in its own
    dtype; latents, velocities and log-probabilities are float32. The log-probability of a decision
    is the mean over the latent elements (see :func:`mmgrpo.core.diffusion.step`).

    Attributes:
        pipe: the diffusers pipeline.
        family: what is particular to its architecture.
        network: the transformer, or what peft or a trainer wrapped around it.
        guidance_scale: of rollouts that do not say otherwise.
        forwards: network calls made so far.
    """

    modality = "image"

    def __init__(
        self,
        source: str | Path | Any,
        *,
        lora: Mapping[str, Any] | None = None,
        reference: str = "auto",
        reference_decay: float = 0.99,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        guidance_scale: float = 1.0,
        max_prompt_tokens: int | None = None,
        max_decisions: int | None = None,
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
            max_prompt_tokens: length of the T5 part of a prompt; None takes the model's own.
            max_decisions: evaluate at most this many denoising steps in one network call.
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
        self.guidance_scale = guidance_scale
        self.max_decisions = max_decisions
        self.forwards = 0
        network = self.pipe.transformer
        if gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if lora is None:
            network.requires_grad_(True)
        else:
            targets = self.family.present_targets()
            network = add_lora(
                network, **{"targets": targets, "init": "gaussian", "seed": seed, **_set(lora)}
            )
        self.network: torch.nn.Module = network
        self._saved = network  # a trainer may wrap self.network
        self._prompts = PromptCache(self.family, max_length=max_prompt_tokens)
        self.reference_weights = make_reference(reference, network, decay=reference_decay)

    @property
    def device(self) -> torch.device:
        """Where the transformer's weights are."""
        return next(self.pipe.transformer.parameters()).device

    def encode(
        self, prompts: Sequence[Prompt], *, guidance_scale: float | None = None
    ) -> LatentPrompts:
        """Return the embeddings of the prompts and how strongly they guide (None: the default).

        Raises:
            DataError: a prompt that is no plain text, or has images.
            ConfigError: the model has no guidance of that scale.
        """
        self.check(prompts)
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        texts = [str(prompt.content) for prompt in prompts]
        return LatentPrompts(
            embeddings=self._prompts.get(texts, self.device),
            guidance_scale=scale,
            negative=self._prompts.get([""], self.device)
            if self.family.needs_negative(scale)
            else None,
        )

    def check(self, prompts: Sequence[Prompt], *, room: int = 0) -> None:
        """Refuse prompts that are no plain text, or have images.

        Args:
            prompts: all prompts of the run.
            room: not used: denoising steps take no place in a prompt's context.

        Raises:
            DataError: names the row.
        """
        del room
        for prompt in prompts:
            if not isinstance(prompt.content, str) or prompt.images:
                raise DataError(
                    f"{prompt.place}: an image model takes plain text prompts; got "
                    f"{'images' if prompt.images else 'chat messages'}."
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

    def evaluate(self, trajectories: Trajectories, request: Request = _PLAIN) -> Evaluation:
        """Return the log-probability of every decision in the mask, and what the request adds.

        A state that several decisions start from goes through the network once.

        Raises:
            MethodError: a divergence is asked for and the prediction it is measured from is absent.
        """
        rows, steps = trajectories.mask.nonzero(as_tuple=True)
        found = self._decide(trajectories, rows, steps, request) if len(rows) else None

        def scatter(name: str, shape: tuple[int, ...] = ()) -> Tensor:
            blank = torch.zeros(*trajectories.mask.shape, *shape, device=rows.device)
            return blank if found is None else blank.index_put((rows, steps), getattr(found, name))

        shape = trajectories.payload.latents.shape[2:]
        return Evaluation(
            log_prob=scatter("log_prob"),
            entropy=scatter("entropy") if request.entropy else None,
            divergence=scatter("divergence") if request.divergence else None,
            prediction=scatter("prediction", shape) if request.prediction else None,
        )

    def _decide(
        self, trajectories: Trajectories, rows: Tensor, steps: Tensor, request: Request
    ) -> _Decisions:
        payload: LatentPayload = trajectories.payload
        x, x_next = payload.latents[rows, steps], payload.latents[rows, steps + 1]
        sigma, sigma_next = payload.sigmas[steps], payload.sigmas[steps + 1]
        velocity = self._velocities(payload, rows, steps)
        out = payload.rule.step(velocity, x, sigma, sigma_next, x_next=x_next)
        divergence = None
        if request.divergence is not None:
            other = _stored(trajectories, request.divergence_target)[rows, steps]
            divergence = payload.rule.divergence(
                request.divergence, velocity, other, sigma, sigma_next
            )
        entropy = _entropy(out, payload.rule.reduce) if request.entropy else None
        return _Decisions(out.log_prob, entropy, divergence, velocity)

    def _velocities(self, payload: LatentPayload, rows: Tensor, steps: Tensor) -> Tensor:
        """Velocity ``[N, ...]`` at the state that each decision starts from."""
        first, index = payload.distinct(rows, steps)
        rows, steps = rows[first], steps[first]
        size = self.max_decisions or len(rows)
        parts = [
            self.velocity(
                payload.latents[row, step],
                payload.sigmas[step],
                payload.prompts,
                payload.prompt_row[row],
            )
            for row, step in zip(rows.split(size), steps.split(size), strict=True)
        ]
        return torch.cat(parts)[index]

    @property
    def has_reference(self) -> bool:
        """Whether there are weights to compare with."""
        return self.reference_weights.available

    def reference(self) -> AbstractContextManager[None]:
        """Within the context, evaluate() answers with the reference's weights."""
        return self.reference_weights.active()

    def export(self, directory: Path) -> None:
        """Write a whole pipeline folder, or the adapter alone if there is one."""
        save_weights(self.pipe, self._saved, Path(directory))

    def load_export(self, directory: Path) -> None:
        """Load the weights that :meth:`export` wrote, into the present tensors.

        Raises:
            ModelError: the folder is missing, or holds weights that do not fit.
        """
        load_weights(self.pipe, self._saved, Path(directory))


def _set(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _stored(trajectories: Trajectories, target: str) -> Tensor:
    stored: Tensor | None = getattr(trajectories, f"{target}_prediction")
    if stored is None:
        raise MethodError(
            f"The divergence is measured from the {target} prediction, "
            "and the trajectories have none."
        )
    return stored


def _entropy(out: StepOutput, reduce: str) -> Tensor:
    """Entropy of the step's Gaussian: per latent element, or their sum."""
    per_element = out.std.log() + (1 + math.log(2 * math.pi)) / 2
    return per_element * (out.mean[0].numel() if reduce == "sum" else 1)
