"""Large images in overlapping tiles: the tiles, and one set of detections from those of all tiles."""

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from ..data.tiles import overlapping_spans

Window = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels of the whole image

_NEAR = 0.01  # of a tile's side: a box that ends this close to the tile's edge counts as cut by it


def tile_windows(height: int, width: int, tile: int, overlap: int) -> list[Window]:
    """Return the tiles of an image, row by row: as few as cover it, evenly spread.

    Args:
        height, width: of the image, in pixels.
        tile: a tile's side. Along a side of the image that is no longer than this there is one tile.
        overlap: the least number of pixels that neighbours share, less than ``tile``.
    """
    rows, columns = (overlapping_spans(length, tile, overlap) for length in (height, width))
    return [(x0, y0, x1, y1) for y0, y1 in rows for x0, x1 in columns]


def merge_tiles(
    found: Sequence[Instances], windows: Sequence[Window], size: tuple[int, int], nms_thresh: float
) -> Instances:
    """Merge the detections of an image's tiles into those of the image, best first, by NMS class by class.

    A box that an edge of its tile cuts may be a piece of an object. A piece is compared with the part of the other box
    that lies in the piece's tile, since its tile shows nothing else. A piece that matches a whole box is dropped;
    pieces that match each other are merged into the box around them. The result has the best score among its members.
    Two whole boxes are compared as in any NMS. So an object that fits into the overlap is found once and whole, and a
    larger one is put together from its pieces.

    The whole image may be one of the tiles, for objects too large for any other: its smaller boxes are dropped.

    Args:
        found: the detections of each tile, in its own pixels. Of their fields, ``pred_boxes``, ``scores`` and
            ``pred_classes`` are merged.
        windows: the tiles.
        size: (height, width) of the image.
        nms_thresh: boxes of one class with a larger IoU are the same object.
    """
    windows = np.array(windows, dtype=np.float32).reshape(-1, 4)  # (T, 4)
    of = np.repeat(np.arange(len(windows)), [len(instances) for instances in found])  # (D,), the tile of each box
    boxes = torch.cat([instances.pred_boxes.tensor.cpu() for instances in found]).numpy()  # (D, 4)
    boxes = boxes + np.tile(windows[of, :2], 2)
    scores = torch.cat([instances.scores.cpu() for instances in found]).numpy()
    classes = torch.cat([instances.pred_classes.cpu() for instances in found]).numpy()
    kept = ~_is_held_by_a_tile(boxes, of, windows, size)
    boxes, of, scores, classes = boxes[kept], of[kept], scores[kept], classes[kept]

    windows = windows[of]  # (D, 4)
    cut = _is_cut(boxes, windows, size)
    merged = []
    for k in np.unique(classes):
        of_class = np.flatnonzero(classes == k)
        best_first = of_class[np.lexsort((-scores[of_class], cut[of_class]))]  # whole boxes before pieces
        merged += [(*object_, k) for object_ in _objects(boxes, scores, windows, cut, best_first, nms_thresh)]
    merged.sort(key=lambda detection: -detection[1])
    return Instances(
        size,
        pred_boxes=Boxes(torch.from_numpy(np.array([box for box, _, _ in merged], np.float32).reshape(-1, 4))),
        scores=torch.tensor([score for _, score, _ in merged], dtype=torch.float32),
        pred_classes=torch.tensor([int(k) for _, _, k in merged], dtype=torch.int64),
    )


def _is_held_by_a_tile(boxes: np.ndarray, of: np.ndarray, windows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Whether each of the (D, 4) boxes was found in the whole image and is no larger than a tile: (D,)."""
    height, width = size
    is_whole = (windows == np.array([0, 0, width, height])).all(axis=1)  # (T,)
    if is_whole.all():  # no tiles
        return np.zeros(len(boxes), dtype=bool)
    tiles = windows[~is_whole]
    sides = (tiles[:, 2:] - tiles[:, :2]).max(axis=0)
    return is_whole[of] & (boxes[:, 2:] - boxes[:, :2] <= sides).all(axis=1)


def _is_cut(boxes: np.ndarray, windows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Whether each of the (D, 4) boxes ends at an edge of its window that is not one of the image: (D,)."""
    height, width = size
    sides = np.tile(windows[:, 2:] - windows[:, :2], 2)  # (D, 4)
    near = np.abs(boxes - windows) <= np.maximum(_NEAR * sides, 1)
    inner = windows != np.array([0, 0, width, height])
    return (near & inner).any(axis=1)


def _objects(
    boxes: np.ndarray, scores: np.ndarray, windows: np.ndarray, cut: np.ndarray, rest: np.ndarray, nms_thresh: float
) -> list[tuple[np.ndarray, float]]:
    """The (4,) box and the score of each object among the detections of one class, with the indices ``rest``."""
    objects = []
    while len(rest):
        members, rest = [rest[0]], rest[1:]
        pieces = cut[members[0]]
        for member in members:  # grows: a piece that matches a piece may match a further one
            same = _iou_as_seen(member, rest, boxes, windows, cut) > nms_thresh
            members.extend(rest[same])
            rest = rest[~same]
            if not pieces:
                break
        box = boxes[members[0]]
        if pieces:
            box = np.concatenate([boxes[members, :2].min(axis=0), boxes[members, 2:].max(axis=0)])
        objects.append((box, scores[members].max()))
    return objects


def _iou_as_seen(first: int, others: np.ndarray, boxes: np.ndarray, windows: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """The IoU of a box with M others, (M,); of a box that is compared with a piece, the part in the piece's tile."""
    a, b = np.repeat(boxes[None, first], len(others), axis=0), boxes[others]
    if cut[first]:
        b = _clipped(b, windows[None, first])
    a = np.where(cut[others, None], _clipped(a, windows[others]), a)
    area_a, area_b, both = _area(a), _area(b), _area(_clipped(a, b))
    return both / np.maximum(area_a + area_b - both, 1e-6)


def _clipped(boxes: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """The (M, 4) parts of boxes in (M, 4) windows, with negative sides where a box lies outside."""
    return np.concatenate([np.maximum(boxes[:, :2], windows[:, :2]), np.minimum(boxes[:, 2:], windows[:, 2:])], axis=1)


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1)
