"""Large images in overlapping tiles: where the tiles lie, and one set of detections from those of all of them."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

Window = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels of the whole image

_NEAR = 0.01  # of a tile's side: a box that ends so close to the tile's edge is taken to be cut by it


def tile_windows(height: int, width: int, tile: int, overlap: int) -> list[Window]:
    """The tiles of an image, row by row: as few as cover it, spread evenly, each overlapping its neighbours.

    Args:
        height, width: of the image, in pixels.
        tile: a tile's side. Along a side of the image that is no longer than this there is one tile.
        overlap: the least number of pixels that neighbours share, less than ``tile``.
    """
    rows, columns = (_starts(length, tile, overlap) for length in (height, width))
    return [(x, y, min(x + tile, width), min(y + tile, height)) for y in rows for x in columns]


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    if length <= tile:
        return [0]
    steps = math.ceil((length - tile) / (tile - overlap))
    return [round(i * (length - tile) / steps) for i in range(steps + 1)]


def merge_tiles(
    found: Sequence[Instances], windows: Sequence[Window], size: tuple[int, int], nms_thresh: float
) -> Instances:
    """The detections of a whole image from those of its tiles, best first: NMS by class over the whole image.

    A box that ends at an edge of its tile, where the image goes on, may be a piece of an object. What a tile cannot see
    says nothing against a match, so a piece is compared with the part of the other box that lies in the piece's tile.
    A piece that matches a whole box is dropped for it; pieces that match each other become the one box around them. The
    result has the best score of what it stands for. Two whole boxes are compared as in any NMS. So an object that fits
    into the overlap is found once and whole, and a larger one that two tiles agree on is put together.

    The image as a whole may be one of the tiles. Of its boxes those count that no other tile holds whole: the objects
    that are too large for a tile.

    Args:
        found: of each tile, in its own pixels, with ``pred_boxes``, ``scores`` and ``pred_classes``; others are lost.
        windows: the tiles.
        size: (height, width) of the image.
        nms_thresh: boxes of one class whose IoU is larger are the same object.
    """
    windows = np.array(windows, dtype=np.float32).reshape(-1, 4)  # (T, 4)
    of = np.repeat(np.arange(len(windows)), [len(instances) for instances in found])  # (D,), each box's tile
    boxes = torch.cat([instances.pred_boxes.tensor.cpu() for instances in found]).numpy()  # (D, 4)
    boxes = boxes + np.tile(windows[of, :2], 2)
    scores = torch.cat([instances.scores.cpu() for instances in found]).numpy()
    classes = torch.cat([instances.pred_classes.cpu() for instances in found]).numpy()
    counts = ~_seen_better(boxes, of, windows, size)
    boxes, of, scores, classes = boxes[counts], of[counts], scores[counts], classes[counts]

    windows = windows[of]  # (D, 4)
    cut = _is_cut(boxes, windows, size)
    merged = []
    for k in np.unique(classes):
        of_class = np.flatnonzero(classes == k)
        best_first = of_class[np.lexsort((-scores[of_class], cut[of_class]))]  # those that are cut after all others
        merged += [(*object_, k) for object_ in _objects(boxes, scores, windows, cut, best_first, nms_thresh)]
    merged.sort(key=lambda detection: -detection[1])
    return Instances(
        size,
        pred_boxes=Boxes(torch.from_numpy(np.array([box for box, _, _ in merged], np.float32).reshape(-1, 4))),
        scores=torch.tensor([score for _, score, _ in merged], dtype=torch.float32),
        pred_classes=torch.tensor([int(k) for _, _, k in merged], dtype=torch.int64),
    )


def _seen_better(boxes: np.ndarray, of: np.ndarray, windows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which of the (D, 4) boxes are of the image as a whole and lie in a tile that is a part of it: (D,)."""
    height, width = size
    is_whole = (windows == np.array([0, 0, width, height])).all(axis=1)  # (T,)
    better = np.zeros(len(boxes), dtype=bool)
    for x0, y0, x1, y1 in windows[~is_whole]:
        better |= (boxes >= [x0, y0, x0, y0]).all(axis=1) & (boxes <= [x1, y1, x1, y1]).all(axis=1)
    return better & is_whole[of]


def _is_cut(boxes: np.ndarray, windows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which of the (D, 4) boxes reach an edge of their window inside an image of ``size``: (D,)."""
    height, width = size
    sides = np.tile(windows[:, 2:] - windows[:, :2], 2)  # (D, 4)
    near = np.abs(boxes - windows) <= np.maximum(_NEAR * sides, 1)
    inner = windows != np.array([0, 0, width, height])
    return (near & inner).any(axis=1)


def _objects(
    boxes: np.ndarray, scores: np.ndarray, windows: np.ndarray, cut: np.ndarray, rest: np.ndarray, nms_thresh: float
) -> list[tuple[np.ndarray, float]]:
    """The (4,) box and score of each object among the detections of one class, whose indices ``rest`` has in order."""
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
    """IoU of a box with M others; with a piece only that of the part in the piece's tile counts. (M,)"""
    a, b = np.repeat(boxes[None, first], len(others), axis=0), boxes[others]
    if cut[first]:
        b = _clipped(b, windows[None, first])
    a = np.where(cut[others, None], _clipped(a, windows[others]), a)
    area_a, area_b, both = _area(a), _area(b), _area(_clipped(a, b))
    return both / np.maximum(area_a + area_b - both, 1e-6)


def _clipped(boxes: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """What of (M, 4) boxes lies in (M, 4) windows; negative sides where nothing does."""
    return np.concatenate([np.maximum(boxes[:, :2], windows[:, :2]), np.minimum(boxes[:, 2:], windows[:, 2:])], axis=1)


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1)
