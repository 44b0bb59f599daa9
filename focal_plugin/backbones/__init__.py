"""Backbones by name: what ``MODEL.BACKBONE.NAME`` finds in Detectron2's ``BACKBONE_REGISTRY``."""

from .timm_fpn import TimmEncoder, build_timm_fpn_backbone

__all__ = ["TimmEncoder", "build_timm_fpn_backbone"]
