"""What a training iteration of the image methods costs, beside training on every step.

    python benchmarks/flow_costs.py                  # 7 interleaved repeats, one thread
    python benchmarks/flow_costs.py --repeats 1 --layers 1 --width 64   # a smoke test

An iteration is what the trainer does: draw a group, score it (a reward that costs nothing, images
are not decoded), advantages, loss, backward, optimiser step. See README.md.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from mmgrpo import Trainer, load_method
from mmgrpo.playground.image_model import build_pipeline
from mmgrpo.policies.flow import FlowPolicy
from mmgrpo.protocols import Prompt
from mmgrpo.trainer.parts import State
from mmgrpo.trainer.step import train_step

SIZE, PATCH, CHANNELS = 32, 4, 4
STEPS, SAMPLES = 20, 16
PROMPT = "the number 42"
TEXT_WIDTH = 64  # of the playground's encoders
MOVING = {"rollout": {"selection": {"interval": 1, "stride": 3}}}
"""A window that visits its places, 0 to 17, within the repeats rather than within a training."""

CASES: Mapping[str, Mapping[str, Any]] = {
    "flow-grpo": {"id": "flow-grpo"},
    "flow-grpo without KL": {"id": "flow-grpo", "regulariser": None},
    "dance-grpo on every step": {
        "id": "dance-grpo",
        "rollout": {"selection": {"fraction": 1.0}},
    },
    "dance-grpo": {"id": "dance-grpo"},
    "mix-grpo": {"id": "mix-grpo", **MOVING},
    "mix-grpo-flash": {"id": "mix-grpo-flash", **MOVING},
    "branch-grpo": {"id": "branch-grpo"},
    "branch-grpo-pruned": {"id": "branch-grpo-pruned"},
    "branch-grpo-mix": {"id": "branch-grpo-mix"},
    "dynamic-treerpo": {"id": "dynamic-treerpo", **MOVING},
    "tempflow-grpo without KL": {"id": "tempflow-grpo", "regulariser": None},
    "g2rpo": {"id": "g2rpo"},
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""``cpu`` counts what this process computed: on a busy machine with one thread the fairer one."""
BASELINES = ("flow-grpo without KL", "dance-grpo on every step", "dance-grpo")
TARGETS = {
    "mix-grpo": 0.55, "mix-grpo-flash": 0.35, "branch-grpo-pruned": 0.5, "branch-grpo-mix": 0.25,
}  # fmt: skip
"""Share of an iteration on every step that a method may take."""


@dataclass
class Account:
    """The network's calls in one iteration: states and whether they were differentiated."""

    forwards: list[tuple[int, bool]] = field(default_factory=list)
    network_s: float = 0.0
    backwards: int = 0

    def states(self, *, trained: bool) -> int:
        """States that went through the network, with or without a gradient."""
        return sum(count for count, grad in self.forwards if grad == trained)


@dataclass
class Case:
    """A method under measurement, and what its iterations cost."""

    trainer: Trainer
    now: Callable[[], float] = time.perf_counter
    state: State = field(default_factory=State)
    seconds: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    accounts: list[Account] = field(default_factory=list)

    def measure(self, *, keep: bool) -> None:
        """Run one iteration, then its network calls once more by themselves."""
        parts = self.trainer.parts
        with counted(parts, self.now) as account:
            total = timed(lambda: train_step(parts, self.state, self.trainer.config), self.now)
        alone = timed(lambda: replay(parts.policy, account), self.now)
        if keep:
            self.seconds.append(total)
            self.alone.append(alone)
            self.accounts.append(account)


@contextmanager
def counted(parts: Any, now: Callable[[], float]) -> Iterator[Account]:
    """Count and time the forward and backward passes of the network."""
    account, started, plain = Account(), [0.0], parts.accelerator.backward

    def before(_module: Any, _args: Any, kwargs: Any) -> None:
        states = len(kwargs["hidden_states"])
        account.forwards.append((states, torch.is_grad_enabled()))
        started[0] = now()

    def after(*_: Any) -> None:
        account.network_s += now() - started[0]

    def backward(loss: torch.Tensor) -> None:
        account.backwards += 1
        account.network_s += timed(lambda: plain(loss), now)

    network = parts.policy.network
    hooks = [
        network.register_forward_pre_hook(before, with_kwargs=True),
        network.register_forward_hook(after),
    ]
    parts.accelerator.backward = backward
    try:
        yield account
    finally:
        parts.accelerator.backward = plain
        for hook in hooks:
            hook.remove()


def replay(policy: FlowPolicy, account: Account) -> None:
    """Make the same calls on random states, nothing else."""
    text = policy.encode([Prompt(0, PROMPT)]).embeddings
    for states, grad in account.forwards:
        x = torch.randn(states, CHANNELS, SIZE, SIZE)
        with torch.set_grad_enabled(grad):
            out = policy.network(
                hidden_states=x,
                timestep=torch.full((states,), 500.0),
                encoder_hidden_states=text["text"].expand(states, -1, -1),
                pooled_projections=text["pooled"].expand(states, -1),
                return_dict=False,
            )[0]
            if grad:
                out.square().mean().backward()
    policy.network.zero_grad()


def timed(call: Callable[[], Any], now: Callable[[], float]) -> float:
    """Seconds that a call takes."""
    start = now()
    call()
    return now() - start


def spread(prompts: list[Any], **_columns: Any) -> list[float]:
    """Stand in for a reward: costs nothing, and differs between the samples of a group."""
    return [float(place % 5) for place in range(len(prompts))]


def make_case(method: Mapping[str, Any], layers: int, width: int, clock: str) -> Case:
    """A trainer on random weights."""
    from diffusers import SD3Transformer2DModel

    pipe: Any = build_pipeline(0)
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=SIZE, patch_size=PATCH, in_channels=CHANNELS, out_channels=CHANNELS,
        num_layers=layers, attention_head_dim=32, num_attention_heads=width // 32,
        joint_attention_dim=TEXT_WIDTH, caption_projection_dim=width,
        pooled_projection_dim=TEXT_WIDTH, pos_embed_max_size=SIZE // PATCH, qk_norm="rms_norm",
    )  # fmt: skip
    pipe = type(pipe)(**{**pipe.components, "transformer": network})
    trainer = Trainer(
        FlowPolicy(pipe, max_prompt_tokens=4),
        reward=spread,
        data=[{"prompt": PROMPT}],
        method=method,
        group_size=SAMPLES // len(load_method(method["id"]).rollout.suffix.strides),
        prompts_per_step=1,
        num_steps=STEPS,
        steps=1000,
        run_dir=tempfile.mkdtemp(),  # only looked at, never written to
    )
    trainer.parts.engine.decode = False  # type: ignore[attr-defined]
    return Case(trainer, CLOCKS[clock])


def median(values: Iterable[float]) -> float:
    """Median of the repeats; of counts that change with the window, one of them."""
    return statistics.median_low(list(values))


def row(name: str, case: Case, seconds: Mapping[str, float]) -> list[str]:
    """A method's line of the table."""
    outside = 1 - sum(account.network_s for account in case.accounts) / sum(case.seconds)
    over = sum(case.seconds) / sum(case.alone)  # windows have repeats of different lengths
    return [
        name,
        f"{seconds[name]:.2f}",
        *(f"{seconds[name] / seconds[base]:.2f}" for base in BASELINES if base in seconds),
        f"{TARGETS[name]:.2f}" if name in TARGETS else "",
        f"{median(account.states(trained=False) for account in case.accounts):.0f}",
        f"{median(account.states(trained=True) for account in case.accounts):.0f}",
        f"{outside:.1%}",
        f"{over:.2f}",
    ]


def table(cases: Mapping[str, Case]) -> str:
    """The measured cases in markdown."""
    seconds = {name: statistics.median(case.seconds) for name, case in cases.items()}
    head = ["method", "s", *(f"/ {name}" for name in BASELINES if name in cases), "target"]
    head += ["states drawn", "states trained", "outside", "over network alone"]
    lines = [head, ["---"] * len(head), *(row(n, case, seconds) for n, case in cases.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    cases = {
        name: make_case(CASES[name], chosen.layers, chosen.width, chosen.clock)
        for name in chosen.cases
    }
    for repeat in range(chosen.repeats + 1):
        for case in cases.values():
            case.measure(keep=repeat > 0)  # the first is the warm-up
    network = next(iter(cases.values())).trainer.parts.policy.network
    size = sum(parameter.numel() for parameter in network.parameters())
    print(
        f"torch {torch.__version__}, {platform.machine()}, {chosen.threads} thread(s), "
        f"{chosen.clock} time, {size / 1e6:.1f} M weights, {STEPS} steps, {SAMPLES} images, "
        f"medians of {chosen.repeats}\n"
    )
    print(table(cases))


if __name__ == "__main__":
    main()
