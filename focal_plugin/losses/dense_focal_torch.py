"""The dense focal loss in plain PyTorch: for the CPU, and for devices that Triton does not know."""

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..structures import IGNORED

# Elements of a block. On a CPU a block and its temporaries fit a core's L2 cache; and below 2^15 PyTorch runs an
# operation on the thread that calls it, so that the threads here never wait for each other.
_CPU_BLOCK, _OTHER_BLOCK = 31_000, 2**22

# A logit of this is background for certain: its loss and its gradient are exactly 0, whatever γ is.
_CERTAIN = -1e4


def loss_and_gradients(
    logits: Sequence[Tensor],
    labels: Sequence[Tensor],
    alpha: float | Tensor,
    gamma: float,
    factors: Sequence[float | None],
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss of ``dense_focal_loss``, and for each level its gradient times ``factors``; None where that is None."""
    positive, negative = (1.0, 1.0) if isinstance(alpha, float) and alpha == -1 else (alpha, 1 - alpha)
    levels = [_Level(*level) for level in zip(logits, labels, factors)]
    cpu, dtype = logits[0].device.type == "cpu", torch.promote_types(logits[0].dtype, torch.float32)
    if cpu:
        for i, level in enumerate(levels):
            level.check_labels(i)
        # SLEEF's log1p for AVX-512, which logaddexp calls, reads its constant −0.0 under a mask that is empty for all
        # other arguments. While the page with the constant is not mapped, each such read takes the processor's slow
        # path, and log1p ten times as long. The argument −0.0 maps the page.
        torch.log1p(torch.tensor(-0.0, dtype=torch.float32))

    tasks = [(level, *block) for level in levels for block in level.blocks(_CPU_BLOCK if cpu else _OTHER_BLOCK)]
    losses: list[Tensor] = [torch.zeros((), dtype=dtype, device=logits[0].device)] * len(tasks)
    queue = iter(enumerate(tasks))  # shared by the threads: each takes the next block when it has done one

    @(torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad)()  # threads don't inherit it
    def work() -> None:
        size = max((count for _, _, count, _ in tasks), default=0)
        scratch = torch.empty(3, size, dtype=dtype, device=logits[0].device)
        for i, (level, start, count, index) in queue:
            losses[i] = level.negatives(start, count, index, negative, gamma, scratch)

    workers = min(torch.get_num_threads(), len(tasks)) if cpu else 1
    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            for future in [pool.submit(work) for _ in range(workers)]:
                future.result()
    else:
        work()
    with torch.no_grad():
        losses += [level.finish(positive, gamma) for level in levels]
        return torch.stack(losses).sum(), [level.gradient for level in levels]


def scale_(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply the gradients in place."""
    number = factor.item()  # in float32 at least, which a 0-dim tensor times a float16 tensor would not be
    if number != 1:
        for gradient in gradients:
            gradient.mul_(number)


def _focal(x: Tensor, weight: float | Tensor, gamma: float, p: Tensor, s: Tensor, gradient: bool) -> Tensor:
    """The sum over logits x with target 0 of weight · σ(x)^γ · softplus(x); x becomes the gradient if one is asked for.

    p and s are scratch space of the shape of x. Target 1 is target 0 of −x.
    """
    torch.sigmoid(x, out=p)
    torch.logaddexp(x, x.new_zeros(()), out=s)  # softplus to the last bits; −log σ(−x) has few left where σ(−x) ≈ 1
    if gamma == 2:
        torch.mul(p, p, out=x)
    else:  # through log p = x − softplus(x), whose derivative is finite where that of p^γ is not
        x.sub_(s).mul_(gamma).exp_()
    x.mul_(weight)  # w = weight · p^γ
    s.mul_(x)
    loss = s.sum()
    if gradient:  # w (γ (1 − p) softplus(x) + p)
        s.addcmul_(p, s, value=-1)
        x.mul_(p).add_(s, alpha=gamma)
    return loss


class _Level:
    """One level's logits as they lie in memory: dimensions before that of the classes, classes (K), dimensions after.

    Their sizes multiply to B, K and S: S is 1 for channels last and H·W for channels first. An anchor is a pair (b, s)
    and has number b·S + s; an element is (b, k, s) and has number (b·K + k)·S + s.
    """

    def __init__(self, logits: Tensor, labels: Tensor, factor: float | None):
        order = sorted(range(5), key=lambda d: -logits.stride(d))
        k_dim = order.index(2)
        self.logits = logits.detach().permute(order)
        self.num_classes = logits.shape[2]
        self.leading, self.inner = k_dim + 1, math.prod(self.logits.shape[k_dim + 1 :])  # S
        self.factor, self.written, self.gradient = factor, None, None
        if factor is not None:
            self.written = torch.empty(self.logits.shape, dtype=logits.dtype, device=logits.device)
            self.gradient = self.written.permute([order.index(d) for d in range(5)])  # (N, A, K, H, W)

        codes = labels.permute([d - (d > 2) for d in order if d != 2]).reshape(-1)  # (B·S,)
        special = (codes != self.num_classes).nonzero().squeeze(1)
        self.codes = codes[special]
        self.ignored = special[self.codes <= IGNORED]  # anchors
        found = (self.codes >= 0) & (self.codes < self.num_classes)
        b, s = special[found] // max(self.inner, 1), special[found] % max(self.inner, 1)
        classes = self.codes[found]
        self.positives, by_place = ((b * self.num_classes + classes) * self.inner + s).sort()  # (P,) elements
        self.classes = classes[by_place]  # (P,)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        self.positive_logits = torch.empty(len(classes), dtype=dtype, device=logits.device)  # (P,)
        # On the host, to look up what a block holds.
        self.positive_numbers, self.ignored_numbers = self.positives.tolist(), self.ignored.tolist()

    def check_labels(self, level: int) -> None:
        if ((self.codes < IGNORED) | (self.codes > self.num_classes)).any():
            raise ValueError(
                f"Level {level} has labels from {self.codes.min()} to {self.codes.max()}; expected a class in "
                f"[0, {self.num_classes}), {self.num_classes} for background or {IGNORED} for ignored."
            )

    def blocks(self, size: int) -> Iterator[tuple[int, int, tuple]]:
        """Cut the elements into runs of at most ``size``: (first element, how many, index into ``logits``) of each."""
        shape = self.logits.shape
        inner = [math.prod(shape[d + 1 :]) for d in range(5)]
        cut = next(d for d in range(5) if inner[d] <= size)  # dimensions before it are walked through, it is sliced
        step, start = size // max(inner[cut], 1), 0
        for outer in itertools.product(*(range(n) for n in shape[:cut])):
            for i in range(0, shape[cut], step):
                count = min(step, shape[cut] - i) * inner[cut]
                if count:
                    yield start, count, (*outer, slice(i, i + step))
                start += count

    def negatives(self, start, count, index, weight, gamma, scratch) -> Tensor:
        """The loss of a block's elements with target 0; writes their gradient, and 0 in the places of the others."""
        block = self.logits[index]
        x, p, s = (row[:count] for row in scratch)
        x.view(block.shape).copy_(block)

        # The block is a box: bn × kn × sn of (b, k, s). Only one of the three is less than its all and more than 1.
        sn = min(count, self.inner)
        kn = min(count // sn, self.num_classes)
        b, k = divmod(start // self.inner, self.num_classes)
        self._take_out_positives(x, start, count)
        self._take_out_ignored(x, b * self.inner + start % self.inner, kn, sn)

        box = (-1, kn, sn)
        if isinstance(weight, Tensor):
            weight = weight[k : k + kn, None]
        loss = _focal(x.view(box), weight, gamma, p.view(box), s.view(box), self.factor is not None)
        if self.factor is not None:
            self.written[index].copy_(self._scaled(x).view(block.shape))
        return loss

    def _take_out_positives(self, x: Tensor, start: int, count: int) -> None:
        low, high = (bisect_left(self.positive_numbers, number) for number in (start, start + count))
        if low < high:
            places = self.positives[low:high] - start
            torch.index_select(x, 0, places, out=self.positive_logits[low:high])
            x.index_fill_(0, places, _CERTAIN)

    def _take_out_ignored(self, x: Tensor, first: int, kn: int, sn: int) -> None:
        """``first`` is the box's first anchor."""
        anchors = len(x) // kn
        low, high = (bisect_left(self.ignored_numbers, number) for number in (first, first + anchors))
        if low < high:
            anchor = self.ignored[low:high] - first
            places = anchor // sn * (kn * sn) + anchor % sn
            if kn > 1:
                places = (places[:, None] + torch.arange(0, kn * sn, sn, device=x.device)).view(-1)
            x.index_fill_(0, places, _CERTAIN)

    def finish(self, weight: float | Tensor, gamma: float) -> Tensor:
        """The loss of the positives, when all blocks are done; writes their gradient."""
        x = -self.positive_logits
        if isinstance(weight, Tensor):
            weight = weight[self.classes]
        loss = _focal(x, weight, gamma, torch.empty_like(x), torch.empty_like(x), self.factor is not None)
        if self.factor is not None:
            self.written.view(-1)[self.positives] = -self._scaled(x).to(self.written.dtype)
        return loss

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.factor == 1 else x.mul_(self.factor)
