"""Whether the files of the data sets that a config names are there."""

import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager


def check_files(cfg: CfgNode, keys: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """Check, before anything is trained, that what these ``keys`` of ``DATASETS`` name is on this machine.

    That is the JSON file, or of Pascal VOC's sets the folder, in the metadata of a registered set. Sets of
    ``DATASETS.LOCAL`` are checked as they are read.

    Raises:
        FileNotFoundError: one is not there.
    """
    for key in keys:
        for name in cfg.DATASETS[key]:
            check_files_of(name, f"DATASETS.{key}", "Describe data of your own in DATASETS.LOCAL.")


def check_files_of(name: str, key: str, hint: str) -> None:
    """Check that the files of the data set ``name``, which ``key`` names, are there; ``hint`` ends the error.

    Raises:
        FileNotFoundError: they are not.
    """
    metadata = MetadataCatalog.get(name)
    path = metadata.get("json_file") or metadata.get("dirname")
    if path and not PathManager.exists(path):
        raise FileNotFoundError(
            f"{key} names {name!r}, whose {path} does not exist (current folder: {os.getcwd()}). Detectron2 looks for "
            "its own data sets in the folder datasets, or in the one that the environment variable DETECTRON2_DATASETS "
            f"names. {hint}"
        )
