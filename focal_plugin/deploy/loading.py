"""A trained model from a config and its weights, with the names of its classes."""

import logging
import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from torch import nn

from ..config import add_focal_config
from ..config.explain import merge_from_list
from ..config.load import build_model, load_config, prepare
from ..data import DataError, class_names
from ..data.local import given_classes
from ..engine import AtomicCheckpointer
from ..files.safe_load import WeightsError
from ..files.weights import missing_file

logger = logging.getLogger(__name__)


def read_config(config: CfgNode | str | os.PathLike, opts: Sequence[str] = ()) -> CfgNode:
    """Return a config that is ready to run and not frozen: of a file, or a copy of a ``CfgNode``.

    Args:
        config: a config, or a YAML file by its path or a name that ``find_config`` finds.
        opts: ``KEY VALUE`` pairs that change it.

    Raises:
        ValueError: ``config`` is an empty path; or a ``ConfigError``, see ``load_config``.
    """
    if not isinstance(config, CfgNode):
        path = os.fspath(config)
        if not path:
            raise ValueError("The config is an empty path; expected a YAML config, such as a run's config.yaml.")
        return load_config(path, opts)
    cfg = config.clone()
    cfg.defrost()
    add_focal_config(cfg)
    merge_from_list(cfg, opts)
    prepare(cfg)
    return cfg


def load_model(cfg: CfgNode) -> nn.Module:
    """Return the model of a config with ``MODEL.WEIGHTS``, in eval mode on its device.

    Raises:
        FileNotFoundError: ``MODEL.WEIGHTS`` is empty or no file.
        WeightsError: the file has no weights, or not exactly those of the model's backbone and head, in their shapes.
    """
    path = cfg.MODEL.WEIGHTS
    if not path:
        raise FileNotFoundError("No weights: expected the path of a checkpoint (--weights, or MODEL.WEIGHTS).")
    if problem := missing_file("MODEL.WEIGHTS (or --weights)", path):
        raise FileNotFoundError(problem)
    model = build_model(cfg)
    checkpointer = AtomicCheckpointer(model)
    checkpointer.load(path)
    # With a part of the weights a smaller network would detect something. Other heads, such as masks, are not needed.
    excess = [name for name in checkpointer.fit.unexpected if name.startswith(("backbone.", "head."))]
    if problems := checkpointer.fit._replace(unexpected=excess).problems():
        listed = "\n  ".join(problems[:5] + [f"... and {len(problems) - 5} more"] * (len(problems) > 5))
        raise WeightsError(
            f"The weights in {path} do not fit the config's model; expected a checkpoint trained with this config, for "
            f"the same classes (`python -m focal_plugin convert classes` maps others):\n  {listed}"
        )
    return model.eval()


def class_metadata(cfg: CfgNode, model: nn.Module) -> Metadata:
    """Return the metadata of the first data set of ``DATASETS.TEST``, or else ``TRAIN``, with class names.

    A data set that learns its class names from its files is loaded. If none can be, the names are those that an entry
    of ``DATASETS.LOCAL`` gives. Without any, the classes are numbered.

    Raises:
        ValueError: the data set has another number of classes than the model.
    """
    names = [name for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN) if name in DatasetCatalog]
    for name in names:
        try:
            classes = class_names(name)
        except (DataError, OSError) as error:
            logger.warning(f"{name!r} cannot be asked for its classes: {error}")
            continue
        if classes is not None:
            _check_num_classes(model, name, classes)
            return MetadataCatalog.get(name)
    for name in names:
        if classes := given_classes(name):
            _check_num_classes(model, name, classes)
            return Metadata(thing_classes=classes)
    logger.warning("No data set of the config's DATASETS has class names: the classes are numbered.")
    return Metadata()


def _check_num_classes(model: nn.Module, name: str, classes: Sequence[str]) -> None:
    expected = _num_classes(model)
    if expected is not None and len(classes) != expected:
        raise ValueError(
            f"The model has {expected} classes, but {name!r} of the config's DATASETS has {len(classes)}: expected "
            "the config that the weights were trained with."
        )


def _num_classes(model: nn.Module) -> int | None:
    for part in (model, getattr(model, "roi_heads", None)):
        if isinstance(number := getattr(part, "num_classes", None), int):
            return number
    return None
