"""Classification and box losses."""

from .box import CIoUBoxLoss, DIoUBoxLoss, GIoUBoxLoss, SmoothL1BoxLoss
from .classification import ElementwiseLoss, SigmoidFocalLoss

__all__ = ["CIoUBoxLoss", "DIoUBoxLoss", "ElementwiseLoss", "GIoUBoxLoss", "SigmoidFocalLoss", "SmoothL1BoxLoss"]
