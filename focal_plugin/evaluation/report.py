"""The end of a run: its results and the files that it wrote, in the log."""

import glob
import json
import logging
import math
import os
from collections.abc import Mapping

from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate
from torch import nn

from .curves import save_curves
from .detections import sample_detections, save_detections

logger = logging.getLogger(__name__)

_FILES = {  # of a run's folder
    "inference*/evaluation.html": "the evaluation, to read in a browser; .json and .csv: its numbers",
    "inference*/*/evaluation.html": "the same of that test set",
    "detections.png": "ground truth and detections",
    "curves.png": "loss, learning rate and AP",
    "metrics.json": "loss, learning rate and AP in numbers",
    "events.out.tfevents.*": "the same for `tensorboard --logdir`",
    "model_final.pth": "the weights, for MODEL.WEIGHTS",
    "model_best.pth": "the weights of the best evaluation (TEST.BEST_METRIC)",
    "model_ema_final.pth": "their average (MODEL.FOCAL.EMA), for MODEL.WEIGHTS",
    "inference/*_instances_results.json": "all detections, in COCO's format",
    "inference/*/*_instances_results.json": "all detections in that test set, in COCO's format",
    "config.yaml": "the whole config",
    "log.txt": "the whole log",
}

# The files that a folder had when its run started: {folder: {file: identity}}.
_before: dict[str, dict[str, tuple[int, int, int]]] = {}


def note_start(output_dir: str, *, again: bool = True) -> None:
    """Note the files that are in a run's folder when it starts, so that ``log_report`` leaves them out.

    Args:
        output_dir: the run's folder; it need not exist yet.
        again: replace the note of an earlier start that was never reported; if False, keep it.
    """
    folder = os.path.abspath(output_dir)
    if again or folder not in _before:
        _before[folder] = {name: _identity(folder, name) for name in _known_files(folder)}


def written_files(output_dir: str) -> dict[str, str]:
    """Return the known files of a run's folder that are new or changed since ``note_start``, with what each is."""
    before = _before.get(os.path.abspath(output_dir), {})
    return {
        os.path.join(output_dir, name): what
        for name, what in _known_files(output_dir).items()
        if before.get(name) != _identity(output_dir, name)
    }


def _known_files(folder: str) -> dict[str, str]:
    return {name: what for pattern, what in _FILES.items() for name in sorted(glob.glob(pattern, root_dir=folder))}


def _identity(folder: str, name: str) -> tuple[int, int, int]:
    """The inode, time in ns and size of a file. Times are not ordered, since a file server's clock may differ."""
    status = os.stat(os.path.join(folder, name))
    return status.st_ino, status.st_mtime_ns, status.st_size


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
        loader: a Detectron2 test loader of the data set.
        dataset_name: the name of the data set.
        image_format: the channel order of the loader's images, as in ``INPUT.FORMAT``.
        num_images: the number of images to draw.
        score_thresh: the lowest score of a detection to draw.
    """
    records, classes = DatasetCatalog.get(dataset_name), MetadataCatalog.get(dataset_name).get("thing_classes")
    samples = sample_detections(model, loader, records, num_images=num_images, image_format=image_format)
    save_detections(os.path.join(output_dir, "detections.png"), samples, classes, score_thresh=score_thresh)


def log_report(output_dir: str, results: Mapping[str, Mapping]) -> None:
    """Log the table of ``results``, {test set: {task: {metric: percent}}}, and the files that this run has written."""
    for name, result in results.items():
        if table := results_table(result):
            logger.info(f"Results on {name}:\n{table}")
        if table := class_table(result):
            logger.info(f"AP by class on {name}:\n{table}")
    files = written_files(output_dir)
    width = max((len(path) for path in files), default=0)
    logger.info("Written:\n" + "\n".join(f"  {path:<{width}}  {what}" for path, what in files.items()))
    _before.pop(os.path.abspath(output_dir), None)


def has_found_nothing(output_dir: str | os.PathLike, dataset_name: str = "") -> bool:
    """Return whether a run's last evaluation had no detection at all: Detectron2 then gives an AP of NaN, not of 0.

    False if the detections are not there, or not whole.

    Args:
        output_dir: the run's folder.
        dataset_name: the test set, if the run has several.
    """
    folder = glob.escape(os.path.join(output_dir, "inference", dataset_name))
    paths = glob.glob(os.path.join(folder, "*_instances_results.json"))
    return bool(paths) and all(_holds_empty_list(path) for path in paths)


def _holds_empty_list(path: str) -> bool:
    with open(path) as file:
        try:
            return json.load(file) == []
        except ValueError:  # not JSON, or no text
            return False


def results_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Return a table of {task: {metric: percent}} without the metrics of single classes; "" without results."""
    rows = [
        {"": task, **{name: _number(value) for name, value in metrics.items() if "-" not in name}}
        for task, metrics in results.items()
        if isinstance(metrics, Mapping)
    ]
    return tabulate(rows, headers="keys", tablefmt="pipe", stralign="right", disable_numparse=True)


def class_table(results: Mapping[str, Mapping[str, float]], most_lines: int = 20) -> str:
    """Return a table of the AP of each class in {task: {metric: percent}}, side by side if long; "" without any."""
    tasks = {task: metrics for task, metrics in results.items() if isinstance(metrics, Mapping)}
    names = dict.fromkeys(name for metrics in tasks.values() for name in metrics if name.startswith("AP-"))
    tasks = {task: metrics for task, metrics in tasks.items() if names.keys() & metrics.keys()}
    rows = [[name.removeprefix("AP-"), *(_number(m.get(name, math.nan)) for m in tasks.values())] for name in names]
    if not rows:
        return ""
    blocks = math.ceil(len(rows) / most_lines)
    height = math.ceil(len(rows) / blocks)
    lines = [[cell for row in rows[i::height] for cell in row] for i in range(height)]
    headers, align = ["class", *tasks] * blocks, ["left", *["right"] * len(tasks)] * blocks
    return tabulate(lines, headers=headers, tablefmt="pipe", colalign=align, disable_numparse=True)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"  # NaN: the test set has no such objects
