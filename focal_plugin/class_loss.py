"""The steps around a class loss that FocalRetinaNet, FocalRPN, FocalFCOS and FocalBoxPredictor share.

The sum over all anchors is divided by a normaliser, the number of anchors assigned to a box (section 4.1), and not by
the number of anchors: nearly all of these are easy background, whose loss the focal loss has made negligible.
"""

from collections.abc import Callable

from torch import Tensor

from .contracts import check_cls_loss
from .structures import DenseTargets

ClassLoss = Callable[[list[Tensor], DenseTargets], Tensor]


def class_loss(
    cls_loss: ClassLoss,
    logits: list[Tensor],
    targets: DenseTargets,
    boxes: Callable[[], Tensor],
    scale: Tensor | float,
    observer: Callable[[ClassLoss, list[Tensor], DenseTargets, Tensor], None] | None = None,
) -> Tensor:
    """Compute a class loss, check that it keeps its contract, and scale it.

    Args:
        cls_loss: an entry of ``CLS_LOSS_REGISTRY``.
        logits: one (N, A, K, H, W) view a level.
        targets: the class of each anchor and the box of each positive.
        boxes: returns the (P, 4) predicted boxes of the positives; called only if the loss has ``needs_quality``.
        scale: the weight of the loss divided by the normaliser.
        observer: called with the loss module, its two arguments and its unscaled sum.

    Returns a scalar. A loss that breaks its contract raises a TypeError or ValueError.
    """
    # The targets of some losses depend on how well each positive's box is predicted, which is known only now.
    targets = with_quality(cls_loss, targets, boxes)
    total = cls_loss(logits, targets)
    check_cls_loss(cls_loss, total, logits, targets)
    if observer is not None:
        observer(cls_loss, logits, targets, total.detach())
    return total * scale


def with_quality(cls_loss: ClassLoss, targets: DenseTargets, boxes: Callable[[], Tensor]) -> DenseTargets:
    """Return ``targets``, with the IoU of each positive's predicted box if ``cls_loss`` has ``needs_quality``."""
    return targets.with_quality(boxes()) if getattr(cls_loss, "needs_quality", False) else targets
