"""The search on the grid against the matrix of all pairs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from focal_plugin.kernels import grid_pairs
from focal_plugin.kernels.grid_pairs import GridPairs, elementwise_iou
from tests.matchers.grid_cases import ODD_BOXES, anchors_and_boxes, iou_matrix, make_anchors, square_anchors


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    """Chunks so small that most searches take several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid_pairs, "_BOXES_AT_ONCE", 5)
        patch.setattr(grid_pairs, "_CANDIDATES_AT_ONCE", 37)
        yield


@settings(max_examples=50)
@given(anchors_and_boxes())
def test_elementwise_iou(case):
    """The bits of the matrix, odd boxes or not."""
    anchors, boxes = case
    pairs = torch.cartesian_prod(torch.arange(len(boxes)), torch.arange(len(anchors)))
    flat = torch.cat(anchors.boxes)
    iou = elementwise_iou(boxes[pairs[:, 0]], flat[pairs[:, 1]])
    assert torch.equal(iou, iou_matrix(anchors, boxes).flatten())


def found_matrix(anchors, boxes, min_iou):
    """The pairs that a search finds as a (G, R) matrix of their IoU, 0 elsewhere."""
    found = torch.zeros(len(boxes), len(anchors))
    for anchor, box, iou in GridPairs(anchors).search(boxes, min_iou):
        assert (iou > 0).all() and (found[box, anchor] == 0).all()
        assert len(torch.unique(box * len(anchors) + anchor)) == len(box), "a pair came twice"
        found[box, anchor] = iou
    return found


@settings(max_examples=100)
@given(anchors_and_boxes(), st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-6, 0.25, 0.5, 1.0])))
def test_finds_every_pair_of_enough_iou(case, threshold):
    """The same pairs as the matrix has, with the same bits."""
    anchors, boxes = case
    iou = iou_matrix(anchors, boxes)
    min_iou = torch.full((len(boxes),), threshold)
    assert torch.equal(found_matrix(anchors, boxes, min_iou), torch.where(iou >= min_iou[:, None], iou, 0))


@settings(max_examples=100)
@given(anchors_and_boxes())
def test_finds_the_best_pairs_from_the_nearest(case):
    """The nearest anchors' IoU is never above the best, and near enough below it for a search to find the best ones."""
    anchors, boxes = case
    iou = iou_matrix(anchors, boxes)
    best = iou.amax(dim=1)
    nearest = GridPairs(anchors).nearest_iou(boxes)
    assert (nearest <= best).all()
    found = found_matrix(anchors, boxes, nearest)
    is_best = (iou == best[:, None]) & (iou > 0)
    assert torch.equal((found == best[:, None]) & (found > 0), is_best)


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_the_nearest_is_the_best_of_a_usual_grid(offset):
    """To a few units in the last place, for boxes of all sizes inside the image."""
    anchors = make_anchors([(20, 30), (10, 15)], [8, 16], [[32, 40.3], [64, 80.6]], offset=offset)
    generator = torch.Generator().manual_seed(0)
    corner, size = torch.rand(2, 300, 2, generator=generator)
    boxes = torch.cat([corner * 200, corner * 200 + 10 ** (size * 2)], dim=1)
    best = iou_matrix(anchors, boxes).amax(dim=1)
    torch.testing.assert_close(GridPairs(anchors).nearest_iou(boxes), best, rtol=1e-5, atol=0)


@pytest.mark.parametrize("width", [4, 5])
def test_odd_boxes(width):
    """Boxes without area, too large for float32 or that are no numbers are found where the matrix has them."""
    anchors, boxes = square_anchors(16, width, 3), torch.tensor(ODD_BOXES)
    iou = iou_matrix(anchors, boxes)
    assert (iou > 0).any(dim=1).sum() >= 3  # the specks and the merely huge
    grid = GridPairs(anchors)
    assert torch.equal(grid.nearest_iou(boxes) > 0, (iou > 0).any(dim=1))
    assert torch.equal(found_matrix(anchors, boxes, torch.zeros(len(boxes))), iou)


def test_candidates_are_few(monkeypatch):
    """At a threshold of .4 less than twice as many anchors are compared with a box as turn out to match."""
    compared = []
    compare = grid_pairs.elementwise_iou
    monkeypatch.setattr(grid_pairs, "elementwise_iou", lambda a, b: compared.append(len(a)) or compare(a, b))
    anchors = make_anchors([(50, 60), (25, 30)], [8, 16], [[32, 40.3, 50.8], [64, 80.6, 101.6]])
    generator = torch.Generator().manual_seed(0)
    corner, size = torch.rand(2, 100, 2, generator=generator)
    boxes = torch.cat([corner * 400, corner * 400 + 30 + size * 70], dim=1)
    found = found_matrix(anchors, boxes, torch.full((100,), 0.4))
    assert 0 < (found > 0).sum() <= sum(compared) < 2 * (found > 0).sum()
    assert max(compared) <= 37 + 5 * 5  # the bound, and a window of a few cells


def test_no_anchors_and_no_boxes():
    """An empty feature map has no pairs, and neither has an image without boxes."""
    empty = make_anchors([(0, 4)], [8], [[16]], [[1.0]])
    boxes = torch.tensor([[0.0, 0, 16, 16]])
    assert GridPairs(empty).nearest_iou(boxes).tolist() == [0]
    assert found_matrix(empty, boxes, torch.zeros(1)).shape == (1, 0)
    grid = GridPairs(square_anchors(16, 4))
    assert grid.nearest_iou(boxes[:0]).shape == (0,)
    assert list(grid.search(boxes[:0], torch.zeros(0))) == []
