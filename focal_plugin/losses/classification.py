"""Classification losses over a batch's dense logits: small modules around the functions of ``functional.py``.

A hyper-parameter out of range raises a ValueError, one that is not a number a TypeError. Both name its config key.
"""

from collections.abc import Sequence
from numbers import Real

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor

from ..registry import CLS_LOSS_REGISTRY
from ..structures import DenseTargets
from . import functional
from .class_weights import alpha_from_config, alpha_needs_class_frequencies
from .dense_focal import dense_focal_loss
from .elementwise import ElementwiseLoss

_ALPHA, _GAMMA = "MODEL.RETINANET.FOCAL_LOSS_ALPHA", "MODEL.RETINANET.FOCAL_LOSS_GAMMA"


def _alpha(alpha: float | Sequence[float]) -> float | Tensor:
    """Return α as a float, or as a (K,) float32 tensor of one weight a class. Errors name the config key."""
    key = _ALPHA if isinstance(alpha, Real) else "MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA"
    checked = functional.checked_alpha(alpha, f"{key} (alpha)")
    if not isinstance(checked, Tensor):
        return checked
    if not len(checked):
        raise ValueError(f"{key} (alpha) is []; expected a number in [0, 1] for each class.")
    return checked.float()


def _by_class(alpha: float | Tensor) -> float | Tensor:
    """Return α in a shape that broadcasts to (..., K, H, W)."""
    return alpha.view(-1, 1, 1) if isinstance(alpha, Tensor) else alpha


@CLS_LOSS_REGISTRY.register()
class SigmoidFocalLoss(ElementwiseLoss):
    """The paper's focal loss, FL(p_t) = −α_t (1 − p_t)^γ log p_t (equation 5), in one pass over the logits.

    Args:
        alpha: the weight of the positives; 1 − alpha is the negatives'. −1 leaves both at 1. Or one weight a class.
        gamma: the focusing parameter, ≥ 0; 0 is the α-balanced cross entropy of equation 3.
    """

    alpha: float | Tensor
    gamma: float
    needs_class_frequencies = staticmethod(alpha_needs_class_frequencies)

    # (γ, α) = (2, .25) is the paper's best (table 1b). The best α falls as γ grows: once γ holds the easy negatives
    # down, positives need less extra weight.
    @configurable
    def __init__(self, *, alpha: float | Sequence[float] = 0.25, gamma: float = 2.0):
        super().__init__(alpha=_alpha(alpha), gamma=functional.GAMMA.check(gamma, f"{_GAMMA} (gamma)"))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, object]:
        return {"alpha": alpha_from_config(cfg), "gamma": cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA}

    def elementwise(self, logits: Tensor, targets: Tensor) -> Tensor:
        return functional.sigmoid_focal_loss(logits, targets, _by_class(self.alpha), self.gamma)

    def forward(self, logits: list[Tensor], targets: DenseTargets) -> Tensor:
        """As ``ElementwiseLoss.forward``, but without one-hot targets or temporaries of the logits' size."""
        return dense_focal_loss(logits, targets.labels, alpha=self.alpha, gamma=self.gamma)


@CLS_LOSS_REGISTRY.register()
class AlphaBalancedBCELoss(ElementwiseLoss):
    """The α-balanced cross entropy CE(p_t) = −α_t log p_t (equation 3, table 1a): the focal loss at γ = 0.

    ``alpha`` is as for ``SigmoidFocalLoss``; .75 is best in the paper's table 1a.
    """

    alpha: float | Tensor
    gamma: float
    needs_class_frequencies = staticmethod(alpha_needs_class_frequencies)

    @configurable
    def __init__(self, *, alpha: float | Sequence[float] = 0.75):
        super().__init__(alpha=_alpha(alpha), gamma=0.0)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, object]:
        return {"alpha": alpha_from_config(cfg)}

    def elementwise(self, logits: Tensor, targets: Tensor) -> Tensor:
        return functional.sigmoid_focal_loss(logits, targets, _by_class(self.alpha), gamma=0)

    def forward(self, logits: list[Tensor], targets: DenseTargets) -> Tensor:
        """As ``SigmoidFocalLoss.forward``."""
        return dense_focal_loss(logits, targets.labels, alpha=self.alpha, gamma=0)


@CLS_LOSS_REGISTRY.register()
class BCELoss(ElementwiseLoss):
    """The cross entropy CE(p_t) = −log p_t (equation 1), over all anchors: the focal loss at γ = 0, without α."""

    # 100,000 easy negatives of p = π = .01 have a loss of −log .99 each, 1,000 in all; 100 positives of the same p have
    # −log .01 each, 460 in all. This imbalance is what section 3 is about.
    def __init__(self, cfg: CfgNode | None = None):
        super().__init__(alpha=-1, gamma=0)

    def elementwise(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")

    def forward(self, logits: list[Tensor], targets: DenseTargets) -> Tensor:
        """As ``SigmoidFocalLoss.forward``."""
        return dense_focal_loss(logits, targets.labels, alpha=-1, gamma=0)


@CLS_LOSS_REGISTRY.register()
class FocalLossStar(ElementwiseLoss):
    """FL* = −α_t log σ(γ x_t + β) / γ (appendix A, table 3).

    Args:
        alpha: as for ``SigmoidFocalLoss``.
        gamma: the steepness γ > 0.
        beta: the shift β; the paper's (γ, β) are (2, 1) and (4, 0).
    """

    alpha: float | Tensor
    gamma: float
    beta: float
    needs_class_frequencies = staticmethod(alpha_needs_class_frequencies)

    @configurable
    def __init__(self, *, alpha: float | Sequence[float] = 0.25, gamma: float = 2.0, beta: float = 0.0):
        super().__init__(
            alpha=_alpha(alpha),
            gamma=functional.STAR_GAMMA.check(gamma, f"{_GAMMA} (gamma of FocalLossStar)"),
            beta=functional.STAR_BETA.check(beta, "MODEL.FOCAL.CLS_LOSS.BETA (beta)"),
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, object]:
        return {
            "alpha": alpha_from_config(cfg),
            "gamma": cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA,
            "beta": cfg.MODEL.FOCAL.CLS_LOSS.BETA,
        }

    def elementwise(self, logits: Tensor, targets: Tensor) -> Tensor:
        return functional.sigmoid_focal_loss_star(logits, targets, _by_class(self.alpha), self.gamma, beta=self.beta)


@CLS_LOSS_REGISTRY.register()
class HingeLoss(ElementwiseLoss):
    """max(0, m − p_t): no loss where p_t ≥ m (section 5.1, where training with a hinge loss was unstable).

    The paper gives no formula, only that its hinge acts on p_t and is 0 above some value. This is the simplest.

    Args:
        margin: m in (0, 1].
    """

    margin: float

    @configurable
    def __init__(self, *, margin: float = 0.9):
        super().__init__(margin=functional.MARGIN.check(margin, "MODEL.FOCAL.CLS_LOSS.HINGE_MARGIN (margin)"))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, object]:
        return {"margin": cfg.MODEL.FOCAL.CLS_LOSS.HINGE_MARGIN}

    def elementwise(self, logits: Tensor, targets: Tensor) -> Tensor:
        return functional.sigmoid_hinge_loss(logits, targets, self.margin)


@CLS_LOSS_REGISTRY.register()
class QualityFocalLoss(ElementwiseLoss):
    """|y − σ|^β times the cross entropy, where y is a positive's IoU (Li et al., NeurIPS 2020): ``quality_focal_loss``.

    Args:
        beta: β, 0 or at least 1; ``MODEL.RETINANET.FOCAL_LOSS_GAMMA`` in a config. There is no α.
    """

    needs_quality = True
    beta: float

    @configurable
    def __init__(self, *, beta: float = 2.0):
        super().__init__(beta=functional.QUALITY_BETA.check(beta, f"{_GAMMA} (beta of QualityFocalLoss)"))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, object]:
        return {"beta": cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA}

    def elementwise(self, logits: Tensor, targets: Tensor) -> Tensor:
        return functional.quality_focal_loss(logits, targets, self.beta)


@CLS_LOSS_REGISTRY.register()
class VarifocalLoss(ElementwiseLoss):
    """Focused negatives; positives weighted by their IoU (Zhang et al., CVPR 2021): see ``varifocal_loss``.

    Args:
        alpha: the weight of the negatives; .75 in that paper. A config gives 1 − ``MODEL.RETINANET.FOCAL_LOSS_ALPHA``,
            as for the focal loss, or 1 if that key is −1.
        gamma: the focusing parameter γ ≥ 0; 2 in that paper.
    """

    needs_quality = True
    alpha: float
    gamma: float

    @configurable
    def __init__(self, *, alpha: float = 0.75, gamma: float = 2.0):
        super().__init__(
            alpha=functional.NEGATIVE_WEIGHT.check(alpha, f"1 - {_ALPHA} (alpha of VarifocalLoss)"),
            gamma=functional.GAMMA.check(gamma, f"{_GAMMA} (gamma)"),
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, object]:
        alpha = functional.ALPHA.check(cfg.MODEL.RETINANET.FOCAL_LOSS_ALPHA, _ALPHA)
        return {"alpha": 1 - alpha if alpha != -1 else 1.0, "gamma": cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA}

    def elementwise(self, logits: Tensor, targets: Tensor) -> Tensor:
        return functional.varifocal_loss(logits, targets, self.alpha, self.gamma)
