"""How much of the machine a step on an image flow model uses: MFU, time elsewhere, peak memory.

    python benchmarks/flow_utilisation.py                # on a GPU; without one: "not measured"
    python benchmarks/flow_utilisation.py --shape flux.1-dev
    python benchmarks/flow_utilisation.py --shape tiny-sd3 --device cpu --resolution 64

The counterpart of utilisation.py: a Flow-GRPO step without KL by the trainer's own ``train_step``.
The operations are those of the network's passes over the states that were drawn and trained; what
activation checkpointing computes again is not among them. See README.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from statistics import median
from typing import Any, NamedTuple

import torch
from flow_costs import CASES, PROMPT, counted, spread
from flow_shapes import SHAPES, build_policy
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from utilisation import ceiling, read_options, timed, wait, watched

from mmgrpo import Trainer
from mmgrpo.policies.flow import FlowPolicy
from mmgrpo.protocols import Prompt
from mmgrpo.trainer import step
from mmgrpo.trainer.parts import State

METHOD = CASES["flow-grpo without KL"]


class Case(NamedTuple):
    """What is measured; ``lora`` is a rank, 0 trains every weight."""

    shape: str
    device: str
    dtype: str
    resolution: int
    steps: int
    samples: int
    micro_batch: int
    lora: int
    checkpointing: bool

    def __str__(self) -> str:
        trained = f"LoRA of rank {self.lora}" if self.lora else "every weight trains"
        again = ", activations computed again" if self.checkpointing else ""
        return (
            f"{self.shape}, {self.resolution} px, {self.steps} steps, {self.samples} images, "
            f"{trained}{again}, {self.micro_batch} in a micro-batch, {self.dtype} on {self.device}"
        )


def make_trainer(case: Case) -> Trainer:
    """A trainer on random weights that draws one group a step and decodes nothing."""
    policy = build_policy(
        SHAPES[case.shape],
        device=case.device,
        dtype=case.dtype,
        lora=case.lora,
        checkpointing=case.checkpointing,
    )
    trainer = Trainer(
        policy,
        reward=spread,
        data=[{"prompt": PROMPT}],
        method=METHOD,
        group_size=case.samples,
        prompts_per_step=1,
        num_steps=case.steps,
        height=case.resolution,
        width=case.resolution,
        micro_batch_size=case.micro_batch,
        steps=1000,
        run_dir=tempfile.mkdtemp(),  # only looked at, never written to
    )
    trainer.parts.engine.decode = False  # type: ignore[attr-defined]
    return trainer


def state_flops(case: Case, policy: FlowPolicy) -> tuple[int, int]:
    """Operations that one state needs: in a forward pass, and in a forward and backward pass.

    Counted by torch on a network without weights, which has neither fused attention, whose backward
    pass computes the scores again, nor checkpointing.
    """
    bare = build_policy(SHAPES[case.shape], device="meta", dtype=case.dtype, lora=case.lora)
    device = torch.device("meta")
    prompts = policy.encode([Prompt(0, PROMPT)]).to(device)
    shape = bare.family.latent_shape(case.resolution, case.resolution)
    latents, sigma = torch.empty(1, *shape, device=device), torch.empty(1, device=device)
    row = torch.zeros(1, dtype=torch.int64, device=device)

    def count(*, trained: bool) -> int:
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(trained):
            velocity = bare.velocity(latents, sigma, prompts, row)
            if trained:
                velocity.sum().backward()
        return counter.get_total_flops()

    return count(trained=False), count(trained=True)


class Measured(NamedTuple):
    """A part of the step: its seconds, and the states that went through the network."""

    seconds: float
    states: int


def measure_parts(trainer: Trainer, state: State, device: str, repeats: int) -> dict[str, Measured]:
    """Median seconds of the sampling and of the update, which ends with the optimiser's step."""
    places = [(step, "sample", "rollout"), (step, "update", "update")]
    found: dict[str, list[float]] = {part: [] for *_, part in places}
    for _ in range(repeats):
        with counted(trainer.parts, time.perf_counter) as account, watched(places, device) as spent:
            step.train_step(trainer.parts, state, trainer.config)
        for part, seconds in spent.items():
            found[part].append(seconds)
    return {
        part: Measured(median(seconds), account.states(trained=part == "update"))
        for part, seconds in found.items()
    }


def outside(trainer: Trainer, state: State, device: str, repeats: int) -> float:
    """Median share of the step that is outside the network's forward and backward passes."""

    def now() -> float:
        wait(device)
        return time.perf_counter()

    shares = []
    for _ in range(repeats):
        with counted(trainer.parts, now) as account:
            total = timed(lambda: step.train_step(trainer.parts, state, trainer.config), device)
        shares.append(1 - account.network_s / total)
    return median(shares)


def measure(case: Case, repeats: int) -> None:
    """Print what one case uses."""
    peak = ceiling(case.device, getattr(torch, case.dtype))
    trainer, state = make_trainer(case), State()
    policy: Any = trainer.parts.policy
    weights = sum(p.numel() for n, p in policy.network.named_parameters() if "lora_" not in n)
    print(f"{case}; {weights / 1e6:.1f} M weights; matrix products reach {peak / 1e12:.2f} TFLOP/s")
    per_state = dict(zip(("rollout", "update"), state_flops(case, policy), strict=True))
    step.train_step(trainer.parts, state, trainer.config)  # the warm-up
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for part, (seconds, states) in measure_parts(trainer, state, case.device, repeats).items():
        flops = states * per_state[part]
        print(
            f"{part}: {seconds:.3f} s, {states} states, {flops / 1e12:.3f} TFLOP, "
            f"MFU {flops / seconds / peak:.1%}"
        )
    highest = torch.cuda.max_memory_allocated()
    share = outside(trainer, state, case.device, repeats)
    print(f"step: outside the network's forward and backward passes {share:.1%}")
    if case.device == "cuda":
        print(
            f"step: peak memory {highest / 2**30:.1f} GiB, {before / 2**30:.1f} of it weights and "
            "optimiser"
        )


def main() -> None:
    """Measure one case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--shape", choices=list(SHAPES), default="sd3.5-medium")
    parser.add_argument("--resolution", type=int, default=512, help="pixels of a side")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=1, help="images in a pass of the update")
    parser.add_argument("--lora", type=int, metavar="RANK", help="0 trains every weight")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction)
    chosen = read_options(parser, repeats=3)
    if chosen is None:
        return
    if chosen.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "1"  # the trainer would take a GPU that is there
    own = SHAPES[chosen.shape]
    case = Case(
        shape=chosen.shape,
        device=chosen.device,
        dtype=chosen.dtype,
        resolution=chosen.resolution,
        steps=chosen.steps,
        samples=chosen.samples,
        micro_batch=chosen.micro_batch,
        lora=own.lora if chosen.lora is None else chosen.lora,
        checkpointing=own.checkpointing if chosen.checkpointing is None else chosen.checkpointing,
    )
    measure(case, chosen.repeats)


if __name__ == "__main__":
    main()
