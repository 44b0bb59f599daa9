"""Time functions in turns, and measure the peak memory of each in its own process."""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class Row:
    """One operation, by several systems.

    Attributes:
        name: what is measured, unique.
        size: the size of the inputs, in words.
        variants: for each system, a function that prepares the inputs and returns the function to measure. The others
            are compared with the first.
        target: the goal, by system.
        logits_bytes: if given, memory is also reported as a multiple of it.
        images: the number of images in the inputs.
    """

    name: str
    size: str
    variants: dict[str, Callable[[], Callable[[], object]]]
    target: dict[str, str] = field(default_factory=dict)
    logits_bytes: int | None = None
    images: int | None = None


def interleave(
    functions: dict[str, Callable], repeats: int, tick: Callable[[], object] = lambda: None, seconds: float = math.inf
) -> dict:
    """Call all functions in turns, ``repeats`` times after a warm-up round; once at least, then for ``seconds``.

    Returns:
        For each function, medians over the rounds: ``seconds`` and ``cpu_seconds`` of a call, and their ratios to the
        first function in the same round, ``times_faster`` and ``times_less_cpu``.
    """
    wall, cpu = ({name: [] for name in functions} for _ in range(2))
    begin = time.perf_counter()
    for number in range(repeats + 1):
        if number > 1 and time.perf_counter() - begin > seconds:
            break
        for name, function in functions.items():
            wait_for_gpu()
            start, cpu_start = time.perf_counter(), time.process_time()
            function()
            wait_for_gpu()
            if number:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - cpu_start)
            tick()
    first = next(iter(functions))
    return {
        name: {
            "seconds": statistics.median(wall[name]),
            "cpu_seconds": statistics.median(cpu[name]),
            "times_faster": statistics.median(a / b for a, b in zip(wall[first], wall[name])),
            "times_less_cpu": statistics.median(a / max(b, 1e-9) for a, b in zip(cpu[first], cpu[name])),
            "rounds": wall[name],
        }
        for name in functions
    }


def extra_peak_bytes(function: Callable[[], object]) -> int:
    """Return the peak memory of a first call of ``function`` above the memory in use before it."""
    if torch.cuda.is_available():
        wait_for_gpu()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        wait_for_gpu()
        if peak := torch.cuda.max_memory_allocated() - before:
            return peak
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak: proc(5)
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def peak_in_new_process(row: str, variant: str, arguments: list[str]) -> int | None:
    """Return ``extra_peak_bytes`` of a variant of a row, measured in a new process; None if it failed."""
    command = [sys.executable, str(Path(__file__).with_name("run.py")), *arguments, "--peak", row, variant]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        print(f"{row}, {variant}: {(result.stderr.strip().splitlines() or ['killed'])[-1]}", file=sys.stderr)
        return None
    return json.loads(result.stdout.splitlines()[-1])


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def wait_for_gpu() -> None:
    """Wait until a GPU, if there is one, has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
