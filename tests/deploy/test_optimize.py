import copy
import pickle

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

from focal_plugin import FocalRetinaNet, add_focal_config
from focal_plugin.commands.train import evaluate
from focal_plugin.config.load import load_config
from focal_plugin.deploy import fast_dtype, optimize_for_inference
from focal_plugin.engine import Trainer
from focal_plugin.layers.frozen_norm import FrozenNormConv2d

DENSE = ("FocalRetinaNet", "RetinaNet")


def small_model(architecture, norm="FrozenBN"):
    """An R18 with norms that do something, and a classifier that is sure of some things and not of others."""
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.NORM = 18, 64, norm
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    if architecture in DENSE:
        cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[size, size * 1.5] for size in (16, 32, 64, 128, 256)]
        cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CONVS = 3, 1
    else:
        cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
        cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_HEADS.IN_FEATURES = "StandardROIHeads", ["p2", "p3", "p4", "p5"]
        cfg.MODEL.ROI_BOX_HEAD.NAME, cfg.MODEL.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", 1
        cfg.MODEL.ROI_BOX_HEAD.FC_DIM, cfg.MODEL.ROI_HEADS.NUM_CLASSES = 16, 3
        cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION, cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 7, 0.1
    torch.manual_seed(0)
    model = build_model(cfg)
    for module in model.modules():
        if isinstance(module, (FrozenBatchNorm2d, nn.BatchNorm2d)):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.8, 1.2)
            module.weight.data.uniform_(0.6, 0.9)
            module.bias.data.normal_(std=0.1)
    if architecture in DENSE:
        for module in model.head.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.normal_(model.head.bbox_pred.weight, std=0.01)
        nn.init.constant_(model.head.cls_score.bias, -3.0)
    return model.eval()


def images():
    generator = torch.Generator().manual_seed(0)
    sizes = [(96, 128), (128, 96), (64, 64)]
    return [{"image": torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)} for size in sizes]


@torch.no_grad()
def detect(model):
    return [result["instances"] for result in model(images())]


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN"])
@pytest.mark.parametrize("architecture", [*DENSE, "GeneralizedRCNN"])
def test_float32_gives_the_same_boxes_in_the_same_order(architecture, norm):
    model = small_model(architecture, norm)
    before = copy.deepcopy(model.state_dict())
    optimized = optimize_for_inference(model, torch.float32)
    found = 0
    for expected, actual in zip(detect(model), detect(optimized), strict=True):
        assert actual.pred_classes.equal(expected.pred_classes)
        torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(actual.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-4, atol=1e-2)
        found += len(expected)
    assert found > 5  # else this test would see nothing
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("norm, left", [("FrozenBN", 0), ("BN", 0), ("GN", 20)])
def test_norms_are_folded_weights_lie_channels_last_and_nothing_is_trained(norm, left):
    optimized = optimize_for_inference(small_model("FocalRetinaNet", norm), torch.float32)
    convs = [module for module in optimized.modules() if isinstance(module, nn.Conv2d)]
    assert sum(getattr(conv, "norm", None) is not None for conv in convs) == left
    assert not any(type(conv) is FrozenNormConv2d for conv in convs)
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convs)
    assert not optimized.training
    assert not any(parameter.requires_grad for parameter in optimized.parameters())


@pytest.mark.parametrize("architecture", [*DENSE, "GeneralizedRCNN"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_computes_in_it_and_answers_in_float32(architecture, dtype):
    model = small_model(architecture)
    optimized = optimize_for_inference(model, dtype)
    seen = []
    optimized.backbone.register_forward_hook(
        lambda module, args, output: seen.extend(x.dtype for x in [args[0], *output.values()])
    )
    for expected, actual in zip(detect(model), detect(optimized), strict=True):
        assert actual.scores.dtype == actual.pred_boxes.tensor.dtype == torch.float32
        if architecture in DENSE and len(expected):
            torch.testing.assert_close(actual.scores[:1], expected.scores[:1], rtol=0, atol=0.05)
    assert seen[0] == dtype
    assert {p.dtype for p in optimized.backbone.parameters()} == {dtype}
    assert all(x == (dtype if architecture in DENSE else torch.float32) for x in seen[1:])


@pytest.mark.parametrize("name", ["", "candidates", "forward_inference"])
def test_only_chosen_outputs_become_float32(name):
    """With the same detections. A subclass with detections of its own gets all in float32."""
    model = small_model("FocalRetinaNet")
    seen = []

    def own(self, *args):
        seen.extend(level.dtype for level in (args[-2] if name == "candidates" else args[-1][0]))
        return getattr(FocalRetinaNet, name)(self, *args)

    if name:
        model.__class__ = type("Own", (FocalRetinaNet,), {name: own})
    optimized = optimize_for_inference(model, torch.bfloat16)
    found = detect(optimized)
    assert set(seen) == ({torch.float32} if name else set())
    optimized.head.register_forward_hook(lambda module, args, output: [[x.float() for x in part] for part in output])
    for a, b in zip(found, detect(optimized), strict=True):
        assert a.scores.equal(b.scores) and a.pred_boxes.tensor.equal(b.pred_boxes.tensor) and len(a)


@pytest.mark.slow  # compiles C++
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", [*DENSE, "GeneralizedRCNN"])
def test_compiled_gives_the_same_detections(architecture, dtype):
    model = small_model(architecture)
    plain, compiled = (optimize_for_inference(model, dtype, compile=flag) for flag in (False, True))
    for expected, actual in zip(detect(plain), detect(compiled), strict=True):
        if dtype == torch.float32:
            assert actual.pred_classes.equal(expected.pred_classes)
            torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=1e-4)
            torch.testing.assert_close(actual.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-4, atol=1e-2)
        else:  # NMS decides otherwise here and there
            torch.testing.assert_close(actual.scores[:1], expected.scores[:1], rtol=0, atol=0.05)


def test_the_choice_of_dtype_follows_the_device(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert fast_dtype("cpu") == torch.bfloat16
    assert next(optimize_for_inference(small_model("RetinaNet")).backbone.parameters()).dtype == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert fast_dtype("cpu") == torch.float32
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # a PyTorch that does not tell
    assert fast_dtype("cpu") == torch.float32
    for capability, expected in [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert fast_dtype("cuda") == expected


def test_it_can_be_copied_and_pickled():
    optimized = optimize_for_inference(small_model("FocalRetinaNet"), torch.float32)
    expected = detect(optimized)[0]
    for twin in (copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        assert detect(twin)[0].scores.equal(expected.scores)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="float64"):
        optimize_for_inference(small_model("RetinaNet"), torch.float64)
    without_backbone = nn.Sequential(Conv2d(3, 4, 1, norm=FrozenBatchNorm2d(4)))
    with pytest.raises(ValueError, match="backbone"):
        optimize_for_inference(without_backbone, torch.bfloat16)
    with pytest.raises(ValueError, match="backbone"):
        optimize_for_inference(without_backbone, torch.float32, compile=True)
    assert optimize_for_inference(without_backbone)[0].norm is None


@pytest.mark.parametrize("optimize", [False, True])
def test_eval_only_uses_it_when_asked(optimize, tiny_config, monkeypatch):
    evaluated = []
    monkeypatch.setattr(Trainer, "test", lambda cfg, model: evaluated.append(model) or {})
    monkeypatch.setattr(Trainer, "report", lambda cfg, model, results: evaluated.append(model))
    opts = ["MODEL.DEVICE", "cpu", "MODEL.FOCAL.INFERENCE.OPTIMIZE", optimize]
    evaluate(load_config(tiny_config, opts), resume=False)
    convs = [m for m in evaluated[0].modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(evaluated) == 2 and evaluated[0] is evaluated[1]
    assert all(
        c.weight.is_contiguous(memory_format=torch.channels_last) == optimize for c in convs if c.in_channels > 1
    )
