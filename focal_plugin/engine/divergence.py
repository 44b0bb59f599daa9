"""What to say, and to leave behind, when a loss or a gradient is infinite or NaN: which images, and where it starts."""

import json
import logging
import math
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList
from detectron2.utils import comm
from torch import Tensor, nn

from ..files.write import replace_file
from ..retinanet import FocalRetinaNet
from .batch_file import save_batch
from .processes import unwrapped
from .window import split

logger = logging.getLogger(__name__)

_KEPT = 3  # batches of skipped steps in a run


@dataclass(frozen=True)
class DivergenceReport:
    """One process's account of a step whose loss or gradient is not finite.

    Attributes:
        rank: the process.
        losses: the losses by name.
        images: the files of its batch.
        cause: the first place where a number is not finite.
        batch_file: where its batch and the weights are, for ``engine.replay``; empty if nowhere.
    """

    rank: int
    losses: dict[str, float]
    images: list[str]
    cause: str
    batch_file: str = ""


class Divergence(FloatingPointError):
    """A step whose loss or gradient is infinite or NaN. The weights are still those of before the step.

    Args:
        iteration: the step, counted from 0 as in the log.
        learning_rate: of that step.
        reports: of the processes where it happened, at least one.
    """

    def __init__(self, iteration: int, learning_rate: float, reports: Sequence[DivergenceReport]):
        self.iteration, self.learning_rate, self.reports = iteration, learning_rate, list(reports)
        finite = all(math.isfinite(loss) for report in self.reports for loss in report.losses.values())
        what = "A gradient" if finite else "Loss"
        lines = [f"{what} became infinite or NaN at iteration {iteration}, learning rate {learning_rate:g}."]
        for report in self.reports:
            losses = ", ".join(f"{name} {loss:g}" for name, loss in report.losses.items())
            lines.append(f"Process {report.rank}: {losses}. {report.cause} Images: {', '.join(report.images)}.")
            if report.batch_file:
                lines.append(f"To compute it again: python -m focal_plugin replay {shlex.quote(report.batch_file)}")
        lines.append(
            "What helps, most often first: a lower SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS, "
            "SOLVER.CLIP_GRADIENTS.ENABLED True, SOLVER.AMP.ENABLED False. SOLVER.MAX_SKIPS goes on without such steps."
        )
        super().__init__("\n".join(lines))

    def save(self, path: str) -> None:
        """Write what is known to a JSON file, whole or not at all.

        A loss that is not finite is the text "nan", "inf" or "-inf".
        """
        first = self.reports[0]
        losses = {name: loss if math.isfinite(loss) else str(loss) for name, loss in first.losses.items()}
        where = {"rank": first.rank, "losses": losses, "cause": first.cause, "images": first.images}
        where["batch_file"] = first.batch_file
        content = {"iteration": self.iteration, "learning_rate": self.learning_rate, **where}
        replace_file(path, lambda file: file.write(json.dumps(content, indent=2).encode()))


@contextmanager
def recorded_divergence(output_dir: str) -> Iterator[None]:
    """Inside, a run that diverges leaves ``diverged.json`` in ``output_dir``; that of an earlier attempt is removed.

    The error goes on, in all processes once the file is there.
    """
    path = os.path.join(output_dir, "diverged.json")
    if comm.is_main_process() and os.path.exists(path):
        os.remove(path)
    try:
        yield
    except Divergence as error:
        if comm.is_main_process():
            try:
                error.save(path)
            except OSError as problem:  # the original error matters more
                logger.warning(str(problem))
        comm.synchronize()  # a process that fails has its launcher end the others
        raise


def explain(trainer, losses: dict[str, float], batch: list[dict]) -> list[DivergenceReport]:
    """The accounts of the processes whose losses are not finite, or of all if it is a gradient. For all processes.

    Args:
        trainer: a ``StepTrainer`` in the step, before the weights change. Its ``output_dir`` gets the batch, if the
            step ends the run or is one of the first ``_KEPT`` that are skipped.
        losses: this process's.
        batch: its images.
    """
    mine = not all(math.isfinite(loss) for loss in losses.values())
    anywhere = any(comm.all_gather(mine))
    model = unwrapped(trainer.model)
    scale = trainer.grad_scaler.get_scale() if trainer.grad_scaler.is_enabled() else 1.0
    parts = split(batch, trainer.accumulate)
    looking = mine or not anywhere
    cause = find_cause(model, parts, trainer.autocast) if looking else ""
    # The losses may wait for other processes, so all compute them if one needs to.
    if any(comm.all_gather(looking and not cause)):
        later = find_cause_in_gradients(model, parts, scale, trainer.autocast)
        cause = cause or later
    if not looking:
        report = None
    else:
        images = [str(image.get("file_name", image.get("image_id", "?"))) for image in batch]
        keeps = trainer.skips < _KEPT or trainer.skips >= trainer.max_skips  # each file has all weights
        path = _save(trainer, model, batch, losses) if trainer.output_dir and keeps else ""
        report = DivergenceReport(comm.get_rank(), losses, images, cause, path)
    return [report for report in comm.all_gather(report) if report is not None]


def _save(trainer, model: nn.Module, batch: list[dict], losses: dict[str, float]) -> str:
    path = os.path.join(trainer.output_dir, f"diverged_{trainer.iter:07d}_process{comm.get_rank()}.pth")
    try:
        settings = {"iteration": trainer.iter, "accumulate": trainer.accumulate, "losses": losses}
        save_batch(path, batch, model, precision=str(trainer.precision or "").removeprefix("torch."), **settings)
    except (OSError, RuntimeError) as error:  # the original error matters more
        logger.warning(f"The batch could not be saved: {error}")
        return ""
    return path


@torch.no_grad()
def find_cause(
    model: nn.Module, parts: Sequence[list[dict]], autocast: Callable[[], AbstractContextManager] = nullcontext
) -> str:
    """Where the numbers stop being finite, in one sentence: the weights, an image, a box, or the head's outputs.

    Empty if all of these are finite. Waits for no other process.

    Args:
        model: the one that diverged, not in DistributedDataParallel.
        parts: the batch, in the micro-batches in which it was computed.
        autocast: the precision in which it was computed.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"The weight {name} is not finite: an earlier step was too large."
    for image in (image for part in parts for image in part):
        if not image["image"].isfinite().all():
            return f"A pixel of {_name(image)} is not finite."
        boxes = getattr(getattr(image.get("instances"), "gt_boxes", None), "tensor", torch.zeros(0))
        if not boxes.isfinite().all():
            return f"A box of {_name(image)} is not finite."
    for part in parts if isinstance(model, DenseDetector) else ():
        with autocast():
            _, _, outputs = _through_the_head(model, part)
        for kind, levels in zip(("logits", "deltas"), outputs):
            for level, values in enumerate(levels):
                if not values.isfinite().all():
                    return _describe(f"the head's {kind}", values, level, model, part)
    return ""


def find_cause_in_gradients(
    model: nn.Module,
    parts: Sequence[list[dict]],
    scale: float,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> str:
    """Where the gradients stop being finite, in one sentence, when all before the losses is: at an anchor or a weight;
    or the losses that are not finite themselves.

    Args:
        model, parts, autocast: as those of ``find_cause``.
        scale: what the losses are multiplied by before the backward pass.
    """
    for part in parts:
        with autocast():
            logits, losses = _logits_and_losses(model, part)
        names, weights = zip(*((name, weight) for name, weight in model.named_parameters() if weight.requires_grad))
        gradients = torch.autograd.grad(sum(losses.values()) * scale, [*logits, *weights], allow_unused=True)
        for level, values in enumerate(gradients[: len(logits)]):
            if values is not None and not values.isfinite().all():
                return _describe("the class loss's gradient by the head's logits", values, level, model, part)
        bad = [name for name, value in losses.items() if not value.isfinite()]
        if logits and bad:
            return f"It starts in {' and '.join(bad)}: weights, images, boxes and the head's outputs are finite."
        found = list(zip(names, gradients[len(logits) :]))[::-1]  # the backward pass sees the last ones first
        for name, values in found:
            if values is not None and not values.isfinite().all():
                where = "the losses of the boxes" if "bbox" in name else "the backward pass"
                return f"It starts in {where}: the gradient of the weight {name} is not finite."
    return "Weights, images and the head's outputs are finite, and so are their gradients: it starts in the losses."


def _through_the_head(model: DenseDetector, part: list[dict]) -> tuple[ImageList, list[Tensor], Sequence]:
    """The network's input, its features, and what the head makes of them for all anchors: logits, deltas, ..."""
    images = model.preprocess_image(part)
    features = model.backbone(images.tensor)
    features = [features[name] for name in model.head_in_features]
    return images, features, model.head(features)


def _logits_and_losses(model: nn.Module, part: list[dict]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The logits of a micro-batch, [] for a model that is no dense detector, and its losses by name."""
    if isinstance(model, FocalRetinaNet):
        logits, deltas, targets = model.predict(part)
        return logits, model.losses(logits, deltas, targets)
    if isinstance(model, DenseDetector):
        images, features, outputs = _through_the_head(model, part)
        gt_instances = [image["instances"].to(model.device) for image in part]
        return list(outputs[0]), model.forward_training(images, features, outputs, gt_instances)
    losses = model(part)
    return [], losses if isinstance(losses, dict) else {"total_loss": losses}


def _describe(what: str, values: Tensor, level: int, model: nn.Module, part: list[dict]) -> str:
    """Where in the (N, A·C, H, W) numbers of a level the first is that is not finite."""
    image, channel, y, x = (~values.isfinite()).nonzero()[0].tolist()
    deltas = what.endswith("deltas")
    num_channels = 4 if deltas else getattr(model, "num_classes", None)
    where = f"channel {channel}"
    if num_channels:
        where = f"{'delta' if deltas else 'class'} {channel % num_channels} of anchor {channel // num_channels}"
    return f"It starts in {what}: level {level}, {where}, at ({y}, {x}) of {_name(part[image])}."


def _name(image: dict) -> str:
    return str(image.get("file_name", image.get("image_id", "an image")))
