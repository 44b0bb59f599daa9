"""What a dense detector learns from, beside the losses: positives by level, background's share, gradients by part."""

import math
from dataclasses import replace

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..structures import IGNORED, DenseTargets


class BalanceHook(HookBase):
    """Puts into the event storage, on the first step and every ``period`` steps:

    - ``positives/<level>``: positive anchors of a level, a mean over images.
    - ``background_share``: the share of the class loss that comes from background anchors. Left out for a loss
      that chooses among the anchors (``MiniBatchLoss``): it would choose others if the positives were not there.
    - ``grad_norm/{backbone, cls_subnet, bbox_subnet}``: the L2 norm of the gradient of the backbone and of each subnet
      with its last conv, before any clipping; ``grad_norm/head`` for parameters of a head with other names. Left out
      where it is not finite: in float16 such a step is skipped.

    The first two need a model that calls a module ``cls_loss`` with ``(logits, targets)``; others get the norms alone.
    On the steps between, nothing is computed and no GPU is waited for.

    Register it with a ``StepTrainer``, or another trainer that calls ``after_backward``, in every process.

    Args:
        model: the detector, or one in DistributedDataParallel.
        period: in steps. 20, as often as Detectron2 writes.
    """

    def __init__(self, model: nn.Module, period: int = 20):
        if period < 1:
            raise ValueError(f"period is {period}; expected a number of steps ≥ 1.")
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.period = period
        self.watch = LossWatch(period)
        loss = getattr(self.model, "cls_loss", None)
        if isinstance(loss, nn.Module):
            loss.register_forward_hook(self.watch)

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
        """What the parts of the batch, over all processes, say of the anchors; {} for a model without ``cls_loss``."""
        images, positives, losses = self.watch.take()
        everyone = comm.gather((images, positives, losses))  # [] but on the main process, which is the one that writes
        images = sum(each[0] for each in everyone)
        if not images:
            return {}
        names = getattr(self.model, "head_in_features", None) or range(len(positives))
        counts = [sum(level) for level in zip(*(each[1] for each in everyone))]
        background, total = (sum(each[2][i] for each in everyone) for i in (0, 1))
        numbers = {f"positives/{name}": count / images for name, count in zip(names, counts)}
        if total and not hasattr(self.model.cls_loss, "choose"):
            numbers["background_share"] = background / total  # Detectron2 would print it if it had "loss" in its name
        return numbers


class LossWatch:
    """A forward hook of a class loss; it keeps what ``BalanceHook`` needs of each call on a step of its period."""

    def __init__(self, period: int):
        self.period = period
        self._iteration = 0
        self._calls: list[tuple[int, list[int], Tensor]] = []

    def __call__(self, loss: nn.Module, args: tuple, total: Tensor) -> None:
        """After ``loss(*args)``, which gave ``total``."""
        iteration = get_event_storage().iter
        if not torch.is_grad_enabled() or not _is_due(iteration, self.period):
            return
        if iteration != self._iteration:  # what is left is of a step that was computed again, to explain it
            self._iteration, self._calls = iteration, []
        logits, targets = args
        background = torch.zeros_like(total)
        if not hasattr(loss, "choose"):
            with torch.no_grad():  # `forward`, since a call would come here again
                background = loss.forward([level.detach() for level in logits], background_of(targets))
        positives = [len(level) for level in targets.positives]
        self._calls.append((len(targets.labels[0]), positives, torch.stack([background, total.detach()])))

    def take(self) -> tuple[int, list[int], list[float]]:
        """Of all calls since the last time: images, positives a level, and the loss of background and of everything."""
        calls, self._calls = self._calls, []
        if not calls:
            return 0, [], [0.0, 0.0]
        images, positives, losses = zip(*calls)
        return sum(images), [sum(level) for level in zip(*positives)], torch.stack(losses).sum(dim=0).tolist()


def background_of(targets: DenseTargets) -> DenseTargets:
    """``targets`` with the positives ignored.

    For every loss that is a sum over all anchors, the loss of these is the background anchors' part of it.
    """
    return replace(
        targets,
        labels=[torch.where((x >= 0) & (x < targets.num_classes), IGNORED, x) for x in targets.labels],
        positives=[level[:0] for level in targets.positives],
        anchors=targets.anchors[:0],
        gt_boxes=targets.gt_boxes[:0],
        quality=None if targets.quality is None else targets.quality[:0],
    )


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
