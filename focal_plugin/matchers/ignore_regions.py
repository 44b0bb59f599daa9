"""Regions of an image without annotations of single objects: crowds, and other regions to ignore."""

import torch
from detectron2.structures import Boxes, pairwise_ioa
from torch import Tensor

from ..structures import IGNORED, NEGATIVE, Anchors

_PAIRS_AT_ONCE = 2**19  # about 20 MB of temporaries


def ignore_covered(labels: Tensor, anchors: Anchors, regions: Boxes, min_ioa: float) -> Tensor:
    """Return the labels with IGNORED for each background anchor that a region covers. Positives stay positive.

    A region covers an anchor if at least ``min_ioa`` of the anchor's area lies in it. By the same measure, COCO's
    evaluation counts detections in a crowd as neither right nor wrong.

    ``labels`` are (R,) and not changed. ``min_ioa`` is above 0.
    """
    boxes = Boxes(anchors.flat)
    covered = torch.zeros_like(labels, dtype=torch.bool)  # (R,)
    for chunk in regions.tensor.split(max(_PAIRS_AT_ONCE // max(len(boxes), 1), 1)):
        covered |= (pairwise_ioa(Boxes(chunk), boxes) >= min_ioa).any(dim=0)
    return torch.where(covered & (labels == NEGATIVE), IGNORED, labels)
