"""A picture of a data set's images with their boxes, and a table of its boxes by class and size."""

import math
import os
from collections import Counter
from collections.abc import Sequence

from detectron2.data.detection_utils import read_image
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from tabulate import tabulate

from ..evaluation.style import GRAY, class_color
from ..files.progress import progress
from .images import readable_image
from .records import objects

SIZES = {"small": 32**2, "medium": 96**2, "large": math.inf}  # COCO's, by the area in pixels that is below
_CELL, _GAP, _LINE = 320, 12, 18  # pixels: an image's longer side, the space between cells, a line of text


def count_boxes(records: Sequence[dict], classes: Sequence[str]) -> str:
    """Return a table of how many images and boxes each class has, and how many boxes are small, medium and large.

    Regions to ignore (``iscrowd``) are in a row of their own.
    """
    images, boxes = Counter(), Counter()
    for record in records:
        rows = [
            (classes[a["category_id"]] if not a["iscrowd"] else None, _size(a["bbox"])) for a in record["annotations"]
        ]
        boxes.update(rows)
        images.update({name for name, _ in rows})
    names = [*classes, *([None] if images[None] else [])]
    table = [
        ["ignored regions" if name is None else name, images[name], sum(boxes[name, size] for size in SIZES)]
        + [boxes[name, size] for size in SIZES]
        for name in names
    ]
    without = sum(not record["annotations"] for record in records)
    header = ["class", "images", "boxes", *SIZES]
    end = f"{len(records)} images, {without} of them without boxes"
    return f"{tabulate(table, header, disable_numparse=[0])}\n{end}"


def _size(box: Sequence[float]) -> str:
    x0, y0, x1, y1 = box
    return next(size for size, limit in SIZES.items() if (x1 - x0) * (y1 - y0) < limit)


def draw_sheet(records: Sequence[dict], classes: Sequence[str], num_images: int) -> Image.Image:
    """Draw images that are spread evenly over a data set, with their boxes in the colours of their classes.

    Regions to ignore are grey. Below is a legend with the number of boxes of each class that is shown.

    Args:
        records: in Detectron2's format, with boxes XYXY; at least one.
        classes: the class names.
        num_images: how many to draw; all, if there are fewer.

    Raises:
        DataError: an image cannot be read.
    """
    num_images = min(num_images, len(records))
    shown = [records[i * len(records) // num_images] for i in range(num_images)]
    columns = math.ceil(math.sqrt(num_images))
    rows = math.ceil(num_images / columns)
    counts = Counter(box["category_id"] for r in shown for box in objects(r))
    step, height = _CELL + _GAP, _CELL + _LINE + _GAP
    legend = (1 + math.ceil(len(counts) / columns)) * _LINE
    sheet = Image.new("RGB", (columns * step + _GAP, rows * height + legend + 2 * _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 12)
    for number, record in enumerate(progress(shown, desc="Drawing")):
        x, y = _GAP + number % columns * step, _GAP + number // columns * height
        sheet.paste(_picture(record), (x, y))
        boxes = len(objects(record))
        text = f"{os.path.basename(record['file_name'])}: {boxes} box{'es' if boxes != 1 else ''}"
        draw.text((x, y + _CELL), _shortened(text, font), "black", font)
    draw.text((_GAP, _GAP + rows * height), f"Boxes of {num_images} images out of {len(records)}:", "black", font)
    for number, (index, count) in enumerate(sorted(counts.items())):
        x, y = _GAP + number % columns * step, _GAP + rows * height + (1 + number // columns) * _LINE
        draw.rectangle((x, y + 2, x + 10, y + 12), class_color(index))
        draw.text((x + 16, y), _shortened(f"{classes[index]}: {count}", font), "black", font)
    return sheet


def _picture(record: dict) -> Image.Image:
    with readable_image(record["file_name"]):
        image = Image.fromarray(read_image(record["file_name"], "RGB"))  # turned by its EXIF orientation
    scale = _CELL / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size])
    draw = ImageDraw.Draw(image)
    for annotation in record["annotations"]:
        color = GRAY if annotation["iscrowd"] else class_color(annotation["category_id"])
        draw.rectangle([scale * value for value in annotation["bbox"]], outline=color, width=2)
    return image


def _shortened(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The end of a text that is too long for a cell."""
    if font.getlength(text) <= _CELL - 20:
        return text
    return next(short for start in range(1, len(text) + 1) if font.getlength(short := "…" + text[start:]) <= _CELL - 20)
