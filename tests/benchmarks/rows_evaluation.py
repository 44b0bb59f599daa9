"""COCO's metric: from detections and ground truth to the twelve numbers and the precision of each class."""

import contextlib
import io
from collections.abc import Callable, Iterator

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from timing import Row

from focal_plugin.evaluation.fast import coco_eval
from tests.evaluation.made_up import made_up


def rows(images: int = 5000, detections: int = 100, classes: int = 80) -> Iterator[Row]:
    """Yield the row of the metric."""

    def prepare(make: Callable) -> Callable[[], Callable[[], object]]:
        def function() -> Callable[[], object]:
            content, results = made_up(images, detections, classes)
            with contextlib.redirect_stdout(io.StringIO()):
                truth = COCO()
                truth.dataset = content
                truth.createIndex()
                found = truth.loadRes(results)
            return lambda: _numbers(make(truth, found, "bbox"))

        return function

    yield Row(
        "evaluation",
        f"{images:,} images × {detections} detections, {classes} classes",
        {"pycocotools": prepare(COCOeval), "ours": prepare(coco_eval)},
        target={"ours": "5× faster"},
    )


def _numbers(evaluation: COCOeval) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats
