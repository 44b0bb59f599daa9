"""The end of a run: its results and what it wrote, for a human."""

import glob
import logging
import math
import os
import time
from collections.abc import Mapping

from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate
from torch import nn

from .curves import save_curves
from .detections import sample_detections, save_detections

logger = logging.getLogger(__name__)

_STARTED = time.time() - 1  # files older than this are not of this run; file systems round their times

_FILES = {
    "detections.png": "ground truth and detections",
    "curves.png": "loss, learning rate and AP",
    "metrics.json": "loss, learning rate and AP in numbers",
    "events.out.tfevents.*": "the same for `tensorboard --logdir`",
    "model_final.pth": "the weights, for MODEL.WEIGHTS",
    "inference/coco_instances_results.json": "all detections, in COCO's format",
    "inference/*/coco_instances_results.json": "all detections in that test set, in COCO's format",
    "config.yaml": "the whole config",
    "log.txt": "all that was logged",
}


def draw_curves(output_dir: str) -> None:
    """Draw ``curves.png`` of the ``metrics.json`` in ``output_dir``, if there is one."""
    metrics = os.path.join(output_dir, "metrics.json")
    if os.path.exists(metrics):
        save_curves(os.path.join(output_dir, "curves.png"), metrics)


def draw_detections(
    output_dir: str,
    model: nn.Module,
    loader,
    dataset_name: str,
    *,
    image_format: str,
    num_images: int,
    score_thresh: float,
) -> None:
    """Draw ``detections.png`` in ``output_dir``: images of a data set, their ground truth and what ``model`` finds.

    Args:
        output_dir: the run's folder.
        model: a trained detector.
        loader: a Detectron2 test loader.
        dataset_name: the data set it loads.
        image_format: of its images, as in ``INPUT.FORMAT``.
        num_images: how many of them to draw.
        score_thresh: detections below it are not drawn.
    """
    records, classes = DatasetCatalog.get(dataset_name), MetadataCatalog.get(dataset_name).get("thing_classes")
    samples = sample_detections(model, loader, records, num_images=num_images, image_format=image_format)
    save_detections(os.path.join(output_dir, "detections.png"), samples, classes, score_thresh=score_thresh)


def log_report(output_dir: str, results: Mapping[str, Mapping]) -> None:
    """Log the table of ``results``, {test set: {task: {metric: percent}}}, and the files that this run has written."""
    for name, result in results.items():
        if table := results_table(result):
            logger.info(f"Results on {name}:\n{table}")
    files = written_files(output_dir)
    width = max((len(path) for path in files), default=0)
    logger.info("Written:\n" + "\n".join(f"  {path:<{width}}  {what}" for path, what in files.items()))


def has_found_nothing(output_dir: str | os.PathLike, dataset_name: str = "") -> bool:
    """Whether a run's last evaluation had no detection at all, for which Detectron2's AP is NaN and should be 0.

    Args:
        output_dir: the run's folder.
        dataset_name: which of its test sets; empty for the only one.
    """
    path = os.path.join(output_dir, "inference", dataset_name, "coco_instances_results.json")
    return os.path.exists(path) and os.path.getsize(path) == len("[]")


def results_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """A table of {task: {metric: percent}}, without the rows by class; empty without results."""
    rows = [
        {"": task, **{name: _number(value) for name, value in metrics.items() if "-" not in name}}
        for task, metrics in results.items()
        if isinstance(metrics, Mapping)
    ]
    return tabulate(rows, headers="keys", tablefmt="pipe", stralign="right", disable_numparse=True)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"  # NaN: the test set has no such objects


def written_files(output_dir: str) -> dict[str, str]:
    """The known files of a run's folder that this process has written, with what each is."""
    found = {}
    for pattern, what in _FILES.items():
        for path in sorted(glob.glob(os.path.join(glob.escape(output_dir), pattern))):
            if os.path.getmtime(path) >= _STARTED:
                found[path] = what
    return found
