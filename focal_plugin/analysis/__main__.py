"""Commands that look at a config, its data and its checkpoints. ``<what> --help`` says more of each."""

import argparse
import sys
from collections.abc import Sequence

from ..config import ConfigError
from ..config.explain import split_pairs
from ..data import DataError
from . import anchors, doctor, init, loss_cdf, speed
from .common import UserError

_WHAT = {"doctor": doctor, "loss-cdf": loss_cdf, "init": init, "anchors": anchors, "speed": speed}


def build_parser() -> argparse.ArgumentParser:
    """The command line: a subcommand for each analysis, described by the first line of its module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m focal_plugin.analysis", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, module in _WHAT.items():
        summary = module.__doc__.splitlines()[0]
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one analysis. 0, 1 for a finding that is wrong, 2 for what the user can put right."""
    words, pairs = split_pairs(sys.argv[1:] if arguments is None else arguments)
    args = build_parser().parse_args(words)
    args.opts += pairs
    try:
        return _WHAT[args.what].main(args)
    except (UserError, ConfigError, DataError, FileNotFoundError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
