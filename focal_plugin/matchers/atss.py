"""ATSS: a matching rule that computes an IoU threshold for each box (Zhang et al., CVPR 2020)."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..kernels.grid_pairs import elementwise_iou, pack_pairs, unpack_pairs
from ..registry import ANCHOR_MATCHER_REGISTRY
from ..structures import NEGATIVE, POSITIVE, Anchors
from .ignore_regions import ignore_covered

_BOXES_AT_ONCE = 4096  # about 200 MB of temporaries
_DISTANCES_AT_ONCE = 2**19  # of anchors without a grid


@ANCHOR_MATCHER_REGISTRY.register()
class ATSSMatcher:
    """Adaptive training sample selection, as in the authors' code.

    The candidates of a box are all anchors at the ``topk`` locations of each level that are nearest to its centre. Its
    threshold is the mean plus the standard deviation (divided by n − 1) of their IoU with the box. Candidates that
    reach it, overlap the box and have their centre inside are positive. All other anchors are background; none is
    ignored. An anchor that is positive for several boxes is matched to the one of the best IoU, the first of equals. Of
    locations equally near, upper ones come first, then left ones.

    Args:
        topk: locations a level, at least 1 (else a ValueError); 9 in the paper.
    """

    @configurable
    def __init__(self, *, topk: int = 9):
        if topk < 1:
            raise ValueError(f"MODEL.FOCAL.MATCHER.TOPK (topk) is {topk}; expected 1 or more locations a level.")
        self.topk = topk

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, object]:
        return {"topk": cfg.MODEL.FOCAL.MATCHER.TOPK}

    def __call__(self, anchors: Anchors, instances: Instances | None = None) -> tuple[Tensor, Tensor]:
        """Match the boxes of one image; a TypeError for a matrix of IoU.

        Returns ``matched`` (R,) int64, the index of each positive anchor's box and 0 for others; ``labels`` (R,) int8.
        """
        if instances is None or not isinstance(anchors, Anchors):
            raise TypeError(
                "ATSSMatcher chooses anchors by where they are, which a matrix of IoU does not tell: call it with "
                "(Anchors, Instances). For Detectron2's own RPN and RetinaNet, use IgnoreBandMatcher."
            )
        ((matched, labels),) = zip(*self._match(anchors, [instances.gt_boxes.tensor]))
        return matched, labels

    def match_batch(
        self, anchors: Anchors, gt_instances: Sequence[Instances], regions: Sequence[Boxes | None], min_ioa: float
    ) -> tuple[Tensor, Tensor]:
        """Match a batch without a loop over its boxes, and ignore the negatives that ``regions`` cover.

        Returns ``matched`` (N, R) int64 and ``labels`` (N, R) int8, the same as matching image by image.
        """
        matched, labels = self._match(
            anchors, [instances.gt_boxes.tensor.to(anchors.device) for instances in gt_instances]
        )
        for image, areas in enumerate(regions):
            if areas is not None:
                labels[image] = ignore_covered(labels[image], anchors, areas.to(labels.device), min_ioa)
        return matched, labels

    def _match(self, anchors: Anchors, images: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Match the (G_i, 4) boxes of N images, and return ``matched`` and ``labels``, both (N, R)."""
        n, r, device = len(images), len(anchors), anchors.device
        # The image of each box and its index in it, made on the host, which knows how many boxes an image has.
        owners = [(i, g) for i, boxes in enumerate(images) for g in range(len(boxes))]
        image, index = torch.tensor(owners, dtype=torch.int64).view(-1, 2).to(device, non_blocking=True).unbind(1)
        keys = torch.zeros(n * r, dtype=torch.int64, device=device)
        chunks = (part.split(_BOXES_AT_ONCE) for part in (torch.cat(images), image, index))
        for boxes, of_image, of_box in zip(*chunks):
            candidates = self._candidates(boxes, anchors)  # (G, C)
            num_candidates = candidates.shape[1]
            candidates = candidates.flatten()  # (G·C,), as all that follows
            box = torch.arange(len(boxes), device=device).repeat_interleave(num_candidates)
            iou = elementwise_iou(boxes.index_select(0, box), anchors.flat.index_select(0, candidates))
            reaches = _reaches_threshold(iou.view(len(boxes), num_candidates)).flatten()
            inside = _center_is_inside(anchors.flat.index_select(0, candidates), boxes.index_select(0, box))
            found = torch.where(reaches & inside, pack_pairs(iou, of_box.index_select(0, box)), 0)
            keys.scatter_reduce_(0, of_image.index_select(0, box) * r + candidates, found, "amax")
        labels = torch.where(keys > 0, POSITIVE, NEGATIVE).to(torch.int8)
        return unpack_pairs(keys)[1].view(n, r), labels.view(n, r)

    def _candidates(self, boxes: Tensor, anchors: Anchors) -> Tensor:
        """Return the (G, C) indices of each box's candidates, the anchors at the nearest locations of each level."""
        centers = boxes.double().view(-1, 2, 2).mean(dim=1)  # (G, 2) as (x, y)
        candidates, first = [], 0
        for level, (level_boxes, num_cell_anchors) in enumerate(zip(anchors.boxes, anchors.num_cell_anchors)):
            if len(level_boxes):
                if anchors.cell_anchors is None:
                    nearest = self._nearest_anywhere(centers, level_boxes.view(-1, num_cell_anchors, 4))
                else:
                    nearest = self._nearest_on_grid(centers, anchors, level)
                index = nearest[:, :, None] * num_cell_anchors + torch.arange(num_cell_anchors, device=boxes.device)
                candidates.append(index.flatten(1) + first)  # (G, k·A)
            first += len(level_boxes)
        return torch.cat([*candidates, centers.new_zeros(len(boxes), 0).long()], dim=1)

    def _nearest_on_grid(self, centers: Tensor, anchors: Anchors, level: int) -> Tensor:
        """Return the (G, k) indices of the nearest locations of a regular grid.

        A location outside the k nearest columns has k nearer locations in its own row; likewise for rows. So it is
        enough to compare the k² locations where the k nearest columns and rows cross.
        """
        assert anchors.strides is not None and anchors.cell_anchors is not None
        (height, width), stride = anchors.grid_sizes[level], anchors.strides[level]
        cells = anchors.cell_anchors[level].double().view(-1, 2)  # (2A, 2), the corners
        center = (centers - cells.mean(dim=0)) / stride - anchors.offset  # (G, 2) in cells
        column, dx = self._nearest_of_axis(center[:, 0], width)  # (G, kx)
        row, dy = self._nearest_of_axis(center[:, 1], height)  # (G, ky)
        distances = (dy[:, :, None] ** 2 + dx[:, None] ** 2).flatten(1)  # (G, ky·kx), in the order of the locations
        locations = (row[:, :, None] * width + column[:, None]).flatten(1)
        return locations.gather(1, self._smallest(distances))

    def _nearest_of_axis(self, center: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return the k integers in [0, size) nearest to each (G,) ``center``, ascending, and their offsets from it."""
        k = min(self.topk, size)
        start = (center - k / 2).ceil().nan_to_num(0).clamp(0, size - k).long()  # of two equally near, the lower
        index = start[:, None] + torch.arange(k, device=center.device)  # (G, k)
        return index, index - center[:, None]

    def _nearest_anywhere(self, centers: Tensor, boxes: Tensor) -> Tensor:
        """Return (G, k), the nearest locations' indices, by the mean centre of their anchors, (H·W, A, 4) ``boxes``."""
        locations = boxes.double().view(len(boxes), -1, 2).mean(dim=1)  # (H·W, 2)
        chunks = centers[:, None].split(max(_DISTANCES_AT_ONCE // len(locations), 1))  # (some of G, 1, 2)
        return torch.cat([self._smallest((chunk - locations).square().sum(dim=2)) for chunk in chunks])

    def _smallest(self, distances: Tensor) -> Tensor:
        """Return the column indices of each row's k smallest values, the first of equals first."""
        return distances.sort(dim=1, stable=True).indices[:, : self.topk]


def _reaches_threshold(iou: Tensor) -> Tensor:
    """Whether each of the (G, C) candidates has at least the mean plus the standard deviation of its box's IoUs."""
    # A high mean says that the anchors fit the box well, so more can be asked of them. A high deviation says that one
    # level fits much better than the others, and the threshold then leaves its anchors alone.
    count = iou.shape[1]
    exact = iou.double()  # so that C equal values have just this mean
    mean = exact.sum(dim=1, keepdim=True) / max(count, 1)
    variance = (exact - mean).square().sum(dim=1, keepdim=True) / max(count - 1, 1)
    return (exact >= mean + variance.sqrt()) & (iou > 0)


def _center_is_inside(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Whether each anchor's centre is inside its box by more than .01 px, the margin in the authors' code."""
    center = anchors.double().view(-1, 2, 2).mean(dim=1)  # (n, 2)
    low, high = boxes.double().split(2, dim=1)
    return ((center - low > 0.01) & (high - center > 0.01)).all(dim=1)
