"""Whether an exported file computes what its model does."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes
from torch import Tensor
from torchvision.ops import box_iou

from ..files.progress import progress
from ..retinanet import FocalRetinaNet
from .export_formats import Run
from .export_graph import ImageInput
from .export_metadata import output_names


class ExportError(ValueError):
    """A model that cannot be exported, or whose exported file computes something else."""


class Tolerance(NamedTuple):
    """How far a file may be from its model.

    Attributes:
        scores: the largest difference of a score.
        pixels, sides: the largest difference of a box's coordinates, in pixels plus a share of its longer side.
        overlaps: the largest difference of an IoU.
        ties: scores this close may come in either order, and may fall on either side of a threshold.
        maps: the largest difference of logits and deltas, as a share of a map's largest value, or of 1.
    """

    scores: float
    pixels: float
    sides: float
    overlaps: float
    ties: float
    maps: float


FLOAT32 = Tolerance(scores=1e-3, pixels=1e-2, sides=1e-4, overlaps=1e-3, ties=1e-4, maps=1e-3)
# Several times what trained models showed; scores of two boxes differ by twice the tolerance.
FLOAT16 = Tolerance(scores=1e-2, pixels=0.1, sides=1e-2, overlaps=5e-2, ties=2e-2, maps=1e-2)
TOLERANCES = {"float32": FLOAT32, "float16": FLOAT16}


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


def check(
    model: FocalRetinaNet,
    run: Run,
    images: Mapping[str, Tensor],
    raw: bool,
    image_input: ImageInput,
    tolerance: Tolerance = FLOAT32,
) -> None:
    """Compare an exported model and ``model`` on each image, as it is and reflected to a larger size.

    In a batch, the larger one goes together with an image that is empty and its own mirror image.

    Raises:
        ExportError: they differ, or no image has a detection to compare.
    """
    found_any = raw
    for name, image in progress(images.items(), desc="Comparing"):
        for packed in map(image_input.pack, _views(model, image, image_input.batch)):
            views = image_input.unpack(packed).float()  # (N, C, H, W)
            expected = expected_maps(model, views) if raw else [find_candidates(model, x, tolerance) for x in views]
            try:
                found = run(packed)
                if raw:
                    compare_maps(expected, found, output_names(model, raw, image_input.batch), tolerance)
                else:
                    parts = split_images(found, len(views)) if image_input.batch else [found]
                    for candidates, part in zip(expected, parts, strict=True):
                        compare_detections(candidates, part, model, tolerance)
            except Exception as error:  # running the file may fail, too
                size = f"a batch of {len(views)}, " * image_input.batch + " × ".join(map(str, views.shape[-2:]))
                raise ExportError(
                    f"The exported file does not compute what the model does, and is not kept. On {name}, {size}: "
                    f"{error}" + ". With --precision float32 it may." * (tolerance is FLOAT16)
                ) from error
            found_any = found_any or len(found[0]) > 0
    if not found_any:
        raise ExportError(
            f"The model detects nothing in {', '.join(images)}, so the file could not be compared with it and is not "
            "kept: give --image files with objects."
        )


def _views(model: FocalRetinaNet, image: Tensor, batch: bool) -> tuple[Tensor, Tensor]:
    """The (N, C, H, W) images to compare on: ``image`` alone, and a larger one or a batch of larger ones."""
    image = image.to(model.device)
    height, width = image.shape[-2:]
    larger = F.pad(image[None], (0, width // 3, 0, height // 4), mode="reflect")
    if batch:
        larger = torch.cat((larger, model.pixel_mean.expand_as(larger), larger.flip(-1)))
    return image[None], larger


def split_images(found: Sequence[np.ndarray], num_images: int) -> list[tuple[np.ndarray, ...]]:
    """Split a batch's detections into boxes, scores and classes of each image.

    Raises:
        ExportError: the counts, the last of ``found``, are not those of ``num_images`` images.
    """
    *found, counts = found
    if counts.shape != (num_images,) or counts.sum() != len(found[0]):
        raise ExportError(f"the counts of {num_images} images and {len(found[0])} boxes are {counts.tolist()}")
    return list(zip(*(np.split(x, counts.cumsum()[:-1]) for x in found)))


def find_candidates(model: FocalRetinaNet, image: Tensor, tolerance: Tolerance = FLOAT32) -> Candidates:
    """Return the model's own candidates for NMS in a (3, H, W) image, on the CPU."""
    limit, generous = model.test_topk_candidates, copy.copy(model)
    generous.test_topk_candidates = 4 * limit
    levels = []
    with torch.no_grad():
        features, logits, deltas = _network(model, image[None])
        for this in logits:
            alone = [x if x is this else torch.full_like(x, -math.inf) for x in logits]
            ((boxes, scores, classes),) = generous.candidates(features, alone, deltas)  # best first
            least = scores[limit - 1] + tolerance.ties if len(scores) > limit else 0
            levels.append((boxes, scores, classes, scores > least))
    boxes, scores, classes, required = (torch.cat(parts).cpu() for parts in zip(*levels))
    clipped = Boxes(boxes.clone())
    clipped.clip(tuple(image.shape[-2:]))
    return Candidates(clipped.tensor if model.clip_before_nms else boxes, clipped.tensor, scores, classes, required)


def expected_maps(model: FocalRetinaNet, images: Tensor) -> list[np.ndarray]:
    """Return the model's own logits and deltas of each level, as ``ExportedHeads`` orders them."""
    with torch.no_grad():
        _, logits, deltas = _network(model, images)
    return [x.cpu().numpy() for x in (*logits, *deltas)]


def _network(model: FocalRetinaNet, images: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The features, logits and deltas of each level of (N, C, H, W) images."""
    features = model.features(model.preprocess_image([{"image": image} for image in images]).tensor)
    return features, *model.head(features)


def compare_maps(
    expected: Sequence[np.ndarray], found: Sequence[np.ndarray], names: Sequence[str], tolerance: Tolerance = FLOAT32
) -> None:
    """Compare logits and deltas.

    Raises:
        ExportError: a map has another shape, or differs by more.
    """
    for name, a, b in zip(names, expected, found, strict=True):
        if a.shape != b.shape:
            raise ExportError(f"{name} is {b.shape}, the model's {a.shape}")
        far = np.abs(a - b).max(initial=0)
        if not far <= tolerance.maps * max(1, np.abs(a).max(initial=0)):
            raise ExportError(f"{name} differs by up to {far:.3g}")


def compare_detections(
    candidates: Candidates, found: Sequence[np.ndarray], model: FocalRetinaNet, tolerance: Tolerance = FLOAT32
) -> None:
    """Check that the detections of a file are what NMS makes of the model's candidates, best first.

    That is, each is a candidate; none overlaps another of its class; and each other candidate overlaps a better one of
    its class, or is beyond the limit of detections. ``tolerance`` says how exactly.

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
    if (np.diff(scores) > FLOAT32.ties).any():
        raise ExportError("the detections are not in the order of their scores")
    if len(scores) > model.max_detections_per_image:
        raise ExportError(f"{len(scores)} detections; the model's limit is {model.max_detections_per_image}")
    kept = torch.tensor(_match(candidates, found, model.test_score_thresh, tolerance), dtype=torch.int64)
    _check_overlaps(candidates, kept, model.test_nms_thresh + tolerance.overlaps)
    # NMS may keep boxes without an area, to be dropped later.
    empty = (candidates.clipped[:, 2:] <= candidates.clipped[:, :2]).any(dim=1)
    least = model.test_score_thresh
    if len(scores) + int(empty.sum()) >= model.max_detections_per_image:
        least = max(least, scores[-1] if len(scores) else 1.0)
    needed = candidates.required & ~empty & (candidates.scores > least + tolerance.ties)
    kept = torch.cat([kept, empty.nonzero().squeeze(1)])
    _check_missing(candidates, needed, kept, model.test_nms_thresh - tolerance.overlaps, tolerance.ties)


def _match(candidates: Candidates, found: Sequence[np.ndarray], score_thresh: float, tolerance: Tolerance) -> list[int]:
    """The index of each detection among the candidates; one whose score is at the threshold may be none of them."""
    left, indices = torch.ones_like(candidates.required), []
    for place, (box, score, cls) in enumerate(zip(*found)):
        box = torch.as_tensor(box)
        far = (candidates.clipped - box).abs().amax(dim=1)
        near = far <= tolerance.pixels + tolerance.sides * (box[2:] - box[:2]).max()
        near &= left & (candidates.classes == int(cls)) & ((candidates.scores - float(score)).abs() <= tolerance.scores)
        if near.any():
            indices.append(int(far.masked_fill(~near, math.inf).argmin()))
            left[indices[-1]] = False
        elif not score <= score_thresh + tolerance.ties:
            raise ExportError(f"its detection {place} is none of the model's: {_text(box, score, cls)}")
    return indices


def _check_overlaps(candidates: Candidates, kept: Tensor, limit: float) -> None:
    boxes, classes = candidates.boxes[kept], candidates.classes[kept]
    overlap = (box_iou(boxes, boxes) > limit) & (classes[:, None] == classes)  # (D, D)
    for a, b in overlap.triu(diagonal=1).nonzero().tolist():
        raise ExportError(f"its detections {a} and {b}, both of class {classes[a]}, overlap: NMS drops one of them")


def _check_missing(candidates: Candidates, needed: Tensor, kept: Tensor, limit: float, ties: float) -> None:
    """Check that each candidate of the (C,) bool ``needed`` is one of ``kept``, or overlaps one that is no worse."""
    boxes, _, scores, classes, _ = candidates
    overlap = box_iou(boxes, boxes[kept]) > limit  # (C, D)
    overlap &= (classes[:, None] == classes[kept]) & (scores[kept] >= scores[:, None] - ties)
    for index in (needed & ~overlap.any(dim=1)).nonzero().flatten().tolist():
        text = _text(candidates.clipped[index], scores[index], classes[index])
        raise ExportError(f"a detection of the model's is missing: {text}")


def _text(box: Sequence, score: float, cls: int) -> str:
    return f"class {int(cls)}, score {float(score):.4f}, box {[round(float(x), 2) for x in box]}"
