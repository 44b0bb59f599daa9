"""torchvision's RetinaNets and what they are converted to see the same."""

import re

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.models._meta import _COCO_CATEGORIES
from torchvision.models.detection import RetinaNet, retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from focal_plugin.config.load import load_config
from focal_plugin.deploy.convert import ConvertError, convert_torchvision, write
from focal_plugin.engine import AtomicCheckpointer
from tests.deploy.convert_twins import assert_same_detections, lively

SIZES = [(128, 160), (192, 128)]  # the shorter side is what torchvision makes of it: nothing is resized


def resnet18(num_classes, norm=nn.BatchNorm2d):
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=norm,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    return RetinaNet(backbone, num_classes, min_size=128, max_size=1333)


def make(build, num_classes):
    return build(weights=None, weights_backbone=None, num_classes=num_classes, min_size=128)


MODELS = {
    "v1": (lambda: make(retinanet_resnet50_fpn, 91), {"classes": "all"}),
    "v2": (lambda: make(retinanet_resnet50_fpn_v2, 7), {}),
    "resnet18": (lambda: resnet18(5), {}),
}


def load(converted, tmp_path, *opts):
    """The model of the files as a user has it."""
    config = write(converted, str(tmp_path / "converted.pth"), "torchvision")
    cfg = load_config(config, ["MODEL.DEVICE", "cpu", *opts])
    model = build_model(cfg).eval()
    AtomicCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * (x != "v2")) for x in MODELS])
def test_the_converted_twin_detects_the_same(name, tmp_path):
    build, options = MODELS[name]
    theirs = lively(build())
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours = load(convert_torchvision(str(tmp_path / "theirs.pth"), **options), tmp_path)
    images = [torch.randint(0, 256, (3, *size)).float() for size in SIZES]
    assert_same_detections(theirs, ours, images[:1])
    assert_same_detections(theirs, ours, images)


@pytest.mark.slow
@torch.no_grad()
def test_the_shipped_config_of_v2_is_torchvisions_model(tmp_path):
    """Its weights load and give the same logits and deltas; COCO's 80 classes of 91 rows."""
    theirs = lively(make(retinanet_resnet50_fpn_v2, 91))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    converted = convert_torchvision(str(tmp_path / "theirs.pth"))
    cfg = load_config("COCO-Detection/focal_retinanet_R_50_FPN_v2.yaml", ["MODEL.DEVICE", "cpu"])
    ours = build_model(cfg).eval()
    found = ours.load_state_dict(converted.weights, strict=False)
    assert not found.unexpected_keys and all("normalizer" in name or "tracked" in name for name in found.missing_keys)
    ours, theirs, image = ours.double(), theirs.double(), torch.randint(0, 256, (3, 128, 160)).double()
    images, _ = theirs.transform([image / 255])
    expected = theirs.head(list(theirs.backbone(images.tensors).values()))  # (N, R, classes), (N, R, 4)
    features = ours.backbone(ours.preprocess_image([{"image": image}]).tensor)
    logits, deltas = ours.head([features[name] for name in ours.head_in_features])
    ids = [_COCO_CATEGORIES.index(name) for name in MetadataCatalog.get("coco_2017_val").thing_classes]
    for maps, rows in ((logits, expected["cls_logits"][..., ids]), (deltas, expected["bbox_regression"])):
        # (N, sizes · ratios · C, H, W) → (N, H · W · ratios · sizes, C)
        levels = [level.unflatten(1, (3, 3, -1)).permute(0, 4, 5, 2, 1, 3).flatten(1, 4) for level in maps]
        torch.testing.assert_close(torch.cat(levels, dim=1), rows, rtol=1e-5, atol=1e-5)
    for part, other in (("ANCHOR_GENERATOR", set()), ("RETINANET", set()), ("FPN", set()), ("RESNETS", {"NORM"})):
        one, two = cfg.MODEL[part], converted.cfg.MODEL[part]
        assert {key for key in one if one[key] != two[key]} == other  # SyncBN, and BN


def test_the_converted_twin_has_the_same_losses(tmp_path):
    """Of one image: torchvision divides by the positives of each, as ``num_fg`` does."""
    theirs = lively(resnet18(5))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours = load(convert_torchvision(str(tmp_path / "theirs.pth")), tmp_path, "MODEL.FOCAL.NORMALIZER", "num_fg").train()
    theirs.train()
    for norm in theirs.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    image = torch.randint(0, 256, (3, 128, 160)).float()
    boxes, classes = torch.tensor([[5.0, 9, 40, 60], [70, 30, 158, 120], [20, 0, 31, 13]]), torch.tensor([1, 4, 1])
    expected = theirs([image / 255], [{"boxes": boxes, "labels": classes}])
    instances = Instances((128, 160), gt_boxes=Boxes(boxes), gt_classes=classes)
    with EventStorage():
        found = ours([{"image": image, "instances": instances}])
    assert found["loss_cls"].item() == pytest.approx(expected["classification"].item(), rel=1e-4)
    assert found["loss_box_reg"].item() == pytest.approx(expected["bbox_regression"].item(), rel=1e-4)


@torch.no_grad()
def test_frozen_norms_without_epsilon(tmp_path):
    """As torchvision's own COCO weights: their file does not tell, but that the norms are frozen and the rows 91."""
    theirs = resnet18(91, FrozenBatchNorm2d).eval()
    overwrite_eps(theirs, 0.0)
    for norm in theirs.modules():
        if isinstance(norm, FrozenBatchNorm2d):  # variances where Detectron2's ε of 1e-5 would matter
            norm.running_var.uniform_(5e-6, 2e-5)
            norm.weight.uniform_(1e-3, 3e-3)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    image = torch.rand(1, 3, 64, 96)
    expected = torch.cat([level.flatten() for level in theirs.backbone(image).values()])
    errors = []
    for eps in (None, 1e-5):
        converted = convert_torchvision(str(tmp_path / "theirs.pth"), norm_eps=eps)
        ours = build_model(converted.cfg).eval()
        ours.load_state_dict(converted.weights, strict=False)
        found = torch.cat([level.flatten() for level in ours.backbone(image).values()])
        errors.append(float((found - expected).abs().max() / expected.abs().max()))
    assert errors[0] < 1e-5 < 1e-2 < errors[1]


def test_coco_classes_of_91_rows(tmp_path):
    theirs = resnet18(91)
    nn.init.normal_(theirs.head.classification_head.cls_logits.bias)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    converted = convert_torchvision(str(tmp_path / "theirs.pth"))
    assert converted.cfg.MODEL.RETINANET.NUM_CLASSES == 80
    assert converted.cfg.DATASETS.TEST == ("coco_2017_val",)
    rows = theirs.head.classification_head.cls_logits.bias.view(3, 3, 91)  # (ratios, sizes, ids)
    ours = converted.weights["head.cls_score.bias"].view(3, 3, 80)  # (sizes, ratios, classes)
    for k, name in enumerate(MetadataCatalog.get("coco_2017_val").thing_classes):
        assert torch.equal(ours[:, :, k], rows[:, :, _COCO_CATEGORIES.index(name)].t())


def test_names_of_old_files(tmp_path):
    """Before 0.14 the pyramid's and the subnets' convs stood one level higher."""
    state = resnet18(5).state_dict()
    old = {}
    for name, value in state.items():
        name = re.sub(r"(inner_blocks|layer_blocks)\.(\d)\.0", r"\1.\2", name)
        name = re.sub(r"(_head)\.conv\.(\d)\.0", lambda m: f"{m[1]}.conv.{2 * int(m[2])}", name)
        old[name] = value
    assert len(set(old) - set(state)) == 12 + 16
    torch.save({"model": state}, tmp_path / "new.pth")
    torch.save({f"module.{name}": value for name, value in old.items()}, tmp_path / "old.pth")
    new, old = (convert_torchvision(str(tmp_path / name)) for name in ("new.pth", "old.pth"))
    assert list(new.weights) == list(old.weights)
    assert all(torch.equal(value, old.weights[name]) for name, value in new.weights.items())
    assert new.settings == old.settings


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s | {"head.extra.weight": torch.zeros(1)}, r"1 of .* no known part.*\n  head\.extra\.weight"),
        (lambda s: {k: v for k, v in s.items() if "p7" not in k}, r"backbone\.top_block\.p7\.weight is missing"),
        (
            lambda s: {k: v for k, v in s.items() if "cls_logits" not in k},
            r"head\.cls_score\.bias: this is no RetinaNet",
        ),
        (
            lambda s: s | {"backbone.body.conv1.weight": torch.zeros(64, 3, 3, 3)},
            r"stem\.conv1\.weight is \(64, 3, 3, 3\)",
        ),
        (lambda s: s | {"head.regression_head.bbox_reg.bias": torch.zeros(12)}, r"has 12 deltas and 45 logits"),
        (lambda s: {k: v for k, v in s.items() if "layer4.1" not in k}, r"has \(2, 2, 2, 1\) blocks of two"),
    ],
)
def test_what_does_not_fit_is_listed(change, message, tmp_path):
    torch.save(change(resnet18(5).state_dict()), tmp_path / "theirs.pth")
    with pytest.raises(ConvertError, match=message):
        convert_torchvision(str(tmp_path / "theirs.pth"))


def test_coco_needs_91_rows(tmp_path):
    torch.save(resnet18(5).state_dict(), tmp_path / "theirs.pth")
    with pytest.raises(ConvertError, match="the classifier has 5 rows; expected 91"):
        convert_torchvision(str(tmp_path / "theirs.pth"), classes="coco")
