"""Rules that assign ground-truth boxes to anchors."""

from .ignore_band import IgnoreBandMatcher

__all__ = ["IgnoreBandMatcher"]
