"""Classification and box losses."""

from .box import CIoUBoxLoss, DIoUBoxLoss, GIoUBoxLoss, SmoothL1BoxLoss
from .classification import (
    AlphaBalancedBCELoss,
    BCELoss,
    ElementwiseLoss,
    FocalLossStar,
    HingeLoss,
    QualityFocalLoss,
    SigmoidFocalLoss,
    VarifocalLoss,
)
from .mining import MiniBatchLoss, OHEMLoss, SampledBCELoss

__all__ = [
    "AlphaBalancedBCELoss",
    "BCELoss",
    "CIoUBoxLoss",
    "DIoUBoxLoss",
    "ElementwiseLoss",
    "FocalLossStar",
    "GIoUBoxLoss",
    "HingeLoss",
    "MiniBatchLoss",
    "OHEMLoss",
    "QualityFocalLoss",
    "SampledBCELoss",
    "SigmoidFocalLoss",
    "SmoothL1BoxLoss",
    "VarifocalLoss",
]
