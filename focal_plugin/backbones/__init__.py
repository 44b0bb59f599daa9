"""Backbones by name: what ``MODEL.BACKBONE.NAME`` finds in Detectron2's ``BACKBONE_REGISTRY``."""

from .pyramid import build_focal_resnet_fpn_backbone, build_pyramid
from .timm_fpn import TimmEncoder, build_timm_fpn_backbone

__all__ = ["TimmEncoder", "build_focal_resnet_fpn_backbone", "build_pyramid", "build_timm_fpn_backbone"]
