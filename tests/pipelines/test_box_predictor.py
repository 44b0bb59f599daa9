"""FocalBoxPredictor against fvcore's and torchvision's losses, Detectron2's predictor, and detections by hand."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from fvcore.nn import sigmoid_focal_loss
from torch.nn import functional as F
from torchvision.ops import batched_nms, box_iou

from focal_plugin import (
    CLS_LOSS_REGISTRY,
    ConfigError,
    FocalBoxPredictor,
    NumPositives,
    OHEMLoss,
    PriorBiasInit,
    QualityFocalLoss,
    SigmoidFocalLoss,
)
from focal_plugin.losses.functional import quality_focal_loss

FASTER = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
CHANNELS = 8
# Sampled proposals of each image; an image of 0 boxes has only background.
BATCHES = {
    "two images": [(9, 2), (5, 3)],
    "an image without boxes": [(6, 0), (7, 2)],
    "no boxes": [(4, 0)],
    "an image without proposals": [(0, 0), (6, 2)],
    "no proposals": [(0, 0), (0, 0)],
}


def build(num_classes=3, agnostic=False, **kwargs):
    args = {
        "box2box_transform": Box2BoxTransform(weights=(10, 10, 5, 5)),
        "cls_loss": SigmoidFocalLoss(),
        "normalizer": NumPositives(),
        "bias_init": PriorBiasInit(),
        **kwargs,
    }
    predictor = FocalBoxPredictor(
        ShapeSpec(channels=CHANNELS), num_classes=num_classes, cls_agnostic_bbox_reg=agnostic, **args
    )
    torch.nn.init.normal_(predictor.cls_score.weight)  # so that the scores and boxes differ
    torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.3)
    return predictor


def draw_boxes(count):
    corners = torch.rand(count, 2) * 50
    return torch.cat([corners, corners + 4 + torch.rand(count, 2) * 40], dim=1)


def draw(counts, num_classes=3):
    """Proposals as ``ROIHeads`` gives them, some ignored, and the features of all of them."""
    proposals = []
    for count, num_boxes in counts:
        image = Instances((100, 120), proposal_boxes=Boxes(draw_boxes(count)))
        image.gt_classes = torch.full((count,), num_classes)
        if num_boxes:
            image.gt_classes = torch.randint(-1, num_classes + 1, (count,))
            image.gt_classes[0] = num_classes - 1  # at least one
            image.gt_boxes = Boxes(draw_boxes(count))
        proposals.append(image)
    return torch.randn(sum(count for count, _ in counts), CHANNELS), proposals


def onehot(gt_classes, num_classes):
    return F.one_hot(gt_classes.clamp(min=0), num_classes + 1)[:, :num_classes].float()


@pytest.mark.parametrize("counts", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("agnostic", [False, True], ids=["per class", "agnostic"])
def test_losses(counts, num_classes, agnostic):
    predictor = build(num_classes, agnostic, loss_weight={"loss_cls": 0.5, "loss_box_reg": 2.0})
    stock = FastRCNNOutputLayers(
        ShapeSpec(channels=CHANNELS),
        box2box_transform=predictor.box2box_transform,
        num_classes=num_classes,
        cls_agnostic_bbox_reg=agnostic,
    )
    features, proposals = draw(counts, num_classes)
    logits, deltas = predictor(features)
    assert logits.shape == (len(features), num_classes)
    assert deltas.shape == (len(features), 4 if agnostic else 4 * num_classes)
    losses = predictor.losses((logits, deltas), proposals)

    gt_classes = torch.cat([image.gt_classes for image in proposals])
    kept = gt_classes >= 0
    expected = sigmoid_focal_loss(
        logits[kept], onehot(gt_classes[kept], num_classes), alpha=0.25, gamma=2.0, reduction="sum"
    )
    num_positives = int((kept & (gt_classes < num_classes)).sum())
    torch.testing.assert_close(losses["loss_cls"], 0.5 * expected / max(num_positives, 1), rtol=1e-5, atol=1e-6)
    expected = stock.box_reg_loss(
        torch.cat([image.proposal_boxes.tensor for image in proposals]),
        torch.cat([image.gt_boxes.tensor if image.has("gt_boxes") else draw_boxes(len(image)) for image in proposals]),
        deltas,
        gt_classes,
    )
    torch.testing.assert_close(losses["loss_box_reg"], 2.0 * expected)
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in predictor.parameters())
    assert predictor.cls_score.weight.grad.isfinite().all()


def test_a_class_loss_that_is_no_number():
    predictor = build(cls_loss=lambda logits, targets: logits[0].flatten())
    features, proposals = draw([(5, 2)])
    with pytest.raises(TypeError, match=r"The class loss <lambda> gave torch.float32 of shape .*; expected one number"):
        predictor.losses(predictor(features), proposals)


def test_no_images():
    losses = build().losses((torch.zeros(0, 3), torch.zeros(0, 12)), [])
    assert all(loss == 0 for loss in losses.values())


@pytest.mark.parametrize("agnostic", [False, True], ids=["per class", "agnostic"])
def test_quality_is_that_of_the_box_of_the_true_class(agnostic):
    predictor = build(3, agnostic, cls_loss=QualityFocalLoss(beta=2.0))
    features, proposals = draw(BATCHES["two images"])
    for image in proposals:  # boxes not far from the truth
        image.gt_boxes = Boxes(image.proposal_boxes.tensor + 1.5)
    logits, deltas = predictor(features)
    gt_classes = torch.cat([image.gt_classes for image in proposals])
    target = onehot(gt_classes, 3)
    anchors = torch.cat([image.proposal_boxes.tensor for image in proposals])
    truth = torch.cat([image.gt_boxes.tensor for image in proposals])
    for row in ((gt_classes >= 0) & (gt_classes < 3)).nonzero().squeeze(1).tolist():
        k = 0 if agnostic else int(gt_classes[row])
        box = predictor.box2box_transform.apply_deltas(deltas[row : row + 1, 4 * k : 4 * k + 4], anchors[row : row + 1])
        target[row, gt_classes[row]] = box_iou(box, truth[row : row + 1])[0, 0]
    assert target.max() > 0.3
    kept, positive = gt_classes >= 0, (gt_classes >= 0) & (gt_classes < 3)
    expected = quality_focal_loss(logits[kept], target[kept], 2.0).sum() / positive.sum()
    torch.testing.assert_close(predictor.losses((logits, deltas), proposals)["loss_cls"], expected)


def test_hard_examples_are_mined_in_each_image():
    predictor = build(3, cls_loss=OHEMLoss(batch_size_per_image=1))
    features, proposals = draw(BATCHES["two images"])
    logits, deltas = predictor(features)
    hardest, num_positives = 0, 0
    for rows, image in zip(logits.split([len(image) for image in proposals]), proposals):
        kept = image.gt_classes >= 0
        losses = F.binary_cross_entropy_with_logits(rows[kept], onehot(image.gt_classes[kept], 3), reduction="none")
        hardest = hardest + losses.sum(dim=1).max()
        num_positives += int((kept & (image.gt_classes < 3)).sum())
    found = predictor.losses((logits, deltas), proposals)["loss_cls"]
    torch.testing.assert_close(found, hardest / num_positives)


@pytest.mark.parametrize("name", sorted(name for name, _ in CLS_LOSS_REGISTRY))
@pytest.mark.parametrize("counts", [BATCHES["an image without boxes"], BATCHES["no proposals"]], ids=["some", "none"])
def test_every_class_loss(small_config, name, counts):
    predictor = FocalBoxPredictor(
        small_config(FASTER, "MODEL.FOCAL.CLS_LOSS.NAME", name, "MODEL.ROI_HEADS.NUM_CLASSES", 3),
        ShapeSpec(channels=CHANNELS),
    )
    features, proposals = draw(counts)
    losses = predictor.losses(predictor(features), proposals)
    sum(losses.values()).backward()
    assert (losses["loss_cls"] > 0) == (len(features) > 0)
    assert predictor.cls_score.weight.grad.isfinite().all()


@pytest.mark.parametrize("agnostic", [False, True], ids=["per class", "agnostic"])
@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_inference_is_sigmoid_and_nms(agnostic, num_classes, threshold):
    predictor = build(num_classes, agnostic, test_score_thresh=threshold, test_topk_per_image=8)
    features, proposals = draw([(12, 0), (0, 0), (5, 0)], num_classes)
    logits, deltas = predictor(features)
    found, kept = predictor.inference((logits, deltas), proposals)
    start = 0
    for image, result, rows in zip(proposals, found, kept, strict=True):
        part = slice(start, start := start + len(image))
        boxes = predictor.box2box_transform.apply_deltas(deltas[part], image.proposal_boxes.tensor)
        boxes = boxes.view(len(image), deltas.shape[1] // 4, 4).expand(-1, num_classes, -1).clone()
        boxes[..., 0::2] = boxes[..., 0::2].clamp(0, 120)
        boxes[..., 1::2] = boxes[..., 1::2].clamp(0, 100)
        row, cls = (logits[part].sigmoid() > threshold).nonzero(as_tuple=True)
        scores = logits[part].sigmoid()[row, cls]
        best = batched_nms(boxes[row, cls], scores, cls, 0.5)[:8]
        torch.testing.assert_close(result.pred_boxes.tensor, boxes[row, cls][best])
        torch.testing.assert_close(result.scores, scores[best])
        assert result.pred_classes.equal(cls[best]) and rows.equal(row[best])


def test_accuracy_is_logged(storage):
    # Right, taken for another class, missed, missed, background taken for it: of two classes.
    logits = torch.tensor([[3.0, -1.0], [2.0, 1.0], [-1.0, -2.0], [-1.0, -2.0], [-3.0, -3.0]])
    boxes = Boxes(draw_boxes(5))
    proposals = Instances((10, 10), proposal_boxes=boxes, gt_boxes=boxes, gt_classes=torch.tensor([0, 1, 1, 0, 2]))
    build(2).losses((logits, torch.zeros(5, 8)), [proposals])
    latest = {name: value for name, (value, _) in storage.latest().items()}
    assert latest["fast_rcnn/cls_accuracy"] == pytest.approx(2 / 5)
    assert latest["fast_rcnn/fg_cls_accuracy"] == pytest.approx(1 / 4)
    assert latest["fast_rcnn/false_negative"] == pytest.approx(2 / 4)


def test_config(small_config):
    words = ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True, "MODEL.FOCAL.CLS_LOSS.WEIGHT", 0.5]
    words += ["MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA", [0.2, 0.4], "MODEL.RETINANET.PRIOR_PROB", 0.02]
    predictor = FocalBoxPredictor(small_config(FASTER, *words), ShapeSpec(channels=CHANNELS))
    assert predictor.bbox_pred.out_features == 4
    assert predictor.loss_weight == {"loss_box_reg": 1.0, "loss_cls": 0.5}
    assert predictor.cls_loss.alpha.tolist() == pytest.approx([0.2, 0.4])
    assert predictor.cls_score.bias.sigmoid().tolist() == pytest.approx([0.02] * 2)


def test_errors(small_config):
    shape = ShapeSpec(channels=CHANNELS)
    with pytest.raises(ConfigError, match=r"MODEL\.FOCAL\.CLS_LOSS\.NAME is 'Foo'"):
        FocalBoxPredictor(small_config(FASTER, "MODEL.FOCAL.CLS_LOSS.NAME", "Foo"), shape)
    with pytest.raises(ValueError, match="has 3 numbers") as error:
        FocalBoxPredictor(small_config(FASTER, "MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA", [0.2, 0.4, 0.1]), shape)
    assert any("MODEL.ROI_HEADS.NUM_CLASSES" in note for note in error.value.__notes__)
    with pytest.raises(ValueError, match="USE_FED_LOSS"):
        build(use_fed_loss=True, use_sigmoid_ce=True)
