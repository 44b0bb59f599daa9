"""RetinaNet and the focal loss for Detectron2: all commands by name."""

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pkgutil import resolve_name

from .files.shipped import CONFIGS

# By name: the function to call with the other words and the program's name, and what it does.
COMMANDS = {
    "quickstart": ("data.quickstart:main", "write a small data set to try things on: trees seen from the air"),
    "data": ("data.__main__:main", "make data sets of data sets: tiles, other formats, splits; and look at one"),
    "doctor": ("commands.train:doctor_main", "check config, data and weights before training"),
    "train": ("commands.train:main", "train a model and evaluate it"),
    "eval": ("commands.train:eval_main", "evaluate a trained model"),
    "predict": ("deploy.predict:main", "detect objects in images, videos and the pictures of a camera"),
    "export": ("deploy.export:main", "write a trained model as one file that runs without this package"),
    "convert": (
        "deploy.convert.__main__:main",
        "make a checkpoint of weights of torchvision, MMDetection, Detectron or timm",
    ),
    "analysis": ("analysis.__main__:main", "look at anchors, the first loss, the loss's distribution, and speed"),
    "ablation": ("ablation.__main__:main", "train the rows of a table with several seeds and report them"),
    "replay": ("engine.replay:main", "compute the batch again at which a training diverged"),
}

_HELP = """usage: {prog} COMMAND ...

RetinaNet and the focal loss for Detectron2, each part of the paper a component chosen by name.

commands:
{commands}

`{prog} COMMAND --help` explains one of them.

examples:
  {prog} quickstart
  {prog} train --config-file quickstart/trees.yaml OUTPUT_DIR output/trees
  {prog} predict --config-file output/trees/config.yaml --weights output/trees/model_final.pth \\
      photos/ --output found

A --config-file is, in this order:
  - a file, relative to the current folder;
  - a shipped config, such as quickstart/trees.yaml or paper/table1b_gamma_2.yaml, of the folder
    {configs};
  - a config of Detectron2's model zoo, such as COCO-Detection/retinanet_R_50_FPN_1x.yaml.
A _BASE_ in it is relative to the file, or else a shipped config.
"""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int | None:
    """Run a command. Its modules are imported only now.

    Args:
        argv: the command and its words; those of this process if not given.
        prog: the name of the program in help and errors.

    Returns:
        The command's exit code, where None is 0; 2 without a command or for an unknown one.
    """
    argv, prog = sys.argv[1:] if argv is None else argv, prog or _program()
    if not argv:
        print(help_page(prog), end="", file=sys.stderr)
        return 2
    name, *words = argv
    if name in ("-h", "--help"):
        print(help_page(prog), end="")
        return 0
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS)
        hint = f"Near it: {', '.join(near)}." if near else f"The commands: {', '.join(COMMANDS)}."
        print(f"{prog}: there is no command {name!r}. {hint} See `{prog} --help`.", file=sys.stderr)
        return 2
    if os.getcwd() not in sys.path:  # so that MODEL.FOCAL.IMPORTS finds modules of the current folder
        sys.path.append(os.getcwd())
    function, _ = COMMANDS[name]
    return resolve_name(f"{__package__}.{function}")(words, f"{prog} {name}")


def help_page(prog: str) -> str:
    """Return what ``--help`` prints."""
    commands = "\n".join(f"  {name:11} {summary}" for name, (_, summary) in COMMANDS.items())
    return _HELP.format(prog=prog, commands=commands, configs=CONFIGS)


def _program() -> str:
    """What this program is called by: ``focal``, or ``python -m focal_plugin``."""
    name = os.path.basename(sys.argv[0])
    return "python -m focal_plugin" if name == "__main__.py" else name


if __name__ == "__main__":
    sys.exit(main())
