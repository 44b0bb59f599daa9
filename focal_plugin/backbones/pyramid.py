"""Detectron2's feature pyramid with P6 and P7 made from what a key names (section 4: from C5)."""

import math

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelP6P7


@BACKBONE_REGISTRY.register()
def build_focal_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A ResNet of ``MODEL.RESNETS`` under a feature pyramid, and the levels above it of ``MODEL.FOCAL.TOP_BLOCK``.

    By default it is Detectron2's ``build_retinanet_resnet_fpn_backbone``: the same parameters by the same names and,
    from one seed, of the same initial values.

    Raises:
        ValueError: as ``build_pyramid``.
    """
    return build_pyramid(cfg, build_resnet_backbone(cfg, input_shape))


def build_pyramid(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """The pyramid of ``MODEL.FPN`` on the features ``MODEL.FPN.IN_FEATURES`` of ``bottom_up``, and two levels above it.

    Raises:
        ValueError: ``bottom_up`` has no such feature, or ``MODEL.FOCAL.TOP_BLOCK`` names none to start from.
    """
    shapes = bottom_up.output_shape()
    missing = [feature for feature in cfg.MODEL.FPN.IN_FEATURES if feature not in shapes]
    if missing or not cfg.MODEL.FPN.IN_FEATURES:
        raise ValueError(
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


def _top_block(cfg: CfgNode, shapes: dict[str, ShapeSpec]) -> LastLevelP6P7 | None:
    """The two levels above the pyramid, made from the last feature of the encoder or of the pyramid."""
    source, out_channels = cfg.MODEL.FOCAL.TOP_BLOCK, cfg.MODEL.FPN.OUT_CHANNELS
    if not source:
        return None
    last = cfg.MODEL.FPN.IN_FEATURES[-1]
    level = int(math.log2(shapes[last].stride))
    sources = {f"c{level}": (shapes[last].channels, last), f"p{level}": (out_channels, f"p{level}")}
    if source not in sources:
        raise ValueError(
            f"MODEL.FOCAL.TOP_BLOCK is {source!r}; expected {' or '.join(sources)}, the last feature of the encoder or "
            "of the pyramid, or '' for no levels above."
        )
    in_channels, in_feature = sources[source]
    return LastLevelP6P7(in_channels, out_channels, in_feature)
