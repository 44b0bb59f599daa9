"""Regions of an image where an annotation names no single objects: crowds, and whatever else is to be ignored."""

import torch
from detectron2.structures import Boxes, pairwise_ioa
from torch import Tensor

from ..structures import IGNORED, NEGATIVE, Anchors

_PAIRS_AT_ONCE = 2**19  # about 20 MB of temporaries


def ignore_covered(labels: Tensor, anchors: Anchors, regions: Boxes, min_ioa: float) -> Tensor:
    """Labels as before, but for the background anchors that a region covers: these are IGNORED.

    A region covers an anchor if at least ``min_ioa`` of the anchor's area lies in it, in that one region, as in COCO's
    evaluation, where a detection in a crowd is neither right nor wrong by the same measure. Positives stay positive.

    Args:
        labels: (R,), IGNORED, NEGATIVE or POSITIVE for each anchor.
        anchors: R anchors.
        regions: M boxes.
        min_ioa: above 0.

    Returns:
        (R,) of the dtype of ``labels``, which is left as it is.
    """
    boxes = Boxes(torch.cat(anchors.boxes))
    covered = torch.zeros_like(labels, dtype=torch.bool)  # (R,)
    for part in regions.tensor.split(max(_PAIRS_AT_ONCE // max(len(boxes), 1), 1)):
        covered |= (pairwise_ioa(Boxes(part), boxes) >= min_ioa).any(dim=0)
    return torch.where(covered & (labels == NEGATIVE), IGNORED, labels)
