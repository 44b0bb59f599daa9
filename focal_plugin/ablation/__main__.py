"""Runs a table of configs and reports it.

    python -m focal_plugin.ablation configs/paper/table1b --data bccd --seeds 3 [--jobs 2] [KEY VALUE ...]

Each row is run with each seed as `python -m focal_plugin train --config-file ... --resume` in a folder of its own. The
same command again goes on with what is unfinished and runs nothing twice.
"""

import argparse
import fcntl
import io
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..config.explain import split_pairs
from .job import read_json
from .launch import LocalLauncher, SlurmLauncher, execute
from .report import to_markdown, write_report
from .rows import DATA, find_base, find_tables
from .runs import Run, count_images, plan, versions
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
        help=f"{', '.join(DATA)}, or a base config: each row's own keys go onto it. Default: the rows as they are",
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="run each row with SEED 1 to N")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: output/ablation/<rows>-<data>")
    parser.add_argument("--launcher", choices=("local", "slurm"), default="local")
    parser.add_argument("--jobs", type=int, metavar="N", help="at a time; default: one for each GPU, SLURM: all")
    parser.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="partition=..., time=MINUTES, gpus_per_node=..., and the like, of submitit's SlurmExecutor",
    )
    parser.add_argument(
        "--train-net", type=Path, metavar="PATH", help="a train_net.py to run; default: python -m focal_plugin train"
    )
    parser.add_argument("--report-only", action="store_true", help="run nothing, report what is there")
    args = parser.parse_intermixed_args(argv)

    args.rows, args.opts = split_pairs(args.words)
    if not args.rows:
        parser.error("name the rows: a folder, YAML files, or the beginning of their names")
    if len(args.opts) % 2:
        parser.error(f"KEY VALUE pairs: {' '.join(args.opts)} is an odd number of words")
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
    args.command = f"{prog} {shlex.join(argv)}"
    try:
        tables = find_tables(args.rows)
        base = find_base(args.data) if args.data else None
        runs = plan([row for table in tables for row in table.rows], base, args.opts, args.seeds, args.output)
        launcher = None if args.report_only else make_launcher(args, len(runs))
        if args.train_net and not args.train_net.is_file():
            raise FileNotFoundError(f"--train-net {args.train_net}: there is no such file.")
        images = {} if args.report_only else count_images(runs)
        args.output.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    runs_of = {table.name: [run for run in runs if run.row in table.rows] for table in tables}
    try:
        if not args.report_only:
            for own in runs_of.values():
                for line in without_effect(own):
                    print(f"Without effect: {line}", file=sys.stderr)
            if code := run_all(args, runs, launcher, images):
                return code
        statuses = set()
        for table in tables:
            summary = write_report(table, runs_of[table.name], base, args.opts, args.output)
            print(to_markdown(summary))
            print(f"Written: {args.output / table.name}/report.html, .md, .csv, .json and .png")
            statuses |= {run["status"] for row in summary["rows"] for run in row["runs"]}
    except OSError as error:
        print(f"{args.output}: {error}. The same command goes on when that is mended.", file=sys.stderr)
        return 1
    return int(not args.report_only and not statuses <= {"finished", "diverged"})


def run_all(args: argparse.Namespace, runs: list[Run], launcher, images: dict[str, int]) -> int:
    """Run what is left, as the only one in the output folder. 0, or the exit code if the program ends here."""
    with open(args.output / "runner.lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{args.output}: the same program is at work here already.", file=sys.stderr)
            return 1
        # Both end it in the same way. Set here also for its children: a shell's background jobs ignore SIGINT.
        ends = (signal.SIGINT, signal.SIGTERM)
        former = [signal.signal(number, signal.default_int_handler) for number in ends]
        try:
            note_start(args.output / "ablation.json", args.command, images)
            execute(runs, launcher, args.train_net, {"versions": versions()})
        except KeyboardInterrupt:
            return 130
        finally:
            for number, handler in zip(ends, former):
                signal.signal(number, handler)
    return 0


def note_start(path: Path, command: str, images: dict[str, int]) -> None:
    """Add this start of the program to the notes of the output folder."""
    starts = read_json(path, {}).get("starts", [])
    new = path.with_suffix(".new")
    new.write_text(
        json.dumps({"images": images, "starts": [*starts, {"time": time.time(), "command": command}]}, indent=2)
    )
    new.replace(path)


def make_launcher(args: argparse.Namespace, num_runs: int) -> LocalLauncher | SlurmLauncher:
    """The launcher of the command line, for at most ``num_runs`` jobs.

    Raises:
        ValueError: SLURM is not there, or its options are not as they should be.
    """
    if args.launcher == "local":
        return LocalLauncher(args.jobs and min(args.jobs, num_runs))
    pairs = (option.partition("=")[::2] for option in args.slurm)
    return SlurmLauncher(args.jobs, {key: int(value) if value.isdigit() else value for key, value in pairs})


if __name__ == "__main__":
    sys.exit(main())
