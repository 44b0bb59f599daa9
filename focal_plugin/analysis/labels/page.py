"""What is written of suggestions: a page of crops, a table, and a COCO file to accept or reject them in."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence

from detectron2.structures import BoxMode
from PIL import Image

from ...evaluation.page import data_uri, read_picture, render
from ...evaluation.style import class_color
from .suggestions import Box, Suggestion

_SIDE = 260  # pixels of a crop's longer side
_MARGIN = 0.6  # of the object's size, on each side: what is around it often decides


def rows(suggestions: Sequence[Suggestion], names: Sequence[str]) -> list[dict]:
    """Return the suggestions as rows of a table, in their order; boxes are XYXY in pixels of the image."""
    return [
        {
            "number": number,
            "kind": s.kind,
            "value": f"{s.value:.6g}",
            "loss": f"{s.loss:.6g}",
            "image": s.record["file_name"],
            "label": "" if s.label is None else s.label,
            "label_class": "" if s.label_class is None else names[s.label_class],
            "predicted_class": names[s.predicted_class],
            "score": f"{s.score:.4f}",
            "iou": "" if s.iou is None else f"{s.iou:.4f}",
            **_corners("label", s.label_box),
            **_corners("predicted", s.predicted_box),
        }
        for number, s in enumerate(suggestions, start=1)
    ]


def _corners(of: str, box: Box | None) -> dict[str, str]:
    sides = [f"{of}_{side}" for side in ("x0", "y0", "x1", "y1")]
    return dict.fromkeys(sides, "") if box is None else {side: f"{v:.2f}" for side, v in zip(sides, box)}


def to_coco(suggestions: Sequence[Suggestion], names: Sequence[str]) -> str:
    """Return the suggestions as a COCO file: an annotation for each, as it would be if accepted.

    ``suggestion`` is its kind; ``value``, ``loss``, ``predicted``, ``score`` and ``iou`` are its evidence; ``replaces``
    is the label that it changes, with its place among the image's annotations. A label to be removed has ``ignore`` 1,
    so that whoever reads the file as labels leaves it out. Names of images are relative to the folder in ``info``.
    """
    records = {s.record["file_name"]: s.record for s in suggestions}
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in records]) if records else ""
    images = [
        {"id": i, "file_name": os.path.relpath(path, folder), "width": record["width"], "height": record["height"]}
        for i, (path, record) in enumerate(records.items(), start=1)
    ]
    ids = {path: i for i, path in enumerate(records, start=1)}
    annotations = [
        {"id": number, "image_id": ids[s.record["file_name"]], **_annotation(s)}
        for number, s in enumerate(suggestions, start=1)
    ]
    categories = [{"id": k, "name": name} for k, name in enumerate(names, start=1)]
    info = {"description": "suggestions of `focal analysis hardest`", "images": folder}
    content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    return json.dumps(content, indent=1)


def _annotation(s: Suggestion) -> dict:
    box, category = s.accepted
    return {
        "category_id": category + 1,
        "bbox": _xywh(box),
        "area": (box[2] - box[0]) * (box[3] - box[1]),
        "iscrowd": 0,
        **({"ignore": 1} if s.kind == "extra" else {}),
        "suggestion": s.kind,
        "value": s.value,
        "loss": s.loss,
        "predicted": {"bbox": _xywh(s.predicted_box), "category_id": s.predicted_class + 1},
        "score": s.score,
        "iou": s.iou,
        "replaces": s.label_box and {"place": s.label, "bbox": _xywh(s.label_box), "category_id": s.label_class + 1},
    }


def _xywh(box: Sequence[float]) -> list[float]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]


def to_html(best: Mapping[str, Sequence[Suggestion]], names: Sequence[str], about: Mapping) -> str:
    """Return the page.

    Args:
        best: the suggestions of each kind, the best first.
        names: the K class names.
        about: ``data_set``; ``judge``, what judged the labels; ``of``, what they are; ``share``, of the loss, that the
            objects hold; ``agreed``, how well labels and detections agree; ``score_thresh``, from which on suggestions
            are marked; ``suggestions``, the name of the COCO file.
    """
    numbered = list(enumerate((s for found in best.values() for s in found), start=1))
    crops = _crops([s for _, s in numbered])
    by_image: dict[str, list] = {}
    for number, s in numbered:
        by_image.setdefault(s.record["file_name"], []).append((number, s.kind))
    seen = {k for _, s in numbered for k in (s.label_class, s.predicted_class) if k is not None}
    classes = sorted(seen | {k for crop in crops for _, k in crop["others"]})
    return render(
        __package__,
        "hardest.html",
        about=about,
        groups={kind: [(n, s, crop) for (n, s), crop in zip(numbered, crops) if s.kind == kind] for kind in best},
        by_image=sorted(by_image.items(), key=lambda item: -len(item[1])),
        classes=classes,
        names=names,
        colors={k: class_color(k) for k in classes},
    )


def _crops(suggestions: Sequence[Suggestion]) -> list[dict]:
    """For each suggestion a crop.

    It has its ``view``, (x, y, width, height) in the image; its ``uri``, "" if it is unreadable; and ``others``,
    the box and class of the other labels there.
    """
    crops: list[dict] = [{}] * len(suggestions)
    order = sorted(range(len(suggestions)), key=lambda i: suggestions[i].record["file_name"])  # each image is read once
    path, image = None, None
    for i in order:
        s = suggestions[i]
        if s.record["file_name"] != path:
            path, image = s.record["file_name"], read_picture(s.record["file_name"])
        boxes = [s.predicted_box, s.label_box or s.predicted_box]
        left, top, right, bottom = (pick(side) for pick, side in zip((min, min, max, max), zip(*boxes)))
        pad = _MARGIN * max(right - left, bottom - top)
        width, height = s.record["width"], s.record["height"]
        x0, y0 = max(int(left - pad), 0), max(int(top - pad), 0)
        x1, y1 = min(int(right + pad) + 1, width), min(int(bottom + pad) + 1, height)
        uri = data_uri(_resized(image.crop((x0, y0, x1, y1)))) if image else ""
        others = [(b, k) for b, k in _other_labels(s) if b[0] < x1 and b[1] < y1 and b[2] > x0 and b[3] > y0]
        crops[i] = {"view": (x0, y0, x1 - x0, y1 - y0), "uri": uri, "others": others}
    return crops


def _other_labels(s: Suggestion) -> Iterator[tuple[Box, int]]:
    for place, label in enumerate(s.record.get("annotations", ())):
        if label.get("place", place) != s.label:
            yield BoxMode.convert(label["bbox"], label["bbox_mode"], BoxMode.XYXY_ABS), label["category_id"]


def _resized(image: Image.Image) -> Image.Image:
    scale = _SIDE / max(image.size)
    return image.resize([max(round(side * scale), 1) for side in image.size])
