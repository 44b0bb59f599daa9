"""COCO's evaluation, which also writes its numbers and a page to read them on."""

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable
from operator import methodcaller

from detectron2.evaluation import COCOEvaluator
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..files.write import replace_file
from .fast import COCOeval_faster, fast_boxes
from .numbers import METRICS, measure
from .page import to_html


class PageEvaluator(COCOEvaluator):
    """Detectron2's ``COCOEvaluator``, which also writes ``evaluation.{json,csv,html}`` to its ``output_dir``.

    They are about boxes. Of several processes, the main one writes them. ``use_fast_impl`` is faster-coco-eval for the
    AP of boxes, where it is installed: the numbers are equal to pycocotools'.
    """

    def __init__(self, *args, use_fast_impl: bool = True, **options):
        is_ours = use_fast_impl and COCOeval_faster is not None
        super().__init__(*args, use_fast_impl=use_fast_impl and not is_ours, **options)
        self._is_ours = is_ours
        self._use_fast_impl |= is_ours

    def _eval_predictions(self, predictions, img_ids=None):
        with fast_boxes() if self._is_ours else contextlib.nullcontext():
            super()._eval_predictions(predictions, img_ids)

    def _derive_coco_results(self, coco_eval, iou_type, class_names=None):
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        if iou_type == "bbox" and self._output_dir:
            name = self._metadata.name
            write_evaluation(self._output_dir, name, coco_eval or _of_nothing(self._coco_api), self._find_image)
        return results

    def _find_image(self, file_name: str) -> str:
        """The path of an image, as ``load_coco_json`` makes it; data sets that it did not load have whole ones."""
        path = os.path.join(self._metadata.get("image_root", ""), file_name)
        return path if os.path.exists(path) else file_name


def _of_nothing(truth: COCO) -> COCOeval:
    """The evaluation of no detections, which Detectron2 leaves out."""
    coco_eval = COCOeval(truth, COCO(), "bbox")
    with contextlib.redirect_stdout(io.StringIO()):
        coco_eval.evaluate()
        coco_eval.accumulate()
    return coco_eval


def write_evaluation(
    folder: str, dataset_name: str, coco_eval: COCOeval, find_image: Callable[[str], str] = os.path.abspath
) -> dict:
    """Write ``evaluation.{json,csv,html}`` to ``folder``, over those of an earlier evaluation.

    Args:
        folder: where to.
        dataset_name: the title of the page.
        coco_eval: an evaluation of boxes, accumulated.
        find_image: from a ``file_name`` in COCO's JSON to the path of the image.

    Returns:
        The content of evaluation.json.
    """
    found = {"data_set": dataset_name, **measure(coco_eval)}
    texts = {
        "evaluation.json": json.dumps(found, indent=1, allow_nan=False) + "\n",
        "evaluation.csv": to_csv(found),
        "evaluation.html": to_html(found, find_image),
    }
    for name, text in texts.items():
        replace_file(os.path.join(folder, name), methodcaller("write", text.encode()))
    return found


def to_csv(found: dict) -> str:
    """Return a line for all classes together and one for each, with numbers in full precision, empty where unknown."""
    rows = []
    for row in (found["overall"], *found["classes"]):
        rows.append(
            {"class": row["name"], "objects": row["objects"], "detections": row["detections"]}
            | {metric: row[metric] for metric in METRICS}
            | {key: (row["best_f1"] or {}).get(key) for key in ("score_thresh", "f1", "precision", "recall")}
            | {"right": row["right"]}
            | {f"fp_{kind}": count for kind, count in row["false_positives"].items()}
            | {f"missed_{size}": count for size, count in row["missed_by_size"].items()}
        )
    writer = csv.DictWriter(file := io.StringIO(), list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def read_threshold(text: str) -> float:
    """Return the number ``text``, or the threshold of the best F1 in the evaluation.json of that path.

    Raises:
        OSError: it is no number, and the file cannot be read.
        ValueError: the file has no such threshold.
    """
    with contextlib.suppress(ValueError):
        return float(text)
    with open(text) as file:
        try:
            best = json.load(file)["overall"]["best_f1"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{text} is no evaluation.json: expected overall.best_f1 in it.") from error
    if best is None:
        raise ValueError(f"{text} has no best threshold, since no detection was right there; give a number.")
    return best["score_thresh"]
