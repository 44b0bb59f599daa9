"""Box losses over the positives: small modules around the functions of fvcore and Detectron2."""

import math
from collections.abc import Callable

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ciou_loss, diou_loss
from detectron2.modeling.box_regression import Box2BoxTransform
from fvcore.nn import giou_loss, smooth_l1_loss
from torch import Tensor, nn

from ..registry import BOX_LOSS_REGISTRY


@BOX_LOSS_REGISTRY.register()
class SmoothL1BoxLoss(nn.Module):
    """Smooth L1 between the predicted deltas and those from anchor to matched box (section 4.1), summed over the four.

    Args:
        beta: the error at which the loss turns from quadratic to linear; 0 is L1, less is a ValueError. Detectron2's
            default is .1, its RetinaNet configs have 0.
    """

    @configurable
    def __init__(self, *, beta: float = 0.0):
        super().__init__()
        if not 0 <= beta < math.inf:
            raise ValueError(
                f"MODEL.RETINANET.SMOOTH_L1_LOSS_BETA is {beta}; expected a finite number, 0 (L1) or more."
            )
        self.beta = beta

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, object]:
        return {"beta": cfg.MODEL.RETINANET.SMOOTH_L1_LOSS_BETA}

    def forward(self, deltas: Tensor, anchors: Tensor, gt_boxes: Tensor, box2box_transform: Box2BoxTransform) -> Tensor:
        """(P, 4) predicted deltas, anchors and boxes → (P,) losses, float32."""
        # Deltas are relative to the anchor's size, so that one error counts alike for small and large objects.
        target = box2box_transform.get_deltas(anchors, gt_boxes)  # (P, 4)
        return smooth_l1_loss(deltas.float(), target, self.beta, reduction="none").sum(dim=1)

    def extra_repr(self) -> str:
        return f"beta={self.beta}"


class _IoUBoxLoss(nn.Module):
    """1 − an IoU-like overlap of the predicted box and its ground truth, without hyper-parameters."""

    box_loss: Callable[..., Tensor]  # (P, 4) boxes, (P, 4) boxes, reduction= → (P,)

    def __init__(self, cfg: CfgNode | None = None):
        super().__init__()

    def forward(self, deltas: Tensor, anchors: Tensor, gt_boxes: Tensor, box2box_transform: Box2BoxTransform) -> Tensor:
        """(P, 4) predicted deltas, anchors and boxes → (P,) losses, float32."""
        boxes = box2box_transform.apply_deltas(deltas, anchors)  # (P, 4)
        # The functions assert x1 ≤ x2, which is False for NaN. Return NaN instead: training checks the losses for it.
        is_nan = boxes.isnan().any(dim=1)  # (P,)
        loss = self.box_loss(torch.where(is_nan[:, None], gt_boxes, boxes), gt_boxes, reduction="none")
        return loss.masked_fill(is_nan, torch.nan)


@BOX_LOSS_REGISTRY.register()
class GIoUBoxLoss(_IoUBoxLoss):
    """1 − generalised IoU (Rezatofighi et al., CVPR 2019), fvcore's."""

    box_loss = staticmethod(giou_loss)


@BOX_LOSS_REGISTRY.register()
class DIoUBoxLoss(_IoUBoxLoss):
    """1 − distance IoU (Zheng et al., AAAI 2020), Detectron2's."""

    box_loss = staticmethod(diou_loss)


@BOX_LOSS_REGISTRY.register()
class CIoUBoxLoss(_IoUBoxLoss):
    """1 − complete IoU (Zheng et al., AAAI 2020), Detectron2's."""

    box_loss = staticmethod(ciou_loss)
