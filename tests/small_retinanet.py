"""A FocalRetinaNet that is built and run in a moment."""

from detectron2.config import CfgNode, get_cfg

from focal_plugin import add_focal_config

CLASSES = 3


def small_config() -> CfgNode:
    """On the CPU: ResNet-18, eight channels, one convolution a subnet, two sizes and three ratios of anchors."""
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "FocalRetinaNet", "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.FPN.OUT_CHANNELS = 18, 64, 8
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[size, size * 1.5] for size in (16, 32, 64, 128, 256)]
    cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CONVS = CLASSES, 1
    return cfg
