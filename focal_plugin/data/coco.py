"""Data sets in COCO's JSON format. Boxes are read; masks and keypoints are not."""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass

from ..files.progress import progress
from ..files.regular import open_regular
from .images import ELSEWHERE, check_image
from .records import Checker, DataError, check_numbers, is_number, join_inside, make_annotation, need, resolve

logger = logging.getLogger(__name__)

_FLAG = (lambda value: value in (0, 1), "0 or 1")
# What an annotation may lack, but not have wrong: COCO's metric reads it from the file.
_OPTIONAL = {
    "area": (lambda value: is_number(value) and value >= 0, "a number ≥ 0"),
    "iscrowd": _FLAG,
    "ignore": _FLAG,
}
_FEDERATED = ("neg_category_ids", "not_exhaustive_category_ids")  # of LVIS's images

_LARGEST = 2**64  # of a whole number: beyond, many of them can have one hash, and looking one up takes as long as many


@dataclass(frozen=True)
class CocoSet:
    """A data set in COCO's format.

    Boxes with ``iscrowd`` or ``ignore`` are crowds: in training, anchors in them are ignored, and in evaluation,
    detections in them count neither for nor against.

    Attributes:
        name: the data set's name, for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        json: the JSON file.
        images: the folder that its file names are relative to.
        classes: class names in the order of their indices; None, the file's categories in the order of their ids.
        on_error: "raise" stops at the first bad record, "skip" leaves bad records out and counts them.
    """

    name: str
    json: str
    images: str
    classes: list[str] | None = None
    on_error: str = "raise"

    def load(self, checker: Checker) -> tuple[list[dict], dict]:
        """Return the records in Detectron2's format, and their metadata.

        If all records are kept as they are, the evaluator reads the file itself. Otherwise the metadata has no
        ``json_file``, and the evaluator makes one from the records.
        """
        path = need(resolve(self.json), "json")
        folder = need(resolve(self.images), "images")
        content = _read_json(path)
        categories = _categories(content, path)
        classes = self.classes or list(categories.values())
        class_ids = {name: index for index, name in enumerate(classes)}
        boxes = _boxes_by_image(content, path, checker)
        if any(isinstance(image, dict) and image.get(key) for image in content["images"] for key in _FEDERATED):
            logger.warning(
                f"{path} has LVIS's {' and '.join(_FEDERATED)}, which training and COCO's metric do not read: what is "
                "not annotated counts as background."
            )
        records, seen = [], set()
        for number, image in enumerate(progress(content["images"], desc=f"Reading {self.name}")):
            with checker.record("image"):
                where = f"{path}, images[{number}]"
                record = _read_image(image, folder, where)
                if record["image_id"] in seen:
                    raise DataError("image listed twice", f"{where} has id {record['image_id']!r}, as one before it.")
                seen.add(record["image_id"])
                for place, annotation in boxes.get(record["image_id"], []):
                    with checker.record("box"):
                        record["annotations"].append(_read_box(annotation, record, categories, class_ids, place))
                records.append(record)
        records.sort(key=lambda record: (isinstance(record["image_id"], str), record["image_id"]))  # as Detectron2 does
        metadata = {"thing_classes": list(classes)}
        if not checker.left_out and classes == list(categories.values()) and _serves_evaluation(content):
            ids = {category: index for index, category in enumerate(categories)}
            metadata.update(json_file=path, image_root=folder, thing_dataset_id_to_contiguous_id=ids)
        return records, metadata


def _read_json(path: str) -> dict:
    try:
        with open_regular(path) as file:
            content = json.load(file)
    except OSError as error:
        raise DataError("file that does not open", str(error)) from error
    except (ValueError, RecursionError) as error:
        raise DataError("file that is not JSON", f"{path}: {error}") from error
    for key in ("images", "categories"):
        _value(content, key, list, path)
    content.setdefault("annotations", [])  # absent where the truth is kept secret
    _value(content, "annotations", list, path)
    return content


def _value(record: object, key: str, kinds: type, where: str):
    """Return ``record[key]``, or raise a ``DataError`` if it is missing or has another type."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kinds) or isinstance(value, bool) or (isinstance(value, int) and abs(value) > _LARGEST):
        raise _wrong(key, value, getattr(kinds, "__name__", kinds), where)
    return value


def _wrong(key: str, value: object, expected: object, where: str) -> DataError:
    return DataError("not COCO's format", f"{where}: {key!r} is {value!r}, expected {expected}.")


def _check_ids(ids: Iterable[object], what: str, path: str) -> None:
    """Raise a ``DataError`` if some of the ids are numbers and others text, which COCO's metric cannot sort."""
    kinds = {type(key) for key in ids} & {int, str}
    if len(kinds) > 1:
        raise DataError("ids of two kinds", f"{path}: some ids of {what} are whole numbers, others text; expected one.")


def _categories(content: dict, path: str) -> dict[int | str, str]:
    """The categories' names by id, in the order of the ids."""
    found, names = {}, set()
    for number, category in enumerate(content["categories"]):
        where = f"{path}, categories[{number}]"
        key, name = _value(category, "id", int | str, where), _value(category, "name", str, where)
        if key in found or name in names:
            raise DataError("category listed twice", f"{where} has id {key!r} and name {name!r}, as one before it has.")
        found[key] = name
        names.add(name)
    if not found:
        raise DataError("no classes", f"{path} has no categories.")
    _check_ids(found, "categories", path)
    return dict(sorted(found.items(), key=lambda item: (isinstance(item[0], str), item[0])))


def _boxes_by_image(content: dict, path: str, checker: Checker) -> dict[int | str, list[tuple[str, dict]]]:
    """Each image's annotations by the image's id, each with its position in the file, for messages."""
    images = [image.get("id") for image in content["images"] if isinstance(image, dict)]
    _check_ids(images, "images", path)
    images = {
        image for image in images if isinstance(image, str) or (isinstance(image, int) and abs(image) <= _LARGEST)
    }
    boxes: dict[int | str, list[tuple[str, dict]]] = {}
    for number, annotation in enumerate(content["annotations"]):
        with checker.record("box"):
            where = f"{path}, annotations[{number}]"
            image = _value(annotation, "image_id", int | str, where)
            if image not in images:
                raise DataError("box of no image", f"{where} has image_id {image!r}, which no image has.")
            boxes.setdefault(image, []).append((f"{where} (id {annotation.get('id')!r})", annotation))
    return boxes


def _read_image(image: dict, folder: str, where: str) -> dict:
    image_id = _value(image, "id", int | str, where)
    where = f"{where} (id {image_id!r})"
    file_name = join_inside(folder, _value(image, "file_name", str, where), where)
    declared = None
    if image.get("width") is not None or image.get("height") is not None:
        declared = tuple(_value(image, side, int | float, where) for side in ("width", "height"))
    width, height = check_image(file_name, declared, where, ELSEWHERE)
    return {"file_name": file_name, "image_id": image_id, "height": height, "width": width, "annotations": []}


def _read_box(annotation: dict, record: dict, categories: dict, class_ids: dict, where: str) -> dict:
    box = _value(annotation, "bbox", list, where)
    check_numbers(box, f"{where} has bbox")
    category = _value(annotation, "category_id", int | str, where)
    if category not in categories:
        known = ", ".join(map(str, categories))
        raise DataError("unknown class", f"{where} has category_id {category!r}; the categories' ids are {known}.")
    for key, (is_sound, expected) in _OPTIONAL.items():
        if key in annotation and not is_sound(annotation[key]):
            raise _wrong(key, annotation[key], expected, where)
    x, y, w, h = box
    size = record["width"], record["height"]
    made = make_annotation((x, y, x + w, y + h), size, categories[category], class_ids, where)
    return made | {"iscrowd": int(bool(annotation.get("iscrowd") or annotation.get("ignore")))}


def _serves_evaluation(content: dict) -> bool:
    """Whether COCO's evaluation reads the file's annotations correctly.

    It needs ``area`` and ``iscrowd``, does not know ``ignore``, takes a box with the id 0 for one without a match, and
    in its fast form stores ids in 64 bits.
    """
    annotations = content["annotations"]
    ids = [annotation.get("id") for annotation in annotations]
    complete = all("area" in a and "iscrowd" in a and not a.get("ignore") for a in annotations)
    return complete and all(isinstance(key, int) and 0 < key < 2**63 for key in ids) and len(set(ids)) == len(ids)
