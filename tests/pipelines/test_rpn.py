"""FocalRPN against Detectron2's RPN without its sampling, and the losses against their formulas."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN, build_proposal_generator
from detectron2.structures import Boxes, ImageList, pairwise_iou
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from focal_plugin import CLS_LOSS_REGISTRY, ATSSMatcher, ConfigError, FocalRPN, IgnoreBandMatcher, PriorBiasInit
from focal_plugin.losses.functional import quality_focal_loss

RPN_CONFIG = "COCO-Detection/rpn_R_50_FPN_1x.yaml"
SHAPES = {f"p{level}": ShapeSpec(channels=16, stride=2**level) for level in range(2, 7)}


class Unsampled(RPN):
    """Detectron2's RPN, which learns from every anchor that is not ignored."""

    def _subsample_labels(self, label):
        return label


@pytest.fixture
def pair(small_config):
    """Detectron2's, without sampling, and ours with the same weights, for which objects are not all the same."""

    def build(*opts):
        cfg = small_config(RPN_CONFIG, *opts)
        theirs = Unsampled(cfg, SHAPES)
        torch.nn.init.normal_(theirs.rpn_head.objectness_logits.weight, std=0.3)
        torch.nn.init.normal_(theirs.rpn_head.anchor_deltas.weight, std=0.1)
        ours = build_proposal_generator(with_focal_rpn(cfg), SHAPES)
        missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
        assert set(missing) <= {"normalizer.mean"} and not unexpected
        return theirs, ours

    return build


def with_focal_rpn(cfg):
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "FocalRPN"
    return cfg


def inputs(images):
    """What a meta-architecture calls RPN with: images, features, boxes."""
    features = {
        name: torch.randn(len(images), 16, math.ceil(64 / s.stride), math.ceil(96 / s.stride))
        for name, s in SHAPES.items()
    }
    batch = ImageList(torch.zeros(len(images), 3, 64, 96), [(64, 96)] * len(images))
    return batch, features, [image["instances"] for image in images]


def flat_logits(rpn, features):
    """(N, R), in the order of Detectron2's anchors."""
    logits, _ = rpn.rpn_head(list(features.values()))
    return torch.cat([level.permute(0, 2, 3, 1).flatten(1) for level in logits], dim=1)


def expected_labels(rpn, features, gt_instances):
    """Detectron2's labels (N, R), boxes (N, R, 4) and anchors (R, 4), without sampling."""
    anchors = rpn.anchor_generator(list(features.values()))
    labels, boxes = rpn.label_and_sample_anchors(anchors, gt_instances)
    return torch.stack(labels), torch.stack(boxes), torch.cat([level.tensor for level in anchors])


@pytest.mark.parametrize("counts", [[3, 5], [0, 4], [0, 0], [1]], ids=str)
@pytest.mark.parametrize("opts", [[], ["MODEL.RPN.BOUNDARY_THRESH", 0]], ids=["", "inside the image"])
def test_bce_is_detectron2s_over_all_anchors(pair, draw_images, counts, opts):
    theirs, ours = pair(*opts, "MODEL.FOCAL.CLS_LOSS.NAME", "BCELoss", "MODEL.FOCAL.NORMALIZER", "num_fg")
    batch = inputs(draw_images(counts))
    expected_proposals, expected = theirs(*batch)
    proposals, losses = ours(*batch)
    labels, _, _ = expected_labels(theirs, *batch[1:])
    kept = labels >= 0
    by_hand = F.binary_cross_entropy_with_logits(
        flat_logits(theirs, batch[1])[kept], labels[kept].float(), reduction="sum"
    )
    torch.testing.assert_close(losses["loss_rpn_cls"], by_hand / max(int((labels == 1).sum()), 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses["loss_rpn_loc"], expected["loss_rpn_loc"])
    assert_same_proposals(proposals, expected_proposals)
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())
    if opts:
        assert (labels == -1).sum() > 100  # it did leave anchors out


def test_a_class_loss_that_is_no_number(pair, draw_images):
    _, ours = pair()
    del ours.cls_loss  # a module, which takes no function's place
    ours.cls_loss = lambda logits, targets: logits[0].flatten()
    with pytest.raises(TypeError, match=r"The class loss <lambda> gave torch.float32 of shape .*; expected one number"):
        ours(*inputs(draw_images([2])))


def assert_same_proposals(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
        torch.testing.assert_close(a.objectness_logits, b.objectness_logits)


def test_inference_is_detectron2s(pair, draw_images):
    theirs, ours = pair()
    batch = inputs(draw_images([2, 2]))
    proposals, losses = ours.eval()(*batch[:2])
    expected, _ = theirs.eval()(*batch[:2])
    assert losses == {} and len(proposals[0]) == 40
    assert_same_proposals(proposals, expected)


@pytest.mark.parametrize("alpha", [0.25, -1.0])
def test_focal_loss_is_torchvisions(pair, draw_images, alpha):
    words = [
        "MODEL.RETINANET.FOCAL_LOSS_ALPHA",
        alpha,
        "MODEL.RPN.LOSS_WEIGHT",
        3.0,
        "MODEL.FOCAL.CLS_LOSS.WEIGHT",
        0.5,
    ]
    theirs, ours = pair(*words)
    batch = inputs(draw_images([3, 0]))
    labels, _, _ = expected_labels(theirs, *batch[1:])
    kept = labels >= 0
    loss = sigmoid_focal_loss(flat_logits(theirs, batch[1])[kept], labels[kept].float(), alpha, 2.0, reduction="sum")
    normalizer = 0.9 * 100 + 0.1 * int((labels == 1).sum())  # the running mean after one batch
    torch.testing.assert_close(ours(*batch)[1]["loss_rpn_cls"], 1.5 * loss / normalizer, rtol=1e-5, atol=1e-6)


def test_quality_is_that_of_the_decoded_boxes(pair, draw_images):
    theirs, ours = pair("MODEL.FOCAL.CLS_LOSS.NAME", "QualityFocalLoss", "MODEL.FOCAL.NORMALIZER", "num_fg")
    batch = inputs(draw_images([3, 2]))
    labels, boxes, anchors = expected_labels(theirs, *batch[1:])
    _, deltas = theirs.rpn_head(list(batch[1].values()))
    deltas = torch.cat([x.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in deltas], dim=1)
    soft = torch.zeros(labels.shape)
    for image, row in (labels == 1).nonzero().tolist():
        box = theirs.box2box_transform.apply_deltas(deltas[image, row][None], anchors[row][None])
        soft[image, row] = pairwise_iou(Boxes(box), Boxes(boxes[image, row][None]))
    kept = labels >= 0
    loss = quality_focal_loss(flat_logits(theirs, batch[1])[kept], soft[kept], 2.0).sum()
    assert soft.max() > 0.1
    torch.testing.assert_close(ours(*batch)[1]["loss_rpn_cls"], loss / (labels == 1).sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(name for name, _ in CLS_LOSS_REGISTRY))
def test_every_class_loss(small_config, draw_images, name):
    cfg = with_focal_rpn(small_config(RPN_CONFIG, "MODEL.FOCAL.CLS_LOSS.NAME", name))
    rpn = build_proposal_generator(cfg, SHAPES)
    _, losses = rpn(*inputs(draw_images([3, 0])))
    losses["loss_rpn_cls"].backward()
    assert losses["loss_rpn_cls"] > 0 and rpn.rpn_head.objectness_logits.weight.grad.abs().sum() > 0


def test_the_matcher_is_the_registrys_with_the_thresholds_of_rpn(small_config):
    own = ["MODEL.RPN.IOU_THRESHOLDS", [0.2, 0.6], "MODEL.RPN.IOU_LABELS", [0, -1, 1]]
    rpn = FocalRPN(small_config(RPN_CONFIG, *own, "MODEL.FOCAL.MATCHER.LOW_QUALITY", "none"), SHAPES)
    assert isinstance(rpn.anchor_matcher, IgnoreBandMatcher)
    assert (rpn.anchor_matcher.thresholds, rpn.anchor_matcher.labels) == ([0.2, 0.6], [0, -1, 1])
    assert rpn.anchor_matcher.low_quality == "none"
    rpn = FocalRPN(small_config(RPN_CONFIG, "MODEL.FOCAL.MATCHER.NAME", "ATSSMatcher"), SHAPES)
    assert isinstance(rpn.anchor_matcher, ATSSMatcher)


def test_atss_sees_the_grid(small_config, draw_images, storage):
    rpn = FocalRPN(small_config(RPN_CONFIG, "MODEL.FOCAL.MATCHER.NAME", "ATSSMatcher"), SHAPES)
    _, losses = rpn(*inputs(draw_images([3])))
    assert torch.isfinite(sum(losses.values()))
    assert storage.latest()["rpn/num_pos_anchors"][0] > 0


def test_the_prior(small_config):
    prior = small_config(RPN_CONFIG, "MODEL.RETINANET.PRIOR_PROB", 0.02)
    assert FocalRPN(prior, SHAPES).rpn_head.objectness_logits.bias.sigmoid().tolist() == pytest.approx([0.02] * 3)
    zero = small_config(RPN_CONFIG, "MODEL.FOCAL.BIAS_INIT.NAME", "ZeroBiasInit")
    assert FocalRPN(zero, SHAPES).rpn_head.objectness_logits.bias.tolist() == [0] * 3


def test_numbers_of_the_classes_are_not_of_objects(small_config):
    words = ["MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA", [0.1, 0.2], "MODEL.FOCAL.BIAS_INIT.NAME", "ClassFrequencyBiasInit"]
    rpn = FocalRPN(small_config(RPN_CONFIG, *words, "MODEL.FOCAL.CLASS_FREQUENCIES", [1, 9]), SHAPES)
    assert rpn.cls_loss.alpha == 0.25
    assert rpn.rpn_head.objectness_logits.bias.sigmoid().tolist() == pytest.approx([0.01] * 3)


def test_errors(small_config):
    with pytest.raises(ConfigError, match=r"MODEL\.FOCAL\.CLS_LOSS\.NAME is 'Foo'.*BCELoss"):
        FocalRPN(small_config(RPN_CONFIG, "MODEL.FOCAL.CLS_LOSS.NAME", "Foo"), SHAPES)
    with pytest.raises(ConfigError, match="add_focal_config"):
        FocalRPN(small_config(RPN_CONFIG, focal=False), SHAPES)
    with pytest.raises(ValueError, match="ascending") as error:
        FocalRPN(small_config(RPN_CONFIG, "MODEL.RPN.IOU_THRESHOLDS", [0.7, 0.3]), SHAPES)
    assert any("MODEL.RPN.IOU_THRESHOLDS" in note for note in error.value.__notes__)
    cfg = small_config(RPN_CONFIG)
    with pytest.raises(TypeError, match=r"IgnoreBandMatcher\(thresholds"):
        FocalRPN(cfg, SHAPES, anchor_matcher=Matcher([0.3, 0.7], [0, -1, 1]))
    with pytest.raises(ValueError, match=r"HEAD_NAME.*Identity.*objectness_logits"):
        FocalRPN(cfg, SHAPES, head=torch.nn.Identity(), bias_init=PriorBiasInit())
    with pytest.raises(ValueError, match=r"MODEL\.ANCHOR_GENERATOR\.NAME.*RotatedAnchorGenerator.*RRPN"):
        FocalRPN(small_config(RPN_CONFIG, "MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator"), SHAPES)
    with pytest.raises(AssertionError, match="gt_instances"):
        FocalRPN(cfg, SHAPES)(*inputs([])[:2])
