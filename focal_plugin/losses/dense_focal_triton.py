"""The dense focal loss on a GPU: one Triton kernel, which reads each logit once and writes its gradient once."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dense_focal_torch import memory_order

_TILE = 2048  # elements a program: 16 for each thread of 4 warps
_SCALE_BLOCK = 4096


def loss_and_gradients(
    logits: Sequence[Tensor],
    labels: Sequence[Tensor],
    alpha: float | Tensor,
    gamma: float,
    needed: Sequence[bool],
    factor: float,
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss of ``dense_focal_loss``, and ``factor`` times the gradient of each level that needs one. No sync."""
    first = logits[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    weights = torch.empty(2, first.shape[2], dtype=dtype, device=first.device)  # of target 1 and of target 0
    weights[0] = 1.0 if isinstance(alpha, float) and alpha == -1 else alpha
    weights[1] = 1.0 if isinstance(alpha, float) and alpha == -1 else 1 - alpha

    gradients = [torch.empty_like(level) if need else None for level, need in zip(logits, needed)]
    launches = [_Launch(*level) for level in zip(logits, labels, gradients)]
    partial = torch.empty(sum(launch.programs for launch in launches), dtype=dtype, device=first.device)
    with torch.cuda.device_of(first):
        for launch, sums in zip(launches, partial.split([launch.programs for launch in launches])):
            launch.run(weights, sums, gamma, factor)
    return partial.sum(), gradients  # in the order of the programs: the same bits each time


def scale_(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply the gradients, each a dense block of memory, in place. A factor of 1 costs no pass over them."""
    for gradient in gradients:
        if count := gradient.numel():
            with torch.cuda.device_of(gradient):
                _scale_kernel[(triton.cdiv(count, _SCALE_BLOCK),)](gradient, factor, count, _SCALE_BLOCK, num_warps=8)


class _Launch:
    """How the kernel walks over one level: tiles of neighbouring anchors × neighbouring classes.

    The anchors' dimensions (N, A, H, W) are put in the order in which they lie in memory, and neighbours merged where
    one stride does for both. The innermost, R, is cut into tiles; a program takes one step of the others (three at
    most). That makes (N·A, H·W) of channels first, and (N·H·W·A) of channels last.
    """

    def __init__(self, logits: Tensor, labels: Tensor, gradient: Tensor | None):
        self.logits, self.gradient = logits.detach(), gradient
        written = self.logits if gradient is None else gradient
        order = [d for d in memory_order(logits) if d != 2]
        self.labels = labels.permute([d - (d > 2) for d in order]).reshape(-1)  # (outer · R,)

        sides: list[tuple[int, int, int]] = []  # (size, stride in logits, stride in gradient)
        for d in order:
            side = (logits.shape[d], logits.stride(d), written.stride(d))
            if sides and all(outer == side[0] * inner for outer, inner in zip(sides[-1][1:], side[1:])):
                sides[-1] = (sides[-1][0] * side[0], *side[1:])
            elif side[0] != 1:
                sides.append(side)
        (self.anchors, *self.anchor_strides), outer = (sides[-1], sides[:-1]) if sides else ((1, 1, 1), [])
        self.outer = [(1, 0, 0)] * (3 - len(outer)) + outer
        self.classes, self.class_strides = logits.shape[2], (logits.stride(2), written.stride(2))

        # The dimension whose elements are neighbours in memory goes last in a tile, so that a warp reads whole lines.
        self.classes_last = self.classes > 1 and self.class_strides[0] < self.anchor_strides[0]
        limit_r, limit_k = (triton.next_power_of_2(max(n, 1)) for n in (self.anchors, self.classes))
        if self.classes_last:
            sizes = [size for size in (16, 32, 64, 128) if size <= limit_k] or [limit_k]
            self.block_k = min(sizes, key=lambda size: (triton.cdiv(self.classes, size) * size, -size))  # least padding
            self.block_r = min(limit_r, _TILE // self.block_k)
        else:
            self.block_r = min(limit_r, 512)
            self.block_k = min(limit_k, _TILE // self.block_r)
        tiles = triton.cdiv(self.anchors, self.block_r) * triton.cdiv(self.classes, self.block_k)
        self.programs = tiles * self.outer[0][0] * self.outer[1][0] * self.outer[2][0] if logits.numel() else 0

    def run(self, weights: Tensor, sums: Tensor, gamma: float, factor: float) -> None:
        """Write a loss a program to ``sums``, and the gradient."""
        if not self.programs:
            return
        _, (size_1, *_), (size_2, *_) = self.outer
        _kernel[(self.programs,)](
            self.logits,
            self.logits if self.gradient is None else self.gradient,
            self.labels,
            weights,
            sums,
            self.anchors,
            self.classes,
            size_1,
            size_2,
            *(side[1] for side in self.outer),
            self.anchor_strides[0],
            self.class_strides[0],
            *(side[2] for side in self.outer),
            self.anchor_strides[1],
            self.class_strides[1],
            GAMMA=gamma,
            FACTOR=factor,
            TERMS=17 if weights.dtype == torch.float64 else 8,
            CLASSES_LAST=self.classes_last,
            WRITES=self.gradient is not None,
            BLOCK_R=self.block_r,
            BLOCK_K=self.block_k,
            num_warps=4,
        )


@triton.jit
def _kernel(
    logits_ptr,
    gradient_ptr,
    labels_ptr,  # (outer · R,)
    weights_ptr,  # (2, K)
    sums_ptr,  # (programs,)
    R,
    K,
    size_1,
    size_2,
    x_0,
    x_1,
    x_2,
    x_r,
    x_k,  # strides of the logits
    g_0,
    g_1,
    g_2,
    g_r,
    g_k,  # strides of the gradient
    GAMMA: tl.constexpr,
    FACTOR: tl.constexpr,
    TERMS: tl.constexpr,
    CLASSES_LAST: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    blocks_r, blocks_k = tl.cdiv(R, BLOCK_R), tl.cdiv(K, BLOCK_K)
    outer = (program // blocks_k // blocks_r).to(tl.int64)  # offsets are 64 bits wide: a level can pass 2^31 elements
    r = (program // blocks_k % blocks_r).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = program % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    if CLASSES_LAST:
        r, k = r[:, None], k[None, :]  # tiles of (BLOCK_R, BLOCK_K)
    else:
        r, k = r[None, :], k[:, None]  # tiles of (BLOCK_K, BLOCK_R)
    inside = (r < R) & (k < K)

    i_0, i_1, i_2 = outer // size_2 // size_1, outer // size_2 % size_1, outer % size_2
    x_at = i_0 * x_0 + i_1 * x_1 + i_2 * x_2 + r * x_r + k.to(tl.int64) * x_k
    x = tl.load(logits_ptr + x_at, mask=inside, other=0.0).to(weights_ptr.dtype.element_ty)
    label = tl.load(labels_ptr + outer * R + r, mask=r < R, other=-1)
    positive = label == k
    counts = inside & (label >= 0)
    weight_1 = tl.load(weights_ptr + k, mask=k < K, other=0.0)
    weight_0 = tl.load(weights_ptr + K + k, mask=k < K, other=0.0)
    weight = tl.where(positive, weight_1, weight_0)

    x = tl.where(positive, -x, x)  # target 1 is target 0 of −x
    e = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + e)
    p = tl.where(x >= 0, larger, e * larger)  # σ(x) and 1 − σ(x), neither by subtraction
    q = tl.where(x >= 0, e * larger, larger)
    # log(1 + e) = 2 artanh(e / (2 + e)), by its series, whose terms shrink by 9 at least; 1 + e has lost bits of e.
    t = e / (2.0 + e)
    log1p = tl.zeros_like(t)
    for i in tl.static_range(TERMS):
        log1p = log1p * (t * t) + 1.0 / (2 * (TERMS - i) - 1)
    log1p = 2.0 * t * log1p
    softplus = tl.maximum(x, 0.0) + log1p
    if GAMMA == 0.0:
        w = weight
    elif GAMMA == 1.0:
        w = weight * p
    elif GAMMA == 2.0:
        w = weight * p * p
    else:  # p^γ through log p, whose derivative is finite where that of a power is not
        w = weight * tl.exp(GAMMA * (tl.minimum(x, 0.0) - log1p))
    tl.store(sums_ptr + program, tl.sum(tl.where(counts, w * softplus, 0.0)))

    if WRITES:
        slope = w * (GAMMA * q * softplus + p) * FACTOR
        slope = tl.where(counts, tl.where(positive, -slope, slope), 0.0)
        g_at = i_0 * g_0 + i_1 * g_1 + i_2 * g_2 + r * g_r + k.to(tl.int64) * g_k
        tl.store(gradient_ptr + g_at, slope.to(gradient_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scale_kernel(gradient_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)  # the host does not know it, and does not wait to
    if factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        gradient = tl.load(gradient_ptr + at, mask=at < count).to(factor_ptr.dtype.element_ty)
        tl.store(gradient_ptr + at, (gradient * factor).to(gradient_ptr.dtype.element_ty), mask=at < count)
