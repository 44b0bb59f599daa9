"""Checks of a data set's records that all formats share, and what happens to a record that fails one."""

import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..files.regular import open_regular

logger = logging.getLogger(__name__)

_FAR = 1e9  # pixels: beyond any image
_LONGEST = 1000  # characters of a message; what a file has in a number's place may be long
_LISTED = 20  # of the records that are left out: how many are listed
_ROUNDING = 1.0  # pixels that a box may reach outside its image, since tools round, or count pixels from 0 or from 1

NOT_NUMBERS, NO_SIZE, OUTSIDE = "box that is not four numbers", "box of no size", "box outside its image"


class DataError(ValueError):
    """A defect in a data set. The message names the file, the record and what was expected.

    Attributes:
        kind: the defect in a few words; records that are left out are counted by it.
        message: the rest.
        unit: "image" or "box" if the defect concerns one of these, which can be left out; None if it concerns the set.
    """

    def __init__(self, kind: str, message: str, unit: str | None = None) -> None:
        message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]} …"
        super().__init__(f"{kind}: {message}")
        self.kind, self.message, self.unit = kind, message, unit


class Checker:
    """Stops at the first bad record (``on_error`` "raise"), or leaves bad records out and counts them ("skip")."""

    def __init__(self, dataset: str, on_error: str = "raise") -> None:
        self.dataset = dataset
        self.on_error = on_error
        self.left_out: Counter[tuple[str, str]] = Counter()  # (unit, kind) -> how many
        self._listed: list[DataError] = []

    @contextmanager
    def record(self, unit: str) -> Iterator[None]:
        """Read one ``unit`` ("image" or "box") inside; with "skip", a ``DataError`` leaves out that unit alone."""
        try:
            yield
        except DataError as error:
            error.unit = error.unit or unit
            if self.on_error == "raise":
                raise
            self.left_out[unit, error.kind] += 1
            if len(self._listed) < _LISTED:
                self._listed.append(error)
            logger.debug("Data set %r: left out one %s. %s", self.dataset, unit, error)

    def report(self, records: Sequence[dict]) -> None:
        """Log the ``summary`` of the records that were kept."""
        logger.log(logging.WARNING if self.left_out else logging.INFO, self.summary(records))

    def summary(self, records: Sequence[dict]) -> str:
        """Return in one line what was kept and, by kind of defect, what was left out."""
        boxes = [box for record in records for box in record["annotations"]]
        line = f"Data set {self.dataset!r}: {len(records)} images, {len(boxes)} boxes"
        if crowds := sum(box["iscrowd"] for box in boxes):
            line += f" ({crowds} of them crowds)"
        for unit, units in (("image", "images"), ("box", "boxes")):
            kinds = {kind: count for (what, kind), count in sorted(self.left_out.items()) if what == unit}
            if kinds:
                listed = ", ".join(f"{kind}: {count}" for kind, count in kinds.items())
                line += f"; {units} left out: {sum(kinds.values())} ({listed})"
        return line

    def listing(self) -> str:
        """Return a line for each of the first 20 records that were left out, and how many more were; "" for none."""
        more = self.left_out.total() - len(self._listed)
        return "\n".join([f"  {error}" for error in self._listed] + ([f"  and {more:,} more"] if more else []))


def join_inside(folder: str, name: str, where: str) -> str:
    """Return the path of ``name`` in ``folder``; ``where`` is what names it.

    Raises:
        DataError: the name leads out of the folder.
    """
    if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
        raise DataError("path outside its folder", f"{where} names {name!r}; expected a path inside {folder}.")
    return os.path.join(folder, name)


def is_number(value: object) -> bool:
    """Return whether ``value`` is a finite number, no bool, and not beyond any image's area."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _FAR**2  # a NaN fails too


def check_numbers(values: Sequence[object], where: str) -> None:
    """Check that ``values`` are four finite numbers, none beyond any image.

    Raises:
        DataError: they are not.
    """
    if len(values) != 4 or not all(is_number(v) and abs(v) <= _FAR for v in values):
        raise DataError(NOT_NUMBERS, f"{where}: {list(values)}.")


def box_defect(box: Sequence[float], size: tuple[float, float]) -> str:
    """Return what is wrong with a box: ``NOT_NUMBERS``, ``NO_SIZE`` or ``OUTSIDE``; "" if nothing is.

    Args:
        box: (x0, y0, x1, y1) in pixels, in an image that spans from (0, 0) to ``size``.
        size: (width, height) of the image; infinite where it is not known.
    """
    x0, y0, x1, y1 = box
    width, height = size
    if not all(map(math.isfinite, box)):
        return NOT_NUMBERS
    if x1 <= x0 or y1 <= y0:
        return NO_SIZE
    if min(x0, y0) < -_ROUNDING or x1 > width + _ROUNDING or y1 > height + _ROUNDING:
        return OUTSIDE
    return "" if x0 < width and y0 < height and x1 > 0 and y1 > 0 else OUTSIDE


def check_box(box: Sequence[float], size: tuple[int, int], where: str, first: int = 0) -> list[float]:
    """Return a box clipped to its image, as (x0, y0, x1, y1) in an image that spans from (0, 0) to ``size``.

    Args:
        box: (x0, y0, x1, y1) in pixels.
        size: (width, height) of the image.
        where: the record, for the message.
        first: the number of the first pixel; with 1, as in VOC, x0 and y0 lose 1.

    Raises:
        DataError: the box has a ``box_defect``.
    """
    check_numbers(box, where)
    x0, y0, x1, y1 = box
    if defect := box_defect((x0 - first, y0 - first, x1, y1), size):
        image = f" in an image of {size[0]}×{size[1]}" if defect == OUTSIDE else ""
        raise DataError(defect, f"{where}: from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}){image}.")
    clipped = (max(x0 - first, 0), max(y0 - first, 0), min(x1, size[0]), min(y1, size[1]))
    return [float(value) for value in clipped]  # Detectron2 would scale whole numbers to whole numbers


def make_annotation(
    box: Sequence[float], size: tuple[int, int], name: str, class_ids: dict[str, int], where: str, first: int = 0
) -> dict:
    """Return a box as an annotation in Detectron2's format: of no crowd, clipped to its image.

    Args:
        box, size, where, first: see ``check_box``.
        name: its class.
        class_ids: the index of each class.

    Raises:
        DataError: the box has a ``box_defect``, or its class is unknown.
    """
    return {
        "bbox": check_box(box, size, where, first),
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": class_id(name, class_ids, where),
        "iscrowd": 0,
    }


def objects(record: dict) -> list[dict]:
    """Return the annotations of an image without crowds."""
    return [annotation for annotation in record.get("annotations", ()) if annotation.get("iscrowd", 0) == 0]


def has_boxes(record: dict) -> bool:
    """Return whether an image has a box that is no crowd."""
    return bool(objects(record))


def class_id(name: str, class_ids: dict[str, int], where: str) -> int:
    """Return the index of the class ``name``.

    Raises:
        DataError: it is none of ``class_ids``.
    """
    if name not in class_ids:
        raise DataError("unknown class", f"{where}: {name!r}; the classes are {', '.join(class_ids)}.")
    return class_ids[name]


def read_text(path: str) -> str:
    """Return what is in a text file.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        with open_regular(path) as file:
            return file.read().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError("file that is not text", f"{path}: {error}") from error


def read_lines(path: str) -> list[tuple[str, str]]:
    """Return the lines of a text file that are not empty, stripped, each with where it is; errors as ``read_text``."""
    lines = enumerate(map(str.strip, read_text(path).splitlines()), start=1)
    return [(f"{path}, line {number}", line) for number, line in lines if line]


def resolve(path: str) -> str:
    """Return where ``path`` of a config is: relative to the current folder, as in Detectron2, with ``~`` expanded.

    If nothing is there and the path begins with ``datasets/``, the folder that the environment variable
    DETECTRON2_DATASETS names stands for ``datasets``, as it does for Detectron2's own data sets.
    """
    path = os.path.expanduser(path)
    parts = os.path.normpath(path).split(os.sep, 1)
    datasets = os.environ.get("DETECTRON2_DATASETS")
    if datasets and len(parts) == 2 and parts[0] == "datasets" and not PathManager.exists(path):
        return os.path.join(os.path.expanduser(datasets), parts[1])
    return path


def need(path: str, what: str) -> str:
    """Return ``path``, which is ``what`` of a config entry.

    Raises:
        DataError: it does not exist.
    """
    if not PathManager.exists(path):
        raise DataError("missing file", f"{what} is {path}, which does not exist (current folder: {os.getcwd()}).")
    return path
