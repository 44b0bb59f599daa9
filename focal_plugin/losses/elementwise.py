"""The base class of losses that are a function of one logit and its target."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..contracts import checked_elementwise
from ..structures import IGNORED, DenseTargets

_BLOCK_SIZE = 2**22  # logits whose temporaries are in memory at a time


class ElementwiseLoss(nn.Module, ABC):
    """A loss that is a sum over anchors and classes of a function of one logit and its target.

    A subclass defines ``elementwise`` and nothing else; this class makes the targets, leaves out the ignored anchors
    and sums. To save memory, targets and temporaries exist for a few million logits at a time and are computed again in
    backward, with the same random numbers if ``elementwise`` draws any.

    Targets are 0 and 1. With the class attribute ``needs_quality = True`` they are soft: the target of a positive for
    its class is its quality, the IoU of its predicted box with its ground truth.

    Args:
        cfg: not used; a subclass without a constructor is built with it.
        hyperparameters: become attributes and are shown by ``repr``. A tensor becomes a buffer: it moves with the
            module, but is not in checkpoints, because it is not learnt.
    """

    needs_quality = False
    _hyperparameters: tuple[str, ...] = ()

    def __init__(self, cfg: CfgNode | None = None, **hyperparameters: float | Tensor):
        super().__init__()
        self._hyperparameters = tuple(hyperparameters)
        for name, value in hyperparameters.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, float(value))

    @abstractmethod
    def elementwise(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each logit. Logits, targets and losses are float tensors (..., K, H, W)."""

    def forward(self, logits: list[Tensor], targets: DenseTargets) -> Tensor:
        """Sum over all classes and anchors that are not ignored; float32. ``logits``: one (N, A, K, H, W) view a level.

        A ValueError if the loss needs the positives' quality and ``targets`` have none.
        """
        if self.needs_quality and targets.quality is None:
            raise ValueError(
                f"{type(self).__name__} needs the quality of each positive, and these DenseTargets have none: give it "
                "targets.with_quality(boxes), with the predicted boxes of the positives."
            )
        # All anchors, about 100,000 an image, and not a sample of them: the focal loss balances them (section 4.1).
        total, start = torch.zeros((), device=logits[0].device), 0
        for i, (level, labels) in enumerate(zip(logits, targets.labels)):
            quality = torch.ones(labels.shape, device=labels.device)  # (N, A, H, W)
            if self.needs_quality and targets.quality is not None:
                stop = start + len(targets.positives[i])
                quality.view(-1)[targets.positives[i]] = targets.quality[start:stop].to(quality.dtype)
                start = stop
            for block in _blocks(level, labels, quality):
                total = total + checkpoint(self._sum, *block, use_reentrant=False)
        return total

    def _sum(self, logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
        """The sum over logits (..., K, H, W) with labels and quality (..., H, W)."""
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        labels = labels.unsqueeze(-3)  # (..., 1, H, W)
        classes = torch.arange(logits.shape[-3], device=logits.device).view(-1, 1, 1)  # (K, 1, 1)
        # One sigmoid a class: background, label K, equals none of them, so all its targets are 0.
        wanted = torch.where(labels == classes, quality.unsqueeze(-3), 0.0).to(logits.dtype)  # (..., K, H, W)
        loss = checked_elementwise(self, self.elementwise(logits, wanted), logits)
        return torch.where(labels == IGNORED, 0.0, loss).sum()  # not a product: 0 · ∞ is NaN

    def extra_repr(self) -> str:
        numbers = {name: getattr(self, name) for name in self._hyperparameters}
        return ", ".join(f"{name}={x.tolist() if isinstance(x, Tensor) else x}" for name, x in numbers.items())


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split the tensors along their first dimensions, until the first has at most ``_BLOCK_SIZE`` elements."""
    if tensors[0].numel() <= _BLOCK_SIZE or tensors[0].dim() <= 3:
        yield tensors
        return
    for slices in zip(*(tensor.unbind() for tensor in tensors)):
        yield from _blocks(*slices)
