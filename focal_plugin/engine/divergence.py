"""What to say when a loss is infinite or NaN: which images, and where in the model it starts."""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


class Divergence(FloatingPointError):
    """A step whose loss is infinite or NaN. The weights are still those of before the step.

    Args:
        iteration: the step, counted from 0 as in the log.
        learning_rate: of that step.
        reports: of the processes where it happened, at least one.
    """

    def __init__(self, iteration: int, learning_rate: float, reports: Sequence[DivergenceReport]):
        self.iteration, self.learning_rate, self.reports = iteration, learning_rate, list(reports)
        lines = [f"Loss became infinite or NaN at iteration {iteration}, learning rate {learning_rate:g}."]
        for report in self.reports:
            losses = ", ".join(f"{name} {loss:g}" for name, loss in report.losses.items())
            lines.append(f"Process {report.rank}: {losses}. {report.cause} Images: {', '.join(report.images)}.")
        lines.append(
            "What helps, most often first: a lower SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS, "
            "SOLVER.CLIP_GRADIENTS.ENABLED True, SOLVER.AMP.ENABLED False."
        )
        super().__init__("\n".join(lines))

    def save(self, path: str) -> None:
        """Write what is known to a JSON file; a loss that is not finite as the text "nan", "inf" or "-inf"."""
        first = self.reports[0]
        losses = {name: loss if math.isfinite(loss) else str(loss) for name, loss in first.losses.items()}
        where = {"rank": first.rank, "losses": losses, "cause": first.cause, "images": first.images}
        with open(path, "w") as file:
            json.dump({"iteration": self.iteration, "learning_rate": self.learning_rate, **where}, file, indent=2)


@contextmanager
def recorded_divergence(output_dir: str) -> Iterator[None]:
    """Inside, a run that diverges leaves ``diverged.json`` in ``output_dir``; that of an earlier attempt is removed.

    The error goes on. Only the main process raises it, so that there is one file.
    """
    path = os.path.join(output_dir, "diverged.json")
    if comm.is_main_process() and os.path.exists(path):
        os.remove(path)
    try:
        yield
    except Divergence as error:
        error.save(path)
        raise


def raise_if_diverged(
    iteration: int, optimizer: torch.optim.Optimizer, reports: Sequence[DivergenceReport | None]
) -> None:
    """Raise if any process reports a loss that is not finite. The weights are still those of before the step.

    Raises:
        Divergence: names the iteration, the losses, the images and where it starts, and says what helps.
    """
    reports = [report for report in reports if report is not None]
    if reports:
        raise Divergence(iteration, optimizer.param_groups[0]["lr"], reports)


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
    """The logits and deltas of all anchors that ``head`` makes of the features in a ``forward`` pass."""

    def stop(module: nn.Module, args: tuple) -> None:
        raise _Seen(module.forward(*args[:1]))  # without targets, which would leave out anchors

    hook = head.register_forward_pre_hook(stop)
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
