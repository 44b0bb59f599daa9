"""The paper's matching rule: thresholds of IoU, and between background and foreground a band that is ignored."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from ..kernels.grid_pairs import GridPairs, elementwise_iou, pack_pairs, unpack_pairs
from ..registry import ANCHOR_MATCHER_REGISTRY
from ..structures import IGNORED, NEGATIVE, POSITIVE, Anchors

try:
    from ..kernels import ignore_band_triton
except ImportError:  # PyTorch for CPUs, for Windows and for macOS comes without Triton
    ignore_band_triton = None  # type: ignore[assignment]

_LOW_QUALITY = ("none", "detectron1", "detectron2")
_IOUS_AT_ONCE = 2**19  # of a dense chunk: about 30 MB of temporaries


@ANCHOR_MATCHER_REGISTRY.register()
class IgnoreBandMatcher:
    """Label anchors by their best IoU with any box: below .4 background, from .5 positive, else ignored (section 4).

    Labels are those of Detectron2's ``Matcher``, with one exception: a box that overlaps no anchor, such as one without
    area, can make all anchors positive there and makes none positive here. ``matched`` is Detectron2's too, the first
    of equally good boxes, for anchors that are positive or reach the lowest threshold. For others it is a valid index.

    Args:
        thresholds: the lowest IoU of each band but the first, ascending, each above 0.
        labels: the label of each band, IGNORED, NEGATIVE or POSITIVE: one more than there are thresholds.
        low_quality: whether the anchors that overlap a box best, all of them at a tie, become positive even if their
            IoU is too low. ``none``: no, as in the paper; ``detectron2``: if it is above 0; ``detectron1``: if it
            reaches the lowest threshold. Such an anchor stays matched to its own best box, which may be another one.

    An argument that is not as above raises a ValueError.
    """

    @configurable
    def __init__(self, *, thresholds: Sequence[float], labels: Sequence[int], low_quality: str = "detectron2"):
        thresholds, labels = list(thresholds), list(labels)
        if not thresholds or not thresholds[0] > 0 or not all(low <= high for low, high in pairwise(thresholds)):
            raise ValueError(
                f"MODEL.RETINANET.IOU_THRESHOLDS (thresholds) is {thresholds}; "
                "expected one or more numbers above 0, in ascending order."
            )
        if len(labels) != len(thresholds) + 1 or not set(labels) <= {IGNORED, NEGATIVE, POSITIVE}:
            raise ValueError(
                f"MODEL.RETINANET.IOU_LABELS (labels) is {labels}; expected one more than IOU_THRESHOLDS, that is "
                f"{len(thresholds) + 1}, each {IGNORED} (ignored), {NEGATIVE} (background) or {POSITIVE} (positive)."
            )
        if low_quality not in _LOW_QUALITY:
            raise ValueError(
                f"MODEL.FOCAL.MATCHER.LOW_QUALITY (low_quality) is {low_quality!r}; "
                f"expected one of {', '.join(_LOW_QUALITY)}."
            )
        self.thresholds = [float(threshold) for threshold in thresholds]
        self.labels = [int(label) for label in labels]
        self.low_quality = low_quality

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, object]:
        return {
            "thresholds": cfg.MODEL.RETINANET.IOU_THRESHOLDS,
            "labels": cfg.MODEL.RETINANET.IOU_LABELS,
            "low_quality": cfg.MODEL.FOCAL.MATCHER.LOW_QUALITY,
        }

    def __call__(self, anchors: Anchors | Tensor, instances: Instances | None = None) -> tuple[Tensor, Tensor]:
        """Match the boxes of one image.

        Args:
            anchors: R anchors; or, without ``instances``, a (G, R) matrix of the IoU of G boxes and R anchors. A matrix
                of another shape, or with a value that is negative or NaN, is a ValueError.
            instances: the image's ``Instances``, with ``gt_boxes``.

        Returns:
            ``matched`` (R,) int64, the index of each anchor's box, and ``labels`` (R,) int8.
        """
        if isinstance(anchors, Tensor):
            if anchors.dim() != 2 or not (anchors >= 0).all():
                raise ValueError(f"Expected a (G, R) matrix of IoU, each ≥ 0; found shape {tuple(anchors.shape)}.")
            return self._match_rows([anchors] if anchors.numel() else [], anchors.new_zeros(anchors.shape[1]))

        assert instances is not None, "IgnoreBandMatcher takes (Anchors, Instances), or a matrix of IoU alone."
        boxes = instances.gt_boxes
        # The search on the grid leaves out anchors in the first band: their best boxes matter if they are positives.
        if anchors.cell_anchors is None or self.labels[0] == POSITIVE:
            return self._match_rows(_iou_rows(boxes, anchors), boxes.tensor.new_zeros(len(anchors)))
        return self._match_grid(anchors.derived(GridPairs), boxes.tensor)

    def match_batch(
        self, anchors: Anchors, gt_instances: Sequence[Instances], regions: Sequence[Boxes | None], min_ioa: float
    ) -> tuple[Tensor, Tensor] | None:
        """Match a batch on a GPU, and ignore the negatives that ``regions`` cover. Return None without Triton.

        Returns ``matched`` (N, R) int64 and ``labels`` (N, R) int8, bit for bit those of matching image by image.
        """
        if ignore_band_triton is None:
            return None
        boxes = [instances.gt_boxes.tensor for instances in gt_instances]
        none = anchors.flat[:0]
        areas = [none if area is None else area.tensor.to(none.device, non_blocking=True) for area in regions]
        rule = self.thresholds, self.labels, self.low_quality
        return ignore_band_triton.match_batch(anchors, boxes, areas, min_ioa, *rule)

    def _match_rows(self, rows: Iterable[Tensor], best: Tensor) -> tuple[Tensor, Tensor]:
        """Match by the (G, R) matrix of IoU, given a few rows at a time. ``best`` is (R,) zeros."""
        matched = torch.zeros_like(best, dtype=torch.int64)
        is_extra = torch.zeros_like(best, dtype=torch.bool)
        start = 0
        for iou in rows:  # (some of G, R)
            value, box = iou.max(dim=0)
            matched = torch.where(value > best, box + start, matched)  # > : the first box wins a tie
            best = torch.maximum(best, value)
            of_box = iou.amax(dim=1, keepdim=True)
            is_extra |= ((iou == of_box) & self._is_worth(of_box)).any(dim=0)
            start += len(iou)
        return matched, self._label(best, is_extra)

    def _match_grid(self, grid: GridPairs, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Match by those pairs that can reach a threshold or be the best of their box, without a (G, R) matrix."""
        lowest = self.thresholds[0]
        best_of_box = boxes.new_zeros(len(boxes))
        if self.low_quality == "detectron2":
            best_of_box = grid.nearest_iou(boxes)
            min_iou = best_of_box.clamp(max=lowest)
        else:
            min_iou = torch.full_like(best_of_box, lowest)

        keys = torch.zeros(len(grid.boxes), dtype=torch.int64, device=boxes.device)
        best_pairs = []  # of each chunk, the pairs that are the best of their box so far
        for anchor, box, iou in grid.search(boxes, min_iou):
            keys.scatter_reduce_(0, anchor, pack_pairs(iou, box), "amax")
            best_of_box.scatter_reduce_(0, box, iou, "amax")
            is_best = (iou == best_of_box.index_select(0, box)).nonzero().squeeze(1)
            best_pairs.append((anchor[is_best], box[is_best], iou[is_best]))
        is_extra = torch.zeros_like(keys, dtype=torch.bool)
        for anchor, box, iou in best_pairs:
            is_extra[anchor[(iou == best_of_box[box]) & self._is_worth(iou)]] = True

        found = keys.nonzero().squeeze(1)  # (M,) anchors in any pair: from here on M of R
        best, box = unpack_pairs(keys[found])
        is_extra = is_extra[found]
        weak = (is_extra & (best < lowest)).nonzero().squeeze(1)  # their best pairs may not be among those found
        if len(weak):
            box[weak] = _best_boxes(grid.boxes[found[weak]], boxes)
        matched, labels = torch.zeros_like(keys), torch.full_like(keys, self.labels[0], dtype=torch.int8)
        matched[found], labels[found] = box, self._label(best, is_extra)
        return matched, labels

    def _is_worth(self, best_of_box: Tensor) -> Tensor:
        """Whether a box makes its best anchors positive, given its best IoU with any anchor."""
        if self.low_quality == "none":
            return torch.zeros_like(best_of_box, dtype=torch.bool)
        return best_of_box >= self.thresholds[0] if self.low_quality == "detectron1" else best_of_box > 0

    def _label(self, best: Tensor, is_extra: Tensor) -> Tensor:
        """Return each anchor's int8 label for its best IoU, POSITIVE where ``is_extra``."""
        labels = torch.full_like(best, self.labels[0], dtype=torch.int8)
        for threshold, label in zip(self.thresholds, self.labels[1:]):
            labels.masked_fill_(best >= threshold, label)
        return labels.masked_fill_(is_extra, POSITIVE)


def _iou_rows(boxes: Boxes, anchors: Anchors) -> Iterator[Tensor]:
    """Yield the (G, R) matrix of IoU, a few rows at a time."""
    flat = Boxes(anchors.flat)
    rows = max(_IOUS_AT_ONCE // max(len(flat), 1), 1)
    for start in range(0, len(boxes) if len(flat) else 0, rows):
        yield pairwise_iou(boxes[start : start + rows], flat)


def _best_boxes(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Return (n,), the index of the best of ``boxes`` (G, 4) for each of ``anchors`` (n, 4), the first of equals."""
    matched = []
    left, top, right, bottom = boxes.unbind(dim=1)  # (G,)
    for chunk in anchors.split(max(_IOUS_AT_ONCE // len(boxes), 1)):
        x0, y0, x1, y1 = chunk[:, :, None].unbind(dim=1)  # (n, 1)
        anchor, box = ((x0 < right) & (left < x1) & (y0 < bottom) & (top < y1)).nonzero(as_tuple=True)
        iou = elementwise_iou(boxes.index_select(0, box), chunk.index_select(0, anchor))
        keys = torch.zeros(len(chunk), dtype=torch.int64, device=boxes.device)
        keys.scatter_reduce_(0, anchor, pack_pairs(iou, box), "amax")
        matched.append(unpack_pairs(keys)[1])
    return torch.cat(matched)
