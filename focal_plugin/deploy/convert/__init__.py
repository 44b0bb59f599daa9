"""Weights of other projects as checkpoints of this one, each with the config that makes them detect as they did.

``python -m focal_plugin.deploy.convert --help`` lists what it reads. Detectron2's own zoo loads as it is.
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
