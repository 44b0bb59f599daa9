"""Read Detectron2's files of object proposals without running anything in them."""

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..config import ConfigError
from ..files.regular import open_regular
from ..files.safe_load import WeightsError, unpickle

_KEYS = "DATASETS.PROPOSAL_FILES_TRAIN or _TEST"
_OLD_NAMES = {"indexes": "ids", "scores": "objectness_logits"}  # Detectron's
_LISTS = ("ids", "boxes", "objectness_logits")


def load_proposals_into_dataset(dataset_dicts: list[dict], proposal_file: str) -> list[dict]:
    """Add its proposals to each record, as Detectron2's function of this name does, which runs what the file holds.

    Args:
        dataset_dicts: records in Detectron2's format, changed in place.
        proposal_file: a pickle of ``ids``, ``boxes`` ((P, 4) arrays) and ``objectness_logits`` ((P,) arrays), three
            lists of one length, and of ``bbox_mode`` where that is not ``BoxMode.XYXY_ABS``: a path or a URL.

    Raises:
        ConfigError: it is no such file, asks for more than data, or lacks an image.
    """
    where = f"{_KEYS}: {proposal_file}"
    if "://" not in proposal_file and not PathManager.isfile(proposal_file):
        raise ConfigError(f"{where} is no file; expected a file of proposals, a pickle, or its URL.")
    with open_regular(proposal_file) as file:
        try:
            content = unpickle(file.read(), proposal_file)
        except WeightsError as error:
            raise ConfigError(f"{_KEYS}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where} is of type {type(content).__name__}; expected a dict of {', '.join(_LISTS)}.")
    content = {_OLD_NAMES.get(key, key): value for key, value in content.items()}
    mode, lists = _box_mode(content, where), _lists(content, where)
    index = {str(key): number for number, key in enumerate(lists["ids"])}
    for record in dataset_dicts:
        number = index.get(str(record["image_id"]))
        if number is None:
            raise ConfigError(f"{where} has no proposals for the image {record['image_id']!r}; expected all images'.")
        boxes, logits = lists["boxes"][number], lists["objectness_logits"][number]
        _check_arrays(boxes, logits, f"{where}, image {record['image_id']!r},")
        order = logits.argsort()[::-1]  # best first
        record["proposal_boxes"], record["proposal_objectness_logits"] = boxes[order], logits[order]
        record["proposal_bbox_mode"] = mode
    return dataset_dicts


def _box_mode(content: dict, where: str) -> BoxMode:
    try:
        return BoxMode(content.get("bbox_mode", BoxMode.XYXY_ABS))
    except (TypeError, ValueError):
        modes = ", ".join(f"{mode.value} ({mode.name})" for mode in BoxMode)
        raise ConfigError(f"{where} has the bbox_mode {content['bbox_mode']!r:.40}; expected one of {modes}.") from None


def _lists(content: dict, where: str) -> dict[str, list | np.ndarray]:
    """Return the three lists, which may be arrays, by name."""
    for name in _LISTS:
        if name not in content:
            raise ConfigError(f"{where} has no {name}; expected a dict of {', '.join(_LISTS)}.")
        if not isinstance(content[name], list | tuple) and getattr(content[name], "ndim", 0) == 0:
            raise ConfigError(f"{where} has {name} of type {type(content[name]).__name__}; expected a list.")
    if len({len(content[name]) for name in _LISTS}) > 1:
        ids, boxes, logits = (len(content[name]) for name in _LISTS)
        raise ConfigError(f"{where} has {ids} ids, {boxes} boxes and {logits} objectness_logits; expected one number.")
    return {name: content[name] for name in _LISTS}


def _check_arrays(boxes: object, logits: object, where: str) -> None:
    for name, array in (("boxes", boxes), ("objectness_logits", logits)):
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf":
            kind = type(array).__name__
            raise ConfigError(f"{where} has {name} of type {kind}; expected an array of numbers.")
        if not np.isfinite(array).all():
            raise ConfigError(f"{where} has {name} that are not finite; expected numbers.")
    if boxes.ndim != 2 or boxes.shape[1] != 4 or logits.shape != boxes.shape[:1]:
        raise ConfigError(
            f"{where} has boxes of shape {boxes.shape} and objectness_logits of shape {logits.shape}; expected (P, 4) "
            "and (P,)."
        )
