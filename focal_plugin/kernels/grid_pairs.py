"""The pairs of anchors and boxes that overlap enough, found on the anchors' grid without a matrix of all pairs."""

from collections.abc import Iterator

import torch
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor

from ..structures import Anchors

_BOXES_AT_ONCE = 256
_CANDIDATES_AT_ONCE = 2**15  # few enough to stay in cache and in one thread


def elementwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the (n,) IoU of each of the (n, 4) boxes with its counterpart, bit for bit as ``pairwise_iou``."""
    return matched_pairwise_iou(Boxes(boxes), Boxes(others)).nan_to_num(0)  # NaN: 0 over an area of 0 or NaN


def pack_pairs(iou: Tensor, box: Tensor) -> Tensor:
    """Pack an IoU and a box index into one int64: larger for a larger IoU, and at equal IoU for a smaller index.

    Floats ≥ 0 have the order of their bits, read as integers. 0 stands for IoU 0 and box 0, so ``scatter_reduce`` with
    "amax" into zeros finds the best box of each anchor.
    """
    return (iou.view(torch.int32).long() << 32) - box


def unpack_pairs(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the IoU and the box index in each key of ``pack_pairs``."""
    bits = (keys + (2**32 - 1)) >> 32
    return bits.int().view(torch.float32), (bits << 32) - keys


class GridPairs:
    """A search for the pairs of anchors and an image's boxes that have enough IoU.

    An IoU of t needs an intersection of t / (1 + t) times the sum of the two areas. The anchors of one shape are a
    stride apart, so those that can intersect a box that much are in a window of their grid, a few cells wide. For most
    of the C = ΣA shapes of all levels this window is empty. Only the anchors in windows are compared with the box, with
    the arithmetic of ``pairwise_iou``. Windows allow for the anchors' rounding to float32, so that no pair is missed.
    """

    def __init__(self, anchors: Anchors):
        assert anchors.strides is not None
        corners, rows, first = [], [], 0  # of each level the first location's anchors, of each shape its grid
        levels = zip(anchors.boxes, anchors.grid_sizes, anchors.num_cell_anchors, anchors.strides, strict=True)
        for boxes, (height, width), num_cell_anchors, stride in levels:
            corners.append(boxes[:num_cell_anchors])
            rows += [(first + a, num_cell_anchors, width, height, stride) for a in range(num_cell_anchors)]
            first += len(boxes)
        self.boxes = anchors.flat  # (R, 4)
        # One row a shape from here on, in float64: only the anchors themselves are rounded.
        grids = torch.tensor(rows, dtype=torch.float64, device=anchors.device).view(-1, 5)
        self.first, self.step, self.width = grids[:, :3].long().unbind(dim=1)  # index of the corner's anchor, next x, W
        self.size, self.stride = grids[:, 2:4], grids[:, 4:]  # (C, 2) as (W, H), (C, 1)
        corner = torch.cat(corners).double()  # the anchors of the first location
        self.low, self.high = corner[:, :2], corner[:, 2:]  # (C, 2)
        self.sides = self.high - self.low  # (C, 2)
        self.areas = self.sides.prod(dim=1)  # (C,)
        # Rounding moves an anchor by at most `rounding` pixels, a few units in the last place of its coordinates. That
        # changes areas and best intersections by at most the fraction `slack`.
        reach = corner.abs().amax(dim=1, keepdim=True) + self.stride * self.size.amax(dim=1, keepdim=True)
        self.rounding = reach * 2.0**-21  # (C, 1)
        self.slack = 16 * self.rounding[:, 0] / self.sides.amin(dim=1) + 1e-5  # (C,)

    def nearest_iou(self, boxes: Tensor) -> Tensor:
        """Return the best IoU of each of ``boxes`` (G, 4) with the anchors nearest to its centre, one of each shape.

        (G,) float32, 0 for an invalid box. Except for rounding, which may lower it, this is the best IoU with any
        anchor.
        """
        return torch.cat([self._nearest_iou(chunk) for chunk in boxes.split(_BOXES_AT_ONCE)])

    def _nearest_iou(self, boxes: Tensor) -> Tensor:
        low, high = boxes.double()[:, None].split(2, dim=2)  # (G, 1, 2)
        cell = ((low + high - self.low - self.high) / (2 * self.stride)).round()  # (G, C, 2) as (x, y)
        x, y = cell.nan_to_num(0).clamp(min=0).minimum(self.size - 1).long().unbind(dim=2)
        index = self.first + (y * self.width + x) * self.step  # (G, C)
        boxes = boxes.repeat_interleave(index.shape[1], dim=0)  # (G·C, 4)
        iou = elementwise_iou(boxes, self.boxes.index_select(0, index.flatten())).view_as(index)
        return torch.cat([iou, iou.new_zeros(len(iou), 1)], dim=1).amax(dim=1)  # 0 without any shape

    def search(self, boxes: Tensor, min_iou: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield all pairs with IoU > 0 and ≥ the box's ``min_iou`` (G,), in chunks of bounded size; each pair once.

        Yields:
            (anchor, box, iou): (M,) int64 indices into the R anchors and the G ``boxes`` (G, 4), and the pairs' float32
            IoU, equal bit for bit to ``pairwise_iou``'s.
        """
        for start in range(0, len(boxes), _BOXES_AT_ONCE):
            stop = start + _BOXES_AT_ONCE
            windows = self._windows(boxes[start:stop], min_iou[start:stop])
            chunk = (windows[:, 0].cumsum(dim=0) - 1) // _CANDIDATES_AT_ONCE
            for some in windows.split(torch.bincount(chunk).tolist()):
                anchor, box = _cells(some)
                box += start
                # index_select is several times faster than indexing here
                iou = elementwise_iou(boxes.index_select(0, box), self.boxes.index_select(0, anchor))
                keep = ((iou >= min_iou.index_select(0, box)) & (iou > 0)).nonzero().squeeze(1)
                yield anchor.index_select(0, keep), box.index_select(0, keep), iou.index_select(0, keep)

    def _windows(self, boxes: Tensor, min_iou: Tensor) -> Tensor:
        """Return windows that hold every anchor with IoU ≥ ``min_iou``, one row of int64 each, for ``_cells``."""
        low, high = boxes.double()[:, None].split(2, dim=2)  # (G, 1, 2)
        sides = high - low  # (G, 1, 2)
        # Below float32's normal numbers the IoU itself is rounded coarsely: any overlap is a candidate then.
        min_iou = torch.where(min_iou < 1e-30, 0, min_iou).double()[:, None]  # (G, 1)
        most = torch.minimum(sides, self.sides)  # (G, C, 2), the largest overlap on each axis
        need = (sides.prod(dim=2) + self.areas) * min_iou / (1 + min_iou)  # (G, C), the least intersection
        need *= (1 - self.slack).clamp(min=0)
        # (G, C, 2), the least overlap on one axis, which suffices if that on the other is the largest possible.
        overlap = need[:, :, None] / most.flip(2) - self.rounding
        first = ((low + overlap - self.high) / self.stride).ceil().clamp(min=0)  # (G, C, 2) as (x, y)
        last = ((high - overlap - self.low) / self.stride).floor().minimum(self.size - 1)
        extent = (last - first + 1).clamp(min=0)
        possible = (need <= most.prod(dim=2)) & (most.amin(dim=2) > 0)
        box, shape = torch.where(possible, extent.prod(dim=2), 0).nonzero(as_tuple=True)  # (number of windows,)

        (x, y), (columns, rows) = first[box, shape].long().unbind(dim=1), extent[box, shape].long().unbind(dim=1)
        step, width = self.step[shape], self.width[shape]
        index = self.first[shape] + (y * width + x) * step
        return torch.stack([columns * rows, columns, box, index, step, step * width], dim=1)


def _cells(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the anchor and the box of each cell of the windows, (number of cells,) int64 each.

    Args:
        windows: rows of (number of cells, columns, box, index of the first anchor, index steps of x and of y).
    """
    counts = windows[:, 0]
    before = counts.cumsum(dim=0) - counts
    cells = torch.cat([before[:, None], windows[:, 1:]], dim=1).repeat_interleave(counts, dim=0)
    before, columns, box, index, step_x, step_y = cells.unbind(dim=1)
    rank = torch.arange(len(cells), device=windows.device) - before
    y = rank // columns
    return index + (rank - y * columns) * step_x + y * step_y, box
