"""Non-maximum suppression on a GPU: all images of a batch in one launch, with static shapes, without synchronising.

torchvision's kernel compares all pairs of candidates, stores a bit for each, and lets the host decide, image by image.
Here a program does a whole image. It takes the best candidate that is left, drops those that overlap it too much, and
stops after the number of detections that an image may have: at most 100 × 5,000 comparisons instead of 5,000 × 5,000,
all in registers. The arithmetic is that of torchvision to the last bit, so the compiler may not contract a product and
a sum into one rounding.
"""

import math

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

# With at most this many candidates, boxes of different classes are moved apart by an offset, which rounds coordinates.
# With more, coordinates stay as they are and classes are compared. On a GPU, all versions of torchvision do the former
# up to here; some do the latter beyond, some only beyond 25,000.
OFFSET_LIMIT = 5000

_BLOCK = 1024  # candidates that are in registers at a time


@torch.library.custom_op("focal_plugin::batched_nms", mutates_args=())
def batched_nms(
    candidates: Tensor, iou_thresh: float, max_detections: int, offset_limit: int = OFFSET_LIMIT
) -> tuple[Tensor, Tensor]:
    """Keep the best candidates of each image that do not overlap a better one of their class too much.

    The result equals ``torchvision.ops.batched_nms(...)[:max_detections]`` of each image.

    Args:
        candidates: (N, C, 6) float32, contiguous: a box in XYXY, its score and its class. Sorted by score, descending;
            a score of −∞ stands for no candidate. No score is NaN.
        iou_thresh: candidates whose IoU with a better one of their class is above it are dropped.
        max_detections: at most this many of an image are kept, the best ones.
        offset_limit: images with more candidates compare classes and do without torchvision's offsets.

    Returns:
        The indices of those kept, (N, D) int64, best first, then zeros; D is ``max_detections`` or C if that is less.
        Their numbers, (N,) int32.
    """
    n, c, _ = candidates.shape
    size = min(max_detections, c)
    keep = candidates.new_zeros(n, size, dtype=torch.int64)
    counts = candidates.new_zeros(n, dtype=torch.int32)
    if n and size:
        with torch.cuda.device_of(candidates):
            _keep_best[(n,)](
                candidates.contiguous(),
                keep,
                counts,
                c,
                size,
                _round_down(iou_thresh),
                offset_limit,
                BLOCK=_BLOCK,
                num_warps=8,
                enable_fp_fusion=False,
            )
    return keep, counts


@batched_nms.register_fake
def _(candidates, iou_thresh, max_detections, offset_limit=OFFSET_LIMIT):
    n, c, _ = candidates.shape
    keep = candidates.new_empty(n, min(max_detections, c), dtype=torch.int64)
    return keep, candidates.new_empty(n, dtype=torch.int32)


def _round_down(number: float) -> float:
    """The largest float32 that is not above ``number``: a float32 exceeds both or neither.

    torchvision compares with the threshold in double precision; the kernel has it in single.
    """
    nearest = np.float32(number)
    return float(nearest if float(nearest) <= number else np.nextafter(nearest, np.float32(-math.inf)))


@triton.jit
def _larger(a, b):
    return tl.where(a < b, b, a)  # std::max, also of NaN


@triton.jit
def _smaller(a, b):
    return tl.where(b < a, b, a)


@triton.jit
def _load(ptr, index, mask, spacing):
    """The corners of candidates, moved apart by class; their areas and their classes."""
    ptr += index * 6
    cls = tl.load(ptr + 5, mask=mask, other=0.0)
    offset = cls * spacing
    left, top = tl.load(ptr, mask=mask, other=0.0) + offset, tl.load(ptr + 1, mask=mask, other=0.0) + offset
    right, bottom = tl.load(ptr + 2, mask=mask, other=0.0) + offset, tl.load(ptr + 3, mask=mask, other=0.0) + offset
    return left, top, right, bottom, (right - left) * (bottom - top), cls


@triton.jit
def _overlaps(ptr, better, spacing, by_class, left, top, right, bottom, area, cls, threshold):
    """Which candidates overlap the ``better`` one too much."""
    x0, y0, x1, y1, its_area, its_cls = _load(ptr, better, better >= 0, spacing)
    width = _larger(_smaller(x1, right) - _larger(x0, left), 0.0)
    height = _larger(_smaller(y1, bottom) - _larger(y0, top), 0.0)
    inter = width * height
    union = its_area + area - inter
    iou = tl.div_rn(inter, union)  # NaN, and so not above the threshold, for two boxes without an area
    return (iou > threshold) & ((cls == its_cls) | (by_class == 0))


@triton.jit(do_not_specialize=["C", "D"])
def _keep_best(candidates_ptr, keep_ptr, counts_ptr, C, D, threshold, offset_limit, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    ptr = candidates_ptr + n * C * 6
    keep_ptr += n * D

    # How many candidates there are, and their largest coordinate, by which classes are moved apart.
    count = 0
    nans = 0
    highest = -float("inf")
    for start in range(0, C, BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = tl.load(ptr + index * 6 + 4, mask=index < C, other=-float("inf")) > -float("inf")
        count += tl.sum(mask.to(tl.int32), axis=0)
        for side in tl.static_range(4):
            corner = tl.load(ptr + index * 6 + side, mask=mask, other=-float("inf"))
            nans += tl.sum((corner != corner).to(tl.int32), axis=0)
            highest = tl.maximum(highest, tl.max(tl.where(corner != corner, -float("inf"), corner), axis=0))
    highest = tl.where(nans > 0, float("nan"), highest)  # as PyTorch's max
    by_class = (count > offset_limit).to(tl.int32)
    spacing = tl.where(by_class > 0, 0.0, highest + 1.0)

    kept = 0
    start = 0
    while (start < count) & (kept < D):
        index = start + tl.arange(0, BLOCK)
        alive = index < count
        left, top, right, bottom, area, cls = _load(ptr, index, alive, spacing)
        for k in range(kept):  # those kept of the blocks before
            better = tl.load(keep_ptr + k)
            drop = _overlaps(ptr, better, spacing, by_class, left, top, right, bottom, area, cls, threshold)
            alive = alive & (drop == 0)
        first = tl.min(tl.where(alive, index, count), axis=0)
        while (first < count) & (kept < D):
            tl.store(keep_ptr + kept, first.to(tl.int64))
            kept += 1
            drop = _overlaps(ptr, first, spacing, by_class, left, top, right, bottom, area, cls, threshold)
            alive = alive & (drop == 0) & (index > first)
            first = tl.min(tl.where(alive, index, count), axis=0)
        tl.debug_barrier()  # all threads see what is in keep_ptr
        start += BLOCK
    tl.store(counts_ptr + n, kept)
