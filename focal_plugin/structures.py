"""The two structures that components exchange: the anchors of an image size, and the targets of a batch for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from detectron2.structures import Boxes, Instances
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor

T = TypeVar("T")

# The labels that a matcher gives to anchors (section 4): neither object nor background, background, object.
# DenseTargets.labels have a class index in [0, K) instead of POSITIVE, K instead of NEGATIVE, and the same IGNORED.
IGNORED, NEGATIVE, POSITIVE = -1, 0, 1


def unravel(indices: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Return the coordinates of flat ``indices``, without the synchronisation of ``torch.unravel_index``."""
    coordinates = []
    for size in reversed(shape[1:]):
        coordinates.append(indices % size)
        indices = indices // size
    return indices, *reversed(coordinates)


def read_counts(counts: Tensor) -> list[int]:
    """Copy the (L,) numbers of positives to the host: the only synchronisation between a batch and its losses."""
    return counts.tolist()


@dataclass(frozen=True, eq=False)
class Anchors:
    """The R anchors of one image size, and their regular grid if there is one. Cached, so never change them in place.

    Attributes:
        boxes: one (H·W·A, 4) float32 tensor a level, XYXY in pixels of the network's input.
        grid_sizes: (H, W) of each level's feature map.
        num_cell_anchors: A of each level.
        strides: pixels between neighbouring locations, one a level; None for a generator without a regular grid.
        cell_anchors: one (A, 4) tensor a level, the anchors of a location at the origin; None as above.
        offset: the first location's distance from the image's corner, in strides.
    """

    boxes: list[Tensor]
    grid_sizes: list[tuple[int, int]]
    num_cell_anchors: list[int]
    strides: list[int] | None = None
    cell_anchors: list[Tensor] | None = None
    offset: float = 0.0
    _derived: dict[Callable[..., Any], Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_generator(cls, generator: Any, features: Sequence[Tensor]) -> "Anchors":
        """Build the anchors for ``features``, one (N, C, H, W) map a level, with one of Detectron2's generators."""
        # Section 4: the same A anchors at every location of a level, in the order of the locations, row by row.
        boxes = [level.tensor for level in generator(features)]  # L × (H·W·A, 4)
        grid_sizes = [(int(feature.shape[-2]), int(feature.shape[-1])) for feature in features]
        num_cell_anchors = [len(b) // max(h * w, 1) for b, (h, w) in zip(boxes, grid_sizes)]
        anchors = cls(boxes, grid_sizes, num_cell_anchors)
        if not all(hasattr(generator, name) for name in ("strides", "cell_anchors", "offset")):
            return anchors
        cells = list(generator.cell_anchors)
        if any(cell.shape[-1] != 4 for cell in cells):  # rotated boxes have a fifth number
            return anchors
        return replace(anchors, strides=list(generator.strides), cell_anchors=cells, offset=generator.offset)

    def __len__(self) -> int:
        """R, the number of anchors over all levels."""
        return sum(len(boxes) for boxes in self.boxes)

    @cached_property
    def flat(self) -> Tensor:
        """The (R, 4) boxes of all levels, concatenated once."""
        return torch.cat(self.boxes)

    def derived(self, make: Callable[["Anchors"], T]) -> T:
        """Return ``make(self)``, computed once: what a matcher can prepare from the anchors alone."""
        if make not in self._derived:
            self._derived[make] = make(self)
        return self._derived[make]

    def flatten_levels(self, values: Tensor) -> Tensor:
        """Reorder (N, R) values of the anchors into (N·R,): level after level, each in (N, A, H, W) order."""
        n, levels = len(values), values.split([len(boxes) for boxes in self.boxes], dim=1)
        return torch.cat(
            [
                level.view(n, h, w, a).permute(0, 3, 1, 2).reshape(-1)
                for level, (h, w), a in zip(levels, self.grid_sizes, self.num_cell_anchors)
            ]
        )  # (N·R,)

    @property
    def device(self) -> torch.device:
        """The device of the boxes."""
        return self.boxes[0].device


@dataclass(frozen=True)
class DenseTargets:
    """The targets of a batch: a class, background or "ignored" for each anchor, and a box for each positive.

    Attributes:
        labels: one (N, A, H, W) int64 tensor a level: a class in [0, K), K for background, or IGNORED.
        num_classes: K.
        positives: one (P_l,) int64 tensor a level: flat indices of the positives into that level's ``labels``.
        anchors: (P, 4) float32, the positives' anchors, levels one after another in the order of ``positives``.
        gt_boxes: (P, 4) float32, the boxes matched to them.
        grid: the R anchors, for a loss that compares them with each other, as NMS does; None if unknown.
        quality: (P,) float32 in [0, 1], the IoU of each predicted box with ``gt_boxes``; None unless a loss needs it.
    """

    labels: list[Tensor]
    num_classes: int
    positives: list[Tensor]
    anchors: Tensor
    gt_boxes: Tensor
    grid: Anchors | None = None
    quality: Tensor | None = None

    @property
    def num_positives(self) -> int:
        """P, over all images and levels. A shape, known on the host: reading it does not synchronise."""
        return len(self.gt_boxes)

    def gather(self, dense: Sequence[Tensor], indices: Sequence[Tensor] | None = None) -> Tensor:
        """Collect the predictions of some anchors, the positives by default, as (P, C).

        Args:
            dense: one (N, A·C, H, W) or (N, A, C, H, W) tensor a level.
            indices: for each level, flat indices into its ``labels``; the rows come in this order. By default
                ``positives``, in the order of ``gt_boxes``.
        """
        rows = []
        for level, labels, chosen in zip(dense, self.labels, self.positives if indices is None else indices):
            n, a, h, w = labels.shape
            level = level.view(n, a, -1, h, w)  # (N, A, C, H, W), whatever the memory format
            image, anchor, y, x = unravel(chosen, (n, a, h, w))
            rows.append(level[image, anchor, :, y, x])  # (P_l, C)
        return torch.cat(rows)

    def with_quality(self, boxes: Tensor) -> "DenseTargets":
        """Return these targets with ``quality``, the IoU of each positive's predicted box with its ground truth.

        ``boxes`` are (P, 4); no gradient goes through them. Two boxes without area have IoU 0.
        """
        iou = matched_pairwise_iou(Boxes(boxes.detach()), Boxes(self.gt_boxes))  # (P,), NaN for 0 / 0
        return replace(self, quality=iou.nan_to_num(nan=0.0).clamp(0, 1))

    @classmethod
    def from_matches(
        cls,
        anchors: Anchors,
        matches: tuple[Tensor, Tensor],
        instances: Sequence[Instances],
        num_classes: int,
    ) -> "DenseTargets":
        """Build the targets of a batch from what a matcher found. Synchronises once.

        Args:
            anchors: the anchors that were matched, R in all.
            matches: the (N, R) index of each anchor's box in its image, and the (N, R) labels.
            instances: for each image its ``Instances``, with ``gt_boxes`` and ``gt_classes``, on any device.
            num_classes: K.
        """
        (matched, codes), device = matches, anchors.device
        n = len(matched)
        # One flat vector: level after level, each in the (N, A, H, W) order of the logits.
        flat = anchors.flatten_levels(codes)  # (N·R,) int8
        shapes = [(n, a, h, w) for a, (h, w) in zip(anchors.num_cell_anchors, anchors.grid_sizes)]
        sizes = [n * len(boxes) for boxes in anchors.boxes]
        is_positive = flat == POSITIVE
        counts = read_counts(torch.stack([level.count_nonzero() for level in is_positive.split(sizes)]))
        at = is_positive.nonzero_static(size=sum(counts)).squeeze(1)  # (P,) into flat

        # Which image and which anchor each positive is. Anchors are in (H, W, A) order, the labels in (N, A, H, W).
        # What differs between the levels is a table, from which each positive has its level's column.
        table, start = [], 0
        for (_, a, h, w), size in zip(shapes, sizes):
            table.append([n * start, start, a, h * w])
            start += size // n
        columns = torch.tensor(table).T.repeat_interleave(torch.tensor(counts), dim=1, output_size=len(at))  # (4, P)
        first_flat, first_anchor, num_cell_anchors, locations = columns.to(device, non_blocking=True)
        local = at - first_flat  # (P,) into the level's labels
        rest = local % (num_cell_anchors * locations)
        image = local // (num_cell_anchors * locations)
        index = first_anchor + rest % locations * num_cell_anchors + rest // locations  # (P,) into the R anchors

        # The boxes of all images are concatenated: the first box of image i has index first[i].
        first = torch.tensor([0, *(len(gt) for gt in instances)][:-1]).cumsum(0).to(device, non_blocking=True)  # (N,)
        box = matched[image, index] + first[image]  # (P,)
        classes = torch.cat([gt.gt_classes for gt in instances]).to(device)  # (G,)
        # Background is label K and not a class of its own: all K sigmoids of such an anchor have target 0 (section 4).
        labels = torch.where(flat == IGNORED, IGNORED, num_classes)  # (N·R,) int64
        labels[at] = classes[box]
        return cls(
            labels=[level.view(shape) for level, shape in zip(labels.split(sizes), shapes)],
            num_classes=num_classes,
            positives=list(local.split(counts)),
            anchors=anchors.flat[index],
            gt_boxes=torch.cat([gt.gt_boxes.tensor for gt in instances]).to(device)[box],
            grid=anchors,
        )
