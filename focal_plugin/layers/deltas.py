"""The four deltas from an anchor to a box, computed without synchronising."""

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor


class AnchorDeltas(Box2BoxTransform):
    """Detectron2's ``Box2BoxTransform`` without the assertion that anchors have an area, which synchronises."""

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Return the (P, 4) deltas (dx, dy, dw, dh) from anchors to boxes, both (P, 4) XYXY (R-CNN's, section 4).

        dx and dy shift the centre by fractions of the anchor's sides; dw and dh are logarithms of the factors by which
        the sides grow. So deltas do not depend on an object's size.
        """
        (anchor_center, anchor_size), (center, size) = map(_center_and_size, (src_boxes, target_boxes))  # (P, 2) each
        weights_xy, weights_wh = self.weights[:2], self.weights[2:]
        shift, scale = (center - anchor_center).unbind(1), (size / anchor_size).log().unbind(1)
        dx, dy = (weight * d / side for weight, d, side in zip(weights_xy, shift, anchor_size.unbind(1)))
        dw, dh = (weight * d for weight, d in zip(weights_wh, scale))
        return torch.stack((dx, dy, dw, dh), dim=1)


def _center_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    size = boxes[:, 2:] - boxes[:, :2]
    return boxes[:, :2] + 0.5 * size, size
