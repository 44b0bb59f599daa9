"""FocalRetinaNet is Detectron2's RetinaNet: the same parameters, losses, gradients and detections from one config."""

import copy

import pytest
import torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.backbone import build_backbone
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import focal_plugin
from focal_plugin import FocalRetinaNetHead, add_focal_config

R50 = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
R101 = "COCO-Detection/retinanet_R_101_FPN_3x.yaml"
CASES = {
    "R50": (R50, []),
    "R101": (R101, []),
    "smooth L1": (R50, ["MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 0.1]),
    "GIoU": (R50, ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "giou"]),
    "DIoU": (R50, ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "diou"]),
    "CIoU": (R50, ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "ciou"]),
    "GN head": (R50, ["MODEL.RETINANET.NORM", "GN"]),
    "BN head": (R50, ["MODEL.RETINANET.NORM", "BN"]),
    "one class": (R50, ["MODEL.RETINANET.NUM_CLASSES", 1]),
    "offset": (R50, ["MODEL.ANCHOR_GENERATOR.OFFSET", 0.5]),
    "gamma 0": (R50, ["MODEL.RETINANET.FOCAL_LOSS_GAMMA", 0.0, "MODEL.RETINANET.FOCAL_LOSS_ALPHA", 0.75]),
    "gamma 5, no alpha": (R50, ["MODEL.RETINANET.FOCAL_LOSS_GAMMA", 5.0, "MODEL.RETINANET.FOCAL_LOSS_ALPHA", -1.0]),
    "no ignore band": (R50, ["MODEL.RETINANET.IOU_THRESHOLDS", [0.5], "MODEL.RETINANET.IOU_LABELS", [0, 1]]),
    "regression weights": (R50, ["MODEL.RETINANET.BBOX_REG_WEIGHTS", (10.0, 10.0, 5.0, 5.0)]),
}


def stock_config(path, opts=()):
    cfg = model_zoo.get_config(path)
    add_focal_config(cfg)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *opts])
    return cfg


def build(cfg, meta_architecture):
    cfg = cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = meta_architecture
    return META_ARCH_REGISTRY.get(meta_architecture)(cfg)


def pair(cfg):
    """Detectron2's model and ours with the same weights, such as give logits and deltas of a trained model's size."""
    torch.manual_seed(0)
    theirs = build(cfg, "RetinaNet")
    for name, buffer in theirs.named_buffers():  # else each residual block doubles the variance
        if name.endswith("conv3.norm.weight"):
            buffer.fill_(0.1)
    for module in theirs.head.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.nn.init.constant_(theirs.head.cls_score.bias, -3.0)
    with torch.no_grad():
        features = theirs.backbone(theirs.eval().preprocess_image(batch(1)).tensor)
        logits, deltas = theirs.head([features[name] for name in theirs.head_in_features])
        theirs.head.cls_score.weight *= 2 / torch.cat([x.flatten() for x in logits]).std()
        theirs.head.bbox_pred.weight *= 0.3 / torch.cat([x.flatten() for x in deltas]).std()
    ours = build(cfg, "FocalRetinaNet")
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert missing == ["normalizer.mean"]
    assert not unexpected
    return theirs, ours


def batch(num_classes):
    """Three images of different sizes: many boxes, none, and one that no anchor matches well."""
    generator = torch.Generator().manual_seed(1)
    inputs = []
    for (height, width), count in [((96, 128), 12), ((128, 96), 0), ((64, 112), 1)]:
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width - 40, height - 40])
        size = 6 + torch.rand(count, 2, generator=generator) * torch.tensor([width - 60, height - 40])
        boxes = Boxes(torch.cat([corner, corner + size], dim=1))
        boxes.clip((height, width))
        if count == 1:
            boxes = Boxes(torch.tensor([[3.0, 3.0, 9.0, 60.0]]))
        classes = torch.randint(num_classes, (count,), generator=generator)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        instances = Instances((height, width), gt_boxes=boxes, gt_classes=classes)
        inputs.append({"image": image, "instances": instances, "height": height * 2, "width": width * 2})
    return inputs


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "_"))
def models(request):
    path, opts = CASES[request.param]
    return pair(stock_config(path, opts))


def test_parameters_have_the_same_names_and_shapes(models):
    theirs, ours = ({name: value.shape for name, value in model.state_dict().items()} for model in models)
    assert ours.pop("normalizer.mean") == ()
    assert list(ours) == list(theirs)
    assert ours == theirs


def test_losses_and_gradients(models):
    theirs, ours = (copy.deepcopy(model).train() for model in models)
    inputs = batch(theirs.num_classes)
    for _ in range(2):  # the second step sees the normaliser that the first one moved
        losses = []
        for model in (theirs, ours):
            model.zero_grad()
            with EventStorage() as storage:
                losses.append(model(copy.deepcopy(inputs)))
                losses[-1]["num_pos"] = storage.latest()["num_pos_anchors"][0]
            (losses[-1]["loss_cls"] + losses[-1]["loss_box_reg"]).backward()
        assert list(losses[1]) == list(losses[0])
        assert losses[1]["num_pos"] == losses[0]["num_pos"] > 0
        for name in ("loss_cls", "loss_box_reg"):
            torch.testing.assert_close(losses[1][name], losses[0][name], rtol=1e-5, atol=0)
    # A bias before batch norm has no gradient but rounding, which is to be small beside the others' gradients.
    rounding = 1e-7 * max(p.grad.abs().max().item() for p in theirs.parameters() if p.grad is not None)
    for (name, expected), actual in zip(theirs.named_parameters(), ours.parameters()):
        if expected.grad is None:
            assert actual.grad is None, name
            continue
        atol = max(1e-4 * expected.grad.abs().max().item(), rounding)
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=atol, msg=name)


def test_detections(models):
    theirs, ours = (copy.deepcopy(model).eval() for model in models)
    inputs = batch(theirs.num_classes)
    with torch.no_grad():
        for expected, actual in zip(theirs(inputs), ours(inputs)):
            expected, actual = expected["instances"], actual["instances"]
            assert len(expected) > 5  # else this test would see nothing
            assert actual.image_size == expected.image_size
            torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=1e-6)
            assert actual.pred_classes.equal(expected.pred_classes)
            torch.testing.assert_close(actual.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("norm", ["", "GN", "BN"])
def test_one_seed_gives_the_same_initial_head(norm):
    cfg = stock_config(R50, ["MODEL.RETINANET.NORM", norm, "MODEL.RETINANET.NUM_CLASSES", 3])
    heads = []
    for name in ("RetinaNet", "FocalRetinaNet"):
        torch.manual_seed(7)
        heads.append(build(cfg, name).head.state_dict())
    assert list(heads[0]) == list(heads[1])
    for name, expected in heads[0].items():
        assert heads[1][name].equal(expected), name


def test_stock_retinanet_takes_the_head():
    cfg = stock_config(R50)
    backbone = build_backbone(cfg)
    shapes = [backbone.output_shape()[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
    model = RetinaNet(cfg, backbone=backbone, head=FocalRetinaNetHead(cfg, shapes)).train()
    with EventStorage():
        losses = model(batch(80))
    assert all(loss.isfinite() for loss in losses.values())


def test_stock_retinanet_takes_the_matcher():
    cfg = stock_config(R50)
    theirs, _ = pair(cfg)
    ours = copy.deepcopy(theirs)
    ours.anchor_matcher = focal_plugin.IgnoreBandMatcher(cfg)
    inputs = batch(80)
    results = []
    for model in (theirs, ours):
        with EventStorage():
            results.append(model.train()(copy.deepcopy(inputs)))
    assert results[0] == results[1]


@pytest.mark.parametrize("source, target", [("RetinaNet", "FocalRetinaNet"), ("FocalRetinaNet", "RetinaNet")])
def test_checkpoints_load_into_the_other(source, target, tmp_path):
    cfg = stock_config(R50, ["MODEL.RETINANET.NUM_CLASSES", 2])
    saved, loaded = build(cfg, source), build(cfg, target)
    DetectionCheckpointer(saved, str(tmp_path)).save("model")
    incompatible = DetectionCheckpointer(loaded).load(str(tmp_path / "model.pth"))
    expected = saved.state_dict()
    for name, value in loaded.state_dict().items():
        if name != "normalizer.mean":
            assert value.equal(expected[name]), name
    assert not isinstance(incompatible, tuple) or not any(incompatible)
