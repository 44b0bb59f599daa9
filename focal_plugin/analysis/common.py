"""What the analyses share: flags, reading the config, its data and weights, and naming and writing output files."""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from torch import nn

from ..config import ConfigError
from ..config.load import load_config
from ..data import DataError, check_files, check_registered
from ..engine import AtomicCheckpointer, Trainer
from ..files.safe_load import WeightsError
from ..files.weights import missing_file
from ..files.write import free_paths
from ..retinanet import FocalRetinaNet

# Errors that the user can correct: the message names the flag, config key or file.
MISTAKES = (ConfigError, DataError, WeightsError, FileNotFoundError, ImportError)


def add_flags(
    parser: argparse.ArgumentParser, *, num_images: int | None = None, config_required: bool = True, writes: bool = True
) -> None:
    """Add the flags that analyses share: ``--num-images`` if there is a default, and ``--output`` if it ``writes``."""
    if num_images is not None:
        text = f"images, spread evenly over the data set; 0: all (default: {num_images})"
        parser.add_argument("--num-images", type=int, default=num_images, metavar="N", help=text)
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        required=config_required,
        help="YAML: a file, or the name of a shipped config or of one of Detectron2's model zoo",
    )
    if writes:
        parser.add_argument("--output", metavar="DIR", help="folder to write to (default: OUTPUT_DIR/analysis)")
    parser.add_argument("opts", metavar="KEY VALUE", nargs=argparse.REMAINDER, help="changes of the config, at the end")


def read_config(args: argparse.Namespace) -> CfgNode:
    """Return the config of the flags; ``--weights``, if the analysis has it, becomes ``MODEL.WEIGHTS``."""
    cfg = load_config(args.config_file, args.opts)
    if getattr(args, "weights", None):
        cfg.MODEL.WEIGHTS = args.weights
    return cfg


def output_paths(args: argparse.Namespace, cfg: CfgNode, *names: str) -> list[Path]:
    """Return paths of new files in the output folder, which is made. Names that exist get a number."""
    return [Path(path) for path in free_paths(output_folder(args, cfg), *names)]


def output_folder(args: argparse.Namespace, cfg: CfgNode) -> Path:
    """Return the output folder, which is made."""
    folder = Path(args.output) if args.output else Path(cfg.OUTPUT_DIR) / "analysis"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def named_run(word: str) -> tuple[str, str]:
    """Return the name and the path in ``[NAME=]PATH``; by default a folder's name, or a file's without its suffix."""
    name, equals, path = word.partition("=")
    if not equals or Path(word).exists():
        name, path = "", word
    return name or (Path(path).resolve().name if Path(path).is_dir() else Path(path).stem), path


def print_written(paths: Sequence[Path]) -> None:
    """Print the names of the files that were written."""
    print(f"Written: {', '.join(map(str, paths))}")


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """Write rows with the same keys to a CSV file, which is empty without rows."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def read_records(cfg: CfgNode, key: str, *, filter_empty: bool = False) -> list[dict]:
    """Return the records of the data sets of ``DATASETS.<key>``, "TRAIN" or "TEST".

    Raises:
        ConfigError: the key is empty, or names a data set that is not registered or cannot be read.
        FileNotFoundError: the files of a data set are missing.
    """
    names = cfg.DATASETS[key]
    if not names:
        raise ConfigError(f"DATASETS.{key} is empty; expected the names of data sets.")
    for name in names:
        check_registered(name, f"DATASETS.{key}")
    check_files(cfg, [key])
    try:
        return get_detection_dataset_dicts(names, filter_empty=filter_empty, check_consistency=False)
    except (OSError, ValueError, AssertionError) as error:  # Detectron2 asserts that there are images
        raise ConfigError(f"DATASETS.{key} names {', '.join(names)}, which cannot be read: {error}") from error


def spread(items: Sequence, count: int) -> list:
    """Return ``count`` items, spread evenly and in their order; all of them if ``count`` is 0 or too large."""
    if count < 0:
        raise ConfigError(f"--num-images is {count}; expected a number ≥ 0, where 0 stands for all.")
    count = min(count or len(items), len(items))
    return [items[i * len(items) // count] for i in range(count)]


def load_weights(model: nn.Module, path: str, where: str = "MODEL.WEIGHTS (or --weights)") -> None:
    """Load the checkpoint ``path``, which ``where`` names, into ``model``.

    Raises:
        ConfigError: there is no such file. WeightsError: it holds no weights.
    """
    if problem := missing_file(where, path):
        raise ConfigError(problem)
    AtomicCheckpointer(model).load(path)


def build_focal_model(cfg: CfgNode, what: str) -> FocalRetinaNet:
    """Return the model of ``cfg``, without its weights.

    Raises:
        ConfigError: it is not a FocalRetinaNet, which the analysis ``what`` needs.
    """
    model = Trainer.build_model(cfg)
    if not isinstance(model, FocalRetinaNet):
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}; `{what}` needs FocalRetinaNet, which loads "
            "the weights of Detectron2's RetinaNet too."
        )
    return model
