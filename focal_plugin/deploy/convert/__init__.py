"""Converts weights of other projects to checkpoints of this one, each with a config that gives the same detections.

``python -m focal_plugin convert --help`` lists the projects. Files of Detectron2's zoo need no conversion.

All functions raise an ``OSError`` or a ``WeightsError`` for a file that cannot be read, and a ``ConvertError`` for a
file that has another architecture or lacks what they need.
"""

from .backbones import convert_resnet
from .classes import map_classes
from .detectors import convert_detectron1, convert_mmdetection, convert_torchvision
from .files import Converted, ConvertError, write

__all__ = [
    "ConvertError",
    "Converted",
    "convert_detectron1",
    "convert_mmdetection",
    "convert_resnet",
    "convert_torchvision",
    "map_classes",
    "write",
]
