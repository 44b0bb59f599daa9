"""Measure rows on a GPU within a budget of time: medians in turns, and what a profiler counts."""

import gc
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from timing import Row, interleave, wait_for_gpu
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

WARMUP, PROFILED = 4, 2
_LAUNCH = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
_WAIT = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


class OverBudget(Exception):
    """The time for a row is up."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise ``OverBudget`` inside after that many seconds."""

    def stop(*_: object) -> None:
        raise OverBudget("over the time budget")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(row: Row, rounds: int, seconds: float) -> dict:
    """Return the numbers of a row for JSON; a variant that fails has an ``error`` in their place.

    Args:
        row: what to measure.
        rounds: at most this many, and as many as fit into half of the time.
        seconds: the budget of the row.
    """
    start, functions, graphs = time.perf_counter(), {}, {}
    variants: dict[str, dict] = {name: {} for name in row.variants}

    def left() -> float:
        return start + seconds - time.perf_counter()

    def attempt(name: str, work: Callable[[], object]) -> None:
        try:
            with limit(left()):
                work()
        except Exception as error:
            torch_memory_error = isinstance(error, torch.cuda.OutOfMemoryError)
            text = "out of GPU memory" if torch_memory_error else f"{type(error).__name__}: {error}"
            variants[name]["error"] = " ".join(text.split())[:200]
            functions.pop(name, None)

    def warm_up(name: str) -> None:
        function, before = row.variants[name](), graph_bytes()
        for _ in range(WARMUP):
            function()
        wait_for_gpu()
        graphs[name] = graph_bytes() - before
        functions[name] = function

    for name in row.variants:
        attempt(name, lambda name=name: warm_up(name))
    try:
        with limit(left()):
            timed = interleave(functions, rounds, seconds=left() / 2) if functions else {}
    except Exception as error:  # which of them it was is not known
        timed = {}
        for name in functions:
            variants[name]["error"] = f"{type(error).__name__}: {error}"[:200]
    for name, numbers in timed.items():
        if next(iter(row.variants)) not in timed:  # nothing to compare with
            numbers = {key: value for key, value in numbers.items() if not key.startswith("times")}
        variants[name] |= numbers
    for name in list(functions) if timed else []:
        attempt(name, lambda name=name: variants[name].update(counted(functions[name], graphs[name])))
    functions.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {
        "name": row.name,
        "size": row.size,
        "images": row.images,
        "logits_bytes": row.logits_bytes,
        "rounds": max((len(numbers.get("rounds", [])) for numbers in variants.values()), default=0),
        "seconds_taken": time.perf_counter() - start,
        "variants": variants,
    }


def graph_bytes() -> int:
    """Return the memory that CUDA graphs keep for themselves."""
    if not torch.cuda.is_available():
        return 0
    segments = torch.cuda.memory_snapshot()
    return sum(x["total_size"] for x in segments if tuple(x.get("segment_pool_id", (0, 0))) != (0, 0))


def counted(function: Callable[[], object], graphs: int = 0) -> dict:
    """Return the peak memory of a call, its kernels' time, and how many launches and waits it has.

    The memory is what a process with nothing else would need: the call's, the model's with its gradients and optimiser,
    and ``graphs`` bytes that its CUDA graphs keep.
    """
    numbers: dict = {}
    gpu = torch.cuda.is_available()
    if gpu:
        wait_for_gpu()
        own = getattr(function, "own_bytes", lambda: 0)()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        wait_for_gpu()
        numbers["peak_bytes"] = torch.cuda.max_memory_allocated() - before + own + graphs
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED):
            function()
        wait_for_gpu()
    numbers |= summary(profiler.events(), PROFILED)
    if note := getattr(function, "note", lambda: "")():
        numbers["note"] = note
    return numbers


def summary(events: list, steps: int) -> dict:
    """Return the numbers of a step from a profiler's ``events``, which end with one synchronisation of the device."""
    on_gpu = [e for e in events if e.device_type != DeviceType.CPU and not getattr(e, "is_user_annotation", False)]
    calls = [e.name for e in events if e.device_type == DeviceType.CPU]
    waits = sum(name in _WAIT or name == "cudaMemcpy" for name in calls)
    return {
        "gpu_seconds": sum(e.time_range.elapsed_us() for e in on_gpu) / 1e6 / steps,
        "launches": sum(name.startswith(_LAUNCH) for name in calls) / steps,
        "waits": max(waits - 1, 0) / steps,
    }


def cells(row: dict, name: str) -> list[str]:
    """Return the columns of the table for a variant: see ``TITLES``."""
    numbers = row["variants"][name]
    if "seconds" not in numbers:
        return [name, "", "", "", "", "", "", numbers.get("error", "")]
    seconds, gpu, peak = numbers["seconds"], numbers.get("gpu_seconds"), numbers.get("peak_bytes")
    faster = f"{numbers['times_faster']:.2f}" if "times_faster" in numbers else ""
    rate = f"{row['images'] / seconds:.1f}" if row["images"] else ""
    busy = f"{1000 * gpu:.3g} ms, {min(gpu / seconds, 1):.0%}" if gpu else ""
    counts = f"{numbers['launches']:.0f} / {numbers['waits']:.0f}" if gpu else ""
    memory = "" if peak is None else f"{peak / 1e9:.2f} GB" if peak >= 1e8 else f"{peak / 1e6:.1f} MB"
    if peak is not None and row["logits_bytes"]:
        memory += f", {peak / row['logits_bytes']:.2f}× the logits"
    note = numbers.get("error") or numbers.get("note", "")
    return [name, f"{1000 * seconds:.3g}", faster, rate, busy, counts, memory, note]


TITLES = ["what", "who", "ms", "times faster", "images/s", "GPU busy", "launches / waits", "peak memory", "notes"]


def table(rows: list[dict]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = ["| " + " | ".join(TITLES) + " |", "|---" * len(TITLES) + "|"]
    for row in rows:
        title = f"**{row['name']}** {row['size']}; {row['rounds']} rounds"
        for name in row["variants"]:
            lines.append("| " + " | ".join([title, *cells(row, name)]).replace("|  ", "| ") + " |")
            title = ""
    return lines


def blank(rows: Iterable[Row]) -> list[str]:
    """Return the lines of a table whose rows were not measured."""
    return ["| what |", "|---|", *(f"| **{row.name}** |" for row in rows)]
