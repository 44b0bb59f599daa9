"""Matching the images of a batch with whatever matcher a model has."""

from collections.abc import Callable, Sequence

import torch
from detectron2.structures import Instances
from torch import Tensor

from ..contracts import check_match
from ..structures import NEGATIVE, Anchors

Matcher = Callable[[Anchors, Instances], tuple[Tensor, Tensor]]


def match_images(
    matcher: Matcher, anchors: Anchors, gt_instances: Sequence[Instances], *, check_values: bool
) -> list[tuple[Tensor, Tensor]]:
    """Match each image's boxes with the anchors, and check what the matcher gives against its contract.

    Args:
        matcher: an entry of ``ANCHOR_MATCHER_REGISTRY``.
        anchors: R anchors.
        gt_instances: of each image, with ``gt_boxes``.
        check_values: whether to check indices and labels too, for which a GPU is synchronised.

    Returns:
        For each image ``matched`` (R,) int64, the index of each anchor's box, and ``labels`` (R,) int8. As in
        Detectron2, every anchor of an image without boxes is background, whatever ``IOU_LABELS`` begins with.

    Raises:
        TypeError, ValueError: the matcher breaks its contract.
    """
    matches = []
    for instances in gt_instances:
        match = matcher(anchors, instances)
        check_match(matcher, match, anchors, instances, values=check_values)
        matched, labels = match
        matches.append((matched, labels if len(instances) else torch.full_like(labels, NEGATIVE)))
    return matches
