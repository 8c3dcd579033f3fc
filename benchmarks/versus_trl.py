"""One GRPO step of mmgrpo and of TRL, side by side: same weights, same tokens, same threads.

    python benchmarks/versus_trl.py                      # every case, 7 interleaved repeats
    python benchmarks/versus_trl.py --cases 0 1 --repeats 1

Each has a process of its own, one computes while the other waits. Gradients are compared first; a
case whose gradients differ is not timed. See README.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from systems import KINDS, SYSTEMS, save_model

GROUP = 8
TOLERANCE = 1e-5


class Case(NamedTuple):
    """A row of the table: tokens of prompt and completion, vocabulary, size of the model.

    ``kind`` is a key of ``KINDS``; an image's tokens are not among those of the prompt.
    """

    prompt: int
    completion: int
    vocabulary: int
    size: str = "small"
    prompts: int = 2
    kind: str = "Qwen2"
    label: str = ""

    def __str__(self) -> str:
        name = self.label or self.size
        return f"{name}, P={self.prompt}, C={self.completion}, V={self.vocabulary}"


CASES = [
    Case(64, 64, 512),
    Case(512, 32, 512),
    Case(64, 64, 16384),
    Case(512, 32, 16384),
    Case(256, 128, 16384, "100M"),
    Case(16, 64, 512, kind="Qwen2-VL", label="tiny Qwen2-VL, one 224x224 image"),
]


MEMORY = [
    Case(256, 512, 151936, prompts=1),
    Case(256, 128, 151936, prompts=1),
    Case(256, 512, 37984, prompts=1),
]
"""The logits of all completions together: 2.5 GB in the first, a quarter of that in the others."""
NEEDED_GIB = {"TRL best settings": 7, "mmgrpo": 2}
"""What a process of ``MEMORY`` takes in all, rounded up from what was measured."""


def fixed_batch(case: Case) -> dict[str, Any]:
    """Return prompts of P letters, 8 completions ``[8, C]`` of each and their advantages.

    A letter is one token of the byte tokenizer.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (case.prompts * GROUP, case.completion)
    ask = KINDS[case.kind].prompt
    letters = torch.randint(97, 122, (case.prompts, case.prompt), generator=generator)
    return {
        "prompts": [ask(place, bytes(row).decode()) for place, row in enumerate(letters.tolist())],
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


class Remote:
    """A system in a process of its own, which waits while it is not asked."""

    def __init__(self, name: str, folder: Path, case: Case, options: Any) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        chosen = (theirs, name, folder, case, options.threads, options.clock)
        spawn = multiprocessing.get_context("spawn")
        self._process = spawn.Process(target=_serve, args=chosen, daemon=True)
        self._process.start()
        theirs.close()

    def gradient(self) -> dict[str, torch.Tensor]:
        """Gradient on the fixed batch, by parameter name."""
        return {name: torch.from_numpy(value) for name, value in self._ask("gradient").items()}

    def seconds(self, part: str) -> float:
        """Seconds that a part takes: step, update or generate."""
        return float(self._ask(part))

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()

    def _ask(self, verb: str) -> Any:
        self._pipe.send(verb)
        try:
            return self._pipe.recv()
        except EOFError:
            raise SystemExit(f"{verb} failed; the reason is above.") from None


def _serve(pipe: Any, name: str, folder: Path, case: Case, threads: int, clock: str) -> None:
    """Answer the verbs of :class:`Remote` until it is closed."""
    torch.set_num_threads(threads)
    system, now = SYSTEMS[name](folder, case, fixed_batch(case)), CLOCKS[clock]
    while True:
        try:
            verb = pipe.recv()
        except EOFError:
            return
        if verb == "gradient":
            pipe.send({name: value.numpy() for name, value in system.gradient().items()})
            continue
        start = now()
        getattr(system, verb)()
        pipe.send(now() - start)


@contextmanager
def running(
    names: list[str], folder: Path, case: Case, options: Any
) -> Iterator[dict[str, Remote]]:
    """Within the context, the systems are there."""
    systems = {name: Remote(name, folder, case, options) for name in names}
    try:
        yield systems
    finally:
        for system in systems.values():
            system.close()


def measure(case: Case, names: list[str], options: Any, folder: Path) -> dict[str, Any]:
    """Return the gradient error and, per system, the medians of step, update and generation."""
    save_model(folder, vocabulary=case.vocabulary, size=case.size, kind=case.kind)
    seconds: dict[str, dict[str, list[float]]] = {n: {} for n in names}
    with running(names, folder, case, options) as systems:
        ours, theirs = (systems[name].gradient() for name in ("mmgrpo", "TRL best settings"))
        error = gradient_error(ours, theirs)
        if error > TOLERANCE:
            raise SystemExit(f"{case}: the gradients differ by {error:.1e}; nothing was timed.")
        for repeat in range(options.cold, options.repeats + 1):
            for name, system in systems.items():
                system.seconds("update")  # after the pause, caches are cold, as in no training run
                for part in ("step", "update", "generate"):
                    found = system.seconds(part)
                    print(f"{case}; {repeat}: {name}, {part}: {found:.2f} s", file=sys.stderr)
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
    if done.returncode:
        print(*done.stderr.splitlines()[-1:], file=sys.stderr)
        return None
    return float(done.stdout.splitlines()[-1])


def refusal(case: Case, name: str, available: int) -> str | None:
    """Return a sentence that says why a peak cannot be measured here, None where it can.

    Args:
        case: a row of ``MEMORY``.
        name: a key of ``NEEDED_GIB``.
        available: bytes of memory that are free.
    """
    if NEEDED_GIB[name] * 2**30 <= available:
        return None
    return (
        f"{case}: {name} is skipped, for it needs about {NEEDED_GIB[name]} GiB of memory and "
        f"{available / 2**30:.1f} GiB are free."
    )


def print_memory(threads: int) -> None:
    """Measure the peaks of ``MEMORY`` one after the other, those that fit."""
    for number, case in enumerate(MEMORY, start=len(CASES)):
        for name in NEEDED_GIB:
            reason = refusal(case, name, psutil.virtual_memory().available)
            peak = None if reason else peak_memory(number, name, threads)
            shown = "not measured" if peak is None else f"{peak:.0f} MiB"
            print(reason or f"{case}; an update's peak: {name}, {shown}", flush=True)


def _print_peak(case: Case, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), vocabulary=case.vocabulary, size=case.size, kind=case.kind)
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
        times = {name: parts[part] for name, parts in seconds.items()}
        shown = [f"{times[n]:.3f}" if n in times else "-" for n in SYSTEMS]
        ratio = times["TRL best settings"] / times["mmgrpo"]
        cells += [" / ".join(shown), f"**{ratio:.1f}x**"]
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
    parser.add_argument("--cold", action="store_true", help="no warm-up, for slow cases")
    parser.add_argument("--no-newcomer", action="store_true", help="TRL only at its best settings")
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
        print_memory(options.threads)
        return
    print(versions(), f"; {options.clock} time, medians of {options.repeats}", sep="")
    print("columns:", " / ".join(SYSTEMS), "; ratio: TRL at its best settings over mmgrpo\n")
    print(HEADER)
    names = [name for name in SYSTEMS if not (options.no_newcomer and "newcomer" in name)]
    results = {}
    for number, case in enumerate(CASES):
        found, peaks = None, {}
        if number in options.cases:
            with tempfile.TemporaryDirectory() as folder:
                found = measure(case, names, options, Path(folder))
            peaks = dict.fromkeys(SYSTEMS)
            if not options.no_peaks:
                peaks = {name: peak_memory(number, name, options.threads) for name in SYSTEMS}
            results[str(case)] = {**found, "peak_mib": peaks}
        print(row(case, found, peaks), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
