"""Layers that are cheaper or safer than PyTorch's and Detectron2's, and the number format that a device is fast in."""

from .deltas import AnchorDeltas
from .fast_dtype import fast_dtype
from .float32 import Float32Conv2d, compute_top_blocks_in_float32
from .frozen_norm import FrozenNormConv2d, fold_frozen_norms, folded

__all__ = [
    "AnchorDeltas",
    "Float32Conv2d",
    "FrozenNormConv2d",
    "compute_top_blocks_in_float32",
    "fast_dtype",
    "fold_frozen_norms",
    "folded",
]
