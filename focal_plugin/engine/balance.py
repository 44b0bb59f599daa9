"""What a dense detector learns from, beside the losses: positives by level, background's share, gradients by part."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..class_loss import ClassLoss
from ..losses import ElementwiseLoss
from ..structures import DenseTargets
from .processes import unwrapped


class BalanceHook(HookBase):
    """Puts into the event storage, on the first step and every ``period`` steps:

    - ``positives/<level>``: positive anchors of a level, a mean over images.
    - ``background_share``: the share of the class loss that comes from background anchors. Left out for a loss
      that is no sum over all anchors (no ``ElementwiseLoss``): one that samples them, say.
    - ``grad_norm/{backbone, cls_subnet, bbox_subnet}``: the L2 norm of the gradient of the backbone and of each subnet
      with its last conv, before any clipping; ``grad_norm/head`` for parameters of a head with other names. Left out
      where it is not finite: in float16 such a step is skipped.

    The first two need a model with a ``loss_observer``, FocalRetinaNet or FocalFCOS; others get the norms alone. The
    steps between cost nothing and synchronise with no GPU.

    Register it with a ``StepTrainer``, or another trainer that calls ``after_backward``, in every process.

    Args:
        model: the detector, or one in DistributedDataParallel.
        period: in steps. 20, as often as Detectron2 writes.
    """

    def __init__(self, model: nn.Module, period: int = 20):
        if period < 1:
            raise ValueError(f"period is {period}; expected a number of steps ≥ 1.")
        self.model = unwrapped(model)
        self.period = period
        self.observer = LossObserver(period)
        if hasattr(self.model, "loss_observer"):
            self.model.loss_observer = self.observer

    def after_backward(self) -> None:
        """Put the numbers of this step, if it is one of them."""
        storage = get_event_storage()
        if not _is_due(storage.iter, self.period):
            return
        scaler = getattr(self.trainer, "grad_scaler", None)  # float16's gradients are still multiplied by its scale
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        numbers = {f"grad_norm/{part}": norm / scale for part, norm in gradient_norms(self.model).items()}
        numbers |= self._seen_anywhere()
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        storage.put_scalars(smoothing_hint=False, **finite)

    def _seen_anywhere(self) -> dict[str, float]:
        """The numbers of all micro-batches and processes, positives and background; {} without an observer."""
        images, positives, losses = self.observer.take()
        everyone = comm.gather((images, positives, losses))  # [] but on the main process, which is the one that writes
        images = sum(each[0] for each in everyone)
        if not images:
            return {}
        names = getattr(self.model, "head_in_features", None) or range(len(positives))
        counts = [sum(level) for level in zip(*(each[1] for each in everyone))]
        of_positives, total = (sum(each[2][i] for each in everyone) for i in (0, 1))
        numbers = {f"positives/{name}": count / images for name, count in zip(names, counts)}
        if total and math.isfinite(of_positives):  # Detectron2 would print the share if it had "loss" in its name
            share = 1 - of_positives / total
            numbers["background_share"] = min(max(share, 0.0), 1.0) if of_positives >= 0 else math.nan
        return numbers


class LossObserver:
    """Keeps what ``BalanceHook`` needs of each call of a class loss on a step of its period."""

    def __init__(self, period: int):
        self.period = period
        self._iteration = 0
        self._calls: list[tuple[int, list[int], Tensor]] = []

    def __call__(self, cls_loss: ClassLoss, logits: list[Tensor], targets: DenseTargets, total: Tensor) -> None:
        """Note the call ``cls_loss(logits, targets)``, which gave ``total``."""
        iteration = get_event_storage().iter
        if not torch.is_grad_enabled() or not _is_due(iteration, self.period):
            return
        if iteration != self._iteration:  # what is left is of a step that was computed again, to explain it
            self._iteration, self._calls = iteration, []
        is_sum = isinstance(cls_loss, ElementwiseLoss)
        of_positives = loss_of_positives(cls_loss, logits, targets) if is_sum else torch.full_like(total, math.nan)
        positives = [len(level) for level in targets.positives]
        self._calls.append((len(targets.labels[0]), positives, torch.stack([of_positives, total])))

    def take(self) -> tuple[int, list[int], list[float]]:
        """Of all calls since the last time: images, positives a level, and the loss of positives and of all anchors."""
        calls, self._calls = self._calls, []
        if not calls:
            return 0, [], [0.0, 0.0]
        images, positives, losses = zip(*calls)
        return sum(images), [sum(level) for level in zip(*positives)], torch.stack(losses).sum(dim=0).tolist()


@torch.no_grad()
def loss_of_positives(cls_loss: ClassLoss, logits: Sequence[Tensor], targets: DenseTargets) -> Tensor:
    """The positive anchors' part of a loss that is a sum over anchors, an ``ElementwiseLoss``: a scalar.

    The rest is the background's. There are few positives, so this costs next to nothing.

    Args:
        cls_loss, logits, targets: as ``class_loss`` calls it with them.
    """
    rows = targets.gather([level.detach() for level in logits])  # (P, K)
    labels = torch.cat([level.flatten()[index] for level, index in zip(targets.labels, targets.positives)])  # (P,)
    indices = torch.arange(len(rows), device=rows.device)
    alone = replace(targets, labels=[labels.view(1, 1, -1, 1)], positives=[indices], grid=None)
    return cls_loss([rows.t()[None, None, :, :, None]], alone)  # of (1, 1, K, P, 1)


@torch.no_grad()
def gradient_norms(model: nn.Module) -> dict[str, float]:
    """The L2 norms of the gradients of a dense detector's parts: ``backbone``, ``cls_subnet``, ``bbox_subnet``.

    A subnet is all of ``head`` whose name begins with ``cls`` or ``bbox``, last conv included; ``head`` is the rest of
    it. Other modules have their own names. A part without gradients is left out.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts.setdefault(_part(name), []).append(parameter.grad)
    if not parts:
        return {}
    norms = torch.stack([torch.nn.utils.get_total_norm(gradients) for gradients in parts.values()])
    return dict(zip(parts, norms.tolist()))


def _part(name: str) -> str:
    part, _, rest = name.partition(".")
    if part != "head":
        return part
    return next((f"{kind}_subnet" for kind in ("cls", "bbox") if rest.startswith(kind)), "head")


def _is_due(iteration: int, period: int) -> bool:
    return iteration == 0 or (iteration + 1) % period == 0
