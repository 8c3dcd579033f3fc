"""One GRPO step of mmgrpo and of TRL, side by side: same weights, same tokens, same threads.

    python benchmarks/versus_trl.py                      # every case, 7 interleaved repeats
    python benchmarks/versus_trl.py --cases 0 1 --repeats 1

Gradients are compared first; a case whose gradients differ is not timed. See README.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from systems import SYSTEMS, System, save_model

GROUP = 8
TOLERANCE = 1e-5


class Case(NamedTuple):
    """A row of the table: tokens of prompt and completion, vocabulary, size of the model."""

    prompt: int
    completion: int
    vocabulary: int
    size: str = "small"
    prompts: int = 2

    def __str__(self) -> str:
        return f"{self.size}, P={self.prompt}, C={self.completion}, V={self.vocabulary}"


CASES = [
    Case(64, 64, 512),
    Case(512, 32, 512),
    Case(64, 64, 16384),
    Case(512, 32, 16384),
    Case(256, 128, 16384, "100M"),
]


MEMORY = [
    Case(256, 512, 151936, prompts=1),
    Case(256, 128, 151936, prompts=1),
    Case(256, 512, 37984, prompts=1),
]
"""The logits of all completions together: 2.5 GB in the first, a quarter of that in the others."""
MEMORY_SYSTEMS = ("TRL best settings", "mmgrpo")


def fixed_batch(case: Case) -> dict[str, Any]:
    """Return texts of P letters, 8 completions ``[8, C]`` of each and their advantages.

    A letter is one token of the byte tokenizer.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (case.prompts * GROUP, case.completion)
    letters = torch.randint(97, 122, (case.prompts, case.prompt), generator=generator)
    return {
        "texts": [bytes(row).decode() for row in letters.tolist()],
        "completions": torch.randint(0, 250, shape, generator=generator),
        "advantages": torch.randn(case.prompts * GROUP, generator=generator),
    }


def gradient_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance of two gradients, by parameter name."""
    names = sorted(expected)
    ours = torch.cat([found[name].flatten() for name in names]).double()
    theirs = torch.cat([expected[name].flatten() for name in names]).double()
    return float((ours - theirs).norm() / theirs.norm())


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""``cpu`` counts what this process computed: on a busy machine with one thread the fairer one."""


def timed(call: Callable[[], Any], now: Callable[[], float]) -> float:
    """Seconds that a call takes."""
    start = now()
    call()
    return now() - start


def measure(case: Case, names: list[str], repeats: int, folder: Path, clock: str) -> dict[str, Any]:
    """Return the gradient error and, per system, the medians of step, update and generation."""
    save_model(folder, vocabulary=case.vocabulary, size=case.size)
    batch = fixed_batch(case)
    systems: dict[str, System] = {name: SYSTEMS[name](folder, case, batch) for name in names}
    error = gradient_error(systems["mmgrpo"].gradient(), systems["TRL best settings"].gradient())
    if error > TOLERANCE:
        raise SystemExit(f"{case}: the gradients differ by {error:.1e}; nothing was timed.")
    seconds: dict[str, dict[str, list[float]]] = {n: {} for n in names}
    for repeat in range(repeats + 1):
        for name, system in systems.items():
            for part in ("step", "update", "generate"):
                found = timed(getattr(system, part), CLOCKS[clock])
                if repeat:  # the first is the warm-up
                    seconds[name].setdefault(part, []).append(found)
    medians = {
        name: {part: statistics.median(values) for part, values in parts.items()}
        for name, parts in seconds.items()
    }
    return {"error": error, "seconds": medians}


def peak_memory(case_number: int, name: str, threads: int) -> float | None:
    """MiB by which one update raises the memory of a fresh process; None where it cannot tell."""
    chosen = ["--threads", str(threads), "--peak", str(case_number), name]
    command = [sys.executable, __file__, *chosen]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def _print_peak(case: Case, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), vocabulary=case.vocabulary, size=case.size)
        system = SYSTEMS[name](Path(folder), case, fixed_batch(case))
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
        before = _status("VmRSS")
        system.update()
        print(_status("VmHWM") - before)


def _status(name: str) -> float:
    """MiB that Linux reports for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":"))


def row(case: Case, found: dict[str, Any] | None, peaks: dict[str, float | None]) -> str:
    """A line of the markdown table: seconds of each system, then TRL's best over ours."""
    if found is None:
        return f"| {case} |" + " not measured |" * 8
    seconds = found["seconds"]
    cells = []
    for part in ("step", "update", "generate"):
        newcomer, best, ours = (seconds[name][part] for name in SYSTEMS)
        cells += [f"{newcomer:.3f} / {best:.3f} / {ours:.3f}", f"**{best / ours:.1f}x**"]
    memory = " / ".join("not measured" if p is None else f"{p:.0f}" for p in peaks.values())
    return f"| {case} | " + " | ".join(cells) + f" | {memory} | {found['error']:.0e} |"


HEADER = (
    "| case | step s | ratio | update s | ratio | generation s | ratio | update's peak MiB "
    "| gradient error |\n|---|---|---|---|---|---|---|---|---|"
)


def versions() -> str:
    """What the numbers depend on."""
    import transformers
    import trl

    return (
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"TRL {trl.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads, float32, {platform.machine()} CPU"
    )


def main() -> None:
    """Measure the chosen cases and print the table; the others read "not measured"."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, nargs="*", default=list(range(len(CASES))))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--no-peaks", action="store_true", help="leave the memory out")
    parser.add_argument("--memory", action="store_true", help="only the peaks with many logits")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        _print_peak([*CASES, *MEMORY][int(options.peak[0])], options.peak[1])
        return
    if options.memory:
        for number, case in enumerate(MEMORY, start=len(CASES)):
            peaks = {name: peak_memory(number, name, options.threads) for name in MEMORY_SYSTEMS}
            print(case, "; an update's peak in MiB:", peaks, flush=True)
        return
    print(versions(), f"; {options.clock} time, medians of {options.repeats}", sep="")
    print("columns:", " / ".join(SYSTEMS), "; ratio: TRL at its best settings over mmgrpo\n")
    print(HEADER)
    results = {}
    for number, case in enumerate(CASES):
        found, peaks = None, {}
        if number in options.cases:
            with tempfile.TemporaryDirectory() as folder:
                found = measure(case, list(SYSTEMS), options.repeats, Path(folder), options.clock)
            peaks = dict.fromkeys(SYSTEMS)
            if not options.no_peaks:
                peaks = {name: peak_memory(number, name, options.threads) for name in SYSTEMS}
            results[str(case)] = {**found, "peak_mib": peaks}
        print(row(case, found, peaks), flush=True)
    print("| tiny Qwen2-VL, one 224x224 image, C=64 |" + " not measured |" * 8)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
