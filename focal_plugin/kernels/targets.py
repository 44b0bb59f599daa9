"""The targets of a batch: by two Triton kernels on a GPU, elsewhere by ``DenseTargets.from_matches``."""

from collections.abc import Sequence

import torch
from detectron2.structures import Instances
from torch import Tensor

from .. import structures
from ..structures import Anchors, DenseTargets

try:
    from . import targets_triton
except ImportError:  # PyTorch for CPUs, for Windows and for macOS comes without Triton
    targets_triton = None  # type: ignore[assignment]


def dense_targets(
    anchors: Anchors, matches: tuple[Tensor, Tensor], instances: Sequence[Instances], num_classes: int
) -> DenseTargets:
    """Return ``DenseTargets.from_matches`` of the same arguments, in few launches on a GPU. Synchronises once."""
    if targets_triton is None or not _uses_triton(anchors) or not len(anchors):
        return DenseTargets.from_matches(anchors, matches, instances, num_classes)
    matched, codes = matches  # (N, R) each
    n, device = len(matched), anchors.device
    # The boxes of all images are concatenated: the first box of image i has index first[i].
    first = torch.tensor([0, *(len(gt) for gt in instances)][:-1]).cumsum(0).to(device, non_blocking=True)  # (N,)
    classes = torch.cat([gt.gt_classes for gt in instances]).to(device, non_blocking=True)  # (G,)
    boxes = torch.cat([gt.gt_boxes.tensor for gt in instances]).to(device, non_blocking=True)  # (G, 4)
    shapes = [(n, a, h, w) for a, (h, w) in zip(anchors.num_cell_anchors, anchors.grid_sizes)]
    labels, is_positive, counts = targets_triton.label(codes, matched, first, classes, shapes, num_classes)
    numbers = structures.read_counts(counts)
    at = is_positive.nonzero_static(size=sum(numbers)).squeeze(1)  # (P,) into labels
    positives, of_anchors, of_boxes = targets_triton.gather(at, matched, first, boxes, anchors.flat, shapes)
    sizes = [n * len(level) for level in anchors.boxes]
    return DenseTargets(
        labels=[level.view(shape) for level, shape in zip(labels.split(sizes), shapes)],
        num_classes=num_classes,
        positives=list(positives.split(numbers)),
        anchors=of_anchors,
        gt_boxes=of_boxes,
        grid=anchors,
    )


def _uses_triton(anchors: Anchors) -> bool:
    return anchors.device.type == "cuda"
