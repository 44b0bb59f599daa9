"""Checks that a config's model and data sets agree on the classes."""

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.dense_detector import DenseDetector

from ..config import ConfigError


def check_num_classes(cfg: CfgNode) -> None:
    """Check that the model and all data sets of ``DATASETS.{TRAIN, TEST, VALIDATION}`` agree on the classes.

    The model's number is ``MODEL.RETINANET.NUM_CLASSES`` for a dense detector and ``MODEL.ROI_HEADS.NUM_CLASSES`` for a
    ``GeneralizedRCNN``; for other models, the data sets are compared with each other alone. Data sets are loaded if
    they learn their class names from their files; those without class names are skipped.

    Raises:
        ConfigError: a data set is not registered, or the number or the names differ; the message says what to set.
    """
    names = {}
    for key in ("TRAIN", "TEST", "VALIDATION"):
        for dataset in cfg.DATASETS[key]:
            check_registered(dataset, f"DATASETS.{key}")
            if (classes := class_names(dataset)) is not None:
                names[dataset] = classes
    if not names:
        return
    first, classes = next(iter(names.items()))
    for dataset, others in names.items():
        if others != classes:
            raise ConfigError(
                f"The data sets of DATASETS.{{TRAIN, TEST, VALIDATION}} disagree on the classes: {first!r} has "
                f"{_listed(classes)}, {dataset!r} has {_listed(others)}. For sets of DATASETS.LOCAL, give both entries "
                "the same classes: [...]."
            )
    key = _num_classes_key(cfg.MODEL.META_ARCHITECTURE)
    if key is None:
        return
    found = cfg.MODEL[key].NUM_CLASSES
    if found != len(classes):
        raise ConfigError(
            f"MODEL.{key}.NUM_CLASSES is {found}, but {first!r} has {len(classes)} classes: {_listed(classes)}. "
            f"Set MODEL.{key}.NUM_CLASSES to {len(classes)} (the background is not counted; "
            f"{cfg.MODEL.META_ARCHITECTURE} reads no other key of that name)."
        )


def class_names(dataset: str) -> list[str] | None:
    """Return the class names of a registered data set, which is loaded if it learns them from its files."""
    metadata = MetadataCatalog.get(dataset)
    if metadata.get("thing_classes") is None:
        DatasetCatalog.get(dataset)
    classes = metadata.get("thing_classes")
    return None if classes is None else list(classes)


def check_registered(dataset: str, key: str) -> None:
    """Check that ``dataset``, which ``key`` names, is registered.

    Raises:
        ConfigError: it is not.
    """
    if dataset not in DatasetCatalog:
        raise ConfigError(
            f"{key} names {dataset!r}, which is not registered. Describe it in DATASETS.LOCAL, "
            "or import the module that registers it with MODEL.FOCAL.IMPORTS."
        )


def is_dense_detector(architecture: str) -> bool:
    """Return whether a meta-architecture is a one-stage detector such as Detectron2's RetinaNet or FocalRetinaNet.

    Raises:
        ConfigError: it is not registered.
    """
    if architecture not in META_ARCH_REGISTRY:
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is {architecture!r}, which is not registered. Registered: "
            f"{', '.join(sorted(name for name, _ in META_ARCH_REGISTRY))}. If it is defined in a module of yours, add "
            "that module to MODEL.FOCAL.IMPORTS."
        )
    model = META_ARCH_REGISTRY.get(architecture)
    return isinstance(model, type) and issubclass(model, DenseDetector)


def _num_classes_key(architecture: str) -> str | None:
    if architecture == "GeneralizedRCNN":
        return "ROI_HEADS"
    return "RETINANET" if is_dense_detector(architecture) else None


def _listed(classes: list[str], most: int = 10) -> str:
    return ", ".join(classes[:most]) + (f", … ({len(classes)} in all)" if len(classes) > most else "")
