"""Data sets in one CSV file, as DeepForest has them: a row for each box."""

import csv
import io
import os
from dataclasses import dataclass

from ..files.progress import progress
from ..files.regular import open_regular
from .images import ELSEWHERE, check_image
from .records import NOT_NUMBERS, Checker, DataError, join_inside, make_annotation, need, resolve

SIDES = ("xmin", "ymin", "xmax", "ymax")
COLUMNS = ("image_path", *SIDES, "label")


@dataclass(frozen=True)
class CsvSet:
    """A data set in a CSV file with the columns image_path, xmin, ymin, xmax, ymax and label, in any order.

    Boxes are in pixels from the image's upper left corner; an image has a row for each of its boxes. A row without
    coordinates, or with four zeros as DeepForest writes it, stands for an image without boxes; its label is not read.
    Other columns are passed over.

    Attributes:
        name: the data set's name, for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        csv: the CSV file.
        images: the folder that its image_path is relative to. Empty: the file's own.
        classes: class names in the order of their indices; None, the labels in the file, sorted.
        on_error: "raise" stops at the first bad record, "skip" leaves bad records out and counts them.
    """

    name: str
    csv: str
    images: str = ""
    classes: list[str] | None = None
    on_error: str = "raise"

    def load(self, checker: Checker) -> tuple[list[dict], dict]:
        """Return the records in Detectron2's format, and their metadata."""
        path = need(resolve(self.csv), "csv")
        folder = need(resolve(self.images), "images") if self.images else os.path.dirname(path)
        rows = _read_rows(path, checker)
        classes = self.classes or sorted({row["label"] for _, row in rows if row["label"] and _has_box(row)})
        if not classes:
            raise DataError("no classes", f"{path} has no row with a label; give the entry its classes: [...].")
        class_ids = {name: index for index, name in enumerate(classes)}
        images: dict[str, list[tuple[str, dict]]] = {}
        for where, row in rows:
            images.setdefault(os.path.normpath(row["image_path"]), []).append((where, row))
        records = []
        for name, boxes in progress(images.items(), desc=f"Reading {self.name}"):
            with checker.record("image"):
                where, row = boxes[0]
                if not row["image_path"]:
                    raise DataError("missing image", f"{where} has no image_path.")
                file_name = join_inside(folder, name, where)
                width, height = check_image(file_name, None, where, ELSEWHERE)
                record = {"file_name": file_name, "image_id": name, "height": height, "width": width, "annotations": []}
                for where, row in boxes:
                    with checker.record("box"):
                        if _has_box(row):
                            record["annotations"].append(_read_box(row, (width, height), class_ids, where))
                records.append(record)
        return records, {"thing_classes": list(classes)}


def _read_rows(path: str, checker: Checker) -> list[tuple[str, dict[str, str]]]:
    """The rows as ``COLUMNS``, each with where it is."""
    rows = []
    try:
        with io.TextIOWrapper(open_regular(path), "utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True, skipinitialspace=True)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                found = ", ".join(map(str, reader.fieldnames or ())) or "none"
                raise DataError("missing column", f"{path} lacks {', '.join(missing)}; its first line names: {found}.")
            for row in reader:
                with checker.record("box"):
                    where = f"{path}, line {reader.line_num}"
                    if None in row or None in row.values():
                        found = "more" if None in row else "fewer"
                        raise DataError("row of another length", f"{where} has {found} values than the first line.")
                    rows.append((where, {column: row[column].strip() for column in COLUMNS}))
    except OSError as error:
        raise DataError("file that does not open", str(error)) from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError("file that is not CSV", f"{path}: {error}") from error
    return rows


def _has_box(row: dict[str, str]) -> bool:
    values = [row[side] for side in SIDES]
    return any(values) and not all(_is_zero(value) for value in values)


def _is_zero(text: str) -> bool:
    try:
        return float(text) == 0
    except ValueError:
        return False


def _read_box(row: dict[str, str], size: tuple[int, int], class_ids: dict[str, int], where: str) -> dict:
    texts = [row[side] for side in SIDES]
    try:
        box = [float(text) for text in texts]
    except ValueError:
        raise DataError(NOT_NUMBERS, f"{where}: {texts}.") from None
    return make_annotation(box, size, row["label"], class_ids, where)
