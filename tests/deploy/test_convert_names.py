"""MMDetection's and Detectron's RetinaNets, and ResNets, by the names and shapes that these projects give them."""

import pickle
import re
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torchvision
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from detectron2.modeling import build_model
from safetensors.torch import save_file
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from focal_plugin.config.load import load_config
from focal_plugin.deploy.convert import ConvertError, convert_detectron1, convert_mmdetection, convert_resnet, write
from focal_plugin.deploy.convert.backbones import BASE
from focal_plugin.deploy.convert.files import Converted
from focal_plugin.engine import AtomicCheckpointer
from tests.deploy.convert_twins import assert_same_detections, lively


def test_a_written_config_is_on_the_shipped_base(tmp_path):
    cfg = load_config(write(Converted({}, BASE), str(tmp_path / "converted.pth"), "nowhere"))
    assert str(tmp_path / "converted.pth") == cfg.MODEL.WEIGHTS
    assert cfg == load_config("Base-FocalRetinaNet.yaml", ["MODEL.WEIGHTS", cfg.MODEL.WEIGHTS])


def load(converted, tmp_path, source):
    cfg = load_config(write(converted, str(tmp_path / "converted.pth"), source), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg).eval()
    AtomicCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


# MMDetection, built of torchvision's parts


class ExactAnchors(AnchorGenerator):
    """MMDetection's anchors are not rounded."""

    def generate_anchors(self, scales, ratios, dtype=torch.float32, device=None):
        root = torch.tensor(ratios).sqrt()[:, None]
        w, h = (1 / root * torch.tensor(scales)).flatten(), (root * torch.tensor(scales)).flatten()
        return torch.stack([-w, -h, w, h], dim=1) / 2


class LinearLevels(ExtraFPNBlock):
    """Its P6 is made from C5, and P7 from P6 without a ReLU."""

    def __init__(self):
        super().__init__()
        self.p6, self.p7 = nn.Conv2d(512, 256, 3, 2, 1), nn.Conv2d(256, 256, 3, 2, 1)

    def forward(self, results, features, names):
        p6 = self.p6(features[-1])
        return [*results, p6, self.p7(p6)], [*names, "p6", "p7"]


def mmdetection(norm_layer=None):
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LinearLevels(),
    )
    sizes = tuple(tuple(4 * stride * 2 ** (i / 3) for i in range(3)) for stride in (8, 16, 32, 64, 128))
    anchors = ExactAnchors(sizes, ((0.5, 1.0, 2.0),) * 5)
    head = RetinaNetHead(256, 9, 5, norm_layer=norm_layer)
    return RetinaNet(
        backbone, 5, anchor_generator=anchors, head=head, detections_per_img=100, min_size=128, max_size=1333
    )


def mmdetection_name(name):
    for theirs, new in [
        (r"backbone\.body\.", "backbone."),
        (r"backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
        (r"backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
        (r"backbone\.fpn\.extra_blocks\.p6\.", "neck.fpn_convs.3.conv."),
        (r"backbone\.fpn\.extra_blocks\.p7\.", "neck.fpn_convs.4.conv."),
        (r"head\.classification_head\.conv\.(\d)\.0\.", r"bbox_head.cls_convs.\1.conv."),
        (r"head\.classification_head\.conv\.(\d)\.1\.", r"bbox_head.cls_convs.\1.gn."),
        (r"head\.regression_head\.conv\.(\d)\.0\.", r"bbox_head.reg_convs.\1.conv."),
        (r"head\.regression_head\.conv\.(\d)\.1\.", r"bbox_head.reg_convs.\1.gn."),
        (r"head\.classification_head\.cls_logits\.", "bbox_head.retina_cls."),
        (r"head\.regression_head\.bbox_reg\.", "bbox_head.retina_reg."),
    ]:
        name = re.sub(f"^{theirs}", new, name)
    return name


@pytest.mark.parametrize("norm_layer", [None, partial(nn.GroupNorm, 32)], ids=["", "GN"])
def test_mmdetection(norm_layer, tmp_path):
    theirs = lively(mmdetection(norm_layer))
    state = {mmdetection_name(name): value for name, value in theirs.state_dict().items()}
    meta = {"cfg": "model = dict(backbone=dict(depth=18, style='pytorch'))", "mmdet_version": "2.25.0"}
    torch.save({"state_dict": state, "meta": meta, "optimizer": {}}, tmp_path / "theirs.pth")
    ours = load(convert_mmdetection(str(tmp_path / "theirs.pth")), tmp_path, "mmdetection")
    assert_same_detections(theirs, ours, [torch.randint(0, 256, (3, 128, 256)).float()])


def test_mmdetection_with_the_buffers_of_its_ema_hook(tmp_path):
    state = {mmdetection_name(name): value for name, value in mmdetection().state_dict().items()}
    raw = {f"ema_{name.replace('.', '_')}": torch.zeros_like(value) for name, value in state.items()}
    found = {}
    for name, weights in (("plain", state), ("ema", state | raw)):
        torch.save({"state_dict": weights}, tmp_path / f"{name}.pth")
        found[name] = convert_mmdetection(str(tmp_path / f"{name}.pth"), style="pytorch")
    plain, ema = found["plain"], found["ema"]
    assert plain.weights.keys() == ema.weights.keys()
    assert all(torch.equal(value, ema.weights[name]) for name, value in plain.weights.items())
    (note,) = set(ema.notes) - set(plain.notes)
    assert f"{len(raw)} buffers ema_*" in note
    torch.save({"state_dict": state | raw | {"ema_other_weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(ConvertError, match=r"1 of the .* weights are of no known part.*\n  ema_other_weight$"):
        convert_mmdetection(str(tmp_path / "other.pth"), style="pytorch")


def test_the_style_of_mmdetection(tmp_path):
    path = str(tmp_path / "theirs.pth")
    state = {mmdetection_name(name): value for name, value in mmdetection().state_dict().items()}
    torch.save({"state_dict": state, "meta": {}}, path)
    with pytest.raises(ConvertError, match="--style pytorch"):
        convert_mmdetection(path)
    caffe = convert_mmdetection(path, style="caffe").cfg
    assert (caffe.INPUT.FORMAT, caffe.MODEL.RESNETS.STRIDE_IN_1X1) == ("BGR", True)
    assert caffe.MODEL.PIXEL_MEAN == [103.53, 116.28, 123.675]
    assert caffe.MODEL.PIXEL_STD == [1, 1, 1]
    pytorch = convert_mmdetection(path, style="pytorch").cfg
    assert (pytorch.INPUT.FORMAT, pytorch.MODEL.RESNETS.STRIDE_IN_1X1) == ("RGB", False)
    torch.save({"state_dict": state | {"bbox_head.atss_centerness.bias": torch.zeros(9)}, "meta": {}}, path)
    with pytest.raises(ConvertError, match=r"1 of the .*\n  bbox_head\.atss_centerness\.bias"):
        convert_mmdetection(path, style="pytorch")


# Detectron


def detectron1_blobs():
    """Those of retinanet_R-50-FPN: each filled with its own number."""
    shapes = {"conv1_w": (64, 3, 7, 7), "res_conv1_bn_s": (64,), "res_conv1_bn_b": (64,)}
    c_in = 64
    for stage, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3)):
        mid, out = 16 * 2**stage, 64 * 2**stage
        for block in range(blocks):
            convs = {"2a": (mid, c_in, 1, 1), "2b": (mid, mid, 3, 3), "2c": (out, mid, 1, 1)}
            convs |= {"1": (out, c_in, 1, 1)} if block == 0 else {}
            for branch, shape in convs.items():
                name = f"res{stage}_{block}_branch{branch}"
                shapes |= {f"{name}_w": shape, f"{name}_bn_s": shape[:1], f"{name}_bn_b": shape[:1]}
            c_in = out
    convs = {"fpn_inner_res5_2_sum": (256, 2048, 1, 1), "fpn_6": (256, 2048, 3, 3), "fpn_7": (256, 256, 3, 3)}
    convs |= {"fpn_inner_res4_5_sum_lateral": (256, 1024, 1, 1), "fpn_inner_res3_3_sum_lateral": (256, 512, 1, 1)}
    convs |= {f"fpn_res{name}_sum": (256, 256, 3, 3) for name in ("5_2", "4_5", "3_3")}
    convs |= {f"retnet_{kind}_conv_n{i}_fpn3": (256, 256, 3, 3) for kind in ("cls", "bbox") for i in range(4)}
    convs |= {"retnet_cls_pred_fpn3": (720, 256, 3, 3), "retnet_bbox_pred_fpn3": (36, 256, 3, 3)}
    for name, shape in convs.items():
        shapes |= {f"{name}_w": shape, f"{name}_b": shape[:1]}
    return {name: np.full(shape, i + 1, np.float32) for i, (name, shape) in enumerate(shapes.items())}


def test_detectron1(tmp_path):
    blobs, path = detectron1_blobs(), tmp_path / "theirs.pkl"
    others = {"conv1_w_momentum": np.zeros(3, np.float32), "__preserve__/fc1000_w": np.zeros((1000, 2048), np.float32)}
    path.write_bytes(pickle.dumps({"blobs": blobs | others, "cfg": "MODEL: {}"}))
    converted = convert_detectron1(str(path))  # which compares all names and shapes with the model's
    values = {name: float(value.flatten()[0]) for name, value in converted.weights.items()}

    tensors = {name: torch.tensor(value.flatten()[:1]) for name, value in blobs.items()}
    known, _ = convert_c2_detectron_names(tensors)  # Detectron2 knows the names of all but RetinaNet's own
    for name, value in known.items():
        if not name.startswith(("retnet", "fpn.")):
            prefix = "backbone." if name.startswith("fpn_") else "backbone.bottom_up."
            assert values[prefix + name] == pytest.approx(float(value), rel=1e-4)
    own = {"backbone.top_block.p6": "fpn_6", "backbone.top_block.p7": "fpn_7"}
    own |= {
        f"head.{kind}_subnet.{2 * i}": f"retnet_{kind}_conv_n{i}_fpn3" for kind in ("cls", "bbox") for i in range(4)
    }
    own |= {"head.cls_score": "retnet_cls_pred_fpn3", "head.bbox_pred": "retnet_bbox_pred_fpn3"}
    for name, blob in own.items():
        assert values[f"{name}.weight"] == blobs[f"{blob}_w"].flatten()[0]
        assert values[f"{name}.bias"] == blobs[f"{blob}_b"].flatten()[0]
    cfg = converted.cfg
    assert (cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.STRIDE_IN_1X1, cfg.INPUT.FORMAT) == (50, True, "BGR")
    assert cfg.MODEL.PIXEL_MEAN == [102.9801, 115.9465, 122.7717]

    path.write_bytes(pickle.dumps({"blobs": blobs | {"mask_fcn_logits_w": np.zeros(3)}}))
    with pytest.raises(ConvertError, match=r"no known part.*\n  mask_fcn_logits_w"):
        convert_detectron1(str(path))


# Backbones


def features_of(model, x):
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = stage(x)
        yield x


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_a_resnet_of_torchvision(name, tmp_path):
    theirs = getattr(torchvision.models, name)(weights=None).eval()
    for norm in theirs.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(1, 2)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours = load(convert_resnet(str(tmp_path / "theirs.pth")), tmp_path, "resnet")
    x = torch.rand(1, 3, 64, 96)
    found = ours.backbone.bottom_up(x)
    for feature, expected in zip(("res3", "res4", "res5"), list(features_of(theirs, x))[1:], strict=True):
        torch.testing.assert_close(found[feature], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_a_resnet_of_timm(tmp_path):
    theirs = timm.create_model("resnet34").eval()
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    converted = convert_resnet(str(tmp_path / "theirs.safetensors"))
    assert converted.cfg.MODEL.RESNETS.DEPTH == 34
    ours = load(converted, tmp_path, "resnet")
    x = torch.rand(1, 3, 64, 64)
    expected = list(features_of(_with_torchvisions_names(theirs), x))[-1]
    torch.testing.assert_close(ours.backbone.bottom_up(x)["res5"], expected, rtol=1e-4, atol=1e-4)


def _with_torchvisions_names(model):
    model.relu = model.act1
    return model


@pytest.mark.parametrize(
    "name, message",
    [
        ("resnet50d", "three convolutions in its stem.*build_timm_fpn_backbone"),
        ("resnet26", r"\(2, 2, 2, 2\) bottlenecks"),
        ("seresnet18", r"layer1\.0\.se\.fc1\.weight"),
    ],
)
def test_a_resnet_that_detectron2_does_not_have(name, message, tmp_path):
    torch.save(timm.create_model(name).state_dict(), tmp_path / "theirs.pth")
    with pytest.raises(ConvertError, match=f"(?s){message}"):
        convert_resnet(str(tmp_path / "theirs.pth"))
