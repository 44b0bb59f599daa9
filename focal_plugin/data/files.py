"""Checks that the files of a config's data sets exist."""

import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..config import ConfigError


def check_files(cfg: CfgNode, keys: Sequence[str] = ("TRAIN", "TEST", "VALIDATION")) -> None:
    """Check that the files of all data sets in these ``keys`` of ``DATASETS`` exist.

    A set's file is the JSON file, or for Pascal VOC's sets the folder, in its metadata. Sets of ``DATASETS.LOCAL`` are
    checked when they are read. With ``MODEL.LOAD_PROPOSALS`` each set has a file of proposals.

    Raises:
        ConfigError: there are more or fewer files of proposals than data sets.
        FileNotFoundError: a file does not exist.
    """
    for key in keys:
        if cfg.MODEL.LOAD_PROPOSALS and key != "VALIDATION":
            _check_proposals(cfg, key)
        for name in cfg.DATASETS[key]:
            check_files_of(name, f"DATASETS.{key}", "Describe data of your own in DATASETS.LOCAL.")


def _check_proposals(cfg: CfgNode, key: str) -> None:
    names, paths = cfg.DATASETS[key], cfg.DATASETS[f"PROPOSAL_FILES_{key}"]
    if len(paths) != len(names):
        raise ConfigError(
            f"DATASETS.PROPOSAL_FILES_{key} has {len(paths)} files; expected {len(names)}, one for each data set of "
            f"DATASETS.{key} (or MODEL.LOAD_PROPOSALS False)."
        )
    for path in paths:
        if "://" not in path and not PathManager.isfile(path):
            raise FileNotFoundError(f"DATASETS.PROPOSAL_FILES_{key} names {path}, which is no file; expected a pickle.")


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
    json_file, folder = metadata.get("json_file"), metadata.get("dirname")
    path = json_file or folder
    if path and not (PathManager.isfile(path) if json_file else PathManager.exists(path)):
        problem = "is no file" if PathManager.exists(path) else "does not exist"
        raise FileNotFoundError(
            f"{key} names {name!r}, whose {path} {problem} (current folder: {os.getcwd()}). Detectron2 looks for "
            "its own data sets in the folder datasets, or in the one that the environment variable DETECTRON2_DATASETS "
            f"names. {hint}"
        )
