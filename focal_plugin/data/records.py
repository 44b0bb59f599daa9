"""What a record of a data set must be: the checks that both formats share, and what becomes of a record that fails."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from detectron2.utils.file_io import PathManager
from PIL import Image

logger = logging.getLogger(__name__)

_ROTATED = (5, 6, 7, 8)  # values of the EXIF tag that swap width and height
_EXIF_ORIENTATION = 274
_FAR = 1e9  # pixels: beyond any image
_ROUNDING = 1.0  # pixels that a box may reach outside its image: what tools that count from 0 or round are off by


class DataError(ValueError):
    """Something in a data set that cannot be right. The message names the file, the record and what was expected.

    Attributes:
        kind: what was wrong, in a few words; records that are left out are counted by it.
        message: the rest.
        unit: "image" or "box" if it concerns one of these, which can be left out; None if it concerns the data set.
    """

    def __init__(self, kind: str, message: str, unit: str | None = None) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message, self.unit = kind, message, unit


class Checker:
    """Decides what a bad record does: ``on_error`` "raise" stops at the first, "skip" leaves it out and counts it."""

    def __init__(self, dataset: str, on_error: str = "raise") -> None:
        self.dataset = dataset
        self.on_error = on_error
        self.left_out: Counter[tuple[str, str]] = Counter()  # (unit, kind) -> how many

    @contextmanager
    def record(self, unit: str) -> Iterator[None]:
        """Around the reading of one ``unit`` ("image" or "box"): a ``DataError`` inside costs that unit alone."""
        try:
            yield
        except DataError as error:
            error.unit = error.unit or unit
            if self.on_error == "raise":
                raise
            self.left_out[unit, error.kind] += 1
            logger.debug("Data set %r: left out one %s. %s", self.dataset, unit, error)

    def report(self, records: Sequence[dict]) -> None:
        """Log in one line what was kept and, by kind, what was left out."""
        boxes = [box for record in records for box in record["annotations"]]
        line = f"Data set {self.dataset!r}: {len(records)} images, {len(boxes)} boxes"
        if crowds := sum(box["iscrowd"] for box in boxes):
            line += f" ({crowds} of them crowds)"
        for unit, units in (("image", "images"), ("box", "boxes")):
            kinds = {kind: count for (what, kind), count in sorted(self.left_out.items()) if what == unit}
            if kinds:
                listed = ", ".join(f"{kind}: {count}" for kind, count in kinds.items())
                line += f"; {units} left out: {sum(kinds.values())} ({listed})"
        logger.log(logging.WARNING if self.left_out else logging.INFO, line)


def join_inside(folder: str, name: str, where: str) -> str:
    """The path of ``name`` in ``folder``; a name that leads out of it is refused. ``where`` says who gave the name."""
    if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
        raise DataError("path outside its folder", f"{where} names {name!r}; expected a path inside {folder}.")
    return os.path.join(folder, name)


def check_image(path: str, declared: tuple | None, where: str) -> tuple[int, int]:
    """Open the image at ``path`` and return its (width, height), turned as its EXIF orientation says.

    Only the header is read. Detectron2 turns an image by its EXIF orientation before use, so that is the size that the
    annotation must have.

    Args:
        declared: the (width, height) that the annotation gives, or None if it gives none.
        where: the record, for the message.

    Raises:
        DataError: the image is missing, does not open, or is of another size.
    """
    try:
        with PathManager.open(path, "rb") as file, Image.open(file) as image:
            size, orientation = image.size, _orientation(image)
    except FileNotFoundError:
        raise DataError("missing image", f"{where} needs {path}, which does not exist.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError("image that does not open", f"{path} ({where}): {error}") from error
    if orientation in _ROTATED:
        size = size[::-1]
    if declared is not None and tuple(declared) != size:
        turned = f", once turned by its EXIF orientation {orientation}" if orientation in _ROTATED else ""
        raise DataError(
            "size that disagrees",
            f"{where} says {declared[0]}×{declared[1]}, but {path} is {size[0]}×{size[1]}{turned} (width×height).",
        )
    return size


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # PIL fails in many ways on broken EXIF data; Detectron2 then leaves the image as it is
        return None


def are_coordinates(values: Sequence[object]) -> bool:
    """Whether all are numbers, finite and not beyond any image."""
    return all(isinstance(value, int | float) and abs(value) <= _FAR for value in values)  # a NaN is not


def check_box(box: Sequence[float], size: tuple[int, int], where: str) -> list[float]:
    """Check one box against its image and return it, clipped to the image.

    Args:
        box: (x0, y0, x1, y1) in pixels, where the image spans from (0, 0) to ``size``.
        size: (width, height) of the image.
        where: the record, for the message.

    Raises:
        DataError: the box has a coordinate that is no finite number or no size, or reaches outside the image by more
            than the pixel that rounding and counting from 0 instead of 1 explain.
    """
    if not are_coordinates(box):
        raise DataError("box that is not four numbers", f"{where}: {list(box)}.")
    x0, y0, x1, y1 = box
    width, height = size
    if x1 <= x0 or y1 <= y0:
        raise DataError("box of no size", f"{where}: from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}).")
    if min(x0, y0) < -_ROUNDING or x1 > width + _ROUNDING or y1 > height + _ROUNDING:
        raise DataError(
            "box outside its image",
            f"{where}: from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}) in an image of {width}×{height}.",
        )
    clipped = [max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))]
    if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
        raise DataError("box outside its image", f"{where}: nothing of it is inside the {width}×{height} image.")
    return clipped


def class_id(name: str, class_ids: dict[str, int], where: str) -> int:
    """The index of class ``name``; refused, with the known ones, if it is none of ``class_ids``."""
    if name not in class_ids:
        raise DataError("unknown class", f"{where}: {name!r}; the classes are {', '.join(class_ids)}.")
    return class_ids[name]


def resolve(path: str) -> str:
    """Where ``path`` of a config is: relative to the current folder, as in Detectron2, with ``~`` expanded.

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
    """Return ``path`` if it exists; otherwise raise a ``DataError`` that says it is ``what`` of a config entry."""
    if not PathManager.exists(path):
        raise DataError("missing file", f"{what} is {path}, which does not exist (current folder: {os.getcwd()}).")
    return path
