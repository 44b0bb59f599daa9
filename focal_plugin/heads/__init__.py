"""Heads of dense detectors and how their classifier's bias starts."""

from .bias_init import PriorBiasInit
from .retinanet_head import FocalRetinaNetHead

__all__ = ["FocalRetinaNetHead", "PriorBiasInit"]
