"""Suggestions of `focal analysis hardest` that somebody has accepted, applied to the labels."""

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
from detectron2.structures import BoxMode

from ..config import ConfigError
from ..files.regular import open_regular
from .records import DataError, is_number

_SAME = 0.01  # pixels by which the corners of a label may differ, since formats round


def read_suggestions(path: str) -> dict:
    """Return the content of a COCO file of suggestions.

    Raises:
        DataError: it is none.
    """
    try:
        with open_regular(path) as file:
            content = json.load(file)
        known = {key: {entry["id"] for entry in content[key]} for key in ("images", "categories")}
        for entry in content["annotations"]:
            places = entry["image_id"] in known["images"], entry["category_id"] in known["categories"]
            is_box = len(entry["bbox"]) == 4 and all(map(is_number, entry["bbox"]))
            if not (all(places) and is_box and {"suggestion", "replaces"} <= entry.keys()):
                raise ValueError(f"annotation {entry['id']} is no suggestion")
        os.path.join(content["info"]["images"], "")
    except OSError as error:
        raise DataError("file that does not open", str(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        expected = "expected the JSON file that `focal analysis hardest` writes"
        raise DataError("file that has no suggestions", f"{path}: {error!r}; {expected}.") from None
    return content


def numbers(texts: Iterable[str], known: Collection[int]) -> set[int]:
    """Return the numbers of suggestions in words such as ``7`` and ``1-20``; all ``known`` ones for ``all`` alone.

    Raises:
        ConfigError: a word is neither, or has a number that is not known.
    """
    chosen: set[int] = set()
    if (texts := list(texts)) == ["all"]:
        return set(known)
    for text in texts:
        first, dash, last = text.partition("-")
        if not first.isdecimal() or not (last.isdecimal() if dash else True) or int(last or first) < int(first):
            raise ConfigError(f"--accept {text}: expected numbers of suggestions, such as 7 or 1-20, or all.")
        for number in range(int(first), int(last or first) + 1):
            if number not in known:
                raise ConfigError(f"--accept {number}: there is no such suggestion; they are {_span(known)}.")
            chosen.add(number)
    return chosen


def correct(records: Sequence[dict], classes: Sequence[str], content: dict, accepted: Iterable[int]) -> Counter[str]:
    """Change the labels of ``records``, in place, as the accepted suggestions say.

    Args:
        records: the data set, with boxes XYXY.
        classes: its class names.
        content: see ``read_suggestions``.
        accepted: the numbers of suggestions, which are those of annotations in ``content``.

    Returns:
        How many of each kind.

    Raises:
        DataError: the data set lacks the image, the class or the label of a suggestion.
    """
    by_id = {entry["id"]: entry for entry in content["annotations"]}
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    folder = content["info"]["images"]
    files = {entry["id"]: os.path.join(folder, entry["file_name"]) for entry in content["images"]}
    key, by_image = _by_image(records, list(files.values()))
    done: Counter[str] = Counter()
    for number in sorted(accepted):
        entry, path = by_id[number], files[by_id[number]["image_id"]]
        where = f"suggestion {number}, {path}"
        found = by_image.get(key(path))
        if not found:
            raise DataError("image that is not there", f"{where}: IN lacks it; expected the data set that was judged.")
        for record in found:  # an image may be in several splits
            _apply(record, entry, names, classes, where)
        done[entry["suggestion"]] += 1
    return done


def _by_image(records: Sequence[dict], paths: Sequence[str]) -> tuple[Callable[[str], str], dict[str, list[dict]]]:
    """Return what makes a key of an image's path, and the records by their keys.

    The key is the path, or if IN has no image of these ``paths``, such as a copy that `focal data split` made, the name
    of the file.

    Raises:
        DataError: the key is the name, and images share one.
    """
    files = sorted({os.path.realpath(record["file_name"]) for record in records})
    has_paths = any(os.path.realpath(path) in files for path in paths)
    key = os.path.realpath if has_paths else os.path.basename
    for images in (files, sorted(set(paths))):
        names = Counter(map(key, images))
        if len(names) < len(images):
            twice = names.most_common(1)[0][0]
            raise DataError("image that is not there", f"IN has none of {paths[0]} ..., and several are named {twice}.")
    found: dict[str, list[dict]] = {}
    for record in records:
        found.setdefault(key(record["file_name"]), []).append(record)
    return key, found


def _span(found: Iterable[int]) -> str:
    found = sorted(found)
    return f"{found[0]} to {found[-1]}" if found else "none"


def _apply(record: dict, entry: dict, names: dict, classes: Sequence[str], where: str) -> None:
    labels, place = record["annotations"], slice(len(record["annotations"]), None)
    if old := entry["replaces"]:
        box, name = _corners(old["bbox"]), names[old["category_id"]]
        same = [
            i
            for i, label in enumerate(labels)
            if not label.get("iscrowd", 0)
            and classes[label["category_id"]] == name
            and np.abs(np.subtract(label["bbox"], box)).max() <= _SAME
        ]
        if not same:
            listed = ", ".join(f"{side:.1f}" for side in box)
            message = f"{where}: it changes a label {name} with the corners {listed}, which IN lacks, maybe by now."
            raise DataError("label that is not there", message)
        place = slice(same[0], same[0] + 1)
    labels[place] = [] if entry.get("ignore") else [_label(entry, names, classes, where)]  # 1: a label to remove


def _label(entry: dict, names: dict, classes: Sequence[str], where: str) -> dict:
    name = names[entry["category_id"]]
    if name not in classes:
        raise DataError("unknown class", f"{where}: {name!r}; the classes of IN are {', '.join(classes)}.")
    box, category = _corners(entry["bbox"]), list(classes).index(name)
    return {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": category, "iscrowd": 0}


def _corners(box: Sequence[float]) -> list[float]:
    x, y, width, height = box
    return [x, y, x + width, y + height]
