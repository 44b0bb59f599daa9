"""The components inside Detectron2's other models: RPN, Faster, Mask and Cascade R-CNN, and FCOS."""

from .box_predictor import FocalBoxPredictor
from .fcos import FocalFCOS
from .roi_heads import FocalCascadeROIHeads, FocalRes5ROIHeads, FocalROIHeads
from .rpn import FocalRPN

__all__ = [
    "FocalBoxPredictor",
    "FocalCascadeROIHeads",
    "FocalFCOS",
    "FocalROIHeads",
    "FocalRPN",
    "FocalRes5ROIHeads",
]
