"""Rules that assign ground-truth boxes to anchors."""

from .atss import ATSSMatcher
from .ignore_band import IgnoreBandMatcher
