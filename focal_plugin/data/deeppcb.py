"""DeepPCB, circuit boards with six kinds of defects, in the CSV format: from its lists and text files.

``focal data deeppcb datasets/DeepPCB/PCBData`` writes ``trainval.csv`` and ``test.csv`` there, beside the lists of the
same names. An entry of a list is an image ``X.jpg``, which is stored as ``X_test.jpg``, and a text file with a line
``x1 y1 x2 y2 type`` for each defect. The templates, ``X_temp.jpg``, are not used.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from ..config import ConfigError
from ..files.write import check_free, replace_file
from .csv_file import COLUMNS
from .records import DataError, join_inside, read_lines

CLASSES = ("open", "short", "mousebite", "spur", "copper", "pin-hole")  # of the types 1 to 6
SPLITS = ("trainval", "test")


def read_split(root: Path, split: str, every: int = 1) -> list[dict[str, str]]:
    """Return the rows of a CSV file: one for each box, or one without coordinates for an image without boxes.

    Args:
        root: the folder ``PCBData``.
        split: the name of a list in it, without its suffix.
        every: take the first image of the list and every ``every``-th one after it.

    Raises:
        DataError: a file is missing or an entry of one is malformed.
    """
    entries = list(_lines(root / f"{split}.txt", 2))[::every]
    if not entries:
        raise DataError("no image", f"{root / split}.txt lists no image.")
    return [row for where, (image, boxes) in entries for row in _read_image(root, image, boxes, where)]


def _read_image(root: Path, image: str, boxes: str, where: str) -> Iterator[dict[str, str]]:
    name = Path(image)
    name = str(name.with_name(f"{name.stem}_test{name.suffix}"))
    found = list(_lines(Path(join_inside(str(root), boxes, where)), 5))
    for place, (*sides, kind) in found:
        if kind not in map(str, range(1, len(CLASSES) + 1)):
            raise DataError("unknown class", f"{place}: type {kind}; expected 1 to {len(CLASSES)}.")
        yield dict(zip(COLUMNS, (name, *sides, CLASSES[int(kind) - 1])))
    if not found:
        yield dict.fromkeys(COLUMNS, "") | {"image_path": name}


def _lines(path: Path, length: int) -> Iterator[tuple[str, list[str]]]:
    """Yield the words of each line that has any, with where it is."""
    for where, line in read_lines(str(path)):
        words = line.replace(",", " ").split()
        if words and len(words) != length:
            raise DataError("malformed line", f"{where}: {line!r}; expected {length} words.")
        if words:
            yield where, words


def convert(root: str, every: int = 1) -> dict[Path, int]:
    """Write a CSV file for each list of ``root``, and return the number of rows of each.

    Raises:
        DataError: see ``read_split``. FileExistsError: one of the CSV files is there already. Then none is written.
    """
    if every < 1:
        raise ConfigError(f"--every is {every}; expected 1 or more.")
    folder = Path(root)
    for split in SPLITS:
        check_free(folder / f"{split}.csv", "folder")
    rows = {folder / f"{split}.csv": read_split(folder, split, every) for split in SPLITS}
    for path, own in rows.items():
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(own)
        replace_file(str(path), lambda file, text=text: file.write(text.getvalue().encode()))
    return {path: len(own) for path, own in rows.items()}
