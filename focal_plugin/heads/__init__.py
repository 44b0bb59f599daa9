"""Heads of dense detectors, and initial values for their classifier's bias."""

from .bias_init import ClassFrequencyBiasInit, PriorBiasInit, ZeroBiasInit
from .retinanet_head import FocalRetinaNetHead
