"""A stack of convolutions computed only where its outputs are wanted.

The box loss needs the deltas of the positive anchors alone, a few in a thousand. A 3×3 conv at some cells of a feature
map needs its input at these cells and their neighbours, so a stack of K convs needs the features within K cells of the
positives. Each conv gathers its inputs' rows and is one matrix product, for all images and levels together. The result
is that of whole maps, to rounding.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Cells:
    """Numbers for the cells of a batch's feature maps, of all levels and images, and of a border around each map.

    The border is one cell wide. Thanks to it each neighbour of a cell has a number, cell + dy · width + dx.

    Args:
        features: one (N, C, H, W) tensor a level.
    """

    def __init__(self, features: Sequence[Tensor]):
        device = features[0].device
        inside, widths, self.starts, self.shapes, count = [], [], [], [], 0
        for n, _, h, w in (level.shape for level in features):
            inside.append(F.pad(torch.ones(n, h, w, dtype=torch.bool, device=device), (1, 1, 1, 1)).flatten())
            widths.append(torch.full((len(inside[-1]),), w + 2, device=device))
            self.starts.append(count)
            self.shapes.append((h + 2, w + 2))
            count += len(inside[-1])
        self.inside, self.widths = torch.cat(inside), torch.cat(widths)  # (M,), borders included
        self.num_inside = sum(len(level) * level[0, 0].numel() for level in features)
        self.offsets = torch.arange(-1, 2, device=device)

    def numbers(self, level: int, image: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Return the numbers of the cells at (y, x) of the images on a level."""
        h, w = self.shapes[level]
        return self.starts[level] + (image * h + y + 1) * w + x + 1

    def around(self, cells: Tensor) -> Tensor:
        """Return the (S, 9) numbers of the cells in the 3×3 window around each of the (S,) ``cells``, row by row."""
        rows = cells[:, None] + self.offsets * self.widths[cells, None]  # (S, 3)
        return (rows[:, :, None] + self.offsets).flatten(1)  # (S, 9)

    def collect(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distinct cells among ``numbers`` that are not border, (S,), ascending; and their inverse, (M,).

        The inverse has the index of each of the M cells in the former, or S for a cell that is not among them.
        """
        is_wanted = torch.zeros_like(self.inside)
        is_wanted[numbers] = True
        cells = (is_wanted & self.inside).nonzero().squeeze(1)  # (S,)
        rows = torch.full_like(self.widths, len(cells))  # (M,)
        rows[cells] = torch.arange(len(cells), device=cells.device)
        return cells, rows

    def gather(self, features: Sequence[Tensor], cells: Tensor) -> Tensor:
        """Return the (S, C) features of the ``cells``."""
        table = torch.cat([level.permute(0, 2, 3, 1).flatten(0, 2) for level in features])  # (cells inside, C)
        return table.index_select(0, (self.inside.cumsum(0) - 1)[cells])


def convs_at(
    convs: Sequence[nn.Conv2d], features: Sequence[Tensor], cells: Cells, numbers: Tensor, max_share: float = 1.0
) -> Tensor | None:
    """Compute 3×3 ``convs``, with a ReLU between any two, at some cells of ``features``.

    Args:
        convs: K convs with bias, kernel 3, stride 1, padding 1.
        features, cells: one (N, C, H, W) tensor a level, and its cells.
        numbers: (P,) the numbers of the cells wanted; a cell may be in it several times.
        max_share: give up if any conv is needed at more than this share of all cells.

    Returns:
        (P, C'), differentiable once; None if it gave up.
    """
    wanted, rows = cells.collect(numbers)
    index = rows[numbers]  # (P,)
    tables = []  # for each conv, last first: the rows in each window, for forward and for backward
    for _ in convs:
        if len(wanted) > max_share * cells.num_inside:
            return None
        windows = cells.around(wanted)  # (S, 9)
        sources, source_rows = cells.collect(windows)  # (S',) ⊇ the cells wanted
        # An output at distance d from an input sees it through the kernel's entry at −d.
        tables.append((source_rows[windows], rows[cells.around(sources)].flip(1)))
        wanted, rows = sources, source_rows

    x = cells.gather(features, wanted)  # (S, C)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):  # autocast does not reach into an autograd.Function
        x = x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        for i, conv in enumerate(convs):
            x = x if i == 0 else x.relu_()
            assert conv.bias is not None
            x = _ConvOfRows.apply(x, conv.weight.to(x.dtype), conv.bias.to(x.dtype), *tables.pop())
    return x.index_select(0, index)


class _ConvOfRows(torch.autograd.Function):
    """A 3×3 conv from the rows of some cells, (S', C), to those of others, (S, C').

    For each entry of the kernel, ``windows`` (S, 9) has the input row that an output reads through it, and ``outputs``
    (S', 9) the output row that reads an input through it. An index one past the end stands for a row of zeros.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, windows: Tensor, outputs: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, windows, outputs)
        return torch.addmm(bias, _windows(x, windows), weight.permute(2, 3, 1, 0).flatten(0, 2))  # (S, C')

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, windows, outputs = ctx.saved_tensors
        num_out, num_in = weight.shape[:2]
        grad_x = _windows(grad, outputs) @ weight.permute(2, 3, 0, 1).flatten(0, 2)  # (S', C)
        grad_weight = grad.t() @ _windows(x, windows)  # (C', 9·C)
        return grad_x, grad_weight.view(num_out, 3, 3, num_in).permute(0, 3, 1, 2), grad.sum(0), None, None


def _windows(rows: Tensor, index: Tensor) -> Tensor:
    """Return (S, 9·C): for each of S the nine ``rows`` (R, C) of its ``index`` (S, 9), zeros for index R."""
    return F.pad(rows, (0, 0, 0, 1)).index_select(0, index.flatten()).view(len(index), index.shape[1] * rows.shape[1])
