"""What a model does around its class loss, the same in FocalRetinaNet, FocalRPN, FocalFCOS and FocalBoxPredictor.

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
    """Compute a class loss, check it against its contract and scale it.

    Args:
        cls_loss: an entry of ``CLS_LOSS_REGISTRY``.
        logits: one (N, A, K, H, W) view a level.
        targets: what each anchor should predict.
        boxes: gives the (P, 4) predicted boxes of the positives. It is called only if the loss asks for their quality.
        scale: the weight of the loss over the normaliser.
        observer: called with the loss, its two arguments and its sum, before the scaling.

    Returns:
        A scalar.

    Raises:
        TypeError, ValueError: the loss breaks its contract.
    """
    targets = with_quality(cls_loss, targets, boxes)
    total = cls_loss(logits, targets)
    check_cls_loss(cls_loss, total, logits, targets)
    if observer is not None:
        observer(cls_loss, logits, targets, total.detach())
    return total * scale


def with_quality(cls_loss: ClassLoss, targets: DenseTargets, boxes: Callable[[], Tensor]) -> DenseTargets:
    """``targets`` as ``cls_loss`` wants them: with the IoU of each positive's predicted box if it ``needs_quality``."""
    return targets.with_quality(boxes().detach()) if getattr(cls_loss, "needs_quality", False) else targets
