"""Trained models at work: prediction, faster inference, test-time augmentation."""

from ..layers.fast_dtype import fast_dtype
from .inputs import ImageError
from .optimize import model_for_inference, optimize_for_inference
from .predictor import Predictor
from .tta import DenseTTA, evaluate_with_tta, with_tta

__all__ = [
    "DenseTTA",
    "ImageError",
    "Predictor",
    "evaluate_with_tta",
    "fast_dtype",
    "model_for_inference",
    "optimize_for_inference",
    "with_tta",
]
