"""COCO's metric of boxes in C++, where faster-coco-eval is installed: the same numbers in a fraction of the time."""

import contextlib
import io
from collections.abc import Iterator, Mapping

import numpy as np
from detectron2.evaluation import coco_evaluation
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from pycocotools.coco import COCO

try:
    from faster_coco_eval import COCOeval_faster
except ImportError:  # an extra: pip install -e .[fast-eval]
    COCOeval_faster = None


class FastBoxEval(COCOevalMaxDets):
    """pycocotools' evaluation of boxes, computed in C++. All numbers are equal up to rounding of float64.

    ``evalImgs`` and ``ious`` stay empty, and of ``params``, all but the lists of ids and ``maxDets`` are COCO's.
    """

    def evaluate(self) -> None:
        """Compare all detections and objects."""
        params = self.params
        params.imgIds, params.catIds = (list(np.unique(ids)) for ids in (params.imgIds, params.catIds))
        params.maxDets = sorted(params.maxDets)
        # The C++ takes ids for float64: texts and large numbers are none.
        images, categories = ({key: i for i, key in enumerate(ids)} for ids in (params.imgIds, params.catIds))
        numbered = [_numbered(coco, images, categories) for coco in (self.cocoGt, self.cocoDt)]
        self._fast = COCOeval_faster(*numbered, "bbox")
        self._fast.params.maxDets = params.maxDets
        self._fast.evaluate()

    def accumulate(self, p=None) -> None:
        """Set ``eval``: the precision, recall and scores."""
        self._fast.accumulate()
        self.eval = self._fast.eval


def _numbered(coco: COCO, images: Mapping, categories: Mapping) -> COCO:
    """A copy with indices in place of the ids of images and categories, without annotations of others."""
    result = COCO()
    result.dataset = {
        "images": [{"id": index} for index in images.values()],
        "categories": [{"id": index} for index in categories.values()],
        "annotations": [
            {**one, "image_id": images[one["image_id"]], "category_id": categories[one["category_id"]]}
            for one in coco.dataset.get("annotations", ())
            if one["image_id"] in images and one["category_id"] in categories
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        result.createIndex()
    return result


def coco_eval(truth: COCO, found: COCO, iou_type: str = "bbox") -> COCOevalMaxDets:
    """Return pycocotools' evaluation, which is computed in C++ for boxes if that is installed."""
    if COCOeval_faster is None or iou_type != "bbox":
        return COCOevalMaxDets(truth, found, iou_type)
    return FastBoxEval(truth, found, iou_type)


@contextlib.contextmanager
def fast_boxes() -> Iterator[None]:
    """Let Detectron2's ``COCOEvaluator`` use ``coco_eval``, in the place of its own one that has to be compiled."""
    before = coco_evaluation.COCOeval_opt, coco_evaluation.COCOevalMaxDets
    coco_evaluation.COCOeval_opt = coco_evaluation.COCOevalMaxDets = coco_eval
    try:
        yield
    finally:
        coco_evaluation.COCOeval_opt, coco_evaluation.COCOevalMaxDets = before
