"""How the classifier's bias starts: the paper's remedy for the flood of easy background (sections 3.3 and 4.1)."""

import math
from collections.abc import Sequence

import torch
from detectron2.config import configurable
from torch import nn

from ..losses.class_weights import class_shares
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
        _check_prior(prior_prob)
        self.prior_prob = prior_prob

    @classmethod
    def from_config(cls, cfg):
        return {"prior_prob": cfg.MODEL.RETINANET.PRIOR_PROB}

    def __call__(self, conv: nn.Conv2d, num_anchors: int, num_classes: int) -> None:
        """Fill the (A·K,) bias of ``conv`` in place."""
        nn.init.constant_(conv.bias, -math.log((1 - self.prior_prob) / self.prior_prob))


@BIAS_INIT_REGISTRY.register()
class ZeroBiasInit:
    """Bias 0, so that every anchor starts with probability .5 of each class: diverges in the paper (section 5.1)."""

    @configurable
    def __init__(self):
        pass

    @classmethod
    def from_config(cls, cfg):
        return {}

    def __call__(self, conv: nn.Conv2d, num_anchors: int, num_classes: int) -> None:
        """Fill the (A·K,) bias of ``conv`` in place."""
        nn.init.zeros_(conv.bias)


@BIAS_INIT_REGISTRY.register()
class ClassFrequencyBiasInit:
    """A prior for each class: π_k = π f_k, with f_k the class's share of all boxes, and bias −log((1 − π_k)/π_k).

    π is divided among the classes: an anchor is foreground of any class with probability about π at the start, where
    ``PriorBiasInit`` gives every class that much. K·π in its place keeps the mean over the classes as it is there.

    Args:
        prior_prob: π, in (0, 1).
        shares: f_k, one number a class, all above 0 and 1 in all; ``MODEL.FOCAL.CLASS_FREQUENCIES`` gives them.

    Raises:
        ValueError: π is not in (0, 1), or the shares are not as above.
    """

    @configurable
    def __init__(self, *, prior_prob: float = 0.01, shares: Sequence[float]):
        _check_prior(prior_prob)
        if not all(share > 0 for share in shares) or not math.isclose(sum(shares), 1, rel_tol=1e-6):
            raise ValueError(f"shares are {list(shares)}; expected numbers above 0 that add up to 1.")
        self.prior_prob = prior_prob
        self.shares = tuple(shares)

    @classmethod
    def from_config(cls, cfg):
        return {"prior_prob": cfg.MODEL.RETINANET.PRIOR_PROB, "shares": class_shares(cfg)}

    @classmethod
    def needs_class_frequencies(cls, cfg) -> bool:
        """Always."""
        return True

    def __call__(self, conv: nn.Conv2d, num_anchors: int, num_classes: int) -> None:
        """Fill the (A·K,) bias of ``conv`` in place.

        Raises:
            ValueError: there are not as many classes as shares.
        """
        if num_classes != len(self.shares):
            raise ValueError(f"There are {num_classes} classes and {len(self.shares)} shares; expected one a class.")
        priors = self.prior_prob * torch.tensor(self.shares, dtype=torch.float64)  # (K,)
        with torch.no_grad():
            conv.bias.view(num_anchors, num_classes).copy_(priors.logit())


def _check_prior(prior_prob: float) -> None:
    if not 0 < prior_prob < 1:
        raise ValueError(f"MODEL.RETINANET.PRIOR_PROB is {prior_prob}; expected a probability between 0 and 1.")
