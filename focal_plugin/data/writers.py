"""Writing data sets: one function for each format, which ``local`` reads back."""

import csv
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, ElementTree, SubElement, indent

import yaml

from ..files.progress import progress
from .csv_file import COLUMNS
from .records import DataError
from .yolo import SPLITS

Splits = Mapping[str, Sequence[dict]]  # records by the name of their split; a file_name is relative to the images


@dataclass(frozen=True)
class Layout:
    """Where a format has its files.

    Attributes:
        images: the folder of the images of a split, relative to the data set's.
        write: writes all but the images; called with the data set's folder, the splits and the class names.
        has_crowds: whether the format has a mark for crowds.
    """

    images: str
    write: Callable[[Path, Splits, Sequence[str]], None]
    has_crowds: bool


def write_dataset(folder: Path, format: str, splits: Splits, classes: Sequence[str]) -> Counter[str]:
    """Write a data set with copies of its images.

    Args:
        folder: the data set's, which is there.
        format: one of ``LAYOUTS``.
        splits: records with paths of images, and boxes XYXY.
        classes: the class names.

    Returns:
        what the format has no mark for and was left out: the number of crowds, if any, as "crowds".

    Raises:
        DataError: the format does not take the names of the splits, or an image that is listed twice in one.
    """
    layout, left_out = LAYOUTS[format], Counter()
    if format == "yolo":
        splits = {_yolo_split(name, list(splits)): records for name, records in splits.items()}
    for split, records in splits.items() if format != "coco" else ():  # whose entries have ids
        for file, count in Counter(record["file_name"] for record in records).most_common(1):
            if count > 1:
                message = f"{file}, in split {split!r}; format {format} has one entry an image. Make one of them."
                raise DataError("image listed twice", message)
    names = flat_names(record["file_name"] for records in splits.values() for record in records)
    written = {}
    with progress(total=sum(map(len, splits.values())), desc="Copying") as bar:
        for split, records in splits.items():
            images = folder / layout.images.format(split=split)
            images.mkdir(parents=True, exist_ok=True)
            written[split] = []
            for record in records:
                name = names[record["file_name"]]
                if not (images / name).exists():  # an image may be in several splits
                    shutil.copyfile(record["file_name"], images / name)
                boxes = [box for box in record["annotations"] if layout.has_crowds or not box["iscrowd"]]
                if crowds := len(record["annotations"]) - len(boxes):
                    left_out["crowds"] += crowds
                written[split].append({**record, "file_name": name, "annotations": boxes})
                bar.update()
    layout.write(folder, written, classes)
    return left_out


def flat_names(paths: Iterable[str]) -> dict[str, str]:
    """Return a file name for each path, for all to be in one folder: no two are the same but for their extension.

    It is the path's last part; where two of these clash, all names begin with the folders that are not common to all
    paths; and where names still clash, with a number.
    """
    unique = sorted(set(paths))
    names = {path: os.path.basename(path) for path in unique}
    if _clash(names.values()):
        common = os.path.commonpath([os.path.abspath(os.path.dirname(path)) for path in unique])
        names = {path: os.path.relpath(path, common).replace(os.sep, "_") for path in unique}
    if _clash(names.values()):
        names = {path: f"{number}_{name}" for number, (path, name) in enumerate(names.items(), start=1)}
    return names


def _clash(names: Iterable[str]) -> bool:
    stems = [os.path.splitext(name)[0].lower() for name in names]  # some disks do not tell a from A
    return len(set(stems)) < len(stems)


def write_coco(path: Path, records: Sequence[dict], classes: Sequence[str]) -> None:
    """Write a JSON file in COCO's format; ids count from 1."""
    images, annotations = [], []
    for number, record in enumerate(records, start=1):
        size = {"width": record["width"], "height": record["height"]}
        images.append({"id": number, "file_name": record["file_name"], **size})
        for box in record["annotations"]:
            x0, y0, x1, y1 = box["bbox"]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": box["category_id"] + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": box["iscrowd"],
                }
            )
    categories = [{"id": index, "name": name} for index, name in enumerate(classes, start=1)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def _write_coco(folder: Path, splits: Splits, classes: Sequence[str]) -> None:
    for split, records in splits.items():
        write_coco(folder / split / "annotations.json", records, classes)


def _write_voc(folder: Path, splits: Splits, classes: Sequence[str]) -> None:
    (folder / "Annotations").mkdir()
    (folder / "ImageSets/Main").mkdir(parents=True)
    seen: dict[str, list[dict]] = {}
    for split, records in splits.items():
        stems = [os.path.splitext(record["file_name"])[0] for record in records]
        (folder / f"ImageSets/Main/{split}.txt").write_text("".join(f"{stem}\n" for stem in stems), encoding="utf-8")
        for stem, record in zip(stems, records):
            if seen.setdefault(stem, record["annotations"]) != record["annotations"]:
                message = f"{record['file_name']}, in split {split!r} and another; VOC has one file an image."
                raise DataError("image with other boxes in another split", message)
            tree = ElementTree(_voc_annotation(record, classes))
            indent(tree)
            tree.write(folder / "Annotations" / f"{stem}.xml", encoding="utf-8")


def _voc_annotation(record: dict, classes: Sequence[str]) -> Element:
    annotation = Element("annotation")
    SubElement(annotation, "filename").text = record["file_name"]
    size = SubElement(annotation, "size")
    for side, value in (("width", record["width"]), ("height", record["height"]), ("depth", 3)):
        SubElement(size, side).text = str(value)
    for box in record["annotations"]:
        item = SubElement(annotation, "object")
        SubElement(item, "name").text = classes[box["category_id"]]
        SubElement(item, "difficult").text = str(int(box["iscrowd"] or box.get("difficult", 0)))
        corners = SubElement(item, "bndbox")
        x0, y0, x1, y1 = box["bbox"]  # VOC counts pixels from 1
        for side, value in (("xmin", x0 + 1), ("ymin", y0 + 1), ("xmax", x1), ("ymax", y1)):
            SubElement(corners, side).text = _number(value)
    return annotation


def _write_yolo(folder: Path, splits: Splits, classes: Sequence[str]) -> None:
    for split, records in splits.items():
        labels = folder / "labels" / split
        labels.mkdir(parents=True)
        for record in records:
            lines = [_yolo_line(box, record["width"], record["height"]) for box in record["annotations"]]
            (labels / record["file_name"]).with_suffix(".txt").write_text("".join(lines))
    content = {split: f"images/{split}" for split in splits} | {"names": dict(enumerate(classes))}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    (folder / "data.yaml").write_text(text, encoding="utf-8")


def _yolo_line(box: dict, width: int, height: int) -> str:
    x0, y0, x1, y1 = box["bbox"]
    shares = ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height)
    return " ".join([str(box["category_id"]), *map(_number, shares)]) + "\n"


def _yolo_split(name: str, names: list[str]) -> str:
    """The key of data.yaml for a split: the one that its name contains, or for a single split "train"."""
    keys = {other: [key for key in SPLITS if key in other] for other in names}
    chosen = [found[0] for found in keys.values() if len(found) == 1]
    if len(names) == 1:
        return (keys[name] or ["train"])[0]
    if len(set(chosen)) < len(names):
        raise DataError(
            "splits that YOLO does not have",
            f"found {', '.join(names)}, expected names with one of {', '.join(SPLITS)}. Convert each by --split.",
        )
    return keys[name][0]


def _write_csv(folder: Path, splits: Splits, classes: Sequence[str]) -> None:
    for split, records in splits.items():
        with open(folder / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for record in records:
                path = f"images/{record['file_name']}"
                for box in record["annotations"]:
                    writer.writerow([path, *map(_number, box["bbox"]), classes[box["category_id"]]])
                if not record["annotations"]:
                    writer.writerow([path, 0, 0, 0, 0, classes[0]])  # as DeepForest has it


def _number(value: float) -> str:
    return f"{value:.10g}"


LAYOUTS = {
    "voc": Layout("JPEGImages", _write_voc, has_crowds=True),
    "coco": Layout("{split}/images", _write_coco, has_crowds=True),
    "yolo": Layout("images/{split}", _write_yolo, has_crowds=False),
    "csv": Layout("images", _write_csv, has_crowds=False),
}
