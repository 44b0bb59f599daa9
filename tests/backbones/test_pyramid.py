from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from focal_plugin import add_focal_config

CONFIGS = Path(__file__).parents[2] / "configs"


def config(top_block="c5", in_features=("res3", "res4", "res5"), encoder="resnet"):
    """A pyramid of 16 channels on a ResNet-18 of Detectron2's or an even smaller one of timm's."""
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.MODEL.BACKBONE.NAME = {"timm": "build_timm_fpn_backbone", "resnet": "build_focal_resnet_fpn_backbone"}[encoder]
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = [name.replace("res", "c") if encoder == "timm" else name for name in in_features]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.FOCAL.TOP_BLOCK = top_block
    cfg.merge_from_list(["MODEL.FOCAL.TIMM.NAME", "test_resnet", "MODEL.FOCAL.TIMM.WEIGHTS", ""])
    cfg.MODEL.FOCAL.TIMM.NORM = "BN"
    return cfg


@torch.no_grad()
@pytest.mark.parametrize("source", ["c5", "p5"])
def test_levels_without_a_relu_between_them(source):
    linear, stock = (build_backbone(config(top_block)) for top_block in (f"{source}-linear", source))
    stock.load_state_dict(linear.state_dict())
    images = torch.randn(1, 3, 128, 128)
    found, expected = linear(images), stock(images)
    assert found["p6"].equal(expected["p6"])
    assert found["p6"].min() < 0
    assert found["p7"].equal(linear.top_block.p7(found["p6"]))
    assert expected["p7"].equal(linear.top_block.p7(found["p6"].relu()))


@pytest.mark.parametrize("encoder", ["resnet", "timm"])
@pytest.mark.parametrize(
    ("top_block", "in_features", "levels"),
    [
        ("c5", ("res3", "res4", "res5"), [3, 4, 5, 6, 7]),
        ("p5", ("res3", "res4", "res5"), [3, 4, 5, 6, 7]),
        ("", ("res3", "res4", "res5"), [3, 4, 5]),
        ("c4", ("res3", "res4"), [3, 4, 5, 6]),
        ("p4", ("res2", "res3", "res4"), [2, 3, 4, 5, 6]),
        ("c5", ("res2", "res3", "res4", "res5"), [2, 3, 4, 5, 6, 7]),
        ("p5", ("res5",), [5, 6, 7]),
    ],
)
def test_the_pyramids_levels(encoder, top_block, in_features, levels):
    """Their names, strides and sizes, and what P6 depends on."""
    backbone = build_backbone(config(top_block, in_features, encoder))
    features = backbone(torch.randn(2, 3, 128, 128))
    assert {name: tuple(x.shape) for name, x in features.items()} == {
        f"p{level}": (2, 16, 128 >> level, 128 >> level) for level in levels
    }
    assert {name: (shape.channels, shape.stride) for name, shape in backbone.output_shape().items()} == {
        f"p{level}": (16, 2**level) for level in levels
    }
    assert backbone.size_divisibility == 2 ** int(in_features[-1][3])
    if top_block:
        features[f"p{levels[-2]}"].sum().backward()
        lateral = getattr(backbone, f"fpn_lateral{in_features[-1][3]}").weight
        assert (lateral.grad is not None) == top_block.startswith("p")
        assert backbone.top_block.p6.weight.grad.abs().sum() > 0


def test_by_default_it_is_detectron2s():
    """Same names, shapes and, from one seed, values; same features."""
    models = []
    for name in ("build_focal_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone"):
        cfg = config()
        cfg.MODEL.BACKBONE.NAME = name
        torch.manual_seed(0)
        models.append(build_backbone(cfg))
    ours, theirs = (model.state_dict() for model in models)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        ours, theirs = (model(x) for model in models)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("encoder", ["resnet", "timm"])
def test_what_p6_cannot_be_made_from(encoder):
    with pytest.raises(ValueError, match=r"MODEL\.FOCAL\.TOP_BLOCK is 'res5'; expected c5 or p5"):
        build_backbone(config("res5", encoder=encoder))
    with pytest.raises(ValueError, match=r"MODEL\.FOCAL\.TOP_BLOCK is 'c5'; expected c4 or p4"):
        build_backbone(config("c5", ("res3", "res4"), encoder=encoder))


def test_features_that_a_resnet_does_not_give():
    cfg = config()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4", "res5"]
    with pytest.raises(ValueError, match=r"MODEL\.FPN\.IN_FEATURES is \['res3', .* expected some of res4, res5"):
        build_backbone(cfg)


def test_a_level_at_stride_4_trains():
    """The shipped config: six levels, and the smallest box gets anchors at P2."""
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.merge_from_file(CONFIGS / "COCO-Detection" / "focal_retinanet_R_50_FPN_P2_1x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    model = build_model(cfg)
    instances = Instances((64, 96), gt_boxes=Boxes([[20.0, 20, 34, 34]]), gt_classes=torch.tensor([1]))
    images = [{"image": torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8), "instances": instances}]
    asked = []
    label = model.label_anchors
    model.label_anchors = lambda *args: asked.append(label(*args)) or asked[-1]
    with EventStorage():
        losses = model.train()(images)
    sum(losses.values()).backward()
    (targets,) = asked
    assert [tuple(labels.shape[-2:]) for labels in targets.labels] == [
        (16, 24), (8, 12), (4, 6), (2, 3), (1, 2), (1, 1)
    ]  # fmt: skip
    assert len(targets.positives[0]) > 0
    assert model.backbone.fpn_lateral2.weight.grad.isfinite().all()
    assert model.backbone.fpn_lateral2.weight.grad.abs().sum() > 0
