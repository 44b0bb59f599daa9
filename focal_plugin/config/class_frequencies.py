"""Counting the boxes of each class in the training set, for components that need the class frequencies."""

from collections.abc import Iterable

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from ..data.records import objects
from .components import chosen_components


def fill_class_frequencies(cfg: CfgNode) -> None:
    """Set an empty ``MODEL.FOCAL.CLASS_FREQUENCIES`` to the counts of ``DATASETS.TRAIN``, if a component needs it.

    User modules and data sets have to be registered before. If a name in ``DATASETS.TRAIN`` is not registered, nothing
    is counted.
    """
    if cfg.MODEL.FOCAL.CLASS_FREQUENCIES or not needs_class_frequencies(cfg) or not cfg.DATASETS.TRAIN:
        return
    if all(name in DatasetCatalog for name in cfg.DATASETS.TRAIN):
        key = "ROI_HEADS" if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" else "RETINANET"
        cfg.MODEL.FOCAL.CLASS_FREQUENCIES = count_boxes(cfg.DATASETS.TRAIN, cfg.MODEL[key].NUM_CLASSES)


def needs_class_frequencies(cfg: CfgNode) -> bool:
    """Whether a component that ``cfg`` names reads the class frequencies; its method of this name tells."""
    asked = (getattr(component, "needs_class_frequencies", None) for component in chosen_components(cfg))
    return any(needs is not None and needs(cfg) for needs in asked)


def count_boxes(datasets: Iterable[str], num_classes: int) -> list[int]:
    """Count the boxes of each class in registered data sets, without crowds; at least ``num_classes`` counts."""
    counts = [0] * num_classes
    for name in datasets:
        for record in DatasetCatalog.get(name):
            for annotation in objects(record):
                category = annotation["category_id"]
                counts += [0] * (category + 1 - len(counts))
                counts[category] += 1
    return counts
