"""ATSS against its algorithm written down box by box, over every location."""

import statistics
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.events import EventStorage
from hypothesis import given, settings

from focal_plugin import add_focal_config, build_matcher
from focal_plugin.matchers import ATSSMatcher, atss
from focal_plugin.matchers.ignore_regions import ignore_covered
from tests.matchers.grid_cases import (
    ODD_BOXES,
    anchors_and_boxes,
    make_anchors,
    make_instances,
    square_anchors,
    without_grid,
)


def match_by_definition(anchors, boxes, topk=9):
    """Algorithm 1 of the paper for anchors on a grid; A anchors at each of the k nearest locations of a level."""
    best = [(0.0, 0, 0)] * len(anchors)  # IoU, box, label of each anchor
    flat = torch.cat(anchors.boxes)
    for g, box in enumerate(boxes.tolist()):
        candidates, first = [], 0
        for level, (height, width) in enumerate(anchors.grid_sizes):
            stride, cell = anchors.strides[level], anchors.cell_anchors[level].double()
            shift = [float(cell[:, axis::2].mean()) for axis in (0, 1)]
            place = [((box[axis] + box[axis + 2]) / 2 - shift[axis]) / stride - anchors.offset for axis in (0, 1)]
            distances = [(y - place[1]) ** 2 + (x - place[0]) ** 2 for y in range(height) for x in range(width)]
            nearest = sorted(range(height * width), key=lambda i: distances[i])[:topk]
            candidates += [first + i * len(cell) + a for i in nearest for a in range(len(cell))]
            first += height * width * len(cell)
        iou = pairwise_iou(Boxes(torch.tensor([box])), Boxes(flat[candidates]))[0].nan_to_num(0).tolist()
        threshold = statistics.fmean(iou) + (statistics.stdev(iou) if len(iou) > 1 else 0)
        for i, value in zip(candidates, iou):
            x0, y0, x1, y1 = flat[i].tolist()
            x, y = (x0 + x1) / 2, (y0 + y1) / 2
            is_inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if value >= threshold and is_inside and value > best[i][0]:
                best[i] = (value, g, 1)
    return [g for _, g, _ in best], [label for _, _, label in best]


def assert_same(found, expected):
    matched, labels = found
    assert matched.dtype == torch.int64 and labels.dtype == torch.int8
    assert labels.tolist() == expected[1]
    assert matched.tolist() == expected[0]


@settings(max_examples=100)
@given(anchors_and_boxes())
def test_as_the_algorithm_says(case):
    """Ordinary and odd boxes, ties, several levels and shapes."""
    anchors, boxes = case
    boxes = boxes[boxes.isfinite().all(dim=1) & (boxes.abs() < 1e7).all(dim=1)]
    assert_same(ATSSMatcher()(anchors, make_instances(boxes)), match_by_definition(anchors, boxes))


def usual_case():
    anchors = make_anchors([(25, 38), (13, 19), (7, 10)], [8, 16, 32], [[32, 40.3], [64, 80.6], [128, 161.3]], offset=0)
    corner, size = torch.rand(2, 40, 2, generator=torch.Generator().manual_seed(0))
    boxes = torch.cat([corner * 250 - 20, corner * 250 - 20 + 8 + size * 120], dim=1)
    return anchors, boxes


@pytest.mark.parametrize("topk", [1, 4, 9, 1000])
@pytest.mark.parametrize("boxes_at_once", [7, 256])
def test_a_usual_image(topk, boxes_at_once, monkeypatch):
    monkeypatch.setattr(atss, "_BOXES_AT_ONCE", boxes_at_once)
    anchors, boxes = usual_case()
    found = ATSSMatcher(topk=topk)(anchors, make_instances(boxes))
    assert topk < 9 or found[1].sum() > 100
    assert_same(found, match_by_definition(anchors, boxes, topk))


@pytest.mark.parametrize("distances_at_once", [100, 2**19])
def test_without_a_grid_the_nearest_are_found_among_all(distances_at_once, monkeypatch):
    monkeypatch.setattr(atss, "_DISTANCES_AT_ONCE", distances_at_once)
    anchors, boxes = usual_case()
    found = ATSSMatcher()(without_grid(anchors), make_instances(boxes))
    assert_same(found, match_by_definition(anchors, boxes))


def test_one_row_by_hand():
    """Squares of 16 px with their centres at 0, 8, ..., 56."""
    anchors = square_anchors(16, width=8)

    def labels(topk, *boxes):
        return ATSSMatcher(topk=topk)(anchors, make_instances(boxes))[1].tolist()

    # The IoU of the five nearest is 0, 1/3, 1, 1/3 and 0: the threshold is 1/3 + √(1/6) = .742.
    assert labels(5, [16, -8, 32, 8]) == [0, 0, 0, 1, 0, 0, 0, 0]
    # That of a wider box 1/9, 3/7, 2/3, 3/7 and 1/9: the threshold is .349 + .238 = .587.
    assert labels(5, [12, -8, 36, 8]) == [0, 0, 0, 1, 0, 0, 0, 0]
    # Of one candidate the threshold is its own IoU, whatever that is, and then only its centre counts.
    assert labels(1, [22, -8, 29, 8]) == [0, 0, 0, 1, 0, 0, 0, 0]
    assert labels(1, [25, -8, 31, 8]) == [0, 0, 0, 0, 0, 0, 0, 0]


def test_ties():
    """Half-way between two locations the first is nearest; of equal boxes the first wins, else the best."""
    anchors = square_anchors(16, width=4)
    matcher = ATSSMatcher(topk=1)
    assert matcher(anchors, make_instances([[0, -8, 24, 8]]))[1].tolist() == [0, 1, 0, 0]
    matched, labels = matcher(anchors, make_instances([[100, 0, 101, 1], *2 * [[0, -8, 16, 8]]]))
    assert (labels.tolist(), matched.tolist()) == ([0, 1, 0, 0], [0, 1, 0, 0])
    worse, better = [4.0, -8, 20, 8], [2.0, -8, 18, 8]
    for boxes in ([worse, better], [better, worse]):
        matched, labels = matcher(anchors, make_instances(boxes))
        assert labels.tolist() == [0, 1, 0, 0]
        assert boxes[matched[1]] == better


@pytest.mark.parametrize("boxes", [[], [[4, 4, 4, 60]], [[-500, -500, -400, -400]], [[900, 900, 990, 990]], ODD_BOXES])
def test_what_cannot_be_matched(boxes):
    """No boxes, no area, outside the image; odd ones may get anchors, and never raise or match a place outside."""
    anchors, _ = usual_case()
    matched, labels = ATSSMatcher()(anchors, make_instances(boxes))
    if boxes is not ODD_BOXES:
        assert not labels.any()
    assert not matched[labels == 0].any()
    flat = torch.cat(anchors.boxes)[labels == 1]
    chosen = torch.tensor(boxes).reshape(-1, 4)[matched[labels == 1]]
    center = (flat[:, :2] + flat[:, 2:]) / 2
    assert ((center > chosen[:, :2]) & (center < chosen[:, 2:])).all()


def test_levels_without_locations():
    empty = make_anchors([(0, 4), (2, 2)], [8, 16], [[16], [32]], [[1.0]])
    boxes = torch.tensor([[0.0, 0, 30, 30]])
    assert_same(ATSSMatcher()(empty, make_instances(boxes)), match_by_definition(empty, boxes))
    nothing = make_anchors([(0, 4)], [8], [[16]], [[1.0]])
    matched, labels = ATSSMatcher()(nothing, make_instances(boxes))
    assert len(matched) == len(labels) == 0


def test_its_key_and_its_errors():
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.MODEL.FOCAL.MATCHER.NAME = "ATSSMatcher"
    assert build_matcher(cfg).topk == 9
    cfg.MODEL.FOCAL.MATCHER.TOPK = 0
    with pytest.raises(ValueError, match=r"MODEL\.FOCAL\.MATCHER\.TOPK \(topk\) is 0; expected 1 or more"):
        build_matcher(cfg)
    with pytest.raises(TypeError, match=r"a matrix of IoU does not tell: call it with \(Anchors, Instances\)"):
        ATSSMatcher()(torch.rand(3, 20))


def test_far_fewer_pairs_than_the_matrix(monkeypatch):
    """At most k locations of each level are compared with a box."""
    compared = []
    compare = atss.elementwise_iou
    monkeypatch.setattr(atss, "elementwise_iou", lambda a, b: compared.append(len(a)) or compare(a, b))
    anchors, boxes = usual_case()
    ATSSMatcher()(anchors, make_instances(boxes))
    assert sum(compared) == len(boxes) * 3 * 9 * 6


def test_a_detector_trains_on_its_matches():
    """Through the model: what it makes positive are the targets, and the losses have gradients."""
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.merge_from_file(Path(__file__).parents[2] / "configs" / "Base-FocalRetinaNet.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.FPN.OUT_CHANNELS = 18, 64, 16
    cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CONVS = 2, 1
    cfg.MODEL.FOCAL.MATCHER.NAME = "ATSSMatcher"
    model = build_model(cfg).train()
    instances = make_instances([[4, 4, 44, 40], [30, 20, 62, 60]])
    instances.gt_classes = torch.tensor([0, 1])
    asked = []
    label = model.label_anchors
    model.label_anchors = lambda *args: asked.append(label(*args)) or asked[-1]
    with EventStorage():
        losses = model([{"image": torch.zeros(3, 64, 64), "instances": instances}])
    sum(losses.values()).backward()
    (targets,) = asked
    chosen = torch.cat(targets.grid.boxes)[ATSSMatcher()(targets.grid, instances)[1] == 1]
    assert sorted(targets.anchors.tolist()) == sorted(chosen.tolist()) != []
    assert model.head.bbox_pred.weight.grad.abs().sum() > 0


@settings(max_examples=50)
@given(anchors_and_boxes())
def test_a_batch_is_its_images(case):
    """Of different numbers of boxes, one without any, and one with a region to ignore."""
    anchors, boxes = case
    instances = [make_instances(part) for part in (boxes, boxes[:0], boxes[1:])]
    region = Boxes(torch.tensor([[-50.0, -50, 60, 60]]))
    matcher = ATSSMatcher(topk=3)
    matched, labels = matcher.match_batch(anchors, instances, [None, None, region], 0.5)
    for i, image in enumerate(instances):
        expected, expected_labels = matcher(anchors, image)
        if i == 2:
            expected_labels = ignore_covered(expected_labels, anchors, region, 0.5)
        assert matched[i].equal(expected) and labels[i].equal(expected_labels)
