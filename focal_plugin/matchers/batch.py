"""Matching of all images of a batch, with any matcher."""

from collections.abc import Callable, Sequence

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..contracts import check_match
from ..structures import NEGATIVE, Anchors
from .ignore_regions import ignore_covered

Matcher = Callable[[Anchors, Instances], tuple[Tensor, Tensor]]


def match_images(
    matcher: Matcher,
    anchors: Anchors,
    gt_instances: Sequence[Instances],
    ignore_boxes: Sequence[Boxes | None] = (),
    *,
    min_ioa: float = 0.0,
    check_values: bool = False,
) -> tuple[Tensor, Tensor]:
    """Match each image's boxes with the anchors.

    On a GPU, a matcher with a method ``match_batch`` gets all images at once. Any other is called image by image, and
    its results are checked against the contract.

    Args:
        matcher: an entry of ``ANCHOR_MATCHER_REGISTRY``.
        anchors: R anchors.
        gt_instances: one ``Instances`` an image, with ``gt_boxes``, on any device.
        ignore_boxes: the ignore regions of each image, or None where it has none; empty if no image has any.
        min_ioa: a background anchor is ignored if at least this share of its area lies in one region; 0 ignores none.
        check_values: whether to check the values of indices and labels too, which synchronises with a GPU.

    Returns:
        ``matched`` (N, R) int64, the index of each anchor's box in its image, and ``labels`` (N, R) int8. As in
        Detectron2, every anchor of an image without boxes is background, whatever the first of ``IOU_LABELS`` is.
        A matcher that breaks its contract raises a TypeError or ValueError.
    """
    regions = [None] * len(gt_instances) if min_ioa == 0 or not ignore_boxes else list(ignore_boxes)
    batched = getattr(matcher, "match_batch", None) if anchors.device.type == "cuda" else None
    if batched is not None and (found := batched(anchors, gt_instances, regions, min_ioa)) is not None:
        check_match(matcher, found, (len(gt_instances), len(anchors)))
        return found
    matches = []
    for instances, areas in zip(gt_instances, regions):
        instances = to_device(instances, anchors.device)
        match = matcher(anchors, instances)
        check_match(matcher, match, (len(anchors),), len(instances) if check_values else 0)
        matched, labels = match
        labels = labels if len(instances) else torch.full_like(labels, NEGATIVE)
        if areas is not None:
            labels = ignore_covered(labels, anchors, areas.to(labels.device), min_ioa)
        matches.append((matched, labels))
    matched, labels = map(torch.stack, zip(*matches))
    return matched, labels


def to_device(instances: Instances, device: torch.device) -> Instances:
    """Return a copy of ``instances`` on a device. Unlike ``Instances.to``, this waits for no GPU that it copies to."""
    moved, to_gpu = Instances(instances.image_size), device.type == "cuda"  # the other way, the host has to wait
    for name, value in instances.get_fields().items():
        if isinstance(value, Boxes):
            value = Boxes(value.tensor.to(device, non_blocking=to_gpu))
        else:
            value = value.to(device, non_blocking=to_gpu) if isinstance(value, Tensor) else value
        moved.set(name, value)
    return moved
