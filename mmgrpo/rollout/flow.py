"""Draws images from a flow policy: some steps stochastic, the rest along the ODE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mmgrpo.core.credit import node_weight
from mmgrpo.core.diffusion import (
    KERNELS,
    Selection,
    StepRule,
    Suffix,
    Tree,
    linear_shift,
    select_steps,
)
from mmgrpo.core.seeding import generator, mix_seed
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import ConfigError, MmgrpoError, nearest
from mmgrpo.protocols import Cost, Prompt, Rollout, Sample
from mmgrpo.rollout.denoise import Course, Drawn, denoise, nodes, step_sizes

ALL_BUT_LAST: Mapping[str, Any] = {"kind": "all_but_last"}
LINEAR = Tree()
OWN_GRID = Suffix()


class FlowModel(Protocol):
    """What the engine asks of a policy."""

    family: Any
    forwards: int

    @property
    def device(self) -> torch.device:
        """Where to sample."""
        ...

    def encode(self, prompts: Sequence[Prompt], *, guidance_scale: float | None = None) -> Any:
        """Return what guides P prompts."""
        ...

    def velocity(self, latents: Tensor, sigma: Tensor, prompts: Any, prompt_row: Tensor) -> Tensor:
        """Return ``[N, ...]`` float32."""
        ...

    def payload(
        self,
        prompts: Any,
        prompt_row: Tensor,
        latents: Tensor,
        sigmas: Tensor,
        rule: StepRule,
        *,
        owner: Tensor | None = None,
    ) -> Any:
        """Bind the states to their prompts, to how they were sampled and to who shares them."""
        ...


class FlowEngine:
    """Samples images in this process.

    Sample g of prompt p has its own noise streams, named by (seed, p.index, g): the initial latent
    and the noise of each step depend on nothing else, whatever the batch, the selection or the
    device. Samples that share a state share its streams, named after the first.

    Attributes:
        sigmas: ``[S + 1]`` float32 noise levels.
        selection: which steps are stochastic and trained, see
            :func:`mmgrpo.core.diffusion.select_steps`; may be changed between rollouts.
    """

    room = 0  # denoising steps take no place in a prompt's context

    def __init__(  # noqa: PLR0913 - each names one choice of the sampler
        self,
        policy: FlowModel,
        *,
        num_steps: int,
        height: int | None = None,
        width: int | None = None,
        kernel: str = "flow_sde",
        eta: float = 0.7,
        reduce: str = "mean",
        selection: Mapping[str, Any] = ALL_BUT_LAST,
        shared_noise: bool = False,
        tree: Tree = LINEAR,
        suffix: Suffix = OWN_GRID,
        schedule: Tensor | None = None,
        shift: float | None = None,
        guidance_scale: float | None = None,
        decode: bool = True,
        max_rows: int | None = None,
    ) -> None:
        """Fix how images are drawn.

        Args:
            policy: a flow policy.
            num_steps: number of denoising steps S.
            height: of the images, in pixels; None takes the model's own size.
            width: of the images, in pixels; None takes the model's own size.
            kernel: step kernel of the stochastic steps; ``ode`` draws without decisions, for
                evaluation.
            eta: noise scale of the kernel.
            reduce: ``mean`` or ``sum`` of the log-density over the latent elements.
            selection: which steps are stochastic and trained; the last step never is.
            shared_noise: one initial latent for all samples of a prompt.
            tree: which denoising steps the samples of a prompt share.
            suffix: how the steps after the last stochastic one are solved.
            schedule: ``[S + 1]`` noise levels; None takes what the pipeline itself would use.
            shift: static shift of a uniform schedule, in place of ``schedule``.
            guidance_scale: None takes the policy's.
            decode: whether samples carry images.
            max_rows: most images in one network or decoder call.

        Raises:
            ConfigError: an option that does not fit the model or another option.
        """
        if kernel not in KERNELS:
            raise ConfigError(f"Unknown kernel '{kernel}'{nearest(kernel, KERNELS)}")
        if eta < 0:
            raise ConfigError(f"eta must be at least 0; got {eta}.")
        self.policy = policy
        self.height = height or policy.family.default_size
        self.width = width or policy.family.default_size
        self.shape = policy.family.latent_shape(self.height, self.width)
        self.sigmas = self._schedule(num_steps, schedule, shift)
        self.rule = StepRule(kernel, eta, self.sigmas[1].item(), reduce)
        self.shared_noise = shared_noise
        self.tree = tree
        self.suffix = suffix
        self.guidance_scale = guidance_scale
        if guidance_scale is not None:
            policy.family.needs_negative(guidance_scale)
        self.decode = decode
        self.max_rows = max_rows
        self.selection = selection
        self._select(0, [0])

    def _schedule(self, num_steps: int, schedule: Tensor | None, shift: float | None) -> Tensor:
        if num_steps < 1:
            raise ConfigError(f"num_steps must be at least 1; got {num_steps}.")
        if schedule is not None and shift is not None:
            raise ConfigError("Give a schedule or a shift, not both.")
        if shift is not None:
            return linear_shift(num_steps, shift=shift)
        if schedule is None:
            schedule = self.policy.family.schedule(num_steps, height=self.height, width=self.width)
        sigmas = schedule.float()
        falling = sigmas.dim() == 1 and bool((sigmas.diff() < 0).all())
        if len(sigmas) != num_steps + 1 or not falling or sigmas[0] > 1 or sigmas[-1] != 0:
            raise ConfigError(
                f"The schedule must fall from at most 1 to 0 in num_steps + 1 = {num_steps + 1} "
                f"values; got {[round(value, 4) for value in sigmas.flatten().tolist()]}."
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
    ) -> Rollout:
        """Draw ``group_size`` images per prompt.

        Args:
            prompts: plain text prompts with distinct indices.
            group_size: images per prompt.
            seed: names the rollout.
            version: of the weights.
            iteration: training iteration, which moving windows follow.

        Raises:
            ConfigError: the group does not fit the tree.
            DataError: a prompt that is no plain text.
            MmgrpoError: the network's output is not finite.
        """
        before, device = self.policy.forwards, self.policy.device
        encoded = self.policy.encode(prompts, guidance_scale=self.guidance_scale)
        names = [(seed, prompt.index, member) for prompt in prompts for member in range(group_size)]
        prompt_row = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
        selection = self._select(seed, [mix_seed(*name) for name in names], iteration)
        owner = self._owners(group_size, len(prompts), selection).to(device)
        drawn = self._draw(encoded, prompt_row, names, selection, owner)
        mask = selection.trained.to(device) & drawn.random
        sigmas = self.sigmas.to(device)
        std, length = step_sizes(sigmas, self.rule)
        trajectories = Trajectories(
            group=torch.tensor([index for _, index, _ in names], device=device),
            mask=mask,
            old_log_prob=drawn.log_prob * mask,
            version=torch.full_like(prompt_row, version),
            node=nodes(owner, group_size, mask),
            step_std=std.repeat(len(mask), 1),
            step_length=length.repeat(len(mask), 1),
            payload=self.policy.payload(
                encoded, prompt_row, drawn.latents, sigmas, self.rule, owner=owner
            ),
        )
        images = self._images(drawn.latents[:, -1])
        owners = [prompt for prompt in prompts for _ in range(group_size)]
        samples = [Sample(owner, image=image) for owner, image in zip(owners, images, strict=True)]
        forwards = self.policy.forwards - before
        cost = Cost(forwards=forwards, decisions=round(float(node_weight(trajectories).sum())))
        return Rollout(trajectories, samples, cost)

    def _draw(
        self,
        encoded: Any,
        prompt_row: Tensor,
        names: Sequence[tuple[int, ...]],
        selection: Selection,
        owner: Tensor,
    ) -> Drawn:
        device = prompt_row.device
        starts = [
            names[row][:2] if self.shared_noise else names[row] for row in owner[:, 0].tolist()
        ]

        def velocity(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            return self._velocity(x, sigma, encoded, prompt_row[rows])

        def noise(rows: Tensor, index: int) -> Tensor:
            return self._noise([(*names[row], index) for row in rows.tolist()], device)

        sigmas, stochastic = self.sigmas.to(device), selection.stochastic
        course = Course(sigmas, self.rule, self.suffix, stochastic, owner)
        drawn = denoise(self._noise(starts, device), course, velocity, noise)
        _check_finite(drawn.latents[:, -1])
        return drawn

    def _owners(self, group_size: int, prompts: int, selection: Selection) -> Tensor:
        """``[B, S + 1]``: the first row that has the same state."""
        try:
            one = self.tree.owners(group_size, selection.stochastic, shared_start=self.shared_noise)
        except ValueError as error:
            raise ConfigError(f"The rollout's tree does not fit: {error}") from error
        first = torch.arange(prompts) * group_size
        return (first[:, None, None] + one).flatten(0, 1)

    def _select(self, seed: int, sample_seeds: Sequence[int], iteration: int = 0) -> Selection:
        if self.rule.kernel == "ode" or self.rule.eta == 0:
            nothing = torch.zeros(self.num_steps, dtype=torch.bool)
            return Selection(nothing, nothing.repeat(len(sample_seeds), 1))
        try:
            return select_steps(
                self.selection,
                self.num_steps,
                seed=seed,
                sample_seeds=sample_seeds,
                iteration=iteration,
            )
        except ValueError as error:
            raise ConfigError(f"The step selection does not fit: {error}") from error

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

    def _images(self, latents: Tensor) -> list[Any]:
        if not self.decode:
            return [None] * len(latents)
        parts = latents.split(self.max_rows or len(latents))
        return [image for part in parts for image in self.policy.family.decode(part)]


def _check_finite(latents: Tensor) -> None:
    if not latents.isfinite().all():
        broken = int((~latents.flatten(1).isfinite().all(dim=1)).sum())
        raise MmgrpoError(
            f"{broken} of {len(latents)} images are not finite: the network overflows in its dtype "
            "or training has diverged; try dtype bfloat16 or float32, or a smaller learning rate."
        )
