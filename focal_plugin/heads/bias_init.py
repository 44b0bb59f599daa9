"""Initial values of the classifier's bias: the paper's remedy for the flood of easy background (sections 3.3 and 4.1).

Each is called with the classifier and fills its (A·K,) bias in place. An argument out of range raises a ValueError.
"""

import math
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from torch import nn

from ..losses.class_weights import class_shares
from ..registry import BIAS_INIT_REGISTRY


@BIAS_INIT_REGISTRY.register()
class PriorBiasInit:
    """Bias b = −log((1 − π)/π), so that at the start the score of every class at every anchor is about π.

    Args:
        prior_prob: π, in (0, 1); .01 in the paper.
    """

    @configurable
    def __init__(self, *, prior_prob: float = 0.01):
        self.prior_prob = _checked_prior(prior_prob)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, object]:
        return {"prior_prob": cfg.MODEL.RETINANET.PRIOR_PROB}

    def __call__(self, conv: nn.Conv2d, num_anchors: int, num_classes: int) -> None:
        # σ(b) = π. At p = .5 the 100,000 background anchors of an image would outweigh everything else in the first
        # steps; at p = .01 the loss of each is 70 times smaller, log .5 / log .99.
        assert conv.bias is not None
        nn.init.constant_(conv.bias, -math.log((1 - self.prior_prob) / self.prior_prob))


@BIAS_INIT_REGISTRY.register()
class ZeroBiasInit:
    """Bias 0, so that all scores start at about .5. In the paper training then diverges (section 5.1)."""

    def __init__(self, cfg: CfgNode | None = None):
        pass

    def __call__(self, conv: nn.Conv2d, num_anchors: int, num_classes: int) -> None:
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)


@BIAS_INIT_REGISTRY.register()
class ClassFrequencyBiasInit:
    """A prior for each class: π_k = π f_k, with f_k the class's share of all boxes, and bias −log((1 − π_k)/π_k).

    The priors add up to π, where ``PriorBiasInit`` gives each class a prior of π: with K·π, both have the same mean.

    Args:
        prior_prob: π, in (0, 1).
        shares: f_k, one a class, all above 0; they add up to 1. A config gives ``MODEL.FOCAL.CLASS_FREQUENCIES``.
    """

    @configurable
    def __init__(self, *, prior_prob: float = 0.01, shares: Sequence[float]):
        if not all(share > 0 for share in shares) or not math.isclose(sum(shares), 1, rel_tol=1e-6):
            raise ValueError(f"shares are {list(shares)}; expected numbers above 0 that add up to 1.")
        self.prior_prob = _checked_prior(prior_prob)
        self.shares = tuple(shares)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, object]:
        return {"prior_prob": cfg.MODEL.RETINANET.PRIOR_PROB, "shares": class_shares(cfg)}

    @classmethod
    def needs_class_frequencies(cls, cfg: CfgNode) -> bool:
        """Return True: the shares are always needed."""
        return True

    def __call__(self, conv: nn.Conv2d, num_anchors: int, num_classes: int) -> None:
        if num_classes != len(self.shares):
            raise ValueError(f"There are {num_classes} classes and {len(self.shares)} shares; expected one a class.")
        priors = self.prior_prob * torch.tensor(self.shares, dtype=torch.float64)  # (K,)
        assert conv.bias is not None
        with torch.no_grad():
            conv.bias.view(num_anchors, num_classes).copy_(priors.logit())


def _checked_prior(prior_prob: float) -> float:
    if not 0 < prior_prob < 1:
        raise ValueError(f"MODEL.RETINANET.PRIOR_PROB is {prior_prob}; expected a probability between 0 and 1.")
    return prior_prob
