"""Labels and positives of a batch on a GPU, each in one launch.

Anchors are in (H, W, A) order, labels in (N, A, H, W). PyTorch's operators take some sixty launches to go from one to
the other and to look up classes, boxes and anchors, which a host needs longer for than the GPU.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..structures import IGNORED, POSITIVE

_BLOCK = 1024  # labels a program
_FIELDS = 5  # a row of the table that describes a level, see _table

Shape = tuple[int, int, int, int]  # (N, A, H, W) of a level


def label(
    codes: Tensor, matched: Tensor, first: Tensor, classes: Tensor, shapes: Sequence[Shape], num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the class of each anchor, in the order of the labels.

    Args:
        codes: (N, R) int8, POSITIVE, NEGATIVE or IGNORED.
        matched: (N, R) int64, the index of each anchor's box in its image.
        first: (N,) int64, the index of each image's first box.
        classes: (G,) int64, of the boxes of all images.
        shapes: of each level.
        num_classes: K.

    Returns:
        labels (N·R,) int64, a class, K or IGNORED; is_positive (N·R,) bool; and the (L,) int32 number of positives.
    """
    table, programs, _ = _table(tuple(shapes), codes.device)
    labels = torch.empty(codes.numel(), dtype=torch.int64, device=codes.device)
    is_positive = torch.empty(codes.numel(), dtype=torch.bool, device=codes.device)
    counts = torch.zeros(len(shapes), dtype=torch.int32, device=codes.device)
    with torch.cuda.device_of(codes):
        _label[(programs,)](
            codes, matched, first, classes, table, labels, is_positive, counts, codes.shape[1], num_classes,
            LEVELS=len(shapes), FIELDS=_FIELDS, POSITIVE=POSITIVE, IGNORED=IGNORED, BLOCK=_BLOCK,
        )  # fmt: skip
    return labels, is_positive, counts


def gather(
    at: Tensor, matched: Tensor, first: Tensor, boxes: Tensor, anchors: Tensor, shapes: Sequence[Shape]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what belongs to each positive.

    Args:
        at: (P,) int64, the positives' indices into the labels of all levels.
        matched, first, shapes: as of ``label``.
        boxes: (G, 4) float32, of all images. anchors: (R, 4) float32.

    Returns:
        positives (P,) int64, the indices into the labels of the level; anchors and boxes (P, 4) float32 each.
    """
    table, _, n = _table(tuple(shapes), at.device)
    positives = torch.empty_like(at)
    of_anchors, of_boxes = (anchors.new_empty(len(at), 4) for _ in range(2))
    if len(at):
        with torch.cuda.device_of(at):
            _gather[(triton.cdiv(len(at), 128),)](
                at, matched, first, boxes, anchors, table, positives, of_anchors, of_boxes, len(at), matched.shape[1],
                n, LEVELS=len(shapes), FIELDS=_FIELDS, BLOCK=128,
            )  # fmt: skip
    return positives, of_anchors, of_boxes


@functools.lru_cache(maxsize=64)  # a few sizes of images; multi-scale training has some tens
def _table(shapes: tuple[Shape, ...], device: torch.device) -> tuple[Tensor, int, int]:
    """Return the (L, _FIELDS) int32 table of the levels, the number of programs that label them all, and N.

    A row has the level's first program, its first anchor, A, the number of locations, and the size of its labels.
    """
    rows, programs, start = [], 0, 0
    for n, a, h, w in shapes:
        rows.append([programs, start, a, h * w, n * a * h * w])
        programs += triton.cdiv(n * a * h * w, _BLOCK)
        start += a * h * w
    return torch.tensor(rows, dtype=torch.int32).to(device), programs, shapes[0][0]


@triton.jit
def _place(local, num_cell_anchors, locations):
    """The image of each label of a level, and its anchor's index in the level, from its index in the level."""
    rest = local % (num_cell_anchors * locations)
    return local // (num_cell_anchors * locations), rest % locations * num_cell_anchors + rest // locations


@triton.jit(do_not_specialize=["R"])
def _label(
    codes_ptr, matched_ptr, first_ptr, classes_ptr, table_ptr, labels_ptr, is_positive_ptr, counts_ptr, R, K,
    LEVELS: tl.constexpr, FIELDS: tl.constexpr, POSITIVE: tl.constexpr, IGNORED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    level = 0
    for i in tl.static_range(1, LEVELS):
        if program >= tl.load(table_ptr + i * FIELDS):
            level = i
    row = table_ptr + level * FIELDS
    start, num_cell_anchors, locations = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    size = tl.load(row + 4)
    n = size // tl.maximum(num_cell_anchors * locations, 1)
    local = (program - tl.load(row)) * BLOCK + tl.arange(0, BLOCK)
    inside = local < size
    image, anchor = _place(local, num_cell_anchors, locations)
    at = image.to(tl.int64) * R + start + anchor
    code = tl.load(codes_ptr + at, mask=inside, other=IGNORED)
    positive = code == POSITIVE
    box = tl.load(first_ptr + image, mask=positive, other=0) + tl.load(matched_ptr + at, mask=positive, other=0)
    found = tl.load(classes_ptr + box, mask=positive, other=0)
    out = start.to(tl.int64) * n + local
    background = tl.where(code == IGNORED, IGNORED, K).to(tl.int64)
    tl.store(labels_ptr + out, tl.where(positive, found, background), mask=inside)
    tl.store(is_positive_ptr + out, positive, mask=inside)
    tl.atomic_add(counts_ptr + level, tl.sum(positive.to(tl.int32)))


@triton.jit(do_not_specialize=["P", "R", "N"])
def _gather(
    at_ptr, matched_ptr, first_ptr, boxes_ptr, anchors_ptr, table_ptr, positives_ptr, of_anchors_ptr, of_boxes_ptr,
    P, R, N,
    LEVELS: tl.constexpr, FIELDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = p < P
    at = tl.load(at_ptr + p, mask=inside, other=0)
    row = tl.zeros((BLOCK,), tl.int32)  # of the table
    for i in tl.static_range(1, LEVELS):
        row = tl.where(at >= tl.load(table_ptr + i * FIELDS + 1).to(tl.int64) * N, i * FIELDS, row)
    start, num_cell_anchors = tl.load(table_ptr + row + 1), tl.load(table_ptr + row + 2)
    local = at - start.to(tl.int64) * N
    image, anchor = _place(local, num_cell_anchors, tl.load(table_ptr + row + 3))
    anchor += start
    box = tl.load(first_ptr + image, mask=inside, other=0)
    box += tl.load(matched_ptr + image * R + anchor, mask=inside, other=0)
    tl.store(positives_ptr + p, local, mask=inside)
    for i in tl.static_range(4):
        side = tl.load(anchors_ptr + anchor * 4 + i, mask=inside, other=0.0)
        tl.store(of_anchors_ptr + p * 4 + i, side, mask=inside)
        side = tl.load(boxes_ptr + box * 4 + i, mask=inside, other=0.0)
        tl.store(of_boxes_ptr + p * 4 + i, side, mask=inside)
