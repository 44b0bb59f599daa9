"""Heads of dense detectors and how their classifier's bias starts."""

from .bias_init import ClassFrequencyBiasInit, PriorBiasInit, ZeroBiasInit
from .retinanet_head import FocalRetinaNetHead
