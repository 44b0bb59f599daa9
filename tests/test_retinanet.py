"""The model outside of a trainer, and inference on many images at once. What it computes is in test_parity.py."""

import math
from types import SimpleNamespace

import pytest
import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, ImageList, Instances

from focal_plugin import Anchors, IgnoreBandMatcher
from focal_plugin.inference import best_of_level, suppress, top
from tests.small_retinanet import CLASSES, small_config

CHOICE = {"num_classes": CLASSES, "count": 1000, "score_thresh": 0.05}
LEVELS = [(6, 8), (3, 4), (2, 2), (1, 1), (1, 1)]


@pytest.fixture(scope="module")
def model():
    return build_model(small_config()).eval()


def test_levels_that_the_backbone_does_not_have():
    cfg = small_config()
    cfg.MODEL.RETINANET.IN_FEATURES = ["p2", "p3"]
    with pytest.raises(
        ValueError, match=r"IN_FEATURES has p2, which .*resnet_fpn_backbone.* gives p3, p4, p5, p6, p7\."
    ):
        build_model(cfg)


@pytest.mark.parametrize("architecture", ["FocalRetinaNet", "FocalFCOS"])
def test_losses_in_a_loop_without_detectron2s_event_storage(architecture):
    cfg = small_config()
    cfg.MODEL.META_ARCHITECTURE = architecture
    instances = Instances((64, 80), gt_boxes=Boxes(torch.tensor([[8.0, 8, 60, 50]])), gt_classes=torch.tensor([1]))
    losses = build_model(cfg)([{"image": torch.rand(3, 64, 80), "instances": instances}])
    assert len(losses) >= 2 and all(0 < loss < math.inf for loss in losses.values())


@pytest.mark.parametrize("labels", [[0, -1, 1], [-1, 0, 1], [1, 0, 1]])
def test_an_image_without_boxes_is_background(model, monkeypatch, labels):
    """As in Detectron2, whatever the label of an anchor that overlaps no box."""
    thresholds, gt = [0.1, 0.4], torch.tensor([[8.0, 8, 60, 40]])
    instances = [Instances((48, 64), gt_boxes=Boxes(x), gt_classes=torch.ones(len(x)).long()) for x in (gt[:0], gt)]
    features, _ = predictions(2)
    stock = SimpleNamespace(num_classes=CLASSES, anchor_matcher=Matcher(thresholds, labels, True))
    expected, _ = RetinaNet.label_anchors(stock, model.anchor_generator(features), instances)
    assert (expected[0] == CLASSES).all()

    monkeypatch.setattr(model, "anchor_matcher", IgnoreBandMatcher(thresholds=thresholds, labels=labels))
    found = model.label_anchors(Anchors.from_generator(model.anchor_generator, features), instances).labels
    found = torch.cat([level.permute(0, 2, 3, 1).flatten(1) for level in found], dim=1)  # (N, R)
    assert found.equal(torch.stack(expected))


def predictions(num_images, shift=-2.0, device="cpu"):
    """Features, and a head's outputs for them, of images of 48×64."""
    features = [torch.zeros(num_images, 8, h, w, device=device) for h, w in LEVELS]
    logits = [(torch.randn(num_images, 6 * CLASSES, h, w) * 2 + shift).to(device) for h, w in LEVELS]
    deltas = [(torch.randn(num_images, 6 * 4, h, w) * 0.2).to(device) for h, w in LEVELS]
    return features, (logits, deltas)


def detect(model, features, outputs):
    count = len(features[0])
    images = ImageList(torch.zeros(count, 3, 48, 64), [(48, 64)] * count)
    return model.forward_inference(images, features, outputs)


def assert_same(a, b):
    assert a.pred_classes.equal(b.pred_classes)
    torch.testing.assert_close(a.scores, b.scores)
    torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor)


def test_images_together_are_as_one_by_one(model):
    features, (logits, deltas) = predictions(4)
    for level in logits:
        level[1] -= 1000  # one without detections
        level[2] -= 3  # one with few
    together = detect(model, features, (logits, deltas))
    assert [len(x) == 0 for x in together] == [False, True, False, False]
    for i, expected in enumerate(together):
        one = [x[i : i + 1] for x in features], tuple([x[i : i + 1] for x in part] for part in (logits, deltas))
        assert_same(detect(model, *one)[0], expected)


def test_the_memory_format_does_not_matter(model):
    features, outputs = predictions(2)
    last = tuple([x.contiguous(memory_format=torch.channels_last) for x in part] for part in outputs)
    for a, b in zip(detect(model, features, outputs), detect(model, features, last)):
        assert_same(a, b)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:FutureWarning")
def test_traced_as_detectron2s_are(model, monkeypatch):
    """On images of other sizes, with more and with fewer candidates than the one of the trace."""
    monkeypatch.setattr(model, "max_detections_per_image", 10**6)
    monkeypatch.setattr(model, "test_score_thresh", 0.01)
    small, large = torch.rand(3, 64, 96) * 255, torch.rand(3, 96, 128) * 255
    with torch.no_grad():
        monkeypatch.setattr(model.head.cls_score.weight, "data", torch.randn(6 * CLASSES, 8, 3, 3) * 0.02)
        numbers = set()
        for example in (small, large):
            adapter = TracingAdapter(model, [{"image": example}])
            traced = torch.jit.trace(adapter, (example,))
            for image in (small, large, small * 0.5, large * 0.1):
                found, expected = adapter.outputs_schema(traced(image)), model([{"image": image}])
                assert_same(found[0]["instances"], expected[0]["instances"])
                numbers.add(len(expected[0]["instances"]))
    assert len(numbers) == 4


@pytest.mark.parametrize("clip", [False, True])
def test_boxes_clipped_before_nms(clip):
    """Two boxes of which little is common, but all that is in the image."""
    boxes = torch.tensor([[-80.0, 10, 10, 30], [-10, 10, 10, 30], [60, 40, 90, 90], [60, 40, 70, 50]])
    scores, classes = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.zeros(4, dtype=torch.int64)
    found = suppress((48, 64), boxes, scores, classes, iou_thresh=0.5, max_detections=100, clip=clip)
    expected = torch.tensor([[0.0, 10, 10, 30], [60, 40, 64, 48]]) if clip else boxes
    assert found.pred_boxes.tensor.equal(expected)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.05, 0.999999, 1.0])
def test_every_detection_is_above_the_threshold(model, monkeypatch, threshold):
    monkeypatch.setattr(model, "test_score_thresh", threshold)
    monkeypatch.setattr(model, "max_detections_per_image", 10**6)
    monkeypatch.setattr(model, "test_nms_thresh", 1.0)  # so that everything stays
    features, (logits, deltas) = predictions(2)
    found = detect(model, features, (logits, deltas))
    for i, instances in enumerate(found):
        scores = torch.cat([x[i].flatten() for x in logits]).sigmoid()
        expected = scores[scores > threshold].sort(descending=True).values
        torch.testing.assert_close(instances.scores, expected)


@pytest.mark.parametrize("count", [0, 1, 5, 1000])
@pytest.mark.parametrize("floor", [-math.inf, 0.0, 1.0, math.inf])
def test_top(count, floor):
    values = torch.randn(3, 40)
    values[1] -= 100
    best, indices = top(values, count, floor)
    assert best.shape == indices.shape
    for row, largest, where in zip(values, best, indices):
        expected = row[row > floor].sort(descending=True).values[:count]
        assert largest[: len(expected)].equal(expected)
        assert (largest[len(expected) :] == -math.inf).all()
        assert row[where[: len(expected)]].equal(expected)


def test_nothing_is_copied_to_the_device_before_nms(model, monkeypatch):
    """Which a GPU would have to be waited for."""
    _, outputs = predictions(2)
    anchors = [torch.rand(h * w * 6, 4) for h, w in LEVELS]
    monkeypatch.setattr(torch, "tensor", None)
    for level in zip(*outputs, anchors):
        best_of_level(*level, **CHOICE)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_before_nms(model):
    _, outputs = predictions(2, device="cuda")
    anchors = [torch.rand(h * w * 6, 4, device="cuda") for h, w in LEVELS]
    torch.cuda.set_sync_debug_mode("error")
    try:
        best = [best_of_level(*level, **CHOICE) for level in zip(*outputs, anchors)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(logits.shape == classes.shape for logits, classes, _, _ in best)
