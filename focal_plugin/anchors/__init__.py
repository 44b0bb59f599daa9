"""Anchor generators beside Detectron2's: scales by the octave, and the anchors of other code bases."""

from .foreign import Detectron1AnchorGenerator, TorchvisionAnchorGenerator
from .octave import OctaveAnchorGenerator
