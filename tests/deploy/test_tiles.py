import itertools

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from focal_plugin.deploy.tiles import merge_tiles, tile_windows


@pytest.mark.parametrize("overlap", [0, 1, 20, 63])
@pytest.mark.parametrize("size", [(64, 64), (65, 64), (1, 200), (127, 300), (200, 128)])
def test_the_tiles_cover_the_image_and_overlap(size, overlap):
    height, width = size
    windows = tile_windows(height, width, 64, overlap)
    seen = np.zeros(size, int)
    for x0, y0, x1, y1 in windows:
        assert (y1 - y0, x1 - x0) == (min(64, height), min(64, width))
        seen[y0:y1, x0:x1] += 1
    assert seen.min() == 1 if overlap == 0 else seen.min() >= 1
    for axis, length in ((0, width), (1, height)):
        starts = sorted({window[axis] for window in windows})
        assert all(b - a <= 64 - overlap for a, b in itertools.pairwise(starts))
        assert len(starts) == max(1, -(-(length - overlap) // (64 - overlap)))  # no more than it takes


def detections(size, boxes, scores=None, classes=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    scores = torch.full((len(boxes),), 0.9) if scores is None else torch.tensor(scores, dtype=torch.float32)
    classes = torch.zeros(len(boxes), dtype=torch.int64) if classes is None else torch.tensor(classes)
    return Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)


def see(window, objects, rng):
    """What a perfect detector finds of (x0, y0, x1, y1, class) in a window: the visible part of each, in its pixels."""
    x0, y0, x1, y1 = window
    boxes, classes = [], []
    for *box, k in objects:
        left, top, right, bottom = max(box[0], x0), max(box[1], y0), min(box[2], x1), min(box[3], y1)
        if right > left and bottom > top:
            boxes.append([left - x0, top - y0, right - x0, bottom - y0])
            classes.append(k)
    return detections((y1 - y0, x1 - x0), boxes, rng.uniform(0.5, 1, len(boxes)).tolist(), classes)


def as_rows(instances):
    rows = torch.cat([instances.pred_boxes.tensor, instances.pred_classes[:, None]], dim=1)
    return sorted(rows.round().int().tolist())


@pytest.mark.parametrize("whole_image_too", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_what_each_tile_sees_in_part_comes_out_once_and_whole(seed, whole_image_too):
    """Objects of all sizes, up to several tiles, on a grid so that they do not overlap."""
    rng = np.random.default_rng(seed)
    height, width = 300, 400
    columns, rows = ([0, *sorted(rng.choice(np.arange(1, n // 10), 4, replace=False) * 10), n] for n in (width, height))
    objects = []
    for x0, x1 in itertools.pairwise(columns):
        for y0, y1 in itertools.pairwise(rows):
            left, right = sorted(rng.choice(np.arange(x0, x1 + 1), 2, replace=False))
            top, bottom = sorted(rng.choice(np.arange(y0, y1 + 1), 2, replace=False))
            objects.append([int(v) for v in (left, top, right, bottom, rng.integers(2))])
    windows = tile_windows(height, width, 100, 20) + [(0, 0, width, height)] * whole_image_too
    merged = merge_tiles([see(window, objects, rng) for window in windows], windows, (height, width), 0.5)
    assert as_rows(merged) == sorted(objects)
    assert merged.image_size == (height, width)
    assert merged.scores.tolist() == sorted(merged.scores.tolist(), reverse=True)


LEFT, RIGHT = (0, 0, 100, 100), (80, 0, 180, 100)


def merged_pair(left, right):
    return merge_tiles([left, right], [LEFT, RIGHT], (100, 180), 0.5)


def test_a_piece_yields_to_the_whole_box_whatever_its_score():
    left = detections((100, 100), [[60, 10, 95, 40]], [0.6])  # the right tile sees it from 80 on
    right = detections((100, 100), [[0, 10, 15, 40]], [0.9])
    merged = merged_pair(left, right)
    assert merged.pred_boxes.tensor.tolist() == [[60, 10, 95, 40]]
    assert merged.scores.tolist() == pytest.approx([0.9])


def test_pieces_of_one_object_are_put_together():
    left = detections((100, 100), [[30, 10, 100, 40]], [0.6])
    right = detections((100, 100), [[0, 11, 70, 41]], [0.8])
    merged = merged_pair(left, right)
    assert merged.pred_boxes.tensor.tolist() == [[30, 10, 150, 41]]
    assert merged.scores.tolist() == pytest.approx([0.8])


def test_a_lone_piece_stays():
    assert as_rows(merged_pair(detections((100, 100), [[30, 10, 100, 40]]), detections((100, 100), []))) == [
        [30, 10, 100, 40, 0]
    ]


def test_neighbours_are_not_put_together():
    """Two whole objects meet in the overlap, and a piece of another class lies on one."""
    left = detections((100, 100), [[50, 10, 88, 40]])
    right = detections((100, 100), [[9, 10, 50, 40], [0, 10, 8, 40]], [0.9, 0.8], [0, 1])
    assert as_rows(merged_pair(left, right)) == [[50, 10, 88, 40, 0], [80, 10, 88, 40, 1], [89, 10, 130, 40, 0]]


@pytest.mark.parametrize("shift, kept", [(2, 1), (12, 2)])
def test_whole_boxes_go_through_plain_nms(shift, kept):
    """Of a width of 16: a shift by 2 leaves an IoU of 14/18, one by 12 one of 4/28."""
    left = detections((100, 100), [[82, 10, 98, 40]], [0.7])
    right = detections((100, 100), [[2 + shift, 10, 18 + shift, 40]], [0.8])
    merged = merged_pair(left, right)
    assert len(merged) == kept
    assert merged.pred_boxes.tensor[0].tolist() == [82 + shift, 10, 98 + shift, 40]


def test_an_edge_of_the_image_cuts_nothing():
    """What ends there is whole: the better of two boxes stays as it is, not the box around both."""
    left = detections((100, 100), [[60, 60, 90, 99]], [0.6])
    right = detections((100, 100), [[0, 60, 10, 100]], [0.9])
    assert as_rows(merged_pair(left, right)) == [[60, 60, 90, 99, 0]]


def test_the_image_as_a_whole_adds_only_what_is_larger_than_a_tile():
    """Not a box that fits into a tile, but lies across the border of two."""
    whole = detections((100, 180), [[60, 10, 120, 50], [20, 60, 160, 90]], [0.95, 0.6])
    nothing = detections((100, 100), np.zeros((0, 4)), [])
    merged = merge_tiles([nothing, nothing, whole], [LEFT, RIGHT, (0, 0, 180, 100)], (100, 180), 0.5)
    assert merged.pred_boxes.tensor.tolist() == [[20, 60, 160, 90]]


def test_the_image_as_a_whole_counts_for_what_no_tile_holds():
    """It sees an object in the left tile too, less well; one in neither; and one that only the tiles see in part."""
    whole = detections((100, 180), [[10, 10, 40, 50], [20, 60, 160, 90]], [0.95, 0.6])
    left = detections((100, 100), [[30, 10, 60, 50], [20, 61, 100, 91]], [0.7, 0.8])
    right = detections((100, 100), [])
    merged = merge_tiles([left, right, whole], [LEFT, RIGHT, (0, 0, 180, 100)], (100, 180), 0.5)
    assert as_rows(merged) == [[20, 60, 160, 90, 0], [30, 10, 60, 50, 0]]
    assert merged.scores.tolist() == pytest.approx([0.8, 0.7])


def test_nothing_found():
    merged = merged_pair(detections((100, 100), []), detections((100, 100), []))
    assert len(merged) == 0
    assert merged.pred_boxes.tensor.shape == (0, 4)
    assert merged.pred_classes.dtype == torch.int64
