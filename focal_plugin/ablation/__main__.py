"""Run a table of configs and report it.

    python -m focal_plugin ablation configs/paper/table1b --data bccd --seeds 3 [--jobs 2] [KEY VALUE ...]

Each row is run with each seed in its own folder, by `python -m focal_plugin train --config-file ... --resume`. The
same command again resumes unfinished runs and repeats no finished one.
"""

import argparse
import contextlib
import fcntl
import io
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..config.explain import split_pairs
from ..files.write import replace_file
from .code import check_code
from .data import check_data, notes_of_data, read_data
from .job import read_json
from .launch import LocalLauncher, SlurmLauncher, execute
from .report import to_markdown, write_report
from .rows import DATA, compared_with, find_base, find_tables
from .runs import plan, versions
from .unread import without_effect

PROG = "python -m focal_plugin.ablation"


def parse(argv: Sequence[str], prog: str = PROG) -> argparse.Namespace:
    """Return the command line, with its words split into ``rows`` and ``opts``, the KEY VALUE pairs.

    Raises:
        SystemExit: a word is missing or wrong.
    """
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "words",
        nargs="+",
        metavar="ROWS [KEY VALUE ...]",
        help="a folder, YAML files, or the beginning of their names, here or shipped; then changes to all configs",
    )
    parser.add_argument(
        "--data",
        help=f"base config that each row's own keys are merged into: {', '.join(DATA)}, or a file; "
        "by default, the rows are run with their own _BASE_",
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="run each row with SEED 1 to N (default: 1)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: output/ablation/<rows>-<data>")
    parser.add_argument("--launcher", choices=("local", "slurm"), default="local", help="default: local")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time (default: one for each GPU; with SLURM, all)"
    )
    parser.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of submitit's SlurmExecutor, such as partition=..., time=MINUTES or gpus_per_node=...",
    )
    parser.add_argument(
        "--train-net", type=Path, metavar="PATH", help="a train_net.py to run (default: python -m focal_plugin train)"
    )
    parser.add_argument("--baseline", metavar="ROW", help="the row that the report compares the others with")
    parser.add_argument("--report-only", action="store_true", help="run nothing and report the runs so far")
    args = parser.parse_intermixed_args(argv)

    args.rows, args.opts = split_pairs(args.words)
    if not args.rows:
        parser.error("name the rows: a folder, YAML files, or the beginning of their names")
    if len(args.opts) % 2:
        parser.error(f"expected KEY VALUE pairs, found an odd number of words: {' '.join(args.opts)}")
    if own := sorted({"SEED", "OUTPUT_DIR"} & set(args.opts[::2])):
        parser.error(f"{' and '.join(own)}: each run has its own; see --seeds and --output")
    if args.seeds < 1 or (args.jobs is not None and args.jobs < 1):
        parser.error("--seeds and --jobs: expected 1 or more")
    if wrong := [option for option in args.slurm if "=" not in option]:
        parser.error(f"--slurm {wrong[0]}: expected KEY=VALUE")
    if args.output is None:
        names = list(dict.fromkeys(Path(os.path.abspath(word)).stem for word in args.rows))
        name = "-".join(names if len(names) < 4 else [names[0], f"and-{len(names) - 1}-more"])
        args.output = Path("output/ablation") / (f"{name}-{Path(args.data).stem}" if args.data else name)
    return args


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a table of configs and report it.

    Args:
        argv: the words of the command line; those of this process if not given.
        prog: the name of the program in usage lines and in the report.

    Returns:
        0 if every run has a result; 1 if one has none, or if a word, config or file is wrong; 130 after Ctrl+C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the encoding of a terminal may lack Δ
    argv, prog = sys.argv[1:] if argv is None else list(argv), prog or PROG
    args = parse(argv, prog)
    try:
        tables = find_tables(args.rows)
        if args.baseline:
            tables = compared_with(tables, args.baseline)
        base = find_base(args.data) if args.data else None
        runs = plan([row for table in tables for row in table.rows], base, args.opts, args.seeds, args.output)
        runs_of = {table.name: [run for run in runs if run.row in table.rows] for table in tables}
        if args.train_net and not args.train_net.is_file():
            raise FileNotFoundError(f"--train-net {args.train_net}: there is no such file.")
        data = None
        if not args.report_only:
            launcher, data = make_launcher(args, len(runs)), read_data(runs)
        check_code(runs, to_run=not args.report_only)
        check_data(runs, data)
        args.output.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    try:
        if data is not None:
            for line in (line for own in runs_of.values() for line in without_effect(own)):
                print(f"Without effect: {line}", file=sys.stderr)
            with sole_runner(args.output):
                note_start(
                    args.output / "ablation.json",
                    f"{prog} {shlex.join(argv)}",
                    {name: found.images for name, found in data.items()},
                )
                execute(runs, launcher, args.train_net, {"versions": versions(), "data": notes_of_data(data)})
        statuses = set()
        for table in tables:
            summary = write_report(table, runs_of[table.name], base, args.opts, args.output)
            print(to_markdown(summary))
            print(f"Written: {args.output / table.name}/report.html, .md, .csv, .json and .png")
            statuses |= {run["status"] for row in summary["rows"] for run in row["runs"]}
    except KeyboardInterrupt:
        return 130
    except BlockingIOError:
        print(f"{args.output}: the same program is already running there.", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{args.output}: {error}. Correct that, and continue with the same command.", file=sys.stderr)
        return 1
    return int(not args.report_only and not statuses <= {"finished", "diverged"})


@contextlib.contextmanager
def sole_runner(output: Path) -> Iterator[None]:
    """Inside, no other such program runs in ``output``, and SIGTERM and SIGINT both raise KeyboardInterrupt.

    Raises:
        BlockingIOError: another one is running there.
    """
    with open(output / "runner.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # SIGINT too: a background job of a shell ignores it, and so would its children.
        handler, numbers = signal.default_int_handler, (signal.SIGINT, signal.SIGTERM)
        former = {number: signal.signal(number, handler) for number in numbers}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


def note_start(path: Path, command: str, images: dict[str, int]) -> None:
    """Add this start of the program to the notes of the output folder."""
    starts = [*read_json(path, {}).get("starts", []), {"time": time.time(), "command": command}]
    notes = json.dumps({"images": images, "starts": starts}, indent=2)
    replace_file(str(path), lambda file: file.write(notes.encode()))


def make_launcher(args: argparse.Namespace, num_runs: int) -> LocalLauncher | SlurmLauncher:
    """Return the launcher of the command line, for at most ``num_runs`` jobs.

    Raises:
        ValueError: SLURM is not installed, or an option of it is wrong.
    """
    if args.launcher == "local":
        return LocalLauncher(args.jobs and min(args.jobs, num_runs))
    pairs = (option.partition("=")[::2] for option in args.slurm)
    return SlurmLauncher(args.jobs, {key: int(value) if value.isdigit() else value for key, value in pairs})


if __name__ == "__main__":
    sys.exit(main())
