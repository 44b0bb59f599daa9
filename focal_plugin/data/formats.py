"""The formats of data sets, and which of them a folder holds."""

import codecs
import csv
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .coco import CocoSet
from .csv_file import COLUMNS, CsvSet
from .records import Checker, DataError, need, resolve
from .voc import VocSet
from .yolo import SPLITS, YoloSet, read_yaml

logger = logging.getLogger(__name__)

FORMATS = {"voc": VocSet, "coco": CocoSet, "yolo": YoloSet, "csv": CsvSet}
_LAYOUTS = (
    "voc: Annotations, ImageSets/Main/*.txt and JPEGImages; coco: a .json with images and categories; "
    "yolo: a .yaml with names and train, or images and labels; csv: a .csv with image_path, xmin, ..., label"
)
_NO_NAMES = ("annotations", "_annotations.coco")  # of COCO's files, that say nothing of a split
_FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')  # COCO's, of an image


@dataclass(frozen=True)
class Found:
    """A data set that a folder holds.

    Attributes:
        format: a key of ``FORMATS``.
        split: what tells it from others of the folder, such as "train".
        keys: what the format's class takes besides ``name``, ``classes`` and ``on_error``.
    """

    format: str
    split: str
    keys: dict[str, str]

    def __str__(self) -> str:
        return f"{self.format}, split {self.split} ({next(iter(self.keys.values()))})"


@dataclass(frozen=True)
class FolderSet:
    """A data set in a folder that is searched for one of the ``FORMATS``.

    Attributes:
        name: the data set's name, for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        path: the folder, or a JSON, YAML or CSV file.
        format: one of ``FORMATS``; empty, any.
        split: where the folder has several, which: a list of VOC's, a key of YOLO's YAML file or a folder in YOLO's
            ``images``, the name of a CSV file or COCO's JSON file or, if that is in a folder of its own or called
            ``annotations.json``, of the folder.
        classes: class names in the order of their indices; None, see the format.
        on_error: "raise" stops at the first bad record, "skip" leaves bad records out and counts them.
    """

    name: str
    path: str
    format: str = ""
    split: str = ""
    classes: list[str] | None = None
    on_error: str = "raise"

    def load(self, checker: Checker) -> tuple[list[dict], dict]:
        """Find the one data set and return its records in Detectron2's format, and their metadata."""
        found = find_sets(self.path, self.format, self.split)
        if len(found) > 1:
            listed = "; ".join(map(str, found))
            message = f"{self.path} holds {listed}. Name one by format and split, or by its file."
            raise DataError("several data sets", message)
        logger.info(f"Data set {self.name!r}: {self.path} holds {found[0]}.")
        return make_set(found[0], self.name, self.classes, self.on_error).load(checker)


def make_set(
    found: Found, name: str, classes: list[str] | None, on_error: str, **keys: str
) -> VocSet | CocoSet | YoloSet | CsvSet:
    """Return the data set that was found; ``keys`` of its class are added, or take the place of those found."""
    return FORMATS[found.format](name=name, classes=classes, on_error=on_error, **(found.keys | keys))


def find_sets(path: str, format: str = "", split: str = "") -> list[Found]:
    """Return the data sets in a folder, or in a JSON, YAML or CSV file.

    Args:
        path: the folder or file, as in a config.
        format: one of ``FORMATS``, to be searched for alone; empty, all are.
        split: that of the sets to return; empty, all are.

    Raises:
        DataError: there is none.
    """
    root = Path(need(resolve(path), "path"))
    everything = [found for name, find in _FINDERS.items() if format in ("", name) for found in find(root)]
    chosen = [found for found in everything if split in ("", found.split)]
    if chosen:
        return chosen
    if everything:
        listed = "; ".join(map(str, everything))
        raise DataError("no such split", f"{path} has no split {split!r}. It holds {listed}.")
    looked = ", ".join(sorted(entry.name for entry in root.iterdir())[:10]) if root.is_dir() else root.name
    raise DataError("no data set", f"{path} holds {looked or 'nothing'}. A data set has, for {_LAYOUTS}.")


def _files(root: Path, suffixes: tuple[str, ...], *patterns: str) -> list[Path]:
    """The files of these suffixes: ``root`` itself if it is one, or those that match the patterns in it."""
    files = [root] if root.is_file() else [path for pattern in patterns for path in sorted(root.glob(pattern))]
    return [path for path in files if path.suffix in suffixes and path.is_file() and not path.name.startswith(".")]


def _find_voc(root: Path) -> Iterator[Found]:
    if not (root / "Annotations").is_dir():
        return
    for path in _files(root, (".txt",), "ImageSets/Main/*"):
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            first = file.readline().strip()
        is_image = (root / "Annotations" / f"{first}.xml").exists()  # such as "photo 1"
        if is_image or first.split()[1:] not in (["-1"], ["0"], ["1"]):  # else VOC's list of one class
            yield Found("voc", path.stem, {"root": str(root), "split": path.stem})


def _find_coco(root: Path) -> Iterator[Found]:
    for path in _files(root, (".json",), "*", "*/*"):
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)  # to parse it would take long
        if content.lstrip()[:1] != b"{" or b'"images"' not in content or b'"categories"' not in content:
            continue
        apart = path.parent.name == "annotations" and not (path.parent / "images").is_dir()  # as in COCO itself
        home = path.parent.parent if apart else path.parent
        split = path.stem if root.is_file() or home in (root, root.parent) else home.name
        split = home.resolve().name if split in _NO_NAMES else split
        yield Found("coco", split, {"json": str(path), "images": str(_images_of(content, home, path))})


def _images_of(content: bytes, home: Path, path: Path) -> Path:
    """The folder that the first image of a COCO file is in."""
    short = path.stem.rpartition("_")[2]  # of annotations/instances_train2017.json
    folders = [home / "images" / short, home / short, home / path.stem, home / "images", home, home.parent / "images"]
    match = _FILE_NAME.search(content)
    try:
        name = json.loads(match[1]) if match else ""
    except ValueError:  # reading the file says so
        name = ""
    there = [folder for folder in folders if os.path.isdir(folder) and os.path.exists(os.path.join(folder, name))]
    return there[0] if there else home


def _find_yolo(root: Path) -> Iterator[Found]:
    described = False
    for path in _files(root, (".yaml", ".yml"), "*"):
        try:
            content = read_yaml(str(path))
        except DataError:
            continue
        if "names" in content or "nc" in content:
            for split in (split for split in SPLITS if content.get(split)):
                described = True
                yield Found("yolo", split, {"data": str(path), "split": split})
    images, labels = root / "images", root / "labels"
    if described or not (images.is_dir() and labels.is_dir()):
        return
    splits = sorted(path.name for path in images.iterdir() if path.is_dir() and (labels / path.name).is_dir())
    for split in splits:
        yield Found("yolo", split, {"images": str(images / split), "labels": str(labels / split)})
    if not splits:
        yield Found("yolo", root.resolve().name, {"images": str(images), "labels": str(labels)})


def _find_csv(root: Path) -> Iterator[Found]:
    for path in _files(root, (".csv",), "*"):
        try:
            with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
                reader = csv.DictReader(file, skipinitialspace=True)
                first, header = next(reader, {}), reader.fieldnames or ()
        except csv.Error:
            continue
        if set(COLUMNS) <= set(header):
            name, images = first.get("image_path") or "", path.parent / "images"
            elsewhere = os.path.exists(images / name) and not os.path.exists(path.parent / name)
            yield Found("csv", path.stem, {"csv": str(path)} | ({"images": str(images)} if elsewhere else {}))


_FINDERS: dict[str, Callable[[Path], Iterator[Found]]] = {
    "voc": _find_voc,
    "coco": _find_coco,
    "yolo": _find_yolo,
    "csv": _find_csv,
}
