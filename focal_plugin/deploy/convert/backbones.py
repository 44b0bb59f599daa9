"""Converts ResNets of torchvision and timm, also inside detectors."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_resnet_backbone
from torch import Tensor

from ...files.safe_yaml import parse_yaml
from ...files.shipped import CONFIGS
from .files import Converted, ConvertError, check_complete, find_weights, merge, read_content
from .names import CLASSIFIER, COUNTERS, rename, resnet_rules

NORM_EPS = 1e-5  # of all norms in Detectron2, and PyTorch's default
RGB = {  # torchvision's statistics of ImageNet, times 255
    "INPUT": {"FORMAT": "RGB"},
    "MODEL": {"PIXEL_MEAN": [123.675, 116.28, 103.53], "PIXEL_STD": [58.395, 57.12, 57.375]},
}

# Depth by the number of blocks in each stage, and whether they are bottlenecks (of three convolutions).
_DEPTHS = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}

_BASE = CONFIGS / "Base-FocalRetinaNet.yaml"
BASE: dict[str, Any] = parse_yaml(_BASE.read_bytes(), str(_BASE))


def convert_resnet(path: str) -> Converted:
    """Convert a ResNet, ResNeXt or wide ResNet of torchvision or timm, for any config with such a backbone.

    Its classifier is dropped.
    """
    weights = find_weights(read_content(path), path)
    if "conv1.0.weight" in weights or any(".downsample.2." in name for name in weights):
        raise ConvertError(
            f"{path} is a ResNet with three convolutions in its stem or pooling in its shortcuts, unlike Detectron2's. "
            "For one of timm's, use MODEL.BACKBONE.NAME build_timm_fpn_backbone; see MODEL.FOCAL.TIMM."
        )
    weights = rename(weights, resnet_rules(), (*COUNTERS, *CLASSIFIER))
    settings = merge(merge(BASE, RGB), {"MODEL": {"RESNETS": resnet_settings(weights)}})
    converted = Converted(weights, settings, heuristics=True)
    cfg = converted.cfg
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    check_complete(weights, build_resnet_backbone(cfg, ShapeSpec(channels=3)))
    converted.notes.append("Pixel mean and deviation are torchvision's; some of timm's models have others.")
    return converted


def resnet_settings(weights: Mapping[str, Tensor], prefix: str = "", stride_in_1x1: bool = False) -> dict[str, Any]:
    """Return the ``MODEL.RESNETS`` of a ResNet.

    Args:
        weights: its weights, by Detectron2's names after ``prefix``.
        prefix: of the names.
        stride_in_1x1: whether the stride is in a bottleneck's first convolution, not in the second.

    Raises:
        ConvertError: Detectron2 has no such ResNet.
    """
    blocks = {match[1] for name in weights if (match := re.match(rf"{re.escape(prefix)}(res\d\.\d+)\.", name))}
    stages = tuple(sum(block.startswith(f"res{n}.") for block in blocks) for n in range(2, 6))
    bottleneck = f"{prefix}res2.0.conv3.weight" in weights
    if (stages, bottleneck) not in _DEPTHS:
        kind = "bottlenecks" if bottleneck else "blocks of two convolutions"
        raise ConvertError(
            f"The ResNet has {stages} {kind} in its stages; expected those of a ResNet-18, -34, -50, -101 or -152."
        )
    settings: dict[str, Any] = {"DEPTH": _DEPTHS[stages, bottleneck], "STRIDE_IN_1X1": stride_in_1x1}
    if not bottleneck:
        return settings | {"RES2_OUT_CHANNELS": 64}
    width, in_channels = weights[f"{prefix}res2.0.conv2.weight"].shape[:2]
    groups = width // in_channels
    return settings | ({"NUM_GROUPS": groups, "WIDTH_PER_GROUP": in_channels} if (groups, width) != (1, 64) else {})


def match_norm_eps(weights: dict[str, Tensor], eps: float) -> dict[str, Tensor]:
    """Scale frozen norms of a given ε so that they compute the same with Detectron2's ε'.

    (x − m) s / √(v + ε) is the same as with ε' and the scale s √(v + ε') / √(v + ε). Norms without statistics, which
    only scale and shift, get m = 0 and v = 1.

    Raises:
        ConvertError: a norm divides by 0.
    """
    weights = dict(weights)
    for name in [name for name in weights if name.startswith("backbone.") and name.endswith("norm.weight")]:
        stem = name.removesuffix("weight")
        scale = weights[name]
        if f"{stem}running_var" not in weights:
            weights |= {f"{stem}running_mean": torch.zeros_like(scale), f"{stem}running_var": torch.ones_like(scale)}
        var = weights[f"{stem}running_var"].double()
        scaled = scale.double() * ((var + NORM_EPS) / (var + eps)).sqrt()
        if not scaled.isfinite().all():
            raise ConvertError(f"{stem}running_var has a 0, by which a norm with an ε of {eps} divides.")
        weights[name] = scaled.to(scale.dtype)
    return weights
