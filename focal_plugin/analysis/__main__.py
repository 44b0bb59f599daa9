"""Analyses of a config, its data and its checkpoints. ``<what> --help`` explains each."""

import argparse
import sys
from collections.abc import Sequence

from ..config.explain import split_pairs
from . import anchors, calibration, doctor, hardest, init, loss_cdf, speed
from .common import MISTAKES

_WHAT = {
    "doctor": doctor,
    "loss-cdf": loss_cdf,
    "hardest": hardest,
    "calibration": calibration,
    "init": init,
    "anchors": anchors,
    "speed": speed,
}


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line: a subcommand for each analysis, described by its module's docstring."""
    parser = argparse.ArgumentParser(prog=prog or "python -m focal_plugin.analysis", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, module in _WHAT.items():
        summary = module.__doc__.splitlines()[0]
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one analysis.

    Args:
        argv: the words of the command line; those of this process if not given.
        prog: the name of the program in usage lines.

    Returns:
        0; 1 if the analysis found a problem; 2 if the user has to correct the command line, the config or a file.
    """
    words, pairs = split_pairs(sys.argv[1:] if argv is None else argv)
    args = build_parser(prog).parse_args(words)
    args.opts += pairs
    try:
        return _WHAT[args.what].main(args)
    except MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
