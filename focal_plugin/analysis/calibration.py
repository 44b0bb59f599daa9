"""How far scores are probabilities, and the temperature that brings them nearest: reliability of runs' detections.

``--runs`` takes folders of runs that ended with an evaluation on COCO's metric. A detection of the first test set is
right if it finds an object at IoU 0.5, as in evaluation.html. Detections below the threshold of the evaluation,
MODEL.RETINANET.SCORE_THRESH_TEST, are not there.

A temperature T turns the score σ(x) into σ(x/T), which changes no order and no AP. The T with the least log loss is
found on every second image of the set. All numbers are of the other images, which it has not seen. ECE is the mean
distance between score and share of right detections, in ten bins of equal width.
"""

import argparse
import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from ..config import ConfigError
from ..config.load import load_config
from ..evaluation import style
from ..evaluation.numbers import calibration, pair
from .common import add_flags, named_run, output_paths, print_written

_SMALLEST = 1e-6  # distance of a score from 0 and 1
_RANGE = (1e-3, 1e3)  # of temperatures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this analysis."""
    parser.add_argument("--runs", nargs="+", required=True, metavar="[NAME=]FOLDER", help="folders of runs")
    add_flags(parser, config_required=False)


def main(args: argparse.Namespace) -> int:
    """Find the temperature of each run, print and write the numbers, and draw the reliability diagrams."""
    runs = [named_run(word) for word in args.runs]
    found = {name: measure(*read_detections(Path(folder), args.opts)) for name, folder in runs}
    if len(found) < len(runs):
        raise ConfigError(f"--runs {' '.join(args.runs)}: two have the same name; write NAME=FOLDER.")
    rows = [table_row(name, run) for name, run in found.items()]
    print(tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=[0]))  # a run may be called 007
    cfg = load_config(str(Path(runs[0][1]) / "config.yaml"), args.opts)
    picture, numbers = paths = output_paths(args, cfg, "calibration.png", "calibration.json")
    numbers.write_text(json.dumps(found, indent=1) + "\n")
    draw(picture, found)
    print_written(paths)
    return 0


def read_detections(folder: Path, opts: Sequence[str] = ()) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the scores of each image's detections in a run's first test set, and whether they are right.

    Raises:
        ConfigError: the folder lacks the config, the detections or the annotations, or these are not JSON.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"--runs {folder}: there is no config.yaml in that folder.")
    tests = load_config(str(folder / "config.yaml"), opts).DATASETS.TEST
    if not tests:
        raise ConfigError(f"--runs {folder}: DATASETS.TEST is empty; expected the run's test set.")
    name = tests[0]
    place = folder / "inference" / (name if len(tests) > 1 else "")
    truth = Path(MetadataCatalog.get(name).get("json_file") or place / f"{name}_coco_format.json")
    results = place / "coco_instances_results.json"
    for path in (truth, results):
        if not path.is_file():
            raise ConfigError(f"--runs {folder}: {path} is not there; `focal eval` on the run's config writes it.")
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            coco, listed = COCO(str(truth)), json.loads(results.read_text())
        except ValueError as error:
            raise ConfigError(f"--runs {folder}: no JSON in {truth} or {results.name}: {error}") from error
        pairs = pair(COCOeval(coco, coco.loadRes(listed) if listed else COCO(), "bbox"))
    return [p.scores for p in pairs], [p.right for p in pairs]


def measure(scores: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> dict:
    """Return the temperature found on every second image, and the calibration of the others before and after it.

    Args:
        scores, right: of each image, (D,) float and bool.

    Returns:
        ``temperature``; ``before`` and ``after``, each what ``evaluation.numbers.calibration`` returns and the mean
        ``log_loss`` of a detection.

    Raises:
        ConfigError: in one of the halves, no detection is right, or none is wrong.
    """
    halves = [[np.concatenate([[], *images[start::2]]) for images in (scores, right)] for start in (0, 1)]
    for _, own in halves:
        if not 0 < own.sum() < len(own):
            raise ConfigError(
                f"Of {len(own)} detections in half of the images {own.sum():.0f} are right: a temperature needs right "
                "and wrong ones."
            )
    temperature = best_temperature(*halves[0])
    tested, own = halves[1][0], halves[1][1].astype(bool)
    numbers = {"temperature": temperature}
    for when, values in (("before", tested), ("after", at_temperature(tested, temperature))):
        p = np.clip(values, _SMALLEST, 1 - _SMALLEST)
        log_loss = -np.where(own, np.log(p), np.log1p(-p)).mean()
        numbers[when] = {"log_loss": float(log_loss), **calibration(values, own)}
    return numbers


def _logit(scores: np.ndarray) -> np.ndarray:
    p = np.clip(scores, _SMALLEST, 1 - _SMALLEST)
    return np.log(p) - np.log1p(-p)


def at_temperature(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Return σ(x/T) of scores σ(x)."""
    return 1 / (1 + np.exp(-_logit(scores) / temperature))


def best_temperature(scores: np.ndarray, right: np.ndarray) -> float:
    """Return the temperature in [.001, 1000] with the least log loss.

    The log loss is convex in β = 1/T, so its slope, the sum of x (σ(βx) − right), has one change of sign.
    """
    x = _logit(scores)
    low, high = (1 / t for t in reversed(_RANGE))
    for _ in range(60):
        beta = np.sqrt(low * high)
        rises = (x * (at_temperature(scores, 1 / beta) - right)).sum() > 0
        low, high = (low, beta) if rises else (beta, high)
    return float(1 / np.sqrt(low * high))


def table_row(name: str, run: dict) -> dict:
    """Return a run's numbers as a row of the printed table."""
    before, after = run["before"], run["after"]
    return {
        "run": name,
        "detections": before["detections"],
        "right": f"{before['precision']:.1%}",
        "mean score": f"{before['mean_score']:.3f}",
        "ECE": f"{before['ece']:.3f}",
        "log loss": f"{before['log_loss']:.3f}",
        "best T": f"{run['temperature']:.2f}",
        "ECE at T": f"{after['ece']:.3f}",
        "log loss at T": f"{after['log_loss']:.3f}",
    }


def draw(path: Path, found: dict[str, dict]) -> None:
    """Draw the share of right detections against the score, before and after the temperature, to a PNG."""
    figure, axes = style.panels(2)
    for axis, when, title in zip(axes, ("before", "after"), ("Scores as they are", "At each run's best temperature")):
        axis.plot([0, 1], [0, 1], color=style.GRAY, linewidth=1)
        for i, (name, run) in enumerate(found.items()):
            bins = [b for b in run[when]["bins"] if b["detections"]]
            label = f"{name}, ECE {run[when]['ece']:.3f}"
            points = [b["mean_score"] for b in bins], [b["precision"] for b in bins]
            marker = style.MARKERS[i % len(style.MARKERS)]
            axis.plot(*points, marker=marker, color=style.color(i), label=label, markersize=4, linewidth=1.4)
        axis.set(title=title, xlabel="score", ylabel="share of detections that are right", xlim=(0, 1), ylim=(0, 1))
        axis.legend(frameon=False, fontsize=8)
    style.save(figure, path)
