"""Whether an exported file computes what its model does."""

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from detectron2.structures import Boxes
from torch import Tensor
from torchvision.ops import box_iou

from ..retinanet import FocalRetinaNet

_TOLERANCE = 1e-3  # of scores and IoU, and of raw maps relative to their largest value
_PIXELS, _RELATIVE = 1e-2, 1e-4  # of boxes, added up
_TIE = 1e-4  # scores this close may come in either order, and may fall on either side of a threshold


class ExportError(ValueError):
    """A model that cannot be exported, or whose exported file computes something else."""


class Candidates(NamedTuple):
    """The C boxes of an image that NMS may choose from.

    Where scores are equal, NMS has several right results: which of them a level's limit lets through, which of two
    boxes drops the other, and which come first depends on the order in which a library sorts. Equal scores are common:
    logits are equal where an image is flat, and saturated logits have a score of 1. So a file's detections are checked
    against the candidates, not against one result of NMS.

    Attributes:
        boxes: (C, 4), as NMS sees them. clipped: (C, 4), as they are returned.
        scores, classes: (C,).
        required: (C,) bool; False where a level's limit may leave the box out.
    """

    boxes: Tensor
    clipped: Tensor
    scores: Tensor
    classes: Tensor
    required: Tensor


def find_candidates(model: FocalRetinaNet, image: Tensor) -> Candidates:
    """Return the model's own candidates for NMS in a (3, H, W) image, on the CPU."""
    limit, generous = model.test_topk_candidates, copy.copy(model)
    generous.test_topk_candidates = 4 * limit
    levels = []
    with torch.no_grad():
        features, logits, deltas = _network(model, image)
        for this in logits:
            alone = [x if x is this else torch.full_like(x, -math.inf) for x in logits]
            ((boxes, scores, classes),) = generous.candidates(features, alone, deltas)  # best first
            least = scores[limit - 1] + _TIE if len(scores) > limit else 0
            levels.append((boxes, scores, classes, scores > least))
    boxes, scores, classes, required = (torch.cat(parts).cpu() for parts in zip(*levels))
    clipped = Boxes(boxes.clone())
    clipped.clip(tuple(image.shape[-2:]))
    return Candidates(clipped.tensor if model.clip_before_nms else boxes, clipped.tensor, scores, classes, required)


def expected_maps(model: FocalRetinaNet, image: Tensor) -> list[np.ndarray]:
    """Return the model's own logits and deltas of each level, as ``ExportedHeads`` orders them."""
    with torch.no_grad():
        _, logits, deltas = _network(model, image)
    return [x.cpu().numpy() for x in (*logits, *deltas)]


def _network(model: FocalRetinaNet, image: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The features, logits and deltas of each level of a (3, H, W) image."""
    features = model.features(model.preprocess_image([{"image": image}]).tensor)
    return features, *model.head(features)


def compare_maps(expected: Sequence[np.ndarray], found: Sequence[np.ndarray], names: Sequence[str]) -> None:
    """Compare logits and deltas, to 1e-3 and relative to the largest of a map.

    Raises:
        ExportError: a map has another shape, or differs by more.
    """
    for name, a, b in zip(names, expected, found, strict=True):
        if a.shape != b.shape:
            raise ExportError(f"{name} is {b.shape}, the model's {a.shape}")
        far = np.abs(a - b).max(initial=0)
        if not far <= _TOLERANCE * max(1, np.abs(a).max(initial=0)):
            raise ExportError(f"{name} differs by up to {far:.3g}")


def compare_detections(candidates: Candidates, found: Sequence[np.ndarray], model: FocalRetinaNet) -> None:
    """Check that the detections of a file are what NMS makes of the model's candidates, best first.

    That is, each is a candidate (boxes to 0.01 pixel and 1e-4 of a coordinate, scores to 1e-3); none overlaps another
    of its class; and each other candidate overlaps a better one of its class, or is beyond the limit of detections.

    Args:
        candidates: of the model.
        found: boxes (D, 4), scores (D,) and classes (D,) of the file.
        model: gives the thresholds and the limit of detections.

    Raises:
        ExportError: they are not; names the first detection that differs.
    """
    boxes, scores, classes = found
    if len(boxes) != len(scores) or len(scores) != len(classes):
        raise ExportError(f"{len(boxes)} boxes, {len(scores)} scores and {len(classes)} classes")
    if (np.diff(scores) > _TIE).any():
        raise ExportError("the detections are not in the order of their scores")
    if len(scores) > model.max_detections_per_image:
        raise ExportError(f"{len(scores)} detections; the model's limit is {model.max_detections_per_image}")
    kept = torch.tensor(_match(candidates, found, model.test_score_thresh), dtype=torch.int64)
    _check_overlaps(candidates, kept, model.test_nms_thresh)
    empty = (candidates.clipped[:, 2:] <= candidates.clipped[:, :2]).any(
        dim=1
    )  # NMS may keep them, to be dropped later
    least = model.test_score_thresh
    if len(scores) + int(empty.sum()) >= model.max_detections_per_image:
        least = max(least, scores[-1] if len(scores) else 1.0)
    needed = candidates.required & ~empty & (candidates.scores > least + _TIE)
    _check_missing(candidates, needed, torch.cat([kept, empty.nonzero().squeeze(1)]), model.test_nms_thresh)


def _match(candidates: Candidates, found: Sequence[np.ndarray], score_thresh: float) -> list[int]:
    """The index of each detection among the candidates; one whose score is at the threshold may be none of them."""
    left, indices = torch.ones_like(candidates.required), []
    for place, (box, score, cls) in enumerate(zip(*found)):
        box = torch.as_tensor(box)
        near = ((candidates.clipped - box).abs() <= _PIXELS + _RELATIVE * box.abs()).all(dim=1)
        near &= left & (candidates.classes == int(cls)) & ((candidates.scores - float(score)).abs() <= _TOLERANCE)
        if near.any():
            indices.append(int(near.nonzero()[0]))
            left[indices[-1]] = False
        elif not score <= score_thresh + _TIE:
            raise ExportError(f"its detection {place} is none of the model's: {_text(box, score, cls)}")
    return indices


def _check_overlaps(candidates: Candidates, kept: Tensor, nms_thresh: float) -> None:
    boxes, classes = candidates.boxes[kept], candidates.classes[kept]
    overlap = (box_iou(boxes, boxes) > nms_thresh + _TOLERANCE) & (classes[:, None] == classes)  # (D, D)
    for a, b in overlap.triu(diagonal=1).nonzero().tolist():
        raise ExportError(f"its detections {a} and {b}, both of class {classes[a]}, overlap: NMS drops one of them")


def _check_missing(candidates: Candidates, needed: Tensor, kept: Tensor, nms_thresh: float) -> None:
    """Check that each candidate of the (C,) bool ``needed`` is one of ``kept``, or overlaps one that is no worse."""
    boxes, _, scores, classes, _ = candidates
    overlap = box_iou(boxes, boxes[kept]) > nms_thresh - _TOLERANCE  # (C, D)
    overlap &= (classes[:, None] == classes[kept]) & (scores[kept] >= scores[:, None] - _TIE)
    for index in (needed & ~overlap.any(dim=1)).nonzero().flatten().tolist():
        text = _text(candidates.clipped[index], scores[index], classes[index])
        raise ExportError(f"a detection of the model's is missing: {text}")


def _text(box: Sequence, score: float, cls: int) -> str:
    return f"class {int(cls)}, score {float(score):.4f}, box {[round(float(x), 2) for x in box]}"
