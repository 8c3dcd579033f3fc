"""How much of the machine a GRPO step uses: MFU, time outside the network, peak memory.

    python benchmarks/utilisation.py                     # on a GPU; without one: "not measured"
    python benchmarks/utilisation.py --device cpu --size small --prompt 64 --completion 64

MFU is the share of the rate that a large matrix product reaches here, measured in the same run; the
operations are those that the step needs (a prompt once per group). See README.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from systems import SIZES, Mmgrpo, save_model
from versus_trl import GROUP, Case, fixed_batch

from mmgrpo.policies.prefix_decoding import PrefixState
from mmgrpo.rollout.autoregressive import AutoregressiveEngine

PARTS = ("forward", "backward", "decode", "draw")
CEILING_SIZE = {"cpu": 1024, "cuda": 8192}


def wait(device: str) -> None:
    """Let the device finish what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], Any], device: str) -> float:
    """Seconds that a call takes until the device has finished."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def ceiling(device: str, dtype: torch.dtype) -> float:
    """Operations per second of the best of ten square matrix products."""
    size = CEILING_SIZE[device]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(10))


def forward_flops(case: Case, tokens: int, heads: int, pairs: int) -> float:
    """Operations of a forward pass.

    Args:
        case: which model.
        tokens: tokens that go through the layers.
        heads: positions that the output head reads.
        pairs: pairs of a token and one that it attends to.
    """
    size = SIZES[case.size]
    width, heads_of_keys = size["hidden_size"], size["num_key_value_heads"]
    keys = width // size["num_attention_heads"] * heads_of_keys
    layer = 2 * width * (width + keys) + 3 * width * size["intermediate_size"]
    per_token = 2 * size["num_hidden_layers"] * layer
    attention = 4 * size["num_hidden_layers"] * width
    return per_token * tokens + 2 * width * case.vocabulary * heads + attention * pairs


def step_flops(case: Case) -> dict[str, float]:
    """Operations that generation and update need: a prompt once, its completions G times."""
    rows, p, c = case.prompts * GROUP, case.prompt, case.completion
    pairs = case.prompts * p * p // 2 + rows * (p * c + c * c // 2)
    tokens = case.prompts * p + rows * c
    forward = forward_flops(case, tokens, rows * c, pairs)
    return {"generate": forward, "update": 3 * forward}


@contextmanager
def watched(places: Sequence[tuple[Any, str, str]], device: str) -> Iterator[dict[str, float]]:
    """Add up the seconds in some functions.

    Args:
        places: who has the function, under which name, and the part that its seconds belong to.
        device: where it computes.
    """
    spent = dict.fromkeys((part for *_, part in places), 0.0)
    plain = [(owner, name, getattr(owner, name)) for owner, name, _ in places]

    def timing(call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            found: list[Any] = []
            spent[part] += timed(lambda: found.append(call(*args, **kwargs)), device)
            return found[0]

        return wrapper

    for (owner, name, part), (_, _, call) in zip(places, plain, strict=True):
        setattr(owner, name, timing(call, part))
    try:
        yield spent
    finally:
        for owner, name, call in plain:
            setattr(owner, name, call)


def inside(system: Mmgrpo) -> list[tuple[Any, str, str]]:
    """The network's passes and the drawing of tokens from its logits."""
    return [
        (system.policy, "_forward", "forward"),
        (system.policy, "_read_kept", "forward"),  # the output head
        (PrefixState, "advance", "decode"),
        (AutoregressiveEngine, "_write_token", "draw"),
        (torch.Tensor, "backward", "backward"),
    ]


def measure(case: Case, device: str, dtype: str, repeats: int) -> None:
    """Print what one case uses."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), vocabulary=case.vocabulary, size=case.size)
        system = Mmgrpo(Path(folder), case, fixed_batch(case), dtype=dtype, device=device)
    peak = ceiling(device, getattr(torch, dtype))
    print(f"{case}, {dtype} on {device}; matrix products reach {peak / 1e12:.2f} TFLOP/s")
    for part, flops in step_flops(case).items():
        call = getattr(system, part)
        call()
        seconds = median(timed(call, device) for _ in range(repeats))
        print(
            f"{part}: {seconds:.3f} s, {flops / 1e12:.3f} TFLOP, MFU {flops / seconds / peak:.1%}"
        )
    shares = []
    for _ in range(repeats):
        with watched(inside(system), device) as spent:
            total = timed(system.step, device)
        shares.append([*(spent[part] / total for part in PARTS), 1 - sum(spent.values()) / total])
    found = [median(values) for values in zip(*shares, strict=True)]
    named = [f"{part} {share:.1%}" for part, share in zip(PARTS, found, strict=False)]
    print(f"step: {', '.join(named)}, outside of these {found[-1]:.1%}")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        system.update()
        grown = (torch.cuda.max_memory_allocated() - before) / 2**20
        print(f"update: peak memory {grown:.0f} MiB above the weights and gradients")


def read_options(parser: argparse.ArgumentParser, *, repeats: int) -> argparse.Namespace | None:
    """Parse a benchmark's options and those of the machine; None where there is no such device.

    Args:
        parser: has the benchmark's own options.
        repeats: how often it measures by default.
    """
    parser.add_argument("--device", choices=list(CEILING_SIZE), default="cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("not measured: no GPU here")
        return None
    chosen.dtype = chosen.dtype or ("bfloat16" if chosen.device == "cuda" else "float32")
    return chosen


def main() -> None:
    """Measure one case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--size", choices=list(SIZES), default="100M")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--completion", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=16384)
    chosen = read_options(parser, repeats=5)
    if chosen is not None:
        case = Case(chosen.prompt, chosen.completion, chosen.vocabulary, chosen.size)
        measure(case, chosen.device, chosen.dtype, chosen.repeats)


if __name__ == "__main__":
    main()
