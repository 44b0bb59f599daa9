"""Pascal VOC's metric, with the page of an evaluation beside it."""

import logging
import os

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, PascalVOCDetectionEvaluator
from detectron2.evaluation.pascal_voc_evaluation import parse_rec

from .evaluator import PageEvaluator

logger = logging.getLogger(__name__)


class VOCEvaluator(DatasetEvaluator):
    """Detectron2's ``PascalVOCDetectionEvaluator``, which also writes what ``PageEvaluator`` does.

    Its results are VOC's alone. The numbers on the page are COCO's, with the objects that VOC marks as difficult as
    regions to ignore.

    Args:
        dataset_name: a data set whose metadata are those of Detectron2's ``register_pascal_voc``.
        output_dir: where to.
        options: others of ``PageEvaluator``.
    """

    def __init__(self, dataset_name: str, output_dir: str, **options):
        self._metric = PascalVOCDetectionEvaluator(dataset_name)
        self._page = _VOCPage(dataset_name, output_dir=output_dir, allow_cached_coco=False, **options)

    def reset(self) -> None:
        """Forget all detections."""
        self._metric.reset()
        self._page.reset()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take the detections in some images."""
        self._metric.process(inputs, outputs)
        self._page.process(inputs, outputs)

    def evaluate(self) -> dict | None:
        """Write the files, and return VOC's numbers; None on other processes than the main one."""
        logger.info("The page has COCO's numbers, the table of results Pascal VOC's.")
        self._page.evaluate()
        return self._metric.evaluate()


class _VOCPage(PageEvaluator):
    def __init__(self, dataset_name: str, **options):
        super().__init__(dataset_name, **options)
        folder = os.path.join(MetadataCatalog.get(dataset_name).dirname, "Annotations")
        names = {category: entry["name"] for category, entry in self._coco_api.cats.items()}
        for image_id, annotations in self._coco_api.imgToAnns.items():
            difficult = {
                (one["name"], *one["bbox"])
                for one in parse_rec(os.path.join(folder, f"{image_id}.xml"))
                if one["difficult"]
            }
            for annotation in annotations:
                x, y, width, height = annotation["bbox"]
                box = (x + 1, y + 1, x + width, y + height)  # VOC counts pixels from 1, in whole numbers
                annotation["iscrowd"] = int((names[annotation["category_id"]], *map(round, box)) in difficult)
