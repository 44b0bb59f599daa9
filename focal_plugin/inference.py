"""From a dense detector's logits and deltas to detections (section 4.1, inference)."""

import math
from collections.abc import Callable

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .structures import unravel


def best_of_level(
    logits: Tensor, deltas: Tensor, anchors: Tensor, *, num_classes: int, count: int, score_thresh: float
) -> tuple[Tensor, ...]:
    """Choose each image's best (anchor, class) pairs of a level, best first; nothing else is decoded.

    The paper takes at most 1,000 predictions of a level whose score is above .05.

    Args:
        logits: (N, A·K, H, W). deltas: (N, A·4, H, W). anchors: (H·W·A, 4).
        num_classes: K.
        count: how many pairs of an image at most.
        score_thresh: pairs with a score clearly below it may be left out.

    Returns:
        logits (N, C), −∞ where an image has fewer; classes (N, C); deltas and anchors (N, C, 4).
    """
    n, _, h, w = logits.shape
    logits = logits.view(n, -1, num_classes, h, w)  # (N, A, K, H, W)
    a = logits.shape[1]
    # Either order is that of the memory in one of the two formats, where flattening copies nothing.
    channels_last = logits.stride(2) == 1
    if channels_last:
        logits = logits.permute(0, 3, 4, 1, 2)  # (N, H, W, A, K)
    # A threshold on the logits spares the sigmoid of the rest. Its margin is for rounding, bfloat16's too: the scores
    # decide in the end.
    floor = _logit(score_thresh) - 0.1
    values, indices = top(logits.flatten(1), count, floor)  # (N, C)
    if channels_last:
        y, x, anchor, cls = unravel(indices, (h, w, a, num_classes))
    else:
        anchor, cls, y, x = unravel(indices, (a, num_classes, h, w))
    image = torch.arange(n, device=indices.device)[:, None]  # (N, 1)
    deltas = deltas.view(n, a, 4, h, w)[image, anchor, :, y, x]  # (N, C, 4)
    return values, cls, deltas, anchors[(y * w + x) * a + anchor]


def top(values: Tensor, count: int, floor: float) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of each row of (N, M) ``values`` in descending order, and their indices: (N, C) both.

    Values up to ``floor`` may be missing. A row with fewer than C is filled up with −∞.
    """
    # Picking out what is above the floor would synchronise with a GPU, and leave its number in a trace.
    if values.is_cuda or torch.jit.is_tracing():
        size = values.shape[1]  # a tensor while PyTorch traces
        best, indices = values.topk(size.clamp(max=count) if isinstance(size, Tensor) else min(count, size))
        return best.float(), indices
    rows = []
    for row in values:  # a CPU is slow to order millions of values
        indices = (row > floor).nonzero().squeeze(1)
        best, order = row[indices].float().topk(min(count, len(indices)))
        rows.append((best, indices[order]))
    all_values = pad_sequence([best for best, _ in rows], batch_first=True, padding_value=-math.inf)
    return all_values, pad_sequence([indices for _, indices in rows], batch_first=True)


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
    """Non-maximum suppression, class by class: drop what overlaps a better box of its class by more than a threshold.

    Args:
        image_size: (height, width) of the network's input.
        boxes: (C, 4), XYXY in pixels. scores, classes: (C,).
        iou_thresh: the IoU; .5 in the paper.
        max_detections: how many of the best are kept.
        clip: whether NMS sees boxes cut at the image's border, or, as in Detectron2, as they were predicted.
        nms: called with boxes, scores, classes and the threshold; gives the indices that are kept, best first.

    Returns:
        The detections, best first, with ``pred_boxes``, ``scores`` and ``pred_classes``.
    """
    candidates = Boxes(boxes)
    if clip:
        candidates.clip(image_size)
    keep = nms(candidates.tensor, scores, classes, iou_thresh)[:max_detections]
    return Instances(image_size, pred_boxes=candidates[keep], scores=scores[keep], pred_classes=classes[keep])


def _logit(probability: float) -> float:
    """log(p / (1 − p)), also at 0 and 1."""
    if probability <= 0:
        return -math.inf
    return math.inf if probability >= 1 else math.log(probability / (1 - probability))
