"""FocalFCOS against Detectron2's FCOS, and its class loss against the formula."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.fcos import FCOS
from torch.nn import functional as F

from focal_plugin import CLS_LOSS_REGISTRY, ConfigError, EMANumPositives, FocalFCOS, SigmoidFocalLoss

RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


@pytest.fixture
def config(small_config):
    """By config alone: a stock RetinaNet's and one name."""
    return lambda *opts: small_config(RETINANET, "MODEL.META_ARCHITECTURE", "FocalFCOS", *opts)


def detectron2s(model: FocalFCOS) -> FCOS:
    """Detectron2's, of the same modules."""
    stock = FCOS(
        backbone=model.backbone,
        head=model.head,
        head_in_features=model.head_in_features,
        num_classes=model.num_classes,
        test_score_thresh=model.test_score_thresh,
        test_nms_thresh=model.test_nms_thresh,
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
    )
    stock.pixel_mean, stock.pixel_std = model.pixel_mean, model.pixel_std
    return stock


def spread(model):
    """Weights with which scores and boxes differ, as a trained model's do."""
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.1)
    torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.1)
    torch.nn.init.constant_(model.head.bbox_pred.bias, 2.0)
    return model


def gradients(model, losses):
    model.zero_grad()
    sum(losses.values()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.head.named_parameters()}


@pytest.mark.parametrize("counts", [[3, 5], [0, 2], [0, 0]], ids=str)
@pytest.mark.parametrize("num_classes", [1, 2])
def test_with_the_focal_loss_it_is_detectron2s(config, draw_images, counts, num_classes):
    model = spread(build_model(config("MODEL.RETINANET.NUM_CLASSES", num_classes)))
    model.normalizer = EMANumPositives(initial=300)
    stock, images = detectron2s(model), draw_images(counts, num_classes)
    for _ in range(2):  # the running normaliser too
        expected, losses = stock(images), model(images)
        assert losses.keys() == expected.keys()
        for name, loss in losses.items():
            torch.testing.assert_close(loss, expected[name], rtol=1e-5, atol=1e-6)
    expected, found = gradients(model, expected), gradients(model, losses)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_inference_is_detectron2s(config, draw_images):
    words = ["MODEL.RETINANET.SCORE_THRESH_TEST", 0.02, "MODEL.RETINANET.NMS_THRESH_TEST", 0.4]
    model, images = spread(build_model(config(*words))), draw_images([0, 0])
    for found, expected in zip(model.eval()(images), detectron2s(model).eval()(images), strict=True):
        found, expected = found["instances"], expected["instances"]
        assert len(found) > 3 and found.pred_classes.equal(expected.pred_classes)
        torch.testing.assert_close(found.scores, expected.scores)
        torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_bce_is_over_all_locations(config, draw_images):
    words = ["MODEL.FOCAL.CLS_LOSS.NAME", "BCELoss", "MODEL.FOCAL.CLS_LOSS.WEIGHT", 3.0]
    model, images = spread(build_model(config(*words, "MODEL.FOCAL.NORMALIZER", "num_fg"))), draw_images([3, 0])
    features = model.backbone(model.preprocess_image(images).tensor)
    features = [features[name] for name in model.head_in_features]
    logits = torch.cat([x.flatten(2).transpose(1, 2) for x in model.head(features)[0]], dim=1)  # (N, R, K)
    labels, _ = model.label_anchors(model.anchor_generator(features), [image["instances"] for image in images])
    labels = torch.stack(labels)
    target = F.one_hot(labels, 3)[..., :2].float()
    loss = 3 * F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / (labels < 2).sum()
    torch.testing.assert_close(model(images)["loss_fcos_cls"], loss)


@pytest.mark.parametrize("name", sorted(name for name, _ in CLS_LOSS_REGISTRY))
def test_every_class_loss(config, draw_images, name):
    model = spread(build_model(config("MODEL.FOCAL.CLS_LOSS.NAME", name)))
    losses = model(draw_images([3, 0]))
    sum(losses.values()).backward()
    assert losses["loss_fcos_cls"] > 0 and model.head.cls_score.weight.grad.abs().sum() > 0


def test_errors(config, small_config):
    with pytest.raises(ConfigError, match=r"MODEL\.FOCAL\.CLS_LOSS\.NAME is 'Foo'"):
        build_model(config("MODEL.FOCAL.CLS_LOSS.NAME", "Foo"))
    with pytest.raises(ConfigError, match="add_focal_config"):
        build_model(small_config(RETINANET, "MODEL.META_ARCHITECTURE", "FocalFCOS", focal=False))
    with pytest.raises(TypeError, match=r"no focal_loss_alpha and no focal_loss_gamma.*cls_loss"):
        FocalFCOS(cls_loss=SigmoidFocalLoss(), normalizer=None, focal_loss_gamma=2.0, focal_loss_alpha=0.25)
