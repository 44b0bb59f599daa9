"""Classification losses (the focal loss and what the paper compares it with) and box losses."""

from .box import CIoUBoxLoss, DIoUBoxLoss, GIoUBoxLoss, SmoothL1BoxLoss
from .classification import (
    AlphaBalancedBCELoss,
    BCELoss,
    FocalLossStar,
    HingeLoss,
    QualityFocalLoss,
    SigmoidFocalLoss,
    VarifocalLoss,
)
from .elementwise import ElementwiseLoss
from .mining import MiniBatchLoss, OHEMLoss, SampledBCELoss
