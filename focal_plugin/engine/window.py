"""Gradient accumulation: the parts of a batch, one after another, are normalised as one batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WindowNormalizer(nn.Module):
    """Stands in for a model's normaliser while the parts of a batch are computed.

    What the losses of a batch are divided by is known when its last part has been matched. So the parts before it are
    divided by a guess, and the positives counted; the last part is divided by what the normaliser makes of all of them,
    and whoever runs the window divides what has been added up before by the rest.

    The guess is for float16, whose gradients have one scale for all parts. It is a power of 2, so that the result is
    that of one division.

    Attributes:
        closing: set it before the forward pass of the last part.
        rest: the divisor of the whole batch over the guess, a scalar; known after that forward pass.
    """

    def __init__(self, normalizer: nn.Module):
        super().__init__()
        self.normalizer = normalizer
        self.counts: list[int] = []  # of positives, of each part
        self.closing = False
        self.rest: Tensor | None = None

    def forward(self, num_positives: int, device: torch.device) -> Tensor:
        """The divisor of this part, a scalar float32 on ``device``."""
        self.counts.append(num_positives)
        guess = 2.0 ** self.counts[0].bit_length()
        if not self.closing:
            return torch.full((), guess, device=device)
        total = self.normalizer(sum(self.counts), device)
        self.rest = total / guess
        return total


@contextmanager
def counted_together(model: nn.Module) -> Iterator[WindowNormalizer | None]:
    """Inside, all forward passes of ``model`` are parts of one batch for its ``normalizer``.

    None, and nothing happens, if it has no such module.
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
    """``batch`` in ``parts`` consecutive parts of sizes that differ by one at most; fewer if it is shorter."""
    parts = min(parts, len(batch))
    return [batch[len(batch) * i // parts : len(batch) * (i + 1) // parts] for i in range(parts)]


@torch.no_grad()
def divide_gradients(model: nn.Module, divisor: Tensor) -> None:
    """Divide all gradients of ``model`` by the scalar ``divisor``, in place."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(divisor)
