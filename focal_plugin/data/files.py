"""Checks that the files of a config's data sets exist."""

import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager


def check_files(cfg: CfgNode, keys: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """Check that the files of all data sets in these ``keys`` of ``DATASETS`` exist.

    A set's file is the JSON file, or for Pascal VOC's sets the folder, in its metadata. Sets of ``DATASETS.LOCAL`` are
    checked when they are read.

    Raises:
        FileNotFoundError: a file does not exist.
    """
    for key in keys:
        for name in cfg.DATASETS[key]:
            check_files_of(name, f"DATASETS.{key}", "Describe data of your own in DATASETS.LOCAL.")


def check_files_of(name: str, key: str, hint: str) -> None:
    """Check that the file of a data set exists.

    Args:
        name: the data set.
        key: the config key that names it.
        hint: what to do, the end of the message.

    Raises:
        FileNotFoundError: it does not.
    """
    metadata = MetadataCatalog.get(name)
    path = metadata.get("json_file") or metadata.get("dirname")
    if path and not PathManager.exists(path):
        raise FileNotFoundError(
            f"{key} names {name!r}, whose {path} does not exist (current folder: {os.getcwd()}). Detectron2 looks for "
            "its own data sets in the folder datasets, or in the one that the environment variable DETECTRON2_DATASETS "
            f"names. {hint}"
        )
