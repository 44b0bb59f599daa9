"""Splitting the images of a data set: at random, with groups of them kept together."""

import csv
import os
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from tabulate import tabulate

from .records import DataError, need, objects


def split_records(
    records: Sequence[dict], groups: Sequence[str], shares: Mapping[str, float], seed: int
) -> dict[str, list[dict]]:
    """Split records so that each group is in one split. The result depends on names, shares and seed alone.

    Args:
        records: in Detectron2's format.
        groups: the group of each.
        shares: the share of the images that each split should have, by its name; in (0, 1], 1 in all.
        seed: of the shuffling.

    Returns:
        the records of each split, in their order, none without any. The numbers of images are within one of what
        ``shares`` says where groups are single images, and as near as large groups allow otherwise.

    Raises:
        DataError: there are fewer groups than splits.
    """
    sizes = Counter(groups)
    if len(sizes) < len(shares):
        raise DataError("too few groups", f"{len(sizes)} for the splits {', '.join(shares)}: {', '.join(sizes)}.")
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    order.sort(key=sizes.get, reverse=True)  # large ones first, as they are hard to place
    lacking = {split: share * len(records) for split, share in shares.items()}
    empty, chosen = set(shares), {}
    for number, group in enumerate(order):
        among = [split for split in shares if split in empty or len(order) - number > len(empty)]
        split = max(among, key=lacking.get)
        chosen[group] = split
        lacking[split] -= sizes[group]
        empty.discard(split)
    return {split: [r for r, group in zip(records, groups) if chosen[group] == split] for split in shares}


def table_of(splits: Mapping[str, Sequence[dict]], shares: Mapping[str, float], classes: Sequence[str]) -> str:
    """Return a table of the splits' images, their share and the one asked for, and their boxes by class.

    Crowds are not counted.
    """
    total = sum(map(len, splits.values()))
    counts = {
        split: Counter(box["category_id"] for record in records for box in objects(record))
        for split, records in splits.items()
    }
    rows = [
        ["images", *map(len, splits.values())],
        ["share", *(f"{len(records) / total:.1%}".replace("%", " %") for records in splits.values())],
        ["asked", *(f"{shares[split]:.1%}".replace("%", " %") for split in splits)],
        *([name, *(counts[split][index] for split in splits)] for index, name in enumerate(classes)),
    ]
    return tabulate(rows, ["", *splits], disable_numparse=True, colalign=("left", *["right"] * len(splits)))


def groups_of(paths: Sequence[str], by: str) -> list[str]:
    """Return the group of each image.

    Args:
        paths: the images'.
        by: "image", each is a group of its own; a CSV file with the columns image_path, of which the last parts are
            enough, and group; or a regular expression, whose first group, or else whole match, in a path names the
            group. The path begins below the folder that holds all images.

    Raises:
        DataError: an image has no group, or the CSV file or the expression is not one.
    """
    if by.endswith(".csv"):
        return _groups_in_file(paths, by)
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    paths = [os.path.relpath(path, folder) for path in paths]
    if by == "image":
        return paths
    try:
        pattern = re.compile(by)
    except re.error as error:
        raise DataError("no regular expression", f"{by!r}: {error}.") from error
    groups = []
    for path in paths:
        match = pattern.search(path.replace(os.sep, "/"))
        if match is None or not (match[1] if pattern.groups else match[0]):
            raise DataError("image of no group", f"{by!r} finds nothing in {path}.")
        groups.append(match[1] if pattern.groups else match[0])
    return groups


def _groups_in_file(paths: Sequence[str], file_name: str) -> list[str]:
    """The groups in a CSV file, which names images by their path or its last parts."""
    try:
        with open(need(file_name, "--by"), encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError("file that is not CSV", f"{file_name}: {error}") from error
    if not {"image_path", "group"} <= set(reader.fieldnames or ()):
        raise DataError("missing column", f"{file_name} has {reader.fieldnames}; expected image_path and group.")
    known = {os.path.normpath(row["image_path"]): row["group"] for row in rows if row["image_path"] and row["group"]}
    groups = []
    for path in paths:
        parts = os.path.abspath(path).split(os.sep)
        names = [os.sep.join(parts[start:]) for start in range(len(parts))]
        found = [known[name] for name in names if name in known]
        if not found:
            raise DataError("image of no group", f"{file_name} has no row with a group for {path}.")
        groups.append(found[0])
    return groups
