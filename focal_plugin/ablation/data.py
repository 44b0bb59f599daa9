"""The data of a run: noted with it, so that one table has results of one set of labels."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from detectron2.data import DatasetCatalog

from ..config import ConfigError
from ..config.components import check_names, fill_args
from ..data import check_registered, has_boxes, register_local_datasets
from ..registry import import_user_modules
from .runs import Run, difference, refuse_others


class DataSet(NamedTuple):
    """What a table says of a data set.

    Attributes:
        images: their number.
        has_boxes: whether any has a box, besides crowds.
        labels: the first digits of the SHA-256 of its records: the images' names and sizes, and all annotations. Where
            the files are, and what is in the images, does not matter.
    """

    images: int
    has_boxes: bool
    labels: str

    def __str__(self) -> str:
        return f"{self.images} images with labels {self.labels}"


def read_data(runs: Sequence[Run]) -> dict[str, DataSet]:
    """Read and check each data set of the runs once.

    Raises:
        ImportError: a module of ``MODEL.FOCAL.IMPORTS``, which may register data sets, is not found.
        ValueError, OSError: a component, a key of its own or a data set is unknown, the files of a data set are wrong,
            or the first test set of a run has no box.
    """
    found: dict[str, DataSet] = {}
    for run in runs:
        import_user_modules(run.cfg)
        try:
            check_names(run.cfg)
            fill_args(run.cfg.clone())
        except ConfigError as error:
            raise ConfigError(f"{run.row.name}: {error}") from error
        register_local_datasets(run.cfg)
        for name in (*run.cfg.DATASETS.TRAIN, *run.cfg.DATASETS.TEST):
            if name not in found:
                check_registered(name, f"DATASETS of {run.row.name}")
                found[name] = _summed_up(DatasetCatalog.get(name))
        if not found[first := run.cfg.DATASETS.TEST[0]].has_boxes:
            raise ConfigError(
                f"{first}, the first of DATASETS.TEST, has no boxes (besides crowds), and so no AP to report. Choose "
                "another one, or report the runs so far with --report-only."
            )
    return found


def _summed_up(records: Sequence[Mapping]) -> DataSet:
    digest = hashlib.sha256()
    for record in records:
        named = {**record, "file_name": os.path.basename(record.get("file_name", ""))}
        digest.update(json.dumps(named, sort_keys=True, default=repr).encode())
    return DataSet(len(records), any(map(has_boxes, records)), digest.hexdigest()[:12])


def notes_of_data(found: Mapping[str, DataSet]) -> dict[str, str]:
    """Return what a run's notes say of the data sets, by name."""
    return {name: str(data) for name, data in found.items()}


def check_data(runs: Sequence[Run], found: Mapping[str, DataSet] | None) -> None:
    """Check that the runs so far have the same data; and if more is to be run, that this is ``found``, the data of now.

    Raises:
        ConfigError: they have not.
    """
    now = {} if found is None else notes_of_data(found)
    changes = {}
    for run in runs:
        sets = {*run.cfg.DATASETS.TRAIN, *run.cfg.DATASETS.TEST}
        noted = next((attempt["data"] for attempt in run.attempts() if "data" in attempt), {})
        before = {name: text for name, text in noted.items() if name in sets}
        now = before | now
        changes[run] = difference(before, {name: now[name] for name in before}, missing="")
    refuse_others(changes, "other data")
