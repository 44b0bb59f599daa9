"""What is probably wrong with a data set, although each of its records may be right."""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches

_RARE, _NEAR = 10, 0.8  # a misspelt class has at most 1/10 of the boxes of the right one, and 80 % of its letters


def repeated_boxes(records: Sequence[dict]) -> list[str]:
    """Return, for each box that an image has once more with the same class, the image's file.

    Args:
        records: in Detectron2's format.
    """
    files = []
    for record in records:
        boxes = [(*box["bbox"], box["category_id"], box.get("iscrowd", 0)) for box in record.get("annotations", ())]
        files += [record.get("file_name", "")] * (len(boxes) - len(set(boxes)))
    return files


def misspelt_classes(counts: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yield each class that is rare and spelt nearly like a frequent one, and that one.

    Names that differ in digits alone are taken for different classes.

    Args:
        counts: the number of boxes by class.
    """
    for name, count in counts.items():
        others = [o for o, boxes in counts.items() if boxes >= _RARE * count > 0 and _letters(o) != _letters(name)]
        lower = {other.lower(): other for other in others}
        for near in get_close_matches(name.lower(), lower, 1, _NEAR):
            yield name, lower[near]


def _letters(name: str) -> str:
    return re.sub(r"\d", "", name)
