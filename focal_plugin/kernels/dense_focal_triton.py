"""The dense focal loss on a GPU: one Triton kernel for loss or gradient, launched once for all levels.

Forward stores nothing; the network keeps the logits anyway. Backward reads them again and writes each gradient once,
already multiplied by the incoming one. To store gradients in forward and scale them in backward would take one pass
more over the logits, and round them twice.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048  # elements at a time: 16 for each thread of 4 warps
_MOST_LEVELS = 8  # in one launch
_FIELDS = 20  # a row of the table that describes a level, see _describe


def loss(logits: Sequence[Tensor], labels: Sequence[Tensor], alpha: float | Tensor, gamma: float) -> Tensor:
    """Return the loss of ``dense_focal_loss``, without synchronising."""
    parts = _launch(logits, labels, [None] * len(logits), alpha, gamma, None)
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).sum()


def gradients(
    logits: Sequence[Tensor | None],
    labels: Sequence[Tensor],
    alpha: float | Tensor,
    gamma: float,
    needed: Sequence[bool],
    factor: Tensor,
) -> list[Tensor | None]:
    """Return the loss's gradient times the scalar ``factor`` for each level that needs one, without synchronising.

    ``logits`` may have None for the others.
    """
    written = [torch.empty_like(level) if need else None for level, need in zip(logits, needed)]
    rows = [row for row in zip(logits, labels, written) if row[2] is not None]
    if rows:
        _launch(*zip(*rows), alpha, gamma, factor)
    return written


def _launch(
    logits: Sequence[Tensor],
    labels: Sequence[Tensor],
    written: Sequence[Tensor | None],
    alpha: float | Tensor,
    gamma: float,
    factor: Tensor | None,
) -> list[Tensor]:
    """Run the kernel over levels. Write their gradients times ``factor``; if it is None, return their losses."""
    first = logits[0]
    dtype, num_classes = torch.promote_types(first.dtype, torch.float32), first.shape[2]
    weights = _class_weights(alpha, num_classes, dtype, first.device)
    largest = max(logits, key=Tensor.numel)
    # The dimension whose elements are neighbours in memory goes last in a tile, so that a warp reads whole lines.
    classes_last = num_classes > 1 and largest.stride(2) < min(largest.stride(3), largest.stride(4))
    block_r, block_k = _block_sizes(num_classes, classes_last)
    sums = []
    rows = list(zip(logits, labels, written))
    for start in range(0, len(rows), _MOST_LEVELS):
        levels = rows[start : start + _MOST_LEVELS]
        keys = tuple(
            (x.shape, x.stride(), label.stride(), None if g is None else g.stride(), _is_aligned(x) and _is_aligned(g))
            for x, label, g in levels
        )
        table, programs, unit, aligned = _table(keys, block_r, classes_last, first.device)
        of_programs = torch.empty(programs, dtype=dtype, device=first.device) if factor is None else weights
        if programs:
            # Each pointer costs the host time at a launch; None, for a level that is not there, costs none.
            columns = zip(*levels, *[(None, None, None)] * (_MOST_LEVELS - len(levels)))
            with torch.cuda.device_of(first):
                _kernel[(programs,)](
                    *(pointer for column in columns for pointer in column),
                    table,
                    weights,
                    weights if factor is None else factor,  # one that is not used
                    of_programs,
                    num_classes,
                    GAMMA=gamma,
                    LEVELS=len(levels),
                    HALF=first.dtype in (torch.float16, torch.bfloat16),
                    TERMS=17 if dtype == torch.float64 else 8,
                    CLASSES_LAST=classes_last,
                    UNIT=unit,
                    ALIGNED=aligned,
                    WRITES=factor is not None,
                    BLOCK_R=block_r,
                    BLOCK_K=block_k,
                    FIELDS=_FIELDS,
                    num_warps=4,
                )
        sums.append(of_programs)
    return sums


def _class_weights(alpha: float | Tensor, num_classes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the (2, K) weights of target 1 and of target 0."""
    if isinstance(alpha, Tensor):
        return torch.stack([alpha, 1 - alpha])
    return _constant_weights(alpha, num_classes, dtype, device)


@functools.lru_cache(maxsize=16)
def _constant_weights(alpha: float, num_classes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    weights = torch.ones(2, num_classes, dtype=dtype, device=device)
    if alpha != -1:
        weights[0], weights[1] = alpha, 1 - alpha
    return weights


@functools.lru_cache(maxsize=64)
def _block_sizes(num_classes: int, classes_last: bool) -> tuple[int, int]:
    """Return how many anchors a program takes, and how many classes at a time; both are powers of 2."""
    limit = triton.next_power_of_2(max(num_classes, 1))
    if not classes_last:
        return 512, min(limit, _TILE // 512)
    sizes = [size for size in (16, 32, 64, 128) if size <= limit] or [limit]
    block_k = min(sizes, key=lambda size: (triton.cdiv(num_classes, size) * size, -size))  # the least padding
    return _TILE // block_k, block_k


def _is_aligned(x: Tensor | None) -> bool:
    """Whether ``x`` (N, A, K, H, W) begins at a multiple of 16 bytes."""
    return x is None or x.data_ptr() % 16 == 0


@functools.lru_cache(maxsize=64)  # a few sizes of images; multi-scale training has some tens
def _table(keys: tuple, block_r: int, classes_last: bool, device: torch.device) -> tuple[Tensor, int, bool, str]:
    """Describe some levels to the kernel.

    Returns:
        The (L, _FIELDS) table, the number of programs, and the kernel's UNIT and ALIGNED.
    """
    rows, programs, unit = [], 0, True
    for shape, strides, label_strides, gradient_strides, is_aligned in keys:
        sizes, fields = _describe(shape, strides, label_strides, gradient_strides or strides, classes_last)
        of_logits, of_gradients = fields[:5], fields[9:]  # of four dimensions of anchors, and of the classes
        inner = 4 if classes_last else 3
        unit &= of_logits.pop(inner) == of_gradients.pop(inner) == 1
        # In elements: 8 of 16 bits, or more, are 16 bytes. A row has to end there, too. Steps along 1 are never taken.
        lengths = sizes if classes_last else [*sizes[:3], shape[2]]
        apart = [step for steps in (of_logits, of_gradients) for step, n in zip(steps, lengths) if n > 1]
        apart += [] if classes_last else [sizes[3]]
        rows.append([programs, *sizes, *fields, is_aligned and not any(step % 8 for step in apart)])
        if classes_last:
            programs += triton.cdiv(sizes[0] * sizes[1] * sizes[2] * sizes[3], block_r)
        else:
            programs += sizes[0] * sizes[1] * sizes[2] * triton.cdiv(sizes[3], block_r)
    flags = {row[-1] for row in rows}
    aligned = "some" if len(flags) > 1 else "all" if True in flags else "none"
    return torch.tensor(rows, dtype=torch.int64).to(device), programs, unit, aligned


def _describe(
    shape: torch.Size, strides: Sequence, label_strides: Sequence, gradient_strides: Sequence, classes_last: bool
) -> tuple[list[int], list[int]]:
    """Describe a level: the sizes of its anchors' dimensions, and all strides.

    The dimensions (N, A, H, W) are in the order in which the logits lie in memory, so that anchors of neighbouring
    numbers are neighbours. Rows that follow one another without a gap count as one.
    """
    order = sorted((0, 1, 3, 4), key=lambda d: -strides[d])
    sizes = [shape[d] for d in order]
    of_logits, of_gradients = [strides[d] for d in order], [gradient_strides[d] for d in order]
    of_labels = [label_strides[d - (d > 2)] for d in order]
    if not classes_last and all(x[2] == sizes[3] * x[3] for x in (of_logits, of_labels, of_gradients)):
        sizes[2:] = [1, sizes[2] * sizes[3]]
    return sizes, [*of_logits, strides[2], *of_labels, *of_gradients, gradient_strides[2]]


@triton.jit
def _pick(level, LEVELS: tl.constexpr, pointers):
    """The pointer of a level, of which there are LEVELS."""
    p = pointers[0]
    for i in tl.static_range(1, LEVELS):
        p = pointers[i] if level == i else p
    return p


@triton.jit
def _outer_offsets(strides_ptr, i_0, i_1, i_2):
    """The offsets in memory of the rows of anchors with these indices."""
    return i_0 * tl.load(strides_ptr) + i_1 * tl.load(strides_ptr + 1) + i_2 * tl.load(strides_ptr + 2)


@triton.jit
def _offsets(strides_ptr, i_0, i_1, i_2, i_3):
    """The offsets in memory of the anchors with these indices."""
    return _outer_offsets(strides_ptr, i_0, i_1, i_2) + i_3 * tl.load(strides_ptr + 3)


@triton.jit
def _sigmoid_and_log1p(e, HALF: tl.constexpr, TERMS: tl.constexpr):
    """1 / (1 + e) and log(1 + e) of e in [0, 1], the latter accurate also where 1 + e rounds to 1."""
    if HALF:  # for logits of 11 bits or less: a polynomial, of relative error 2e-7, and 1 / (1 + e) by the logarithm,
        # corrected by a step of Newton's method: fewer instructions than Triton's logarithm and division
        log1p = 0.005232691
        log1p = log1p * e - 0.029505229
        log1p = log1p * e + 0.07822595
        log1p = log1p * e - 0.13663246
        log1p = log1p * e + 0.19106008
        log1p = log1p * e - 0.24842982
        log1p = log1p * e + 0.33319098
        log1p = log1p * e - 0.49999493
        log1p = (log1p * e + 0.99999994) * e
        sigmoid = tl.exp2(-1.442695 * log1p)
        sigmoid *= 2.0 - (1.0 + e) * sigmoid
    else:  # the series of 2 artanh(e / (2 + e)): each term is at most a ninth of the one before
        sigmoid = 1.0 / (1.0 + e)
        t = e / (2.0 + e)
        log1p = tl.zeros_like(t)
        for i in tl.static_range(TERMS):
            log1p = log1p * (t * t) + 1.0 / (2 * (TERMS - i) - 1)
        log1p = 2.0 * t * log1p
    return sigmoid, log1p


@triton.jit
def _tiles(
    logits_ptr, labels_ptr, gradients_ptr, weights_ptr, factor_ptr, row, tile, size_0, size_1, size_2, size_3,
    K,
    GAMMA: tl.constexpr,
    HALF: tl.constexpr,
    TERMS: tl.constexpr,
    CLASSES_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether pointers and all strides but the innermost are multiples of 16 bytes
    WRITES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the loss of BLOCK_R anchors and all classes, or write their gradients."""
    # Offsets have 64 bits: a level can have more than 2^31 logits.
    if CLASSES_LAST:
        r = tile * BLOCK_R + tl.arange(0, BLOCK_R)  # anchors
        inside_r = r < size_0 * size_1 * size_2 * size_3
        i_3, i_2 = (r % size_3).to(tl.int64), (r // size_3 % size_2).to(tl.int64)
        i_1, i_0 = (r // size_3 // size_2 % size_1).to(tl.int64), (r // size_3 // size_2 // size_1).to(tl.int64)
    else:  # the anchors of one row, which are neighbours
        if ALIGNED:
            size_3 = tl.multiple_of(size_3 // 8 * 8, 8)
        blocks = tl.cdiv(size_3, BLOCK_R)
        line = tile // blocks
        r = tile % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
        inside_r = r < size_3
        i_3, i_2 = r.to(tl.int64), (line % size_2).to(tl.int64)
        i_1, i_0 = (line // size_2 % size_1).to(tl.int64), (line // size_2 // size_1).to(tl.int64)
    label = tl.load(labels_ptr + _offsets(row + 10, i_0, i_1, i_2, i_3), mask=inside_r, other=-1).to(tl.int32)
    # Where each anchor's logits and gradients begin.
    if UNIT and not CLASSES_LAST:
        x_line = logits_ptr + _outer_offsets(row + 5, i_0, i_1, i_2)
        g_line = gradients_ptr + _outer_offsets(row + 14, i_0, i_1, i_2)
        if ALIGNED:
            x_line, g_line = tl.multiple_of(x_line, 16), tl.multiple_of(g_line, 16)
        x_ptr, g_ptr = x_line + r, g_line + r
    else:
        x_ptr = logits_ptr + _offsets(row + 5, i_0, i_1, i_2, i_3)
        g_ptr = gradients_ptr + _offsets(row + 14, i_0, i_1, i_2, i_3)
        if ALIGNED:
            x_ptr, g_ptr = tl.multiple_of(x_ptr, 16), tl.multiple_of(g_ptr, 16)
    if CLASSES_LAST:  # tiles of (BLOCK_R, BLOCK_K)
        inside_r, x_ptr, g_ptr, label = inside_r[:, None], x_ptr[:, None], g_ptr[:, None], label[:, None]
        total = tl.zeros((BLOCK_R, BLOCK_K), weights_ptr.dtype.element_ty)
    else:  # tiles of (BLOCK_K, BLOCK_R)
        inside_r, x_ptr, g_ptr, label = inside_r[None, :], x_ptr[None, :], g_ptr[None, :], label[None, :]
        total = tl.zeros((BLOCK_K, BLOCK_R), weights_ptr.dtype.element_ty)
    counts = label >= 0
    factor = tl.load(factor_ptr)
    x_step, g_step = tl.load(row + 9), tl.load(row + 18)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)  # classes
        weight_1 = tl.load(weights_ptr + k, mask=k < K, other=0.0)
        weight_0 = tl.load(weights_ptr + K + k, mask=k < K, other=0.0)
        if UNIT and CLASSES_LAST:
            x_k, g_k = k, k
        else:
            x_k, g_k = k.to(tl.int64) * x_step, k.to(tl.int64) * g_step
            if ALIGNED:
                x_k, g_k = tl.multiple_of(x_k, 8), tl.multiple_of(g_k, 8)
        if CLASSES_LAST:
            k, x_k, g_k, weight_1, weight_0 = (
                k[None, :], x_k[None, :], g_k[None, :], weight_1[None, :], weight_0[None, :],
            )  # fmt: skip
        else:
            k, x_k, g_k, weight_1, weight_0 = (
                k[:, None], x_k[:, None], g_k[:, None], weight_1[:, None], weight_0[:, None],
            )  # fmt: skip
        inside = inside_r & (k < K)
        x = tl.load(x_ptr + x_k, mask=inside, other=0.0).to(weights_ptr.dtype.element_ty)
        positive = label == k
        weight = tl.where(positive, weight_1, weight_0)  # 0 beyond the last class

        x = tl.where(positive, -x, x)  # target 1 is target 0 of −x
        e = tl.exp(-tl.abs(x))
        larger, log1p = _sigmoid_and_log1p(e, HALF, TERMS)
        p = tl.where(x >= 0, larger, e * larger)  # σ(x) and 1 − σ(x), neither by subtraction
        softplus = tl.maximum(x, 0.0) + log1p
        if GAMMA == 0.0:
            w = weight
        elif GAMMA == 1.0:
            w = weight * p
        elif GAMMA == 2.0:
            w = weight * p * p
        else:  # p^γ through log p, whose derivative is finite where that of a power is not
            w = weight * tl.exp(GAMMA * (tl.minimum(x, 0.0) - log1p))
        if WRITES:  # appendix B
            q = tl.where(x >= 0, e * larger, larger)
            slope = w * (GAMMA * q * softplus + p) * tl.where(positive, -factor, factor)
            tl.store(g_ptr + g_k, tl.where(counts, slope, 0.0).to(gradients_ptr.dtype.element_ty), mask=inside)
        else:
            total += tl.where(counts, w * softplus, 0.0)
    return tl.sum(total)


# Labels are parts of one tensor, so where they begin depends on the images' sizes; no kernel is compiled for each case.
@triton.jit(do_not_specialize_on_alignment=[f"t{level}" for level in range(_MOST_LEVELS)])
def _kernel(
    x0, x1, x2, x3, x4, x5, x6, x7,  # logits of up to 8 levels; None for a level that is not there
    t0, t1, t2, t3, t4, t5, t6, t7,  # their labels
    g0, g1, g2, g3, g4, g5, g6, g7,  # their gradients; None in forward
    table_ptr,  # (LEVELS, FIELDS), see _describe
    weights_ptr,  # (2, K)
    factor_ptr,  # a scalar
    sums_ptr,  # (programs,)
    K,
    GAMMA: tl.constexpr,
    LEVELS: tl.constexpr,
    HALF: tl.constexpr,
    TERMS: tl.constexpr,
    CLASSES_LAST: tl.constexpr,  # whether classes are the dimension whose elements are neighbours in memory
    UNIT: tl.constexpr,  # whether the stride of the innermost dimension is 1
    ALIGNED: tl.constexpr,  # "all", "some" or "none" of the levels, see _tiles
    WRITES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FIELDS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    level = 0
    for i in tl.static_range(1, LEVELS):
        if program >= tl.load(table_ptr + i * FIELDS):
            level = i
    row = table_ptr + level * FIELDS
    tile = program - tl.load(row).to(tl.int32)
    size_0, size_1 = tl.load(row + 1).to(tl.int32), tl.load(row + 2).to(tl.int32)
    size_2, size_3 = tl.load(row + 3).to(tl.int32), tl.load(row + 4).to(tl.int32)
    labels_ptr = _pick(level, LEVELS, (t0, t1, t2, t3, t4, t5, t6, t7))
    logits_ptr = _pick(level, LEVELS, (x0, x1, x2, x3, x4, x5, x6, x7))
    gradients_ptr = logits_ptr  # not written
    if WRITES:
        gradients_ptr = _pick(level, LEVELS, (g0, g1, g2, g3, g4, g5, g6, g7))
    # The faster of two programs, which knows that all is aligned; both are there only if both are needed.
    if ALIGNED == "all" or (ALIGNED == "some" and tl.load(row + 19) != 0):
        total = _tiles(
            logits_ptr, labels_ptr, gradients_ptr, weights_ptr, factor_ptr, row, tile, size_0, size_1, size_2, size_3,
            K, GAMMA, HALF, TERMS, CLASSES_LAST, UNIT, UNIT, WRITES, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    else:
        total = _tiles(
            logits_ptr, labels_ptr, gradients_ptr, weights_ptr, factor_ptr, row, tile, size_0, size_1, size_2, size_3,
            K, GAMMA, HALF, TERMS, CLASSES_LAST, UNIT, False, WRITES, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    if not WRITES:
        tl.store(sums_ptr + program, total)
