"""Detectron2's feature pyramid, with P6 and P7 computed from the feature that a key names (section 4: from C5)."""

import math

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelP6P7
from torch import Tensor

from ..config import ConfigError


@BACKBONE_REGISTRY.register()
def build_focal_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build the ResNet of ``MODEL.RESNETS`` under a feature pyramid with the levels of ``MODEL.FOCAL.TOP_BLOCK``.

    By default this is Detectron2's ``build_retinanet_resnet_fpn_backbone``: the same parameters, with the same names
    and, from the same seed, the same initial values.

    Raises:
        ConfigError: as ``build_pyramid``.
    """
    return build_pyramid(cfg, build_resnet_backbone(cfg, input_shape))


def build_pyramid(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """Build the pyramid of ``MODEL.FPN`` on features of ``bottom_up``, with the levels of ``MODEL.FOCAL.TOP_BLOCK``.

    Raises:
        ConfigError: ``bottom_up`` has no such feature, or ``MODEL.FOCAL.TOP_BLOCK`` names none to start from.
    """
    shapes = bottom_up.output_shape()
    missing = [feature for feature in cfg.MODEL.FPN.IN_FEATURES if feature not in shapes]
    if missing or not cfg.MODEL.FPN.IN_FEATURES:
        raise ConfigError(
            f"MODEL.FPN.IN_FEATURES is {list(cfg.MODEL.FPN.IN_FEATURES)}; expected some of {', '.join(shapes)}, the "
            "features of the encoder (of a ResNet, MODEL.RESNETS.OUT_FEATURES names them)."
        )
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=_top_block(cfg, shapes),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


class LinearP6P7(LastLevelP6P7):
    """Detectron2's two levels above the pyramid without the ReLU between them, as MMDetection has them."""

    def forward(self, feature: Tensor) -> list[Tensor]:
        """Return P6 and P7, (N, C, H/2, W/2) and (N, C, H/4, W/4), from (N, C', H, W)."""
        p6 = self.p6(feature)
        return [p6, self.p7(p6)]


def _top_block(cfg: CfgNode, shapes: dict[str, ShapeSpec]) -> LastLevelP6P7 | None:
    """Build the two levels above the pyramid, from the last feature of the encoder or of the pyramid."""
    source, out_channels = cfg.MODEL.FOCAL.TOP_BLOCK, cfg.MODEL.FPN.OUT_CHANNELS
    if not source:
        return None
    name, linear = source.removesuffix("-linear"), source.endswith("-linear")
    last = cfg.MODEL.FPN.IN_FEATURES[-1]
    level = int(math.log2(shapes[last].stride))
    sources = {f"c{level}": (shapes[last].channels, last), f"p{level}": (out_channels, f"p{level}")}
    if name not in sources:
        raise ConfigError(
            f"MODEL.FOCAL.TOP_BLOCK is {source!r}; expected {' or '.join(sources)}, the last feature of the encoder or "
            "of the pyramid, with -linear appended for no ReLU between P6 and P7, or '' for no levels above."
        )
    in_channels, in_feature = sources[name]
    return (LinearP6P7 if linear else LastLevelP6P7)(in_channels, out_channels, in_feature)
