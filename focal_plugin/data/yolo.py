"""Data sets in Ultralytics' YOLO layout: for each image a text file, a line of which is a class and a box."""

import math
import os
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass

from detectron2.utils.file_io import PathManager
from PIL import Image

from ..config import ConfigError
from ..files.progress import progress
from ..files.regular import read_regular
from ..files.safe_yaml import MOST_BYTES, parse_yaml
from .images import check_image
from .records import NOT_NUMBERS, Checker, DataError, make_annotation, need, read_lines, read_text, resolve

SPLITS = ("train", "val", "test")
NAMES_FILE = "classes.txt"  # what labelling tools write in place of a data.yaml
_FAR = 2  # shares of an image: beyond rounding, and what a box in pixels exceeds


@dataclass(frozen=True)
class YoloSet:
    """A data set in YOLO's layout, described by a ``data.yaml`` or as a folder of images and one of labels.

    A label file has the image's name, with ``.txt``. Its lines are ``class cx cy w h``, or ``class x1 y1 x2 y2 ...``
    for a polygon, of which the bounding box is taken; all are shares of the image's width and height. An empty label
    file and a missing one stand for an image without boxes.

    Attributes:
        name: the data set's name, for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        data: the YAML file with ``names`` and, for each split, a folder of images, a text file that lists images, or a
            list of these, relative to its ``path``. If it says ``kpt_shape``, keypoints follow each box and are passed
            over.
        split: "train", "val" or "test" in that file.
        root: the folder that the paths in ``data`` are relative to, in place of what it says itself, which has to be in
            its own folder.
        images: in place of ``data`` and ``split``, the folder of the images.
        labels: with ``images``, the folder of the labels. Empty: the last folder ``images`` in an image's path is
            replaced by ``labels``; if there is none, the labels are beside the images.
        classes: class names in the order of their indices; None, those of the YAML file. With ``images``, they are also
            the names that the labels' numbers stand for; None, the lines of ``classes.txt`` in ``labels`` or up to two
            folders above it.
        on_error: "raise" stops at the first bad record, "skip" leaves bad records out and counts them.
    """

    name: str
    data: str = ""
    split: str = ""
    root: str = ""
    images: str = ""
    labels: str = ""
    classes: list[str] | None = None
    on_error: str = "raise"

    def __post_init__(self) -> None:
        given = {key for key in ("data", "split", "root", "images", "labels") if getattr(self, key)}
        if given - {"root"} != {"data", "split"} and given - {"labels"} != {"images"}:
            found = ", ".join(sorted(given)) or "neither"
            raise ConfigError(
                f"format yolo takes data, split and perhaps root, or images and perhaps labels; found {found}."
            )

    def load(self, checker: Checker) -> tuple[list[dict], dict]:
        """Return the records in Detectron2's format, and their metadata."""
        if self.data:
            path = need(resolve(self.data), "data")
            content = read_yaml(path)
            root = need(resolve(self.root), "root") if self.root else ""
            sources = _split_sources(content, path, self.split, root)
        else:
            path, root, content, sources = "", "", {}, [need(resolve(self.images), "images")]
        names = self._names(content, path or sources[0])
        classes = self.classes or list(names.values())
        class_ids = {name: index for index, name in enumerate(classes)}
        home = root or os.path.dirname(path) if path else ""
        images = [image for source in sources for image in _list_images(source, home)]
        labels = [self._label_file(image, sources[0]) for image in images]
        _check_labels(images, labels, sources, checker)
        home = os.path.commonpath([os.path.abspath(os.path.dirname(image)) for image in images]) if images else ""
        keypoints = _keypoints(content, path)
        records: list[dict] = []
        seen: dict[str, str] = {}
        for image, label in zip(progress(images, desc=f"Reading {self.name}"), labels):
            with checker.record("image"):
                if label in seen:
                    raise DataError("image listed twice", f"{image} and {seen[label]} have the same labels, {label}.")
                seen[label] = image
                width, height = check_image(image, None, self.split or self.images)
                image_id = os.path.relpath(os.path.abspath(image), home)
                record = {"file_name": image, "image_id": image_id, "height": height, "width": width, "annotations": []}
                for where, line in read_lines(label) if PathManager.exists(label) else ():
                    with checker.record("box"):
                        record["annotations"].append(_read_line(line, record, names, class_ids, where, keypoints))
                records.append(record)
        return records, {"thing_classes": list(classes)}

    def _names(self, content: dict, where: str) -> dict[int, str]:
        """The names that the labels' numbers stand for, in the order of the numbers."""
        found = content.get("names")
        if found is None:
            found = self.classes or (None if self.data else self._read_names())
        names = dict(enumerate(found)) if isinstance(found, list) else found
        sound = isinstance(names, dict) and names and all(type(key) is int and key >= 0 for key in names)
        if not sound or not all(isinstance(name, str) and name for name in names.values()):
            raise DataError(
                "no classes",
                f"{where} has names {reprlib.repr(found)}, expected a list, or {{0: name}} (quote yes and no). "
                f"Without a data.yaml, give the entry its classes: [...], or write {NAMES_FILE}.",
            )
        if len(set(names.values())) < len(names):
            raise DataError(
                "category listed twice", f"{where} has names {reprlib.repr(found)}, of which some are the same."
            )
        return dict(sorted(names.items()))

    def _read_names(self) -> list[str] | None:
        folder = resolve(self.labels) if self.labels else labels_folder(resolve(self.images))
        for _ in range(3):  # labels/train, labels and what these are in
            path = os.path.join(folder, NAMES_FILE)
            if PathManager.exists(path):
                return [name.strip() for name in read_text(path).rstrip().splitlines()]
            folder = os.path.dirname(folder)
        return None

    def _label_file(self, image: str, source: str) -> str:
        stem = os.path.splitext(image)[0]
        if self.labels:
            return os.path.join(resolve(self.labels), os.path.relpath(stem, source)) + ".txt"
        return os.path.join(labels_folder(os.path.dirname(stem)), os.path.basename(stem)) + ".txt"


def labels_folder(images: str) -> str:
    """Return the folder of the labels of the images in a folder: its last part ``images`` becomes ``labels``."""
    parts = os.path.normpath(images).split(os.sep)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return os.sep.join(parts)


def read_yaml(path: str) -> dict:
    """Return what a data.yaml holds.

    Raises:
        DataError: it is no YAML mapping, or asks for more than data.
    """
    try:
        return parse_yaml(read_regular(path, MOST_BYTES), path, keys=(str, int))
    except (ConfigError, OSError) as error:
        raise DataError("file that is not YAML", str(error)) from error


def _split_sources(content: dict, path: str, split: str, root: str) -> list[str]:
    """Return the folders of images, or text files that list images, of a split.

    Args:
        content: of the YAML file ``path``.
        path: that file.
        split: a key of it, such as "train".
        root: what ``content``'s paths are relative to; empty, what it says itself, which is in its own folder.

    Raises:
        DataError: the file does not have the split, or what it names does not exist or is outside the folder.
    """
    values = content.get(split) if split in SPLITS else None
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, list) or not values or not all(isinstance(value, str) and value for value in values):
        has = ", ".join(key for key in SPLITS if content.get(key)) or "none"
        raise DataError("no such split", f"{path} has {split}: {reprlib.repr(values)}; its splits are: {has}.")
    root = root or _root_of(content, path)
    sources = []
    for value in values:
        places = [os.path.join(root, value)]
        if value.startswith("../"):  # Roboflow writes one ../ too many
            places.append(os.path.join(root, value[len("../") :]))
        inside = [os.path.normpath(place) for place in places if _is_inside(place, root)]
        if not inside:
            raise DataError(
                "path outside its folder",
                f"{path} has {split}: {value}, outside {root}. If that is what you want, give the entry a root.",
            )
        sources.append(next(filter(PathManager.exists, inside), None) or need(inside[-1], f"{split} in {path}"))
    return sources


def _root_of(content: dict, path: str) -> str:
    """The folder that the paths in a data.yaml are relative to: its ``path``, relative to it or the current folder."""
    home, said = os.path.dirname(path), content.get("path") or ""
    if not isinstance(said, str):
        raise DataError("not YOLO's format", f"{path}: path is {reprlib.repr(said)}, expected a folder.")
    for root in (os.path.normpath(os.path.join(home, said)), said):
        if _is_inside(root, home) and os.path.isdir(root):
            return root
    raise DataError(
        "path outside its folder",
        f"{path}: path is {said}, which is no folder in {home or 'this one'}. Correct it, or give the entry a root.",
    )


def _is_inside(path: str, folder: str) -> bool:
    path, folder = os.path.abspath(path), os.path.abspath(folder)
    return os.path.commonpath([path, folder]) == folder


def _list_images(source: str, home: str) -> Iterator[str]:
    """Yield the images in a folder and the folders in it, or those that a text file lists, all in ``home`` if given."""
    if not os.path.isdir(source):
        for where, line in read_lines(source):
            path = os.path.normpath(os.path.join(os.path.dirname(source), line))
            if not _is_inside(path, home or os.path.dirname(source)):
                raise DataError("path outside its folder", f"{where} names {line[:200]}.")
            yield path
        return
    extensions = Image.registered_extensions()
    for folder, folders, files in os.walk(source):
        folders.sort()
        yield from (os.path.join(folder, file) for file in sorted(files) if is_image(file, extensions))


def is_image(name: str, extensions: dict[str, str]) -> bool:
    """Return whether a file's name has one of the ``extensions`` of images, and is not hidden."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in extensions


def _check_labels(images: list[str], labels: list[str], sources: list[str], checker: Checker) -> None:
    """Check that there are labels, and that in their folders each is of an image."""
    if images and not any(map(PathManager.exists, labels)):
        message = f"none of {len(images)} images has a label file; that of {images[0]} would be {labels[0]}."
        raise DataError("no labels", message)
    if not all(map(os.path.isdir, sources)):
        return  # a list of images may name some of a folder
    known = {os.path.abspath(label) for label in labels}
    for folder in sorted({os.path.dirname(label) for label in labels}):
        for name in sorted(os.listdir(folder) if os.path.isdir(folder) else []):
            path = os.path.join(folder, name)
            if name.endswith(".txt") and name != NAMES_FILE and os.path.abspath(path) not in known:
                with checker.record("image"):
                    raise DataError("labels of no image", f"{path}: no image in {', '.join(sources)} has that name.")


def _keypoints(content: dict, path: str) -> int | None:
    """How many numbers of keypoints follow each box, or None if the set has none."""
    shape = content.get("kpt_shape")
    if shape is None:
        return None
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
        raise DataError("not YOLO's format", f"{path}: kpt_shape is {reprlib.repr(shape)}, expected [number, 2 or 3].")
    return math.prod(shape)


def _read_line(
    line: str, record: dict, names: dict[int, str], class_ids: dict[str, int], where: str, keypoints: int | None
) -> dict:
    words = line.split()
    count = len(words)
    is_polygon = keypoints is None and count >= 7 and count % 2 == 1
    if not is_polygon and count != 5 + (keypoints or 0):
        expected = "class cx cy w h, or class x1 y1 x2 y2 ... for a polygon" if keypoints is None else "keypoints too"
        raise DataError("line of another length", f"{where} has {count} values; expected {expected}.")
    text = " ".join(words)[:80]
    try:
        index, *values = map(float, words if is_polygon else words[:5])
    except ValueError:
        raise DataError(NOT_NUMBERS, f"{where}: {text}.") from None
    if index not in names:
        raise DataError("unknown class", f"{where}: class {words[0]}; the classes' numbers are {_range(names)}.")
    if not all(map(math.isfinite, values)):
        raise DataError(NOT_NUMBERS, f"{where}: {text}.")
    if max(map(abs, values)) > _FAR:
        raise DataError("box that is not normalised", f"{where}: {text}; expected shares of the image, from 0 to 1.")
    if is_polygon:
        box = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
    else:
        cx, cy, w, h = values
        box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
    width, height = record["width"], record["height"]
    x0, y0, x1, y1 = box
    box = (x0 * width, y0 * height, x1 * width, y1 * height)
    return make_annotation(box, (width, height), names[int(index)], class_ids, where)


def _range(names: dict[int, str]) -> str:
    keys = list(names)
    return f"{keys[0]} to {keys[-1]}" if keys == list(range(keys[0], keys[-1] + 1)) else ", ".join(map(str, keys))
