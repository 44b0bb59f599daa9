import logging

import pytest
import timm
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from focal_plugin import add_focal_config
from focal_plugin.backbones import TimmEncoder

# timm's own for tests: batch norm with its activation inside; batch norm without; layer norm, first stride 4, renamed
# modules; features as (N, H, W, C).
NAMES = ["test_efficientnet", "test_resnet", "test_convnext", "test_mambaout"]


def images(size=64, channels=3, seed=0):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(seed))


def reference(encoder, name):
    """timm's own encoder of all features, with the weights of ours, by stride."""
    theirs = timm.create_model(name, features_only=True).eval()
    missing = theirs.load_state_dict(encoder.net.state_dict(), strict=False)
    assert not missing.unexpected_keys
    return theirs, theirs.feature_info.reduction()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("out_features", [["c3", "c4", "c5"], ["c2", "c3"], ["c4"]])
def test_features_are_timms(name, out_features):
    encoder = TimmEncoder(name, out_features=out_features).eval()
    theirs, strides = reference(encoder, name)
    with torch.no_grad():
        found, expected = encoder(images()), dict(zip(strides, theirs(images())))
    assert list(found) == list(encoder.output_shape()) == out_features
    for feature, tensor in found.items():
        stride = 2 ** int(feature[1])
        of_timm = expected[stride].permute(0, 3, 1, 2) if name == "test_mambaout" else expected[stride]
        torch.testing.assert_close(tensor, of_timm)
        shape = encoder.output_shape()[feature]
        assert tensor.shape == (2, shape.channels, 64 // stride, 64 // stride) and shape.stride == stride


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_computed_in_vain(name):
    encoder = TimmEncoder(name, out_features=["c3", "c4"], norm="BN")
    sum(feature.sum() for feature in encoder(images()).values()).backward()
    assert [n for n, parameter in encoder.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("freeze_at", [0, 1, 2, 3, 5])
def test_freeze_at_is_what_the_features_of_that_stride_depend_on(name, freeze_at):
    encoder = TimmEncoder(name, norm="BN", freeze_at=freeze_at)
    theirs, strides = reference(encoder, name)
    expected = set()
    for stride, feature in zip(strides, theirs(images())):
        if stride <= 2**freeze_at and freeze_at:
            theirs.zero_grad()
            feature.square().sum().backward(retain_graph=True)
            expected |= {n for n, parameter in theirs.named_parameters() if parameter.grad is not None}
    assert {n for n, parameter in encoder.net.named_parameters() if not parameter.requires_grad} == expected


def test_further_parameters_are_frozen_by_name():
    encoder = TimmEncoder("test_efficientnet", norm="BN", freeze=["*.conv_dw.weight", "conv_stem.*"])
    frozen = {n for n, parameter in encoder.net.named_parameters() if not parameter.requires_grad}
    assert "conv_stem.weight" in frozen and any("conv_dw" in n for n in frozen)
    assert frozen == {n for n, _ in encoder.net.named_parameters() if "conv_dw.w" in n or n.startswith("conv_stem.")}
    with pytest.raises(ValueError, match=r"MODEL\.FOCAL\.TIMM\.FREEZE: .* no parameter like 'conv_dw'"):
        TimmEncoder("test_efficientnet", freeze=["conv_dw"])


def statistics(encoder):
    return {n: b.clone() for n, b in encoder.named_buffers() if "running" in n}


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])
def test_frozen_batch_norm_stays_as_it_is_and_keeps_its_activation(name):
    encoder = TimmEncoder(name, out_features=["c1", "c3"])
    for norm in encoder.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    before = statistics(encoder)
    theirs, strides = reference(encoder, name)
    found, expected = encoder.train()(images()), dict(zip(strides, theirs(images())))
    for feature, stride in {"c1": 2, "c3": 8}.items():
        torch.testing.assert_close(found[feature], expected[stride])
    assert all(torch.equal(value, before[n]) for n, value in statistics(encoder).items())
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and not any(p.requires_grad for norm in norms for p in norm.parameters())
    assert any(p.requires_grad for p in encoder.parameters())


def test_trained_batch_norm_is_trained_but_in_frozen_stages():
    encoder = TimmEncoder("test_resnet", norm="BN", freeze_at=2).train()
    before = statistics(encoder)
    sum(feature.sum() for feature in encoder(images()).values()).backward()
    changed = {n for n, value in statistics(encoder).items() if not torch.equal(value, before[n])}
    assert changed == {n for n in before if "layer2" in n or "layer3" in n or "layer4" in n}
    assert encoder.net.layer2[0].bn1.weight.grad is not None


def test_synchronised_batch_norm_keeps_its_activation():
    encoder = TimmEncoder("test_efficientnet", norm="SyncBN").eval()
    norms = [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(module, nn.SyncBatchNorm) for module in norms)
    theirs, strides = reference(encoder, "test_efficientnet")
    with torch.no_grad():
        torch.testing.assert_close(encoder(images())["c3"], dict(zip(strides, theirs(images())))[8])


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(channels):
    assert TimmEncoder("test_resnet", in_channels=channels)(images(channels=channels))["c3"].shape[2:] == (8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "test_resnot"}, r"MODEL\.FOCAL\.TIMM\.NAME is 'test_resnot'.*test_resnet"),
        ({"out_features": ["res3", "res4"]}, r"no feature res3, res4; it has c1 \(stride 2\).*MODEL\.FPN\.IN_FEATURES"),
        ({"out_features": []}, r"none was named.*MODEL\.FPN\.IN_FEATURES"),
        ({"name": "test_vit"}, r"no feature c3, c5; it has c4 \(stride 16\)"),
        ({"name": "test_convnext", "out_features": ["c1"]}, r"no feature c1; it has c2 \(stride 4\)"),
        ({"norm": "GN"}, r"MODEL\.FOCAL\.TIMM\.NORM .* is 'GN'; expected one of FrozenBN, BN, SyncBN"),
        ({"name": "mvitv2_tiny", "freeze_at": 2}, r"MODEL\.BACKBONE\.FREEZE_AT"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TimmEncoder(**{"name": "test_resnet", **arguments})


def config(**timm_keys):
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "FocalRetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.FPN.IN_FEATURES = ["c3", "c4", "c5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    cfg.MODEL.RETINANET.NUM_CLASSES = 2
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
    cfg.merge_from_list(
        [
            v
            for k, v in {"NAME": "test_resnet", "WEIGHTS": "", "NORM": "BN", **timm_keys}.items()
            for v in (f"MODEL.FOCAL.TIMM.{k}", v)
        ]
    )
    return cfg


@pytest.mark.parametrize(
    ("top_block", "in_features", "levels"),
    [
        ("c5", ["c3", "c4", "c5"], [3, 4, 5, 6, 7]),
        ("p5", ["c3", "c4", "c5"], [3, 4, 5, 6, 7]),
        ("", ["c3", "c4", "c5"], [3, 4, 5]),
        ("p4", ["c2", "c3", "c4"], [2, 3, 4, 5, 6]),
    ],
)
def test_the_pyramids_levels(top_block, in_features, levels):
    cfg = config()
    cfg.MODEL.FOCAL.TOP_BLOCK = top_block
    cfg.MODEL.FPN.IN_FEATURES = in_features
    backbone = build_backbone(cfg)
    expected = {f"p{level}": (2, 16, 128 >> level, 128 >> level) for level in levels}
    assert {name: tuple(feature.shape) for name, feature in backbone(images(128)).items()} == expected
    assert {name: (shape.channels, shape.stride) for name, shape in backbone.output_shape().items()} == {
        f"p{level}": (16, 2**level) for level in levels
    }
    assert backbone.size_divisibility == 2 ** int(in_features[-1][1])


def test_the_config_reaches_the_encoder():
    cfg = config(NAME="test_efficientnet", FREEZE=["*.conv_dw.weight"])
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    encoder = build_backbone(cfg, ShapeSpec(channels=1)).bottom_up
    same = TimmEncoder("test_efficientnet", in_channels=1, norm="BN", freeze_at=2, freeze=["*.conv_dw.weight"])
    assert {n: (p.shape, p.requires_grad) for n, p in encoder.named_parameters()} == {
        n: (p.shape, p.requires_grad) for n, p in same.named_parameters()
    }
    assert len(encoder._frozen_norms) == len(same._frozen_norms) > 0


def test_a_detector_on_it_trains_and_its_checkpoint_loads():
    torch.manual_seed(0)
    cfg = config()
    model, copy = build_model(cfg), build_model(cfg)
    instances = Instances((64, 64), gt_boxes=Boxes([[8.0, 8, 40, 40]]), gt_classes=torch.tensor([1]))
    batch = [{"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8), "instances": instances}]
    with EventStorage():
        losses = model.train()(batch)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.backbone.parameters())
    assert any(p.grad.abs().sum() > 0 for p in model.backbone.bottom_up.parameters())
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected, found = model.eval().backbone(images()), copy.eval().backbone(images())
    assert all(torch.equal(found[level], expected[level]) for level in expected)


def messages(cfg, caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING, "focal_plugin"):
        build_backbone(cfg)
    return [record.getMessage() for record in caplog.records if record.name.startswith("focal_plugin")]


def test_a_warning_where_images_are_not_as_the_weights_expect(caplog, tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    cfg = config(WEIGHTS=str(tmp_path / "weights.pth"))
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [127.5] * 3, [127.5] * 3
    assert messages(cfg, caplog) == []
    cfg.INPUT.FORMAT = "BGR"
    (message,) = messages(cfg, caplog)
    assert "INPUT.FORMAT RGB" in message and "127.5" in message
    cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_STD = "RGB", [1.0] * 3
    assert len(messages(cfg, caplog)) == 1


def test_a_warning_where_random_layers_are_frozen(caplog):
    assert messages(config(), caplog) == []
    (message,) = messages(config(NORM="FrozenBN"), caplog)
    assert "MODEL.BACKBONE.FREEZE_AT 0" in message
    cfg = config(NORM="FrozenBN")
    cfg.MODEL.WEIGHTS = "a/checkpoint.pth"  # which will bring them
    assert messages(cfg, caplog) == []
