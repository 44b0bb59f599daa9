"""Trained models at work: faster inference."""

from ..fast_dtype import fast_dtype
from .optimize import model_for_inference, optimize_for_inference

__all__ = ["fast_dtype", "model_for_inference", "optimize_for_inference"]
