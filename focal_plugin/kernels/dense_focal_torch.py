"""The dense focal loss in plain PyTorch: for the CPU, and for devices without Triton."""

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..structures import IGNORED, unravel

# The logit of a certain negative: its loss and its gradient are exactly 0, whatever γ is.
_CERTAIN = -1e4


def loss_and_gradients(
    logits: Sequence[Tensor],
    labels: Sequence[Tensor],
    alpha: float | Tensor,
    gamma: float,
    needed: Sequence[bool],
    factor: float,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the loss of ``dense_focal_loss``, and ``factor`` times the gradient of each level that needs one."""
    positive, negative = (1.0, 1.0) if isinstance(alpha, float) and alpha == -1 else (alpha, 1 - alpha)
    device, dtype = logits[0].device, torch.promote_types(logits[0].dtype, torch.float32)
    levels = [_Level(*level, factor) for level in zip(logits, labels, needed)]
    if device.type == "cpu":
        for i, level in enumerate(levels):
            level.check_labels(i)
        # logaddexp calls SLEEF's log1p, which on AVX-512 loads a constant under a mask that is empty unless an argument
        # is −0.0. Until the constant's page is mapped, even empty loads take the processor's slow path and log1p takes
        # ten times as long. An argument −0.0 maps the page.
        torch.log1p(torch.tensor(-0.0, device="cpu"))

    tasks = [(level, *block) for level in levels for block in level.blocks(_block_size(device))]
    losses = [torch.empty(0)] * len(tasks)  # summed in this order, whichever thread is first, to be reproducible
    queue = iter(enumerate(tasks))

    @(torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad)()  # set for each thread
    def work() -> None:
        size = max((count for _, _, count, _ in tasks), default=0)
        scratch = torch.empty(3, size, dtype=dtype, device=device)
        for i, (level, start, count, index) in queue:
            losses[i] = level.negatives(start, count, index, negative, gamma, scratch)

    _on_threads(work, min(torch.get_num_threads(), len(tasks)) if device.type == "cpu" else 1)
    losses += [level.positives(positive, gamma) for level in levels]
    return torch.stack(losses).sum(), [level.gradient for level in levels]


def scale_(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply the gradients in place."""
    number = factor.item()  # a 0-dim tensor would be rounded to float16 before a float16 gradient is multiplied by it
    if number != 1:
        for gradient in gradients:
            gradient.mul_(number)


def _on_threads(work: Callable[[], None], count: int) -> None:
    """Call ``work`` on ``count`` threads at once, with PyTorch's own threads switched off.

    PyTorch would divide every operation among its threads and wait for the slowest. The operations here are short, and
    on cores that other processes use too, most of the time would be spent waiting.
    """
    if count <= 1:
        work()
        return
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for future in [pool.submit(work) for _ in range(count)]:
                future.result()
    finally:
        torch.set_num_threads(threads)  # the pool's 1 has become the default of threads that start later


def memory_order(logits: Tensor) -> list[int]:
    """Return the dimensions of ``torch.empty_like(logits)``, those of larger strides first."""
    strides = torch.empty_like(logits, device="meta").stride()
    return sorted(range(logits.ndim), key=lambda d: -strides[d])


def _block_size(device: torch.device) -> int:
    """Return the largest number of elements of a block: on a CPU, as many as fit in cache with their temporaries."""
    return 2**17 if device.type == "cpu" else 2**22


def _focal(scratch: Tensor, weight: float | Tensor, gamma: float, factor: float, gradient: Tensor | None) -> Tensor:
    """Return Σ weight · σ(x)^γ · softplus(x), the loss of logits with target 0; write its gradient times ``factor``.

    This is equation 5: for target 0, 1 − p_t = σ(x) and −log p_t = softplus(x). Target 1 is target 0 of −x with another
    weight.

    Args:
        scratch: (3, ...), three tensors of one shape; the first holds the logits x. All are overwritten.
        weight: a number, or a tensor that broadcasts to that shape.
        gradient: of that shape and any dtype, or None.
    """
    x, p, s = scratch.unbind()
    zero = x.new_zeros(())
    torch.sigmoid(x, out=p)
    torch.logaddexp(x, zero, out=s)  # softplus; −log σ(−x) would be inaccurate where σ(−x) ≈ 1
    if gamma == 0:
        if gradient is not None:
            torch.mul(p, weight * factor, out=gradient)
        return s.mul_(weight).sum()

    number, weights = (1.0, weight) if isinstance(weight, Tensor) else (weight, None)
    if gamma == 2:
        torch.addcmul(zero, p, p, value=gamma * factor * number, out=x)
    else:  # p^γ through log p = x − softplus(x): its derivative is finite where that of a power is not
        x.sub_(s).mul_(gamma).exp_().mul_(gamma * factor * number)
    if weights is not None:
        x.mul_(weights)
    loss = s.mul_(x).sum() / (gamma * factor)
    # Appendix B. Of w · softplus(x) / γ, with w = γ · weight · p^γ, the gradient is w (1 − p) softplus(x) + w p / γ.
    if gradient is not None:
        torch.addcmul(s.addcmul_(p, s, value=-1), p, x, value=1 / gamma, out=gradient)
    return loss


class _Level:
    """One level's logits in the order of memory, as (B, K, S).

    K are the classes, B all dimensions before them and S all dimensions after them: S = 1 for channels last, S = H·W
    for channels first. Anchor (b, s) has the number b·S + s, and element (b, k, s) the number (b·K + k)·S + s.
    """

    def __init__(self, logits: Tensor, labels: Tensor, needed: bool, factor: float):
        self.gradient = torch.empty_like(logits) if needed else None  # (N, A, K, H, W), dense
        order = memory_order(logits)
        self.logits = logits.detach().permute(order)
        self.shape = self.logits.shape
        self.num_classes, self.inner = logits.shape[2], math.prod(self.shape[order.index(2) + 1 :])  # K, S
        self.factor = factor
        self.written = None if self.gradient is None else self.gradient.permute(order).view(-1)  # (B·K·S,)

        flat = labels.permute([d - (d > 2) for d in order if d != 2]).reshape(-1)  # (B·S,)
        special = (flat != self.num_classes).nonzero().squeeze(1)  # the anchors that are not background
        self.labels = flat[special]
        self.ignored = special[self.labels <= IGNORED]  # (I,) anchors
        is_positive = (self.labels >= 0) & (self.labels < self.num_classes)
        anchors, classes = special[is_positive], self.labels[is_positive]
        b, s = anchors.div(self.inner, rounding_mode="floor"), anchors.remainder(self.inner)
        self.positive, indices = ((b * self.num_classes + classes) * self.inner + s).sort()  # (P,) elements
        self.classes = classes[indices]  # (P,)
        # On the host, where each block looks up which of them it holds.
        self.ignored_numbers, self.positive_numbers = self.ignored.tolist(), self.positive.tolist()

    def check_labels(self, level: int) -> None:
        """Raise ValueError for labels outside [−1, K]; ``level`` is this level's number."""
        if ((self.labels < IGNORED) | (self.labels > self.num_classes)).any():
            raise ValueError(
                f"Level {level} has labels from {self.labels.min()} to {self.labels.max()}; expected a class in "
                f"[0, {self.num_classes}), {self.num_classes} for background or {IGNORED} for ignored."
            )

    def blocks(self, size: int) -> Iterator[tuple[int, int, tuple[Any, ...]]]:
        """Divide the elements into contiguous blocks of at most ``size``.

        Each block is a box in (B, K, S), of which at most one side is neither 1 nor the whole dimension.

        Yields:
            The number of the first element, the number of elements, and the block's index into ``logits``.
        """
        inner = [math.prod(self.shape[d + 1 :]) for d in range(5)]
        cut = next(d for d in range(5) if inner[d] <= size)  # the dimension that is sliced; those before it are indexed
        step, start = size // max(inner[cut], 1), 0
        for outer in itertools.product(*(range(n) for n in self.shape[:cut])):
            for i in range(0, self.shape[cut], step):
                count = min(step, self.shape[cut] - i) * inner[cut]
                if count:
                    yield start, count, (*outer, slice(i, i + step))
                start += count

    def negatives(
        self, start: int, count: int, index: tuple[Any, ...], weight: float | Tensor, gamma: float, scratch: Tensor
    ) -> Tensor:
        """Return the loss of a block's elements with target 0. Write their gradient, and 0 for all other elements."""
        block, scratch = self.logits[index], scratch[:, :count]
        x = scratch[0]
        x.view(block.shape).copy_(block)
        ks = min(count // min(count, self.inner), self.num_classes), min(count, self.inner)  # the block in K and S
        b, k = divmod(start // self.inner, self.num_classes)

        low, high = (bisect_left(self.positive_numbers, number) for number in (start, start + count))
        if low < high:
            x.index_fill_(0, self.positive[low:high] - start, _CERTAIN)
        first = b * self.inner + start % self.inner
        low, high = (bisect_left(self.ignored_numbers, number) for number in (first, first + count // ks[0]))
        if low < high:
            x.index_fill_(0, _elements(self.ignored[low:high] - first, *ks), _CERTAIN)

        gradient = None if self.written is None else self.written[start : start + count]
        if isinstance(weight, Tensor):
            weight, scratch = weight[k : k + ks[0], None], scratch.view(3, -1, *ks)
            gradient = None if gradient is None else gradient.view(-1, *ks)
        return _focal(scratch, weight, gamma, self.factor, gradient)

    def positives(self, weight: float | Tensor, gamma: float) -> Tensor:
        """Return the loss of the elements with target 1. Write their gradient, over the zeros of ``negatives``."""
        x = -self.logits[unravel(self.positive, self.shape)]  # (P,)
        scratch = x.to(torch.promote_types(x.dtype, torch.float32)).repeat(3, 1)
        gradient = None if self.written is None else torch.empty_like(x)
        if isinstance(weight, Tensor):
            weight = weight[self.classes]
        loss = _focal(scratch, weight, gamma, self.factor, gradient)
        if self.written is not None and gradient is not None:
            self.written[self.positive] = -gradient
        return loss


def _elements(anchors: Tensor, k: int, s: int) -> Tensor:
    """Return the numbers of the k elements of each of the ``anchors`` in a block of sizes (b, k, s)."""
    first = anchors // s * (k * s) + anchors % s
    return (first[:, None] + torch.arange(0, k * s, s, device=anchors.device)).view(-1)
