"""What the analyses share: their flags, the config and its data, the names of what they write."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from torch import nn

from ..config.load import load_config
from ..data import check_files
from ..engine import AtomicCheckpointer, Trainer
from ..files.safe_load import WeightsError
from ..files.weights import missing_file
from ..files.write import free_paths
from ..retinanet import FocalRetinaNet


class UserError(ValueError):
    """Something that the user can put right. The message names the flag, the config key or the file."""


def add_flags(parser: argparse.ArgumentParser, *, config_required: bool = True, writes: bool = True) -> None:
    """The flags that every analysis has; ``--output`` if it ``writes``."""
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        required=config_required,
        help="YAML: a file, or the name of a shipped config or of one of Detectron2's model zoo",
    )
    if writes:
        parser.add_argument("--output", metavar="DIR", help="where to write; OUTPUT_DIR/analysis if not given")
    parser.add_argument("opts", metavar="KEY VALUE", nargs=argparse.REMAINDER, help="changes of the config, at the end")


def read_config(args: argparse.Namespace) -> CfgNode:
    """The config of the flags. ``--weights``, where the analysis has it, becomes ``MODEL.WEIGHTS``."""
    cfg = load_config(args.config_file, args.opts)
    if getattr(args, "weights", None):
        cfg.MODEL.WEIGHTS = args.weights
    return cfg


def output_stem(args: argparse.Namespace, cfg: CfgNode, name: str, suffixes: Sequence[str]) -> Path:
    """A path without suffix that none of ``suffixes`` makes an existing file of, in a folder that exists.

    It is ``<folder>/<name>``, or ``<name>-2`` and so on: nothing that is there is overwritten.
    """
    folder = Path(args.output) if args.output else Path(cfg.OUTPUT_DIR) / "analysis"
    folder.mkdir(parents=True, exist_ok=True)
    return Path(free_paths(folder, *(name + suffix for suffix in suffixes))[0].removesuffix(suffixes[0]))


def written(stem: Path, suffixes: Sequence[str]) -> str:
    """A line that lists the files ``stem`` + suffix."""
    return "Written: " + ", ".join(f"{stem}{suffix}" for suffix in suffixes)


def read_records(cfg: CfgNode, key: str, *, filter_empty: bool = False) -> list[dict]:
    """The records of the data sets of ``DATASETS.<key>``, "TRAIN" or "TEST".

    Raises:
        UserError: the key is empty, or names a data set that is not registered, has no image to read, or whose files
            are not there.
    """
    names = cfg.DATASETS[key]
    if not names:
        raise UserError(f"DATASETS.{key} is empty; expected the names of data sets.")
    for name in names:
        if name not in DatasetCatalog:
            raise UserError(f"DATASETS.{key} names {name!r}, which is not registered; add an entry to DATASETS.LOCAL.")
    try:
        check_files(cfg, [key])
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
    try:
        return get_detection_dataset_dicts(names, filter_empty=filter_empty, check_consistency=False)
    except (OSError, ValueError, AssertionError) as error:  # a DataError is a ValueError; Detectron2 asserts images
        raise UserError(f"DATASETS.{key} names {', '.join(names)}, which cannot be read: {error}") from error


def spread(items: Sequence, count: int) -> list:
    """``count`` of ``items``, spread evenly over them and in their order; all of them for 0 or too large a count."""
    if count < 0:
        raise UserError(f"--num-images is {count}; expected a number ≥ 0, where 0 stands for all.")
    count = min(count or len(items), len(items))
    return [items[i * len(items) // count] for i in range(count)]


def load_weights(model: nn.Module, path: str, where: str = "MODEL.WEIGHTS (or --weights)") -> None:
    """Load a checkpoint into ``model``.

    Raises:
        UserError: there is no such file, or it holds anything but weights.
    """
    if problem := missing_file(where, path):
        raise UserError(problem)
    try:
        AtomicCheckpointer(model).load(path)
    except WeightsError as error:
        raise UserError(f"{where}: {error}") from error


def build_focal_model(cfg: CfgNode, what: str) -> FocalRetinaNet:
    """The model of ``cfg``, without its weights.

    Raises:
        UserError: it is no FocalRetinaNet, which ``what`` needs.
    """
    model = Trainer.build_model(cfg)
    if not isinstance(model, FocalRetinaNet):
        raise UserError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}; `{what}` looks into a FocalRetinaNet. The "
            "weights of a RetinaNet of Detectron2's load into one."
        )
    return model
