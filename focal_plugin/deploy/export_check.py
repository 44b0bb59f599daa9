"""Whether an exported file computes what its model does."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

from ..inference import suppress
from ..retinanet import FocalRetinaNet

_TOLERANCE = 1e-3  # of scores, and of raw maps relative to their largest value
_PIXELS, _RELATIVE = 1e-2, 1e-4  # of boxes, added up
_TIE = 1e-4  # scores that are so close may change places, and may fall on either side of a threshold


class ExportError(ValueError):
    """A model that cannot be exported, or whose exported file computes something else."""


def expected_detections(model: FocalRetinaNet, image: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the model's own boxes (D, 4), scores (D,) and classes (D,) in a (3, H, W) image, best first.

    Boxes are clipped to the image. Those that are empty then, which the model drops in the end, are included: they
    count towards its limit of detections.

    NMS goes class by class here. If there are few boxes, Detectron2's moves the classes apart in float32 instead, which
    rounds the coordinates of the last of 80 classes to 1/128 pixel, enough to change what NMS keeps.
    """
    with torch.no_grad():
        features, logits, deltas = _network(model, image)
        ((boxes, scores, classes),) = model.candidates(features, logits, deltas)
    size = tuple(image.shape[-2:])
    found = suppress(
        size,
        boxes,
        scores,
        classes,
        iou_thresh=model.test_nms_thresh,
        max_detections=model.max_detections_per_image,
        clip=model.clip_before_nms,
        nms=_nms_by_class,
    )
    found.pred_boxes.clip(size)
    return tuple(x.cpu().numpy() for x in (found.pred_boxes.tensor, found.scores, found.pred_classes))


def _nms_by_class(boxes: Tensor, scores: Tensor, classes: Tensor, iou_thresh: float) -> Tensor:
    """Return the indices that NMS keeps when it sees one class at a time, best first; of equal scores, the lower."""
    kept = [classes.new_zeros(0)]
    for cls in classes.unique():
        indices = (classes == cls).nonzero().squeeze(1)
        kept.append(indices[nms(boxes[indices], scores[indices], iou_thresh)])
    indices = torch.cat(kept).sort().values
    return indices[scores[indices].argsort(descending=True, stable=True)]


def expected_maps(model: FocalRetinaNet, image: Tensor) -> list[np.ndarray]:
    """The model's own logits and deltas of each level, as ``ExportedHeads`` orders them."""
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


def compare_detections(expected: Sequence[np.ndarray], found: Sequence[np.ndarray], model: FocalRetinaNet) -> None:
    """Compare boxes (to 0.01 pixel and 1e-4 of a coordinate), order, classes and scores (to 1e-3).

    Detections of nearly equal score may have changed places. Those whose score is nearly the lowest that the threshold
    and the limit of detections let through may be missing.

    Args:
        expected: boxes (D, 4), scores (D,) and classes (D,), empty boxes included.
        found: the same, without empty boxes.
        model: whose ``test_score_thresh`` and ``max_detections_per_image`` give the lowest score.

    Raises:
        ExportError: they differ by more.
    """
    boxes, scores, classes = found
    if len(boxes) != len(scores) or len(scores) != len(classes):
        raise ExportError(f"{len(boxes)} boxes, {len(scores)} scores and {len(classes)} classes")
    if (np.diff(scores) > _TIE).any():
        raise ExportError("the detections are not in the order of their scores")
    least = model.test_score_thresh
    for other in (expected[1], scores):
        if len(other) == model.max_detections_per_image:
            least = max(least, other[-1])
    not_empty = (expected[0][:, 2:] > expected[0][:, :2]).all(axis=1)
    expected = [values[not_empty] for values in expected]
    left = list(range(len(scores)))
    for place, detection in enumerate(zip(*expected)):
        same = next((i for i in left if _same(place, detection, i, (boxes[i], scores[i], classes[i]))), None)
        if same is not None:
            left.remove(same)
        elif detection[1] > least + _TIE:
            raise ExportError(f"the model's detection {place} is not among its {len(scores)}: {_text(detection)}")
    extra = [i for i in left if scores[i] > least + _TIE]
    if extra:
        detection = boxes[extra[0]], scores[extra[0]], classes[extra[0]]
        raise ExportError(f"its detection {extra[0]} is not among the model's {len(expected[1])}: {_text(detection)}")


def _same(place: int, expected: Sequence, other_place: int, found: Sequence) -> bool:
    close = _TOLERANCE if place == other_place else _TIE
    return (
        expected[2] == found[2]
        and abs(expected[1] - found[1]) <= close
        and np.allclose(expected[0], found[0], rtol=_RELATIVE, atol=_PIXELS)
    )


def _text(detection: Sequence) -> str:
    box, score, cls = detection
    return f"class {cls}, score {score:.4f}, box {[round(float(x), 2) for x in box]}"
