"""Draws images from a flow policy: some steps stochastic, the rest along the ODE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmgrpo.core.credit import node_weight
from mmgrpo.core.diffusion import (
    AUTO,
    FLOW,
    KERNELS,
    MatchingRule,
    Process,
    Selection,
    StepRule,
    Suffix,
    Tree,
    fan_out,
    select_steps,
)
from mmgrpo.core.seeding import generator, mix_seed
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import ConfigError, nearest
from mmgrpo.protocols import Cost, OnSamples, Prompt, Rollout, Sample
from mmgrpo.rollout.denoise import Course, Drawn, check_finite, denoise, nodes, step_sizes
from mmgrpo.rollout.flow_model import FlowModel
from mmgrpo.rollout.matching import draw_matching, on_clean_samples
from mmgrpo.rollout.rows import Rows, lay_out

ALL_BUT_LAST: Mapping[str, Any] = {"kind": "all_but_last"}
LINEAR = Tree()
OWN_GRID = Suffix()
DENOISING = MatchingRule()


class FlowEngine:
    """Samples images in this process.

    Sample g of prompt p has its own noise streams, named by (seed, p.index, g): the initial latent
    and the noise of each step depend on nothing else, whatever the batch, the selection or the
    device. Samples that share a state share its streams, named after the first. A suffix of several
    strides ends every sample on each of them: the group then has a row for each sample and stride,
    the first stride's first, and ``stratum`` tells which.

    Attributes:
        sigmas: ``[S + 1]`` float32 noise levels.
        selection: which steps are stochastic and trained, see
            :func:`mmgrpo.core.diffusion.select_steps`; may be changed between rollouts.
    """

    room = 0  # denoising steps take no place in a prompt's context
    announces = True

    def __init__(  # noqa: PLR0913 - each names one choice of the sampler
        self,
        policy: FlowModel,
        *,
        num_steps: int,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        kernel: str = AUTO,
        eta: float | None = None,
        noise_growth: float = 0.0,
        reduce: str = "mean",
        selection: Mapping[str, Any] = ALL_BUT_LAST,
        shared_noise: bool = False,
        tree: Tree = LINEAR,
        suffix: Suffix = OWN_GRID,
        matching: MatchingRule = DENOISING,
        schedule: Tensor | None = None,
        shift: float | None = None,
        guidance_scale: float | None = None,
        decode: bool = True,
        max_rows: int | None = None,
        keep_velocity: bool = False,
    ) -> None:
        """Fix how images are drawn.

        Args:
            policy: a flow policy.
            num_steps: number of denoising steps S.
            height: of the images, in pixels; None takes the model's own size.
            width: of the images, in pixels; None takes the model's own size.
            num_frames: of the videos; None takes the model's own number, or draws images.
            kernel: step kernel of the stochastic steps; ``auto`` is the family's own, ``ode``
                draws without decisions, for evaluation.
            eta: noise scale of the kernel; None takes the published one.
            noise_growth: how much larger it gets over the stochastic steps, see
                :meth:`mmgrpo.core.diffusion.StepRule.growing`.
            reduce: ``mean`` or ``sum`` of the log-density over the latent elements.
            selection: which steps are stochastic and trained; the last step never is.
            shared_noise: one initial latent for all samples of a prompt.
            tree: which denoising steps the samples of a prompt share.
            suffix: how the steps after the last stochastic one are solved.
            matching: whether the decisions are draws on the clean samples instead of steps.
            schedule: ``[S + 1]`` noise levels; None takes what the pipeline itself would use.
            shift: static shift of a uniform schedule, in place of ``schedule``.
            guidance_scale: None takes the policy's.
            decode: whether samples carry images.
            max_rows: most images in one network or decoder call.
            keep_velocity: whether the trajectories carry the velocities, as ``old_prediction``.

        Raises:
            ConfigError: an option that does not fit the model or another option.
        """
        kernel = _kernel(policy.family.process, kernel, suffix)
        eta = KERNELS[kernel].eta if eta is None else eta
        if eta < 0:
            raise ConfigError(f"eta must be at least 0; got {eta}.")
        self.policy = policy
        self.height = height or policy.family.default_size
        self.width = width or policy.family.default_size
        frames = {} if num_frames is None else {"num_frames": num_frames}
        self.shape = policy.family.latent_shape(self.height, self.width, **frames)
        self.sigmas = self._schedule(num_steps, schedule, shift)
        self.rule = StepRule(kernel, eta, self.sigmas[1].item(), reduce)
        self.noise_growth = noise_growth
        self.shared_noise = shared_noise
        self.tree = tree
        self.suffix = suffix
        self.matching = matching
        self.guidance_scale = guidance_scale
        if guidance_scale is not None:
            policy.family.needs_negative(guidance_scale)
        self.decode = decode
        self.max_rows = max_rows
        self.keep_velocity = keep_velocity
        self.selection = selection
        self._select(0, [0])

    def _schedule(self, num_steps: int, schedule: Tensor | None, shift: float | None) -> Tensor:
        if num_steps < 1:
            raise ConfigError(f"num_steps must be at least 1; got {num_steps}.")
        if schedule is not None and shift is not None:
            raise ConfigError("Give a schedule or a shift, not both.")
        if shift is not None:
            return self.policy.family.shifted(num_steps, shift)
        if schedule is None:
            schedule = self.policy.family.schedule(num_steps, height=self.height, width=self.width)
        sigmas = schedule.float()
        falling = sigmas.dim() == 1 and bool((sigmas.diff() < 0).all())
        end = self.policy.family.final_sigma
        if len(sigmas) != num_steps + 1 or not falling or sigmas[0] > 1 or sigmas[-1] != end:
            raise ConfigError(
                f"The schedule must fall from at most 1 to {end} in num_steps + 1 = "
                f"{num_steps + 1} values; "
                f"got {[round(value, 4) for value in sigmas.flatten().tolist()]}."
            )
        return sigmas

    @property
    def num_steps(self) -> int:
        """Number of denoising steps S."""
        return len(self.sigmas) - 1

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        seed: int,
        version: int = 0,
        iteration: int = 0,
        on_samples: OnSamples | None = None,
    ) -> Rollout:
        """Draw ``group_size`` images per prompt and stride of the suffix.

        Args:
            prompts: plain text prompts with distinct indices.
            group_size: samples per prompt.
            seed: names the rollout.
            version: of the weights.
            iteration: training iteration, which moving windows follow.
            on_samples: gets each group when it is decoded; each is then decoded alone.

        Raises:
            ConfigError: the group does not fit the tree.
            DataError: a prompt that is no plain text.
            MmgrpoError: the network's output is not finite.
        """
        before, device = self.policy.forwards, self.policy.device
        size = (self.height, self.width)
        encoded = self.policy.encode(prompts, guidance_scale=self.guidance_scale, size=size)
        strata = len(self.suffix.strides)
        rows = lay_out(prompts, group_size=group_size, strata=strata, seed=seed, device=device)
        selection = self._select(seed, [mix_seed(*name) for name in rows.names], iteration)
        rule = self.rule.growing(self.noise_growth, selection.stochastic)
        owner = self._owners(group_size, len(prompts), selection).to(device)
        sigmas = self.sigmas.to(device)
        course = Course(sigmas, rule, self.suffix, selection.stochastic, owner, rows.stratum)
        drawn = self._draw(encoded, rows, course)
        mask = selection.trained.to(device) & drawn.random
        std, length = step_sizes(sigmas, rule)
        trajectories = Trajectories(
            group=torch.tensor([prompt.index for prompt in rows.prompts], device=device),
            mask=mask,
            old_log_prob=drawn.log_prob * mask,
            version=torch.full_like(rows.prompt_row, version),
            node=nodes(owner, group_size * strata, mask),
            stratum=rows.stratum if strata > 1 else None,
            step_std=std.repeat(len(mask), 1),
            step_length=length.repeat(len(mask), 1),
            old_prediction=torch.stack(drawn.velocity, dim=1) if self.keep_velocity else None,
            payload=self.policy.payload(
                encoded, rows.prompt_row, drawn.latents, sigmas, rule, owner=owner
            ),
        )
        if self.matching.on:
            clean = drawn.latents[:, -1].clone()
            family = self.policy.family
            draws = draw_matching(clean, rows.names, self.matching, self.sigmas, family)
            bound = self.policy.matching_payload(encoded, rows.prompt_row, clean, self.matching)
            trajectories = on_clean_samples(trajectories, *draws, bound)
        samples = self._samples(drawn.latents[:, -1], rows, group_size * strata, on_samples)
        forwards = self.policy.forwards - before
        cost = Cost(forwards=forwards, decisions=round(float(node_weight(trajectories).sum())))
        return Rollout(trajectories, samples, cost)

    def _draw(self, encoded: Any, rows: Rows, course: Course) -> Drawn:
        device, names = rows.prompt_row.device, rows.names
        starts = [
            names[row][:2] if self.shared_noise else names[row]
            for row in course.owner[:, 0].tolist()
        ]

        def velocity(x: Tensor, sigma: Tensor, chosen: Tensor) -> Tensor:
            return self._velocity(x, sigma, encoded, rows.prompt_row[chosen])

        def noise(chosen: Tensor, index: int) -> Tensor:
            return self._noise([(*names[row], index) for row in chosen.tolist()], device)

        drawn = denoise(self._noise(starts, device), course, velocity, noise)
        check_finite(drawn.latents[:, -1])
        return drawn

    def _owners(self, group_size: int, prompts: int, selection: Selection) -> Tensor:
        """``[B, S + 1]``: the first row that has the same state."""
        try:
            one = self.tree.owners(group_size, selection.stochastic, shared_start=self.shared_noise)
        except ValueError as error:
            raise ConfigError(f"The rollout's tree does not fit: {error}") from error
        if len(self.suffix.strides) > 1:
            level = int(selection.stochastic.nonzero().max()) + 1
            one = fan_out(one, level, len(self.suffix.strides))
        first = torch.arange(prompts) * len(one)
        return (first[:, None, None] + one).flatten(0, 1)

    def _select(self, seed: int, sample_seeds: Sequence[int], iteration: int = 0) -> Selection:
        if self.rule.is_still:
            nothing = torch.zeros(self.num_steps, dtype=torch.bool)
            return Selection(nothing, nothing.repeat(len(sample_seeds), 1))
        try:
            chosen = select_steps(
                self.selection,
                self.num_steps,
                seed=seed,
                sample_seeds=sample_seeds,
                iteration=iteration,
            )
        except ValueError as error:
            raise ConfigError(f"The step selection does not fit: {error}") from error
        noisy = self.sigmas[1:] > 0
        return Selection(chosen.stochastic & noisy, chosen.trained & noisy)

    def _noise(self, names: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
        """Return ``[B, ...]`` standard normal, each row from the stream of its name."""
        rows = [torch.randn(self.shape, generator=generator(*name)) for name in names]
        return torch.stack(rows).to(device)

    def _velocity(self, x: Tensor, sigma: Tensor, encoded: Any, prompt_row: Tensor) -> Tensor:
        size = self.max_rows or len(x)
        parts = zip(x.split(size), prompt_row.split(size), strict=True)
        return torch.cat(
            [
                self.policy.velocity(part, sigma.expand(len(part)), encoded, rows)
                for part, rows in parts
            ]
        )

    def _samples(
        self, latents: Tensor, rows: Rows, group: int, on_samples: OnSamples | None
    ) -> list[Sample]:
        """Decode ``[B, ...]`` final latents, all or each group of so many rows."""
        kind, samples = self.policy.family.modality, list[Sample]()
        if on_samples is None:
            group = len(latents)
        for first in range(0, len(latents), group):
            part = slice(first, first + group)
            pairs = zip(rows.prompts[part], self._decoded(latents[part]), strict=True)
            made = [Sample(prompt, **{kind: one}) for prompt, one in pairs]
            if on_samples is not None:
                on_samples(made)
            samples += made
        return samples

    def _decoded(self, latents: Tensor) -> list[Any]:
        if not self.decode:
            return [None] * len(latents)
        parts = latents.split(self.max_rows or len(latents))
        return [made for part in parts for made in self.policy.family.decode(part)]


def _kernel(process: Process, name: str, suffix: Suffix) -> str:
    """The step kernel that ``name`` means for the process; refuse what does not go together."""
    if name not in (AUTO, *KERNELS):
        raise ConfigError(f"Unknown kernel '{name}'{nearest(name, (AUTO, *KERNELS))}")
    if process is not FLOW and not suffix.plain:
        raise ConfigError(f"A suffix solves the ODE of a flow model, and this is {process.name}.")
    try:
        return process.kernel(name)
    except ValueError as error:
        raise ConfigError(f"The {error}") from error
