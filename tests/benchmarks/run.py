#!/usr/bin/env python
"""Compare speed and memory with Detectron2's and torchvision's RetinaNet, in one process, in turns, on equal inputs.

    run.py [--quick] [--rows WORD] [--output output/bench]

prints a table and writes it as Markdown and JSON. "Floor" is the work that no implementation can avoid: a copy of the
same bytes, or only the convolutions. Nothing is asserted. Compare ratios within one run only.
"""

# ruff: noqa: E402  # the folders come first: neither the package nor this folder need be installed

import argparse
import json
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import focal_plugin  # noqa: F401  # before Detectron2, whose deprecation warnings it keeps away

# isort: split
import rows_loss
import rows_matching
import rows_network
import torch
from timing import Row, extra_peak_bytes, interleave, peak_in_new_process
from tqdm import tqdm

GPU_ROWS = ("class loss, forward + backward, CUDA", "train step, CUDA", "inference, CUDA")


def all_rows(tiny: bool) -> Iterator[Row]:
    """Yield the rows of the table; ``tiny`` ones for a test."""
    if tiny:
        yield from rows_loss.rows(1, 64, 96, classes=3)
        yield from rows_matching.rows(64, 96, counts=(3,))
        yield from rows_network.train_rows(1, 64, 64, depth=18)
        yield from rows_network.inference_rows(64, 64, depth=18)
        return
    yield from rows_loss.rows()
    yield from rows_matching.rows()
    yield from rows_network.train_rows()
    yield from rows_network.inference_rows()
    if torch.cuda.is_available():
        yield from rows_loss.rows(device="cuda")
        yield from rows_network.train_rows(8, 800, 1216, device="cuda")
        yield from rows_network.inference_rows(800, 1216, device="cuda")


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
    }


def markdown(facts: dict, rows: list[dict]) -> str:
    """Return the table."""
    lines = [", ".join(f"{key}: {value}" for key, value in facts.items()), ""]
    lines += ["| what | who | times faster | times less CPU | extra memory | target |", "|---|---|---|---|---|---|"]
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
    if not facts["GPU"]:
        lines += [f"| **{name}** | | | | | |" for name in GPU_ROWS]
    lines += ["", "Times are relative to the first line of each row: medians of the ratios within a round."]
    if any(row["cpu_seconds_of_others"] > 1 for row in rows):
        shares = ", ".join(f"{row['name']}: {row['cpu_seconds_of_others']:.0f} s" for row in rows)
        lines.append(f"Other processes used the processor meanwhile ({shares}): wall-clock ratios are then unreliable.")
    return "\n".join(lines) + "\n"


def _cpu_seconds() -> float:
    """Return the CPU time that all processes have used."""
    if not Path("/proc/stat").exists():
        return 0.0
    user, nice, system = (int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def main(words: list[str] | None = None) -> list[dict]:
    """Run the command line ``words`` and return the numbers of the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and memory only where there is a target")
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--output", type=Path, default=Path("output/bench"), help="folder for bench.md and bench.json")
    parser.add_argument("--tiny", action="store_true", help="tiny inputs, to test that it runs")
    parser.add_argument("--peak", nargs=2, metavar=("ROW", "WHO"), help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    warnings.filterwarnings("ignore")
    rows = [row for row in all_rows(args.tiny) if args.rows in row.name]
    if args.peak:
        row = next(row for row in rows if row.name == args.peak[0])
        print(extra_peak_bytes(row.variants[args.peak[1]]()))
        return []

    facts, results = machine(), []
    for row in rows:
        repeats = 1 if args.tiny else 2 if args.quick else 7
        wanted = [name for name in row.variants if "floor" not in name]
        if args.quick or args.tiny:
            wanted = [name for name in ("Detectron2", "ours") if "memory" in row.target.get("ours", "")]
        results.append(measure(row, repeats, wanted, ["--tiny"] if args.tiny else []))
    table = markdown(facts, results)
    folder, number = args.output, 1
    while (folder / "bench.md").exists():  # of an earlier run
        number += 1
        folder = args.output.with_name(f"{args.output.name}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.md").write_text(table)
    (folder / "bench.json").write_text(json.dumps({"machine": facts, "rows": results}, indent=1))
    print(table + f"Written to {folder}/bench.md and bench.json.")
    return results


if __name__ == "__main__":
    main()
