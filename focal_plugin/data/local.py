"""``DATASETS.LOCAL``: data sets described in a config."""

import functools
import pickle
import reprlib
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..config import ConfigError
from .coco import CocoSet
from .csv_file import CsvSet
from .formats import FORMATS, FolderSet
from .images import decoded
from .records import Checker, DataError
from .voc import VocSet
from .yolo import YoloSet

DataSet = VocSet | CocoSet | YoloSet | CsvSet | FolderSet


class LocalDataset:
    """The function of a local set that Detectron2's ``DatasetCatalog`` calls for its records.

    The first call reads and checks the files and completes the set's metadata; later ones return copies.

    Attributes:
        left_out: after the first call, the number of images and boxes left out, by ("image" or "box", kind of defect).
    """

    def __init__(self, entry: DataSet) -> None:
        self.entry = entry
        self.left_out: Counter[tuple[str, str]] = Counter()
        self._is_decoded = False

    def __call__(self) -> list[dict]:
        return pickle.loads(self._records)

    def leave_out_broken_images(self) -> None:
        """Decode all images of a set with ``on_error: skip`` once, and leave out those that cannot be.

        Reading the records opens the images without decoding them. In training another image may take the place of one
        that then proves broken; in evaluation each would count as an image without a detection.

        Raises:
            DataError: no image is left.
        """
        if self.entry.on_error != "skip" or self._is_decoded:
            return
        self._is_decoded = True
        checker = Checker(self.entry.name, "skip")
        kept = decoded(self(), checker)
        if not checker.left_out:
            return
        self.left_out += checker.left_out
        checker.report(kept)
        self._records = self._pack(kept)
        metadata = MetadataCatalog.get(self.entry.name)
        if metadata.get("json_file"):
            del metadata.json_file  # it has the boxes of all images; the evaluator makes one of the records

    def _pack(self, records: list[dict]) -> bytes:
        if not records:
            raise DataError("no image", f"in data set {self.entry.name!r}: none is listed, or all were left out.")
        return pickle.dumps(records)

    @functools.cached_property
    def _records(self) -> bytes:  # pickled, since callers change what they get
        checker = Checker(self.entry.name, self.entry.on_error)
        try:
            records, metadata = self.entry.load(checker)
        except DataError as error:
            hint = " Correct it, or leave such records out with on_error: skip." if error.unit else ""
            raise DataError(
                error.kind, f"in data set {self.entry.name!r}: {error.message}{hint}", error.unit
            ) from error
        checker.report(records)
        self.left_out = checker.left_out
        for record in records if self.entry.on_error == "skip" else ():
            record["on_error"] = "skip"  # the training loader reads it
        packed = self._pack(records)
        known = MetadataCatalog.get(self.entry.name)
        if known.get("json_file"):  # an evaluator, built before any loader, has written these records to a file
            metadata.pop("json_file", None)
        known.set(**metadata)
        return packed


def leave_out_broken_images(name: str) -> None:
    """Do so with the data set ``name`` if it is of ``DATASETS.LOCAL`` (see ``LocalDataset``)."""
    if name in DatasetCatalog and isinstance(dataset := DatasetCatalog[name], LocalDataset):
        dataset.leave_out_broken_images()


def given_classes(name: str) -> list[str] | None:
    """Return the ``classes`` that the entry of the data set ``name`` gives; None if it is not of ``DATASETS.LOCAL``."""
    dataset = DatasetCatalog[name]
    return dataset.entry.classes if isinstance(dataset, LocalDataset) else None


def register_local_datasets(cfg: CfgNode) -> None:
    """Register the entries of ``cfg.DATASETS.LOCAL`` with Detectron2's catalogs. No file is read yet.

    Registering an entry again changes nothing.

    Raises:
        ConfigError: an entry has a missing, unknown or malformed key, or the name of another data set.
    """
    for index, entry in enumerate(cfg.DATASETS.LOCAL):
        register_local_dataset(entry, f"DATASETS.LOCAL[{index}]")


def register_local_dataset(entry: Mapping, where: str = "data set") -> None:
    """Register a data set, such as ``{"name": "mine", "format": "coco", "json": "a.json", "images": "imgs"}``.

    Args:
        entry: ``format`` ("voc", "coco", "yolo" or "csv") and the attributes of ``VocSet``, ``CocoSet``, ``YoloSet`` or
            ``CsvSet``; or a ``path`` to search and the other attributes of ``FolderSet``.
        where: the entry, for messages.

    Raises:
        ConfigError: see ``register_local_datasets``.
    """
    parsed = _parse(entry, where)
    if parsed.name not in DatasetCatalog:
        DatasetCatalog.register(parsed.name, LocalDataset(parsed))
        MetadataCatalog.get(parsed.name).set(evaluator_type="coco")
        return
    taken = DatasetCatalog[parsed.name]
    if not isinstance(taken, LocalDataset):
        raise ConfigError(
            f"{where}: the name {parsed.name!r} is taken by a data set that is not local; choose another."
        )
    if taken.entry != parsed:
        raise ConfigError(f"{where}: {parsed.name!r} is registered already as {taken.entry}; choose another name.")


def _parse(entry: Mapping, where: str) -> DataSet:
    searched = isinstance(entry, Mapping) and "path" in entry
    needs_format = isinstance(entry, Mapping) and ("format" in entry or not searched)
    if not isinstance(entry, Mapping) or (needs_format and str(entry.get("format")) not in FORMATS):
        found = f"format {reprlib.repr(entry.get('format'))}" if isinstance(entry, Mapping) else reprlib.repr(entry)
        raise ConfigError(
            f"{where} has {found}; expected keys and values with a format of {', '.join(FORMATS)}, or with a path to "
            "find it in."
        )
    kind = FolderSet if searched else FORMATS[entry["format"]]
    values = dict(entry) if searched else {key: value for key, value in entry.items() if key != "format"}
    known = {field.name: field.default for field in fields(kind)}
    unknown = [str(key) for key in values if key not in known]
    missing = [key for key, default in known.items() if default is MISSING and key not in values]
    for problem, keys in (("unknown", unknown), ("missing", missing)):
        if keys:
            listed = ", ".join(f"{key} (needed)" if known[key] is MISSING else key for key in known)
            what = "A path to search" if searched else f"Format {entry['format']}"
            few = textwrap.shorten(", ".join(keys), 200, placeholder=" ...")
            raise ConfigError(f"{where}: {problem} key {few}. {what} takes {listed}.")
    choices = {"on_error": ("raise", "skip"), "difficult": ("keep", "ignore")}
    for key, value in values.items():
        if key == "classes":
            values[key] = _check_classes(value, where)
        elif key in choices and value not in choices[key]:
            raise ConfigError(f"{where}: {key} is {reprlib.repr(value)}; expected one of {', '.join(choices[key])}.")
        elif not isinstance(value, str) or not value:
            raise ConfigError(
                f"{where}: {key} is {reprlib.repr(value)}; expected text (in YAML, quote what looks like a number)."
            )
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _check_classes(classes: object, where: str) -> list[str] | None:
    if classes is None:
        return None
    listed = list(classes) if isinstance(classes, Sequence) and not isinstance(classes, str) else []
    if not listed or not all(isinstance(name, str) and name for name in listed) or len(set(listed)) < len(listed):
        raise ConfigError(
            f"{where}: classes is {reprlib.repr(classes)}; expected a list of different names (in YAML, quote yes, no "
            "and numbers)."
        )
    return listed
