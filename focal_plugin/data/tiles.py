"""Tiles: the spans along a side of an image, the boxes in a tile, and images cut into a data set of tiles."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from PIL import Image

from ..config import ConfigError
from ..files.progress import progress
from .images import readable_image


def overlapping_spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Return the spans (start, stop) that cover a side of ``length`` pixels: as few as can, evenly spread.

    Args:
        length: the side's length.
        tile: the length of each span. A side no longer than this is one span.
        overlap: the least number of pixels that neighbours share, less than ``tile``.
    """
    if length <= tile:
        return [(0, length)]
    steps = math.ceil((length - tile) / (tile - overlap))
    starts = [round(i * (length - tile) / steps) for i in range(steps + 1)]
    return [(start, start + tile) for start in starts]


def tile_spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Cut a side of ``length`` pixels into spans (start, stop) that overlap by at least ``overlap`` pixels.

    All have one size, the one near ``tile`` that leaves no rest.
    """
    count = max(1, round((length - overlap) / (tile - overlap)))
    return overlapping_spans(length, math.ceil((length + (count - 1) * overlap) / count), overlap)


def clip_to_tile(
    boxes: np.ndarray, tile: tuple[int, int, int, int], min_visible: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clip (G, 4) XYXY boxes to a tile.

    Args:
        boxes: in pixels of the whole image.
        tile: (x0, y0, x1, y1) of the tile.
        min_visible: the least share of an object's area that is inside.

    Returns:
        (M, 4) boxes in pixels of the tile, of those that reach into it; (M,) bool, whether they are objects there; and
        (M,) their indices in ``boxes``.
    """
    x0, y0, x1, y1 = tile
    clipped = np.clip(boxes, [x0, y0, x0, y0], [x1, y1, x1, y1])
    sides, whole = clipped[:, 2:] - clipped[:, :2], boxes[:, 2:] - boxes[:, :2]
    share = sides.prod(axis=1) / whole.prod(axis=1)  # (G,)
    (reaching,) = (sides > 0).all(axis=1).nonzero()
    return clipped[reaching] - [x0, y0, x0, y0], share[reaching] >= min_visible, reaching


def check_tiling(tile: int, overlap: int, min_visible: float) -> None:
    """Check the numbers of ``cut_tiles``.

    Raises:
        ConfigError: one is out of range.
    """
    if not 0 <= overlap < tile or not 0 < min_visible <= 1:
        found = f"size {tile}, overlap {overlap}, least visible share {min_visible}"
        raise ConfigError(f"Tiles of {found}; expected 0 <= overlap < size and 0 < share <= 1.")


def cut_tiles(
    records: Sequence[dict], names: Sequence[str], folder: Path, *, tile: int, overlap: int, min_visible: float
) -> list[dict]:
    """Cut images into tiles and write them as PNG files.

    A box that a tile's edge cuts is clipped to the tile. It is an object of the tile if at least ``min_visible`` of its
    area is inside, and a crowd otherwise: not trained on, and in evaluation neither found nor missed. What was a crowd
    stays one. Neighbouring tiles overlap, so that an object may be one of several tiles.

    Args:
        records: in Detectron2's format, with boxes XYXY.
        names: of the images: the tile at (x, y) becomes ``<name>_<x>_<y>.png``.
        folder: where the tiles are written.
        tile: the approximate side of a tile, in pixels. Of an image, all tiles have one size, near this one.
        overlap: the pixels that neighbouring tiles share, at least.
        min_visible: in (0, 1].

    Returns:
        the records of the tiles; a ``file_name`` is relative to ``folder``.

    Raises:
        DataError: an image cannot be read.
    """
    os.makedirs(folder, exist_ok=True)
    spans = [[tile_spans(record[side], tile, overlap) for side in ("height", "width")] for record in records]
    made = []
    total = sum(len(rows) * len(columns) for rows, columns in spans)
    with progress(total=total, desc="Cutting", unit="tile") as bar:
        for record, name, (rows, columns) in zip(records, names, spans):
            with readable_image(record["file_name"]):
                pixels = read_image(record["file_name"], "RGB")  # (H, W, 3), turned by its EXIF orientation
            for top, bottom in rows:
                for left, right in columns:
                    file_name = f"{name}_{left}_{top}.png"
                    Image.fromarray(pixels[top:bottom, left:right]).save(folder / file_name)
                    annotations = _annotations_in(record, (left, top, right, bottom), min_visible)
                    size = {"height": bottom - top, "width": right - left}
                    made.append({"file_name": file_name, "image_id": file_name, **size, "annotations": annotations})
                    bar.update()
    return made


def _annotations_in(record: dict, tile: tuple[int, int, int, int], min_visible: float) -> list[dict]:
    boxes = np.array([annotation["bbox"] for annotation in record["annotations"]]).reshape(-1, 4)
    annotations = []
    for box, is_object, index in zip(*clip_to_tile(boxes, tile, min_visible)):
        annotation = record["annotations"][index]
        crowd = int(annotation["iscrowd"] or not is_object)
        annotations.append({**annotation, "bbox": box.tolist(), "bbox_mode": BoxMode.XYXY_ABS, "iscrowd": crowd})
    return annotations
