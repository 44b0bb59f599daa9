"""The page of an evaluation: one HTML file that needs no other, with charts drawn by its template."""

import base64
import io
from collections.abc import Callable

import jinja2
from detectron2.data.detection_utils import read_image
from PIL import Image

from .numbers import KINDS, METRICS, SIZES
from .style import class_color

_MOST_CLASSES = 12  # in a matrix and in colours of their own; of more, the page lists the commonest confusions
_LONGEST_SIDE = 640  # of a picture, in pixels


def render(package: str, template: str, **values) -> str:
    """Return a page from a template of a package, which may extend the ``base.html`` of this one."""
    folders = [jinja2.PackageLoader(name, "") for name in (package, __package__)]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def to_html(found: dict, find_image: Callable[[str], str]) -> str:
    """Return the page for the content of evaluation.json.

    Args:
        found: see ``measure``.
        find_image: from a ``file_name`` in it to the path of the image.
    """
    names = [row["name"] for row in found["classes"]]
    return render(
        __package__,
        "page.html",
        found=found,
        rows=[found["overall"], *found["classes"]] if len(names) > 1 else found["classes"],
        names=names,
        colors=[class_color(k) for k in range(len(names))],
        metrics=METRICS,
        kinds=KINDS,
        sizes=SIZES,
        is_small=len(names) <= _MOST_CLASSES,
        confusions=_confusions(found["confusion"], [*names, "background"]),
        pictures=[_picture(image, find_image(image["file_name"]), names) for image in found["worst_images"]],
    )


def _confusions(counts: list[list[int]], names: list[str], most: int = 20) -> list[tuple[int, str, str]]:
    """The commonest confusions of two classes: how often, of what, and as what."""
    pairs = [
        (count, names[i], names[j])
        for i, row in enumerate(counts[:-1])
        for j, count in enumerate(row[:-1])
        if i != j and count
    ]
    return sorted(pairs, key=lambda pair: -pair[0])[:most]


def _picture(entry: dict, path: str, names: list[str]) -> dict:
    """The size in pixels of a worst image, a small copy as a data URI, "" if it cannot be read, and labels."""
    image = read_picture(path)
    if entry["width"] and entry["height"]:
        width, height = entry["width"], entry["height"]
    elif image:  # COCO's JSON need not have it
        width, height = image.size
    else:
        boxes = [shape["box"] for shape in (*entry["objects"], *entry["detections"])]
        width, height = (max(box[axis] + box[axis + 2] for box in boxes) for axis in (0, 1))
    if image:
        image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    uri = data_uri(image) if image else ""
    return {"width": width, "height": height, "uri": uri, "labels": _labels(entry["detections"], names, width)}


def _labels(detections: list[dict], names: list[str], width: float) -> list[dict]:
    """The texts at false positives, the best first, without those that would lie on another; all are titles too."""
    size = width / 36  # of letters, in pixels of the image
    placed: list[dict] = []
    for d in (d for d in detections if d["error"]):
        kind = "wrong class" if d["error"] == "class" else d["error"]
        text = f"{names[d['class']]}: " * (len(names) > 1) + f"{kind} {d['score']:.2f}"
        length = 0.6 * size * len(text)
        x0, y0, box_width, _ = d["box"]
        on_left = x0 + box_width / 2 < width / 2
        left = max(x0 if on_left else min(x0 + box_width, width) - length, 0)
        base = max(y0 - size / 4, size)
        if all(
            abs(base - other["base"]) > 1.1 * size or left > other["end"] or left + length < other["left"]
            for other in placed
        ):
            placed.append({"text": text, "left": left, "end": left + length, "base": base, "size": size})
    return placed


def read_picture(path: str) -> Image.Image | None:
    """Return an image in RGB, turned by its EXIF orientation; None if it cannot be read."""
    try:
        return Image.fromarray(read_image(path, format="RGB"))
    except (OSError, SyntaxError, ValueError):  # Pillow's for a file that is not there, or broken
        return None


def data_uri(image: Image.Image) -> str:
    """Return a URI that holds an image itself, as a JPEG."""
    image.save(buffer := io.BytesIO(), "JPEG", quality=75, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
