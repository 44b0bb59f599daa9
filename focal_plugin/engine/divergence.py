"""What to say when a loss is infinite or NaN: which images, and where in the model it starts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from detectron2.utils import comm
from torch import Tensor, nn


@dataclass(frozen=True)
class DivergenceReport:
    """One process's account of a step whose loss is not finite.

    Attributes:
        rank: the process.
        losses: the losses by name.
        images: the files of its batch.
        cause: the first place where a number is not finite.
    """

    rank: int
    losses: dict[str, float]
    images: list[str]
    cause: str

    @classmethod
    def of(
        cls, losses: dict[str, float], model: nn.Module, batch: list[dict], forward: Callable
    ) -> "DivergenceReport | None":
        """The account of a step, or None if all its ``losses`` are finite: nothing is computed then.

        Args:
            losses: the losses by name.
            model: the model they come from.
            batch: the images, as the model takes them.
            forward: computes the losses of a batch, to see the head's outputs once more.
        """
        if all(math.isfinite(loss) for loss in losses.values()):
            return None
        images = [str(image.get("file_name", image.get("image_id", "?"))) for image in batch]
        return cls(comm.get_rank(), losses, images, find_cause(model, batch, forward))


def raise_if_diverged(
    iteration: int, optimizer: torch.optim.Optimizer, reports: Sequence[DivergenceReport | None]
) -> None:
    """Raise if any process reports a loss that is not finite. The weights are still those of before the step.

    Raises:
        FloatingPointError: names the iteration, the losses, the images and where it starts, and says what helps.
    """
    reports = [report for report in reports if report is not None]
    if not reports:
        return
    rate = optimizer.param_groups[0]["lr"]
    lines = [f"Loss became infinite or NaN at iteration {iteration}, learning rate {rate:g}."]
    for report in reports:
        losses = ", ".join(f"{name} {loss:g}" for name, loss in report.losses.items())
        lines.append(f"Process {report.rank}: {losses}. {report.cause} Images: {', '.join(report.images)}.")
    lines.append(
        "What helps, most often first: a lower SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS, "
        "SOLVER.CLIP_GRADIENTS.ENABLED True, SOLVER.AMP.ENABLED False."
    )
    raise FloatingPointError("\n".join(lines))


@torch.no_grad()
def find_cause(model: nn.Module, batch: list[dict], forward: Callable) -> str:
    """Where the numbers stop being finite, in one sentence: the weights, an image, or the head's outputs."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"The weight {name} is not finite: an earlier step was too large."
    for image in batch:
        if not image["image"].isfinite().all():
            return f"A pixel of {image.get('file_name', 'an image')} is not finite."
    model = getattr(model, "module", model)
    if isinstance(getattr(model, "head", None), nn.Module):
        for kind, levels in zip(("logits", "deltas"), _head_outputs(model.head, lambda: forward(batch))):
            num_channels = getattr(model, "num_classes", None) if kind == "logits" else 4
            for level, values in enumerate(levels):
                if not values.isfinite().all():
                    return _describe(kind, level, values, num_channels)
    return "Weights, images and the head's outputs are finite: it starts in the losses."


class _Seen(Exception):
    """Ends a forward pass at the head: what follows may wait for other processes, which are not computing it."""


def _head_outputs(head: nn.Module, forward: Callable) -> tuple[list[Tensor], list[Tensor]]:
    """The logits and deltas that ``head`` gives in a ``forward`` pass."""

    def stop(module: nn.Module, args: tuple, output: tuple) -> None:
        raise _Seen(output)

    hook = head.register_forward_hook(stop)
    try:
        forward()
    except _Seen as seen:
        return seen.args[0]
    finally:
        hook.remove()
    return [], []


def _describe(kind: str, level: int, values: Tensor, num_channels: int | None) -> str:
    """Where in the (N, A·C, H, W) outputs of a level the first number is that is not finite."""
    image, channel, y, x = (~values.isfinite()).nonzero()[0].tolist()
    what = f"channel {channel}"
    if num_channels:
        unit = "class" if kind == "logits" else "delta"
        what = f"{unit} {channel % num_channels} of anchor {channel // num_channels}"
    return f"It starts in the head's {kind}: level {level}, {what}, at ({y}, {x}) of image {image} of the batch."
