#!/usr/bin/env python
"""Compare speed and memory with Detectron2's and torchvision's RetinaNet, in one process, in turns, on equal inputs.

    run.py [--quick] [--rows WORD] [--output output/bench]
    run.py --rows CUDA [--budget 240]

prints a table and writes it as Markdown and JSON. "Floor" is the work that no implementation can avoid: a copy of the
same bytes, or only the convolutions. Nothing is asserted. Compare ratios within one run only.

The rows of a GPU stop after the budget, in seconds; the table then has the rows that were measured until then.
"""

# ruff: noqa: E402  # the folders come first: neither the package nor this folder need be installed

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import focal_plugin  # noqa: F401  # before Detectron2, whose deprecation warnings it keeps away

# isort: split
import measure_gpu
import rows_evaluation
import rows_gpu
import rows_loss
import rows_matching
import rows_network
import torch
from timing import Row, extra_peak_bytes, interleave, peak_in_new_process
from tqdm import tqdm

TINY = {"height": 64, "width": 96, "depth": 18, "boxes": 3, "counts": (3,), "images": (2,), "compile": False}


def cpu_rows(tiny: bool) -> Iterator[Row]:
    """Yield the rows of the CPU; ``tiny`` ones for a test."""
    if tiny:
        yield from rows_loss.rows(1, 64, 96, classes=3)
        yield from rows_matching.rows(64, 96, counts=(3,))
        yield from rows_network.train_rows(1, 64, 64, depth=18)
        yield from rows_network.inference_rows(64, 64, depth=18)
        yield from rows_evaluation.rows(3, 4, 2)
        return
    yield from rows_loss.rows()
    yield from rows_matching.rows()
    yield from rows_network.train_rows()
    yield from rows_network.inference_rows()
    yield from rows_evaluation.rows()


def measure(row: Row, repeats: int, peaks: list[str], arguments: list[str]) -> dict:
    """Return the numbers of a row for JSON, with the peak memory of the variants ``peaks``."""
    busy, own = _cpu_seconds(), sum(os.times()[:4])
    functions = {name: prepare() for name, prepare in row.variants.items()}
    total = (repeats + 1) * len(functions)
    with tqdm(total=total, desc=row.name, disable=None, leave=False) as bar:
        variants = interleave(functions, repeats, bar.update)
    others = (_cpu_seconds() - busy) - (sum(os.times()[:4]) - own)
    del functions
    for name in tqdm(peaks, desc=f"{row.name}, memory", disable=None, leave=False):
        variants[name]["peak_bytes"] = peak_in_new_process(row.name, name, arguments)
    return {
        "name": row.name,
        "size": row.size,
        "target": row.target,
        "logits_bytes": row.logits_bytes,
        "repeats": repeats,
        "cpu_seconds_of_others": max(others, 0.0),
        "variants": variants,
    }


def measure_on_gpu(rows: Sequence[Row], rounds: int, budget: float, save: Callable[[list[dict]], object]) -> list[dict]:
    """Return the numbers of the rows within ``budget`` seconds, a share for each; ``save`` gets them after each row."""
    end, results = time.perf_counter() + budget, []
    for i, row in enumerate(rows):
        left = end - time.perf_counter()
        if left < 2:
            print(f"Not measured, over the budget of {budget:.0f} s: {', '.join(r.name for r in rows[i:])}.")
            break
        # Three shares: most rows need less than one, and those that compile more.
        results.append(measure_gpu.measure(row, rounds, min(left, 3 * left / (len(rows) - i))))
        print(f"{row.name}: {results[-1]['seconds_taken']:.0f} s", flush=True)
        save(results)
    return results


def machine() -> dict:
    """Return the facts that the numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load average at the start": os.getloadavg()[0],
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "fast dtype": str(rows_network.fast_dtype("cuda" if torch.cuda.is_available() else "cpu")),
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "date": f"{datetime.now():%Y-%m-%d}",
        "commit": _commit(),
    }


def markdown(facts: dict, rows: list[dict], gpu_rows: list[dict]) -> str:
    """Return the tables."""
    lines = [", ".join(f"{key}: {value}" for key, value in facts.items()), ""]
    if rows:
        lines += _cpu_table(rows)
    if gpu_rows:
        lines += [*measure_gpu.table(gpu_rows), ""]
    elif not facts["GPU"]:
        lines += ["Without a GPU these rows stay blank:", "", *measure_gpu.blank(rows_gpu.rows(rows_gpu.Setting())), ""]
    lines += ["Times are relative to the first line of each row: medians of the ratios within a round."]
    return "\n".join(lines) + "\n"


def _cpu_table(rows: list[dict]) -> list[str]:
    lines = ["| what | who | times faster | times less CPU | extra memory | target |", "|---|---|---|---|---|---|"]
    for row in rows:
        title = f"**{row['name']}** {row['size']}; {row['repeats']} rounds"
        for name, numbers in row["variants"].items():
            peak = numbers.get("peak_bytes")
            memory = "" if peak is None else f"{peak / 1e6:.0f} MB"
            if peak is not None and row["logits_bytes"]:
                memory += f", {peak / row['logits_bytes']:.2f}× the logits"
            speed = f"{numbers['times_faster']:.2f} | {numbers['times_less_cpu']:.2f}"
            lines.append(f"| {title} | {name} | {speed} | {memory} | {row['target'].get(name, '')} |")
            title = ""
    lines.append("")
    if any(row["cpu_seconds_of_others"] > 1 for row in rows):
        shares = ", ".join(f"{row['name']}: {row['cpu_seconds_of_others']:.0f} s" for row in rows)
        lines.append(f"Other processes used the processor meanwhile ({shares}): wall-clock ratios are then unreliable.")
    return lines


def _commit() -> str:
    """Return the commit of the code, with a + if files have changed since; "unknown" outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_seconds() -> float:
    """Return the CPU time that all processes have used."""
    if not Path("/proc/stat").exists():
        return 0.0
    user, nice, system = (int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def main(words: list[str] | None = None) -> int:
    """Run the command line ``words``; return 1 if a row of the GPU failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and memory only where there is a target")
    parser.add_argument("--rows", default="", help="only rows whose name contains this; CUDA: those of a GPU")
    parser.add_argument("--budget", type=float, default=240, help="seconds for the rows of a GPU (default: 240)")
    parser.add_argument("--output", type=Path, default=Path("output/bench"), help="folder for bench.md and bench.json")
    parser.add_argument("--tiny", action="store_true", help="tiny inputs, to test that it runs")
    parser.add_argument("--peak", nargs=2, metavar=("ROW", "WHO"), help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    has_gpu = torch.cuda.is_available()
    if "CUDA" in args.rows and not has_gpu:
        parser.error(f"--rows {args.rows}: these rows need a GPU, and PyTorch {torch.__version__} sees none.")
    warnings.filterwarnings("ignore")
    rows = [row for row in cpu_rows(args.tiny) if args.rows in row.name]
    if args.peak:
        row = next(row for row in rows if row.name == args.peak[0])
        print(extra_peak_bytes(row.variants[args.peak[1]]()))
        return 0
    setting = rows_gpu.Setting(**TINY if args.tiny else {})
    gpu_rows = [row for row in rows_gpu.rows(setting) if args.rows in row.name] if has_gpu else []
    if not rows and not gpu_rows:
        parser.error(f"--rows {args.rows}: no row has this in its name.")

    facts, results, folder = machine(), [], new_folder(args.output)

    def save(gpu_results: list[dict]) -> str:
        text = markdown(facts, results, gpu_results)
        content = {"machine": facts, "rows": results, "gpu_rows": gpu_results}
        (folder / "bench.json").write_text(json.dumps(content, indent=1))
        (folder / "bench.md").write_text(text)
        return text

    for row in rows:
        repeats = 1 if args.tiny else 2 if args.quick else 7
        wanted = [name for name in row.variants if "floor" not in name]
        if args.quick or args.tiny:
            wanted = [name for name in ("Detectron2", "ours") if "memory" in row.target.get("ours", "")]
        results.append(measure(row, repeats, wanted, ["--tiny"] if args.tiny else []))
    gpu_results = measure_on_gpu(gpu_rows, 2 if args.tiny else 10, args.budget, save)
    print(save(gpu_results) + f"Written to {folder}/bench.md and bench.json.")
    return int(any("error" in numbers for row in gpu_results for numbers in row["variants"].values()))


def new_folder(wanted: Path) -> Path:
    """Make the folder ``wanted``, or one with a number after its name if it has an earlier table."""
    folder, number = wanted, 1
    while (folder / "bench.md").exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
