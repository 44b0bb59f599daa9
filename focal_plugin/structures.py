"""The two things that flow between components: the anchors of an image size, and what a batch asks of each of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from detectron2.structures.boxes import Boxes, matched_pairwise_iou
from torch import Tensor

# A matcher's verdict on an anchor. In DenseTargets.labels a class index k ≥ 0 stands for POSITIVE and K (the number
# of classes) for NEGATIVE; IGNORED is the same in both.
IGNORED, NEGATIVE, POSITIVE = -1, 0, 1


def unravel(indices: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """As ``torch.unravel_index``, which has a GPU waited for: it copies the shape there."""
    places = []
    for size in reversed(shape[1:]):
        places.append(indices % size)
        indices = indices // size
    return indices, *reversed(places)


@dataclass(frozen=True)
class Anchors:
    """The anchors of one image size, and the grid they stand on when there is one.

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

    @classmethod
    def from_generator(cls, generator, features: Sequence[Tensor]) -> "Anchors":
        """Anchors for ``features``, one (N, C, H, W) map a level, from one of Detectron2's anchor generators."""
        boxes = [level.tensor for level in generator(features)]  # L × (H·W·A, 4)
        grid_sizes = [tuple(int(size) for size in feature.shape[-2:]) for feature in features]
        num_cell_anchors = [len(b) // max(h * w, 1) for b, (h, w) in zip(boxes, grid_sizes)]
        if not all(hasattr(generator, name) for name in ("strides", "cell_anchors", "offset")):
            return cls(boxes, grid_sizes, num_cell_anchors)
        cell_anchors = list(generator.cell_anchors)
        if any(cell.shape[-1] != 4 for cell in cell_anchors):  # rotated boxes have a fifth number
            return cls(boxes, grid_sizes, num_cell_anchors)
        return cls(boxes, grid_sizes, num_cell_anchors, list(generator.strides), cell_anchors, generator.offset)

    def __len__(self) -> int:
        """R, the number of anchors over all levels."""
        return sum(len(boxes) for boxes in self.boxes)

    def flatten_levels(self, values: Tensor) -> Tensor:
        """Reorder (N, R) values of the anchors into one vector: level after level, each in (N, A, H, W) order."""
        n, levels = len(values), values.split([len(boxes) for boxes in self.boxes], dim=1)
        return torch.cat(
            [
                level.view(n, h, w, a).permute(0, 3, 1, 2).reshape(-1)
                for level, (h, w), a in zip(levels, self.grid_sizes, self.num_cell_anchors)
            ]
        )  # (N·R,)

    @property
    def device(self) -> torch.device:
        """Where the boxes live."""
        return self.boxes[0].device


@dataclass(frozen=True)
class DenseTargets:
    """What a batch asks of each anchor.

    Attributes:
        labels: one (N, A, H, W) int64 tensor a level: a class in [0, K), K for background, IGNORED for neither.
        num_classes: K.
        positives: one (P_l,) int64 tensor a level: flat indices of the positives into that level's ``labels``.
        anchors: (P, 4) float32, the positives' anchors, levels one after another in the order of ``positives``.
        gt_boxes: (P, 4) float32, the boxes matched to them.
        grid: all the anchors that the labels are of, for a loss that compares them with each other; None if unknown.
        quality: (P,) float32 in [0, 1], how well each positive's box is predicted; None unless the loss asks for it.
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
        """P, over all images and levels. Known on the host: reading it does not wait for the GPU."""
        return len(self.gt_boxes)

    def gather(self, dense: Sequence[Tensor], places: Sequence[Tensor] | None = None) -> Tensor:
        """The rows of some anchors of per-level (N, A·C, H, W) or (N, A, C, H, W) predictions, as (P, C).

        Args:
            dense: the predictions, one tensor a level.
            places: for each level, flat indices into its ``labels``; those of the positives by default, whose rows come
                in the order of ``gt_boxes``.
        """
        rows = []
        for level, labels, indices in zip(dense, self.labels, self.positives if places is None else places):
            n, a, h, w = labels.shape
            level = level.view(n, a, -1, h, w)  # (N, A, C, H, W), whatever the memory format
            image, anchor, y, x = unravel(indices, (n, a, h, w))
            rows.append(level[image, anchor, :, y, x])  # (P_l, C)
        return torch.cat(rows)

    def with_quality(self, boxes: Tensor) -> "DenseTargets":
        """The same targets, and as each positive's quality the IoU of its predicted box with ``gt_boxes``.

        Args:
            boxes: (P, 4), the predicted boxes; no gradient goes through them. Two boxes of no size have IoU 0.
        """
        iou = matched_pairwise_iou(Boxes(boxes.detach()), Boxes(self.gt_boxes))  # (P,), NaN for 0 / 0
        return replace(self, quality=iou.nan_to_num(nan=0.0).clamp(0, 1))

    @classmethod
    def from_matches(
        cls, anchors: Anchors, matches: Sequence[tuple[Tensor, Tensor]], instances: Sequence, num_classes: int
    ) -> "DenseTargets":
        """Targets of a batch from a matcher's ``(matched, labels)`` of each image.

        Args:
            anchors: the anchors that were matched, R in all.
            matches: for each image the (R,) index of the matched box and the (R,) label of each anchor.
            instances: for each image its ``Instances``, with ``gt_boxes`` and ``gt_classes``.
            num_classes: K.
        """
        codes = torch.stack([labels for _, labels in matches])  # (N, R)
        n, device = len(codes), codes.device
        anchor_ids = torch.arange(len(anchors), device=device).expand(n, -1)  # (N, R)

        # From here on everything is one flat vector: level after level, each in the (N, A, H, W) order of the logits.
        codes, anchor_ids = anchors.flatten_levels(codes), anchors.flatten_levels(anchor_ids)  # (N·R,)
        flat = torch.where(codes == IGNORED, IGNORED, num_classes)  # (N·R,) int64
        positions = (codes == POSITIVE).nonzero().squeeze(1)  # (P,), the one place that has to wait for a GPU

        shapes = [(n, a, h, w) for a, (h, w) in zip(anchors.num_cell_anchors, anchors.grid_sizes)]
        sizes = [n * len(boxes) for boxes in anchors.boxes]
        ends = torch.tensor(sizes, device=device).cumsum(0)  # (L,)
        level = torch.bucketize(positions, ends, right=True)  # (P,)
        image = torch.cat([torch.arange(n, device=device).repeat_interleave(s // n) for s in sizes])[positions]
        anchor_ids = anchor_ids[positions]  # (P,)

        # Boxes of all images one after another: the first box of image i has index first[i].
        first = torch.tensor([0, *(len(gt) for gt in instances)][:-1], device=device).cumsum(0)  # (N,)
        matched = torch.stack([index for index, _ in matches])[image, anchor_ids] + first[image]  # (P,)
        flat[positions] = torch.cat([gt.gt_classes for gt in instances])[matched]
        counts = torch.bincount(level, minlength=len(sizes)).tolist()
        starts = ends - torch.tensor(sizes, device=device)
        return cls(
            labels=[labels.view(shape) for labels, shape in zip(flat.split(sizes), shapes)],
            num_classes=num_classes,
            positives=list((positions - starts[level]).split(counts)),
            anchors=torch.cat(anchors.boxes)[anchor_ids],
            gt_boxes=torch.cat([gt.gt_boxes.tensor for gt in instances])[matched],
            grid=anchors,
        )
