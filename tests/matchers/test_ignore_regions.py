"""Anchors in crowds are no background: against every pair by hand, for every matcher, down to the losses."""

import copy

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from focal_plugin import IGNORED, NEGATIVE, POSITIVE, Anchors
from focal_plugin.config.load import load_config
from focal_plugin.matchers import ignore_regions
from focal_plugin.matchers.ignore_regions import ignore_covered


def covered_by_hand(anchors, regions, min_ioa):
    """(R,) in float64, one pair after another."""
    found = np.zeros(len(anchors), dtype=bool)
    for r, (x0, y0, x1, y1) in enumerate(anchors.astype(np.float64)):
        for left, top, right, bottom in regions.astype(np.float64):
            inside = max(0, min(x1, right) - max(x0, left)) * max(0, min(y1, bottom) - max(y0, top))
            found[r] |= inside > 0 and inside / ((x1 - x0) * (y1 - y0)) >= min_ioa
    return found


def some_boxes(rng, count, most):
    """Whole numbers, so that shares of just a half occur; some have no size."""
    low = rng.integers(-5, 20, (count, 2))
    return np.concatenate([low, low + rng.integers(0, most, (count, 2))], axis=1).astype(np.float32)


def as_anchors(boxes):
    half = len(boxes) // 2
    levels = [torch.from_numpy(boxes[:half]), torch.from_numpy(boxes[half:])]
    return Anchors(levels, [(1, half), (1, len(boxes) - half)], [1, 1])


@pytest.mark.parametrize("min_ioa", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("num_regions", [0, 1, 7])
@pytest.mark.parametrize("pairs_at_once", [2**19, 1000, 1])
def test_by_hand(monkeypatch, min_ioa, num_regions, pairs_at_once):
    monkeypatch.setattr(ignore_regions, "_PAIRS_AT_ONCE", pairs_at_once)
    rng = np.random.default_rng(num_regions)
    boxes, regions = some_boxes(rng, 300, 9), some_boxes(rng, num_regions, 15)
    regions[:1] = [2, 2, 14, 14]  # one that surely covers some
    labels = torch.from_numpy(rng.integers(-1, 2, 300)).to(torch.int8)
    before = labels.clone()
    found = ignore_covered(labels, as_anchors(boxes), Boxes(regions), min_ioa)
    covered = torch.from_numpy(covered_by_hand(boxes, regions, min_ioa))
    expected = torch.where(covered & (before == NEGATIVE), IGNORED, before)
    assert found.dtype == torch.int8 and found.equal(expected) and labels.equal(before)
    assert (found != before).any() == (num_regions > 0)


def test_two_halves_are_not_one_region():
    anchors = as_anchors(np.array([[0, 0, 10, 10], [40, 40, 50, 50]], dtype=np.float32))
    labels = torch.tensor([NEGATIVE, NEGATIVE], dtype=torch.int8)
    halves = Boxes([[0.0, 0, 4, 10], [6.0, 0, 10, 10]])
    assert ignore_covered(labels, anchors, halves, 0.5).tolist() == [NEGATIVE, NEGATIVE]
    assert ignore_covered(labels, anchors, halves, 0.4).tolist() == [IGNORED, NEGATIVE]


def test_no_anchors():
    labels = torch.zeros(0, dtype=torch.int8)
    assert ignore_covered(labels, as_anchors(np.zeros((0, 4), np.float32)), Boxes([[0.0, 0, 4, 10]]), 0.5).equal(labels)


# In the model


def build(tiny_config, *opts):
    return build_model(load_config(tiny_config, ["MODEL.DEVICE", "cpu", *opts])).train()


def image(*boxes, regions=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    instances = Instances((64, 64), gt_boxes=Boxes(boxes), gt_classes=torch.zeros(len(boxes), dtype=torch.int64))
    pixels = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sample = {"image": pixels, "instances": instances}
    return sample if regions is None else {**sample, "ignore_boxes": Boxes(torch.tensor(regions).view(-1, 4))}


def features_of(model):
    return [torch.empty(1, 0, side, side) for side in (8, 4, 2, 1, 1)]


def labels_of(model, *batch):
    """(N, R) codes of the anchors, in the order of the anchors."""
    targets = model.label_batch(features_of(model), list(batch))
    levels = [level.permute(0, 2, 3, 1).flatten(1) for level in targets.labels]
    return torch.cat(levels, dim=1), targets


@pytest.mark.parametrize("matcher", ["IgnoreBandMatcher", "ATSSMatcher"])
@pytest.mark.parametrize("boxes", [[], [[4.0, 4, 20, 20]], [[4.0, 4, 20, 20], [30.0, 30, 60, 60]]])
def test_only_covered_background_changes(tiny_config, matcher, boxes):
    model = build(tiny_config, "MODEL.FOCAL.MATCHER.NAME", matcher)
    regions = [[0.0, 0, 30, 30], [40.0, 0, 64, 20]]
    without, targets = labels_of(model, image(*boxes))
    found, with_regions = labels_of(model, image(*boxes, regions=regions))
    anchors = torch.cat(Anchors.from_generator(model.anchor_generator, features_of(model)).boxes)
    covered = torch.from_numpy(covered_by_hand(anchors.numpy(), np.array(regions), 0.5))
    expected = torch.where(covered & (without == model.num_classes), IGNORED, without)
    assert found.equal(expected) and not found.equal(without)
    assert with_regions.gt_boxes.equal(targets.gt_boxes) and with_regions.anchors.equal(targets.anchors)


def test_a_box_that_is_both(tiny_config):
    """Its anchors stay positive; those around them that lie in it are no background."""
    box = [4.0, 4, 28, 28]
    (labels,), targets = labels_of(build(tiny_config), image(box, regions=[box]))
    (without,), _ = labels_of(build(tiny_config), image(box))
    assert targets.num_positives > 0 and (labels == 0).equal(without == 0)
    assert (labels == IGNORED).sum() > (without == IGNORED).sum()


def test_each_image_has_its_own(tiny_config):
    model = build(tiny_config)
    batch = [image(), image(regions=[[0.0, 0, 64, 64]]), image()]
    labels, _ = labels_of(model, *batch)
    assert (labels[0] == model.num_classes).all() and labels[2].equal(labels[0])
    anchors = torch.cat(Anchors.from_generator(model.anchor_generator, features_of(model)).boxes)
    covered = covered_by_hand(anchors.numpy(), np.array([[0, 0, 64, 64]]), 0.5)
    assert (labels[1] == IGNORED).equal(torch.from_numpy(covered)) and covered.any() and not covered.all()


def losses_of(model, *batch):
    torch.manual_seed(0)
    model = copy.deepcopy(model)
    with EventStorage():
        losses = model(list(batch))
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {name: loss.item() for name, loss in losses.items()}, gradients


@pytest.mark.parametrize("head", ["FocalRetinaNetHead", "plain"])
def test_losses(tiny_config, head):
    """Without regions, or with the key at 0, they are what they were; with them, less for the same image."""
    model = build(tiny_config)
    if head == "plain":  # one that takes no targets
        forward = model.head.forward
        model.head.takes_targets = False
        model.head.forward = lambda features: forward(features)
    boxes, regions = [[4.0, 4, 20, 20]], [[30.0, 30, 64, 64]]
    stock, gradients = losses_of(model, image(*boxes))
    crowded, _ = losses_of(model, image(*boxes, regions=regions))
    assert crowded["loss_box_reg"] == stock["loss_box_reg"]
    assert 0 < crowded["loss_cls"] < stock["loss_cls"]

    model.ignore_ioa = 0.0
    off, gradients_off = losses_of(model, image(*boxes, regions=regions))
    assert off == stock
    assert all(a.equal(b) for a, b in zip(gradients, gradients_off, strict=True))


def test_nothing_but_a_crowd(tiny_config):
    """All anchors ignored: a loss of 0 with gradients of 0."""
    model = build(tiny_config)
    losses, gradients = losses_of(model, image(regions=[[-1000.0, -1000, 1000, 1000]]))
    assert losses == {"loss_cls": 0, "loss_box_reg": 0}
    assert gradients and all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_the_key_is_checked(tiny_config, value):
    with pytest.raises(ValueError, match=r"MODEL\.FOCAL\.MATCHER\.IGNORE_IOA"):
        build(tiny_config, "MODEL.FOCAL.MATCHER.IGNORE_IOA", value)


def test_positives_are_never_ignored():
    anchors = as_anchors(np.array([[0, 0, 10, 10], [0, 0, 10, 10]], dtype=np.float32))
    labels = torch.tensor([POSITIVE, NEGATIVE], dtype=torch.int8)
    assert ignore_covered(labels, anchors, Boxes([[0.0, 0, 10, 10]]), 0.5).tolist() == [POSITIVE, IGNORED]
