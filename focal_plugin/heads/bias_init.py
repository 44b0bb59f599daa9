"""How the classifier's bias starts: the paper's remedy for the flood of easy background (sections 3.3 and 4.1)."""

import math

from detectron2.config import configurable
from torch import nn

from ..registry import BIAS_INIT_REGISTRY


@BIAS_INIT_REGISTRY.register()
class PriorBiasInit:
    """Bias b = −log((1 − π)/π), so that at the start every anchor is foreground with probability about π.

    Args:
        prior_prob: π, in (0, 1); .01 in the paper.

    Raises:
        ValueError: π is not in (0, 1).
    """

    @configurable
    def __init__(self, *, prior_prob: float = 0.01):
        if not 0 < prior_prob < 1:
            raise ValueError(f"MODEL.RETINANET.PRIOR_PROB is {prior_prob}; expected a probability between 0 and 1.")
        self.prior_prob = prior_prob

    @classmethod
    def from_config(cls, cfg):
        return {"prior_prob": cfg.MODEL.RETINANET.PRIOR_PROB}

    def __call__(self, conv: nn.Conv2d, num_anchors: int, num_classes: int) -> None:
        """Fill the (A·K,) bias of ``conv`` in place."""
        nn.init.constant_(conv.bias, -math.log((1 - self.prior_prob) / self.prior_prob))
