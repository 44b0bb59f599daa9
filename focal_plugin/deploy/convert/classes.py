"""Maps a checkpoint to another list of classes; classes in both lists keep their weights."""

import json
import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from torch import Tensor, nn

from ...config.load import build_model
from ...data import class_names, is_dense_detector
from .files import ConvertError, find_weights, read_content

_LAYER = "head.cls_score"


def map_classes(
    cfg: CfgNode, path: str, old: Sequence[str], new: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Map a checkpoint to a dense detector of other classes, or of the same classes in another order.

    Classes in both lists keep their rows of ``head.cls_score``, for each anchor. New classes get the rows of a new
    model: small random weights and the bias of ``MODEL.FOCAL.BIAS_INIT``. All other weights are kept.

    Args:
        cfg: the config of the new model.
        path: a checkpoint.
        old: the names of its classes, in order.
        new: the names of the new classes, in order.

    Returns:
        The weights; and the names that are ``kept``, ``new`` and ``dropped``.

    Raises:
        OSError, WeightsError: the checkpoint cannot be read.
        ConvertError: the model is no dense detector, or the numbers of classes differ from the lists.
    """
    for names, what in ((old, "the checkpoint's"), (new, "the new")):
        if twice := sorted({name for name in names if list(names).count(name) > 1}):
            raise ConvertError(f"Of {what} classes {', '.join(twice)} is there twice; expected different names.")
    weights = find_weights(read_content(path), path)
    fresh = _fresh_rows(cfg, len(new))  # by the ending: (A, K', ...)
    result = dict(weights)
    for ending, target in fresh.items():
        name = f"{_LAYER}.{ending}"
        if name not in weights:
            raise ConvertError(f"{path} has no {name}; expected a checkpoint of a RetinaNet of this config.")
        rows, anchors = weights[name], len(target)
        if len(rows) != anchors * len(old):
            raise ConvertError(
                f"{path} has {len(rows)} rows of {name}, {len(rows) / anchors:g} for each of the config's {anchors} "
                f"anchors at a location; expected {len(old)}, one for each of its classes "
                f"({', '.join(old[:5])}{', …' * (len(old) > 5)})."
            )
        if rows.shape[1:] != target.shape[2:]:
            raise ConvertError(
                f"{path} has {name} of {tuple(rows.shape)}, for features of another width than the config's, "
                f"{tuple(target.shape[2:])}."
            )
        source = rows.unflatten(0, (anchors, len(old)))  # (A, K, ...)
        for k, label in enumerate(new):
            if label in old:
                target[:, k] = source[:, list(old).index(label)]
        result[name] = target.flatten(0, 1)
    return result, {
        "kept": [label for label in new if label in old],
        "new": [label for label in new if label not in old],
        "dropped": [label for label in old if label not in new],
    }


def _fresh_rows(cfg: CfgNode, num_classes: int) -> dict[str, Tensor]:
    """The classifier's weight and bias in a new model of the config, (A, K, ...) each."""
    if not is_dense_detector(cfg.MODEL.META_ARCHITECTURE):
        raise ConvertError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}; expected a dense detector, such as RetinaNet, "
            f"whose classes are rows of {_LAYER}."
        )
    if num_classes != cfg.MODEL.RETINANET.NUM_CLASSES:
        raise ConvertError(
            f"MODEL.RETINANET.NUM_CLASSES is {cfg.MODEL.RETINANET.NUM_CLASSES}, but there are {num_classes} new "
            f"classes. Set MODEL.RETINANET.NUM_CLASSES {num_classes}, in the config or after --opts."
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    layer = getattr(build_model(cfg).head, "cls_score", None)
    if not isinstance(layer, nn.Conv2d):
        raise ConvertError("The model's head has no convolution cls_score, whose rows are those of the classes.")
    if layer.out_channels % num_classes:
        raise ConvertError(f"{_LAYER} has {layer.out_channels} rows, which {num_classes} classes do not divide evenly.")
    parts = [("weight", layer.weight), ("bias", layer.bias)]
    return {part: rows.detach().clone().unflatten(0, (-1, num_classes)) for part, rows in parts if rows is not None}


def read_class_names(text: str, cfg: CfgNode) -> list[str]:
    """Return the class names that a command line gives.

    Args:
        text: a registered data set; a file in COCO's format (``.json``), or with a name on each line; or names
            separated by commas. Empty, the classes of ``DATASETS.TRAIN``.
        cfg: a config whose data sets are registered.

    Raises:
        OSError: the file cannot be read.
        ConvertError: there are no such names.
    """
    if not text:
        if not cfg.DATASETS.TRAIN:
            raise ConvertError("The config's DATASETS.TRAIN is empty: give the new classes with --to-classes.")
        text = cfg.DATASETS.TRAIN[0]
        if text not in DatasetCatalog:
            raise ConvertError(f"DATASETS.TRAIN names {text!r}, which is not registered: give --to-classes.")
    if text in DatasetCatalog:
        names = class_names(text)
        if names is None:
            raise ConvertError(f"The data set {text!r} has no class names: list them.")
        return names
    if os.path.isfile(text):
        return _names_of_file(text)
    if "," not in text and ("/" in text or text.endswith((".json", ".txt"))):
        raise ConvertError(f"There is no file {text}; expected a data set, a file, or names separated by commas.")
    names = [name.strip() for name in text.split(",")]
    if "" in names:
        raise ConvertError(f"{text!r} has an empty name; expected names separated by commas.")
    return names


def _names_of_file(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:  # with or without a byte order mark
            text = file.read()
    except UnicodeDecodeError as error:
        raise ConvertError(f"{path} is no text in UTF-8: {error}") from error
    if not path.endswith(".json"):
        names = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        try:
            categories = json.loads(text)["categories"]
            names = [str(category["name"]) for category in sorted(categories, key=lambda category: category["id"])]
        except (ValueError, KeyError, TypeError) as error:
            raise ConvertError(f"{path} is no file of COCO's format with categories: {error!r}") from error
    if not names:
        raise ConvertError(f"{path} names no class; expected a name on each line.")
    return names
