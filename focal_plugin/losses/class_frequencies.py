"""How many boxes each class has: given in the config, or counted in the training set."""

from collections.abc import Iterable

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from ..registry import chosen_components


def class_shares(cfg: CfgNode) -> list[float]:
    """Each class's share of the boxes, from ``MODEL.FOCAL.CLASS_FREQUENCIES``; in all 1.

    A class without boxes counts as if it had as many as the rarest class with boxes: what the training set does not
    show is rare, not impossible.

    Raises:
        ValueError: the key is empty, has not one number a class, or has numbers that are no frequencies.
    """
    counts, num_classes = list(cfg.MODEL.FOCAL.CLASS_FREQUENCIES), cfg.MODEL.RETINANET.NUM_CLASSES
    if not counts:
        raise ValueError(
            "MODEL.FOCAL.CLASS_FREQUENCIES is empty, and a component that the config names needs it: give the number "
            "of boxes of each class, or their shares. load_config, and so train_net.py, counts them in DATASETS.TRAIN."
        )
    if len(counts) != num_classes:
        raise ValueError(
            f"MODEL.FOCAL.CLASS_FREQUENCIES has {len(counts)} numbers and MODEL.RETINANET.NUM_CLASSES is "
            f"{num_classes}; expected one number a class."
        )
    if not all(0 <= count < float("inf") for count in counts) or not any(counts):
        raise ValueError(
            f"MODEL.FOCAL.CLASS_FREQUENCIES is {counts}; expected finite numbers ≥ 0, at least one of them above 0."
        )
    rarest = min(count for count in counts if count > 0)
    counts = [count or rarest for count in counts]
    return [count / sum(counts) for count in counts]


def fill_class_frequencies(cfg: CfgNode) -> None:
    """Set an empty ``MODEL.FOCAL.CLASS_FREQUENCIES`` to the counts of ``DATASETS.TRAIN``, if a component needs it.

    It does if its class method ``needs_class_frequencies(cfg)`` says so. User modules and data sets are registered
    before; with a name in ``DATASETS.TRAIN`` that is not registered nothing is counted.
    """
    if cfg.MODEL.FOCAL.CLASS_FREQUENCIES or not needs_class_frequencies(cfg) or not cfg.DATASETS.TRAIN:
        return
    if all(name in DatasetCatalog for name in cfg.DATASETS.TRAIN):
        key = "ROI_HEADS" if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" else "RETINANET"
        cfg.MODEL.FOCAL.CLASS_FREQUENCIES = count_boxes(cfg.DATASETS.TRAIN, cfg.MODEL[key].NUM_CLASSES)


def needs_class_frequencies(cfg: CfgNode) -> bool:
    """Whether a component that ``cfg`` names reads ``MODEL.FOCAL.CLASS_FREQUENCIES``."""
    asked = (getattr(component, "needs_class_frequencies", None) for component in chosen_components(cfg))
    return any(needs is not None and needs(cfg) for needs in asked)


def count_boxes(datasets: Iterable[str], num_classes: int) -> list[int]:
    """The number of boxes of each class in registered data sets, crowds left out, for at least ``num_classes``."""
    counts = [0] * num_classes
    for name in datasets:
        for record in DatasetCatalog.get(name):
            for annotation in record.get("annotations", ()):
                if annotation.get("iscrowd", 0) == 0:
                    category = annotation["category_id"]
                    counts += [0] * (category + 1 - len(counts))
                    counts[category] += 1
    return counts
