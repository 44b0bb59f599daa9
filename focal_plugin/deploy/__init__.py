"""Trained models at work: faster inference."""

from .optimize import fast_dtype, model_for_inference, optimize_for_inference

__all__ = ["fast_dtype", "model_for_inference", "optimize_for_inference"]
