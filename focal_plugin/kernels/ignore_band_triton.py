"""The ignore-band matcher on a GPU: every anchor against every box, in registers, for all images of a batch at once.

A GPU compares a few hundred thousand anchors with a hundred boxes faster than it could find out which pairs matter, and
the shapes of its outputs do not depend on the boxes. The (G, R) matrix of IoU is never in memory: the first kernel
keeps the best box of each anchor and the best IoU of each box, the second computes the IoU again where it has to know
which anchors have that best IoU. The arithmetic is that of Detectron2's ``pairwise_iou`` to the last bit, which is why
the compiler may not contract a product and a sum into one rounding.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..structures import IGNORED, NEGATIVE, POSITIVE, Anchors

_BLOCK = 256  # anchors a program
_MODES = {"none": 0, "detectron1": 1, "detectron2": 2}


def match_batch(
    anchors: Anchors,
    boxes: Sequence[Tensor],
    regions: Sequence[Tensor],
    min_ioa: float,
    thresholds: Sequence[float],
    band_labels: Sequence[int],
    low_quality: str,
) -> tuple[Tensor, Tensor]:
    """Match the (G_i, 4) boxes of N images, and ignore the negatives in their (M_i, 4) regions.

    ``match_ignore_bands`` documents ``min_ioa`` and the arguments after it. Returns ``matched`` and ``labels``, (N, R).
    """
    bands = torch.tensor(thresholds), torch.tensor(band_labels, dtype=torch.int32)
    bands = [band.to(anchors.device, non_blocking=True) for band in bands]
    tensors = anchors.flat, *_padded(boxes, anchors.device), *_padded(regions, anchors.device), *bands
    return match_ignore_bands(*tensors, low_quality, min_ioa)


def _padded(boxes: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (N, G, 4) and the (N,) int32 numbers of boxes, of N tensors (G_i, 4)."""
    numbers = [len(image) for image in boxes]
    counts = torch.tensor(numbers, dtype=torch.int32)
    if not any(numbers):
        return torch.empty(len(boxes), 0, 4, device=device), counts.to(device, non_blocking=True)
    padded = pad_sequence(list(boxes), batch_first=True).float()
    return padded.to(device, non_blocking=True), counts.to(device, non_blocking=True)


@torch.library.custom_op("focal_plugin::match_ignore_bands", mutates_args=())
def match_ignore_bands(
    anchors: Tensor,
    boxes: Tensor,
    num_boxes: Tensor,
    regions: Tensor,
    num_regions: Tensor,
    thresholds: Tensor,
    band_labels: Tensor,
    low_quality: str,
    min_ioa: float,
) -> tuple[Tensor, Tensor]:
    """Match a batch in two launches, without synchronising.

    Args:
        anchors: (R, 4) float32.
        boxes: (N, G, 4) float32, the boxes of each image, then padding.
        num_boxes: (N,) int32, the number of boxes of each image.
        regions: (N, M, 4) float32, the ignore regions, padded likewise.
        num_regions: (N,) int32.
        thresholds: (T,) float32, ascending.
        band_labels: (T + 1,) int32.
        low_quality: as of ``IgnoreBandMatcher``.
        min_ioa: a background anchor is ignored if at least this share of its area lies in one region; 0 ignores none.

    Returns:
        ``matched`` (N, R) int64 and ``labels`` (N, R) int8.
    """
    n, g = boxes.shape[:2]
    r = len(anchors)
    best = anchors.new_empty(n, r)
    matched = anchors.new_empty(n, r, dtype=torch.int64)
    labels = anchors.new_empty(n, r, dtype=torch.int8)
    best_of_box = anchors.new_zeros(n, max(g, 1), dtype=torch.int32)  # bits of floats ≥ 0, which are ordered like ints
    if not n or not r:
        return matched, labels
    grid = (triton.cdiv(r, _BLOCK), n)
    # Neither kernel may fuse a·b + c into one rounding.
    options = {"BLOCK": _BLOCK, "num_warps": 4, "enable_fp_fusion": False}
    with torch.cuda.device_of(anchors):
        _best_pairs[grid](anchors, boxes, num_boxes, best, matched, best_of_box, r, g, **options)
        _labels[grid](
            anchors,
            boxes,
            num_boxes,
            regions,
            num_regions,
            thresholds,
            band_labels,
            best,
            best_of_box,
            labels,
            r,
            g,
            regions.shape[1],
            min_ioa,
            NUM_BANDS=len(thresholds),
            MODE=_MODES[low_quality],
            IGNORED=IGNORED,
            NEGATIVE=NEGATIVE,
            POSITIVE=POSITIVE,
            **options,
        )
    return matched, labels


@match_ignore_bands.register_fake
def _(anchors, boxes, num_boxes, regions, num_regions, thresholds, band_labels, low_quality, min_ioa):
    shape = len(boxes), len(anchors)
    return anchors.new_empty(shape, dtype=torch.int64), anchors.new_empty(shape, dtype=torch.int8)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)  # as PyTorch does


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _load_anchors(ptr, index, mask):
    """The corners and the areas of some anchors."""
    left, top = tl.load(ptr + index * 4, mask=mask, other=0.0), tl.load(ptr + index * 4 + 1, mask=mask, other=0.0)
    right = tl.load(ptr + index * 4 + 2, mask=mask, other=0.0)
    bottom = tl.load(ptr + index * 4 + 3, mask=mask, other=0.0)
    return left, top, right, bottom, (right - left) * (bottom - top)


@triton.jit
def _intersection(ax0, ay0, ax1, ay1, ptr):
    """The intersection of anchors with the box at ``ptr``, NaN for an invalid box; and the area of the box."""
    left, top, right, bottom = tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)
    width = _larger(_smaller(ax1, right) - _larger(ax0, left), 0.0)
    height = _larger(_smaller(ay1, bottom) - _larger(ay0, top), 0.0)
    return width * height, (right - left) * (bottom - top)


@triton.jit
def _iou(ax0, ay0, ax1, ay1, area, ptr):
    """The IoU of anchors with the box at ``ptr``; 0 for an invalid box."""
    inter, box_area = _intersection(ax0, ay0, ax1, ay1, ptr)
    iou = tl.div_rn(inter, tl.where(inter > 0, box_area + area - inter, 1.0))
    return tl.where((inter > 0) & (iou >= 0), iou, 0.0)


# Triton would compile a kernel for each kind of number: 1, a multiple of 16, any other. These change with each batch.
@triton.jit(do_not_specialize=["R", "G"])
def _best_pairs(anchors_ptr, boxes_ptr, counts_ptr, best_ptr, matched_ptr, best_of_box_ptr, R, G, BLOCK: tl.constexpr):
    n = tl.program_id(1)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < R
    ax0, ay0, ax1, ay1, area = _load_anchors(anchors_ptr, index, mask)
    best = tl.zeros([BLOCK], dtype=tl.float32)
    matched = tl.zeros([BLOCK], dtype=tl.int64)
    for g in range(tl.load(counts_ptr + n)):
        iou = _iou(ax0, ay0, ax1, ay1, area, boxes_ptr + (n.to(tl.int64) * G + g) * 4)
        better = iou > best  # >: the first of equally good boxes wins
        best = tl.where(better, iou, best)
        matched = tl.where(better, g, matched)
        largest = tl.max(iou, axis=0)
        if largest > 0:
            tl.atomic_max(best_of_box_ptr + n * G + g, largest.to(tl.int32, bitcast=True))
    at = n.to(tl.int64) * R + index
    tl.store(best_ptr + at, best, mask=mask)
    tl.store(matched_ptr + at, matched, mask=mask)


@triton.jit(do_not_specialize=["R", "G", "M"])
def _labels(
    anchors_ptr,
    boxes_ptr,
    counts_ptr,
    regions_ptr,
    region_counts_ptr,
    thresholds_ptr,
    band_labels_ptr,
    best_ptr,
    best_of_box_ptr,
    labels_ptr,
    R,
    G,
    M,
    min_ioa,
    NUM_BANDS: tl.constexpr,
    MODE: tl.constexpr,
    IGNORED: tl.constexpr,
    NEGATIVE: tl.constexpr,
    POSITIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(1)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < R
    ax0, ay0, ax1, ay1, area = _load_anchors(anchors_ptr, index, mask)
    at = n.to(tl.int64) * R + index
    best = tl.load(best_ptr + at, mask=mask, other=0.0)
    lowest = tl.load(thresholds_ptr)
    count = tl.load(counts_ptr + n)

    labels = tl.zeros([BLOCK], dtype=tl.int32) + tl.load(band_labels_ptr)
    for band in tl.static_range(NUM_BANDS):
        reaches = best >= tl.load(thresholds_ptr + band)
        labels = tl.where(reaches, tl.load(band_labels_ptr + band + 1), labels)
    if MODE > 0:  # the best anchors of each box, however small their IoU
        for g in range(count):
            of_box = tl.load(best_of_box_ptr + n * G + g).to(tl.float32, bitcast=True)
            worth = of_box >= lowest if MODE == 1 else of_box > 0
            if worth:
                iou = _iou(ax0, ay0, ax1, ay1, area, boxes_ptr + (n.to(tl.int64) * G + g) * 4)
                labels = tl.where(iou == of_box, POSITIVE, labels)
    if count == 0:  # whatever the first band's label is
        labels = tl.zeros([BLOCK], dtype=tl.int32) + NEGATIVE
    if min_ioa > 0:
        for m in range(tl.load(region_counts_ptr + n)):
            inter, _ = _intersection(ax0, ay0, ax1, ay1, regions_ptr + (n.to(tl.int64) * M + m) * 4)
            covered = (inter > 0) & (tl.div_rn(inter, tl.where(inter > 0, area, 1.0)) >= min_ioa)
            labels = tl.where(covered & (labels == NEGATIVE), IGNORED, labels)
    tl.store(labels_ptr + at, labels.to(tl.int8), mask=mask)
