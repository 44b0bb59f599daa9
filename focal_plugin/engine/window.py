"""Gradient accumulation: the micro-batches of a batch are normalised as one batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WindowNormalizer(nn.Module):
    """The normaliser of a model while it computes the micro-batches of a batch.

    The divisor of a batch's losses is known once its last micro-batch has been matched. So those before it are divided
    by a guess, and their positives counted; the last is divided by the normaliser's value for all positives, and the
    caller divides the gradients of the earlier ones by ``rest``.

    The guess keeps float16's gradients in range, as they have one loss scale. It is a power of 2, so that two divisions
    round as one does.

    Attributes:
        closing: set it before the forward pass of the last micro-batch.
        rest: the divisor of the whole batch over the guess, a scalar; known after that forward pass.
    """

    def __init__(self, normalizer: nn.Module):
        super().__init__()
        self.normalizer = normalizer
        self.counts: list[int] = []  # of positives, one per micro-batch
        self.closing = False
        self.rest: Tensor | None = None

    def forward(self, num_positives: int, device: torch.device) -> Tensor:
        """Return the divisor of this micro-batch, a scalar float32 on ``device``."""
        self.counts.append(num_positives)
        guess = 2.0 ** self.counts[0].bit_length()
        if not self.closing:
            return torch.full((), guess, device=device)
        total = self.normalizer(sum(self.counts), device)
        self.rest = total / guess
        return total


@contextmanager
def counted_together(model: nn.Module) -> Iterator[WindowNormalizer | None]:
    """Treat all forward passes of ``model`` inside as micro-batches of one batch.

    Yields:
        The normaliser in place of ``model.normalizer``; None, with nothing done, if the model has no such module.
    """
    normalizer = getattr(model, "normalizer", None)
    if not isinstance(normalizer, nn.Module):
        yield None
        return
    model.normalizer = WindowNormalizer(normalizer)
    try:
        yield model.normalizer
    finally:
        model.normalizer = normalizer


def split(batch: Sequence, parts: int) -> list[Sequence]:
    """Split ``batch`` into ``parts`` consecutive micro-batches whose sizes differ by at most one; fewer if shorter."""
    parts = min(parts, len(batch))
    return [batch[len(batch) * i // parts : len(batch) * (i + 1) // parts] for i in range(parts)]


@torch.no_grad()
def divide_gradients(model: nn.Module, divisor: Tensor) -> None:
    """Divide all gradients of ``model`` by the scalar ``divisor``, in place."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(divisor)
