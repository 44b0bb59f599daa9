"""Detections from the logits and deltas of a dense detector (section 4.1, inference)."""

from collections.abc import Callable

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .kernels.top import floor_of_logits, top
from .structures import unravel


def best_of_level(
    logits: Tensor, deltas: Tensor, anchors: Tensor, *, num_classes: int, count: int, score_thresh: float
) -> tuple[Tensor, ...]:
    """Choose the best (anchor, class) pairs of a level for each image, best first.

    Only these are decoded: in the paper at most 1,000 a level, of those with a score above .05.

    Args:
        logits: (N, A·K, H, W). deltas: (N, A·4, H, W). anchors: (H·W·A, 4).
        num_classes: K.
        count: the largest number of pairs of an image.
        score_thresh: pairs with a score clearly below it may be left out; the caller has to compare exactly.

    Returns:
        logits (N, C), −∞ where an image has fewer than C; classes (N, C); deltas and anchors (N, C, 4) each.
    """
    n, _, h, w = logits.shape
    a = logits.shape[1] // num_classes
    # Flatten in the order of the memory, channels first or last: that copies nothing.
    channels_last = logits.stride(1) == 1
    flat = (logits.permute(0, 2, 3, 1) if channels_last else logits).flatten(1)
    values, indices = top(flat, count, floor_of_logits(score_thresh))  # (N, C)
    if channels_last:
        row, cls = unravel(indices, (h * w * a, num_classes))
    else:
        anchor, cls, location = unravel(indices, (a, num_classes, h * w))
        row = location * a + anchor
    image = torch.arange(n, device=row.device)[:, None]  # (N, 1)
    by_location = deltas.reshape(n, a, 4, h * w).permute(0, 3, 1, 2)  # (N, H·W, A, 4)
    return values, cls, by_location[image, row // a, row % a], anchors[row]


def suppress(
    image_size: tuple[int, int],
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    *,
    iou_thresh: float,
    max_detections: int,
    clip: bool = False,
    nms: Callable[[Tensor, Tensor, Tensor, float], Tensor] = batched_nms,
) -> Instances:
    """Non-maximum suppression, class by class: drop each box that overlaps a better one of its class too much.

    Args:
        image_size: (height, width) of the network's input.
        boxes: (C, 4), XYXY in pixels. scores, classes: (C,).
        iou_thresh: the largest IoU that is not too much; .5 in the paper.
        max_detections: at most this many are kept, the best ones.
        clip: clip boxes to the image before NMS; Detectron2 does so only after it.
        nms: called with boxes, scores, classes and the threshold; returns the indices to keep, best first.

    Returns the detections, best first, with ``pred_boxes``, ``scores`` and ``pred_classes``.
    """
    # Levels are merged first: an object found on two of them is one detection (section 4.1).
    candidates = Boxes(boxes)
    if clip:
        # At the border this changes IoUs, and so which boxes are dropped.
        candidates.clip(image_size)
    keep = nms(candidates.tensor, scores, classes, iou_thresh)[:max_detections]
    return Instances(image_size, pred_boxes=candidates[keep], scores=scores[keep], pred_classes=classes[keep])
