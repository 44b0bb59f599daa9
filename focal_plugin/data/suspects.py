"""What is probably wrong with a data set, although each of its records may be right."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches

_RARE, _NEAR = 10, 0.8  # a misspelt class has at most 1/10 of the boxes of the right one, and 80 % of its letters


def suspects(records: Sequence[dict], classes: Sequence[str], from_boxes: bool) -> Iterator[str]:
    """Yield what is suspect, a sentence or two each.

    Args:
        records: in Detectron2's format.
        classes: the class names.
        from_boxes: whether they were found in the boxes, and not listed by somebody: only then may one be misspelt.
    """
    if files := repeated_boxes(records):
        yield f"repeated boxes (same image, box and class): {len(files):,}, as in {files[0]}. Remove them."
    counts = Counter(classes[box["category_id"]] for record in records for box in record["annotations"])
    for name, near in misspelt_classes(counts) if from_boxes else ():
        boxes = f"it has boxes: {counts[name]:,}, the other: {counts[near]:,}"
        yield f"class {name!r} is spelt nearly like {near!r}; {boxes}. Is it a slip?"


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
