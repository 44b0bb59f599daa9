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
from ..data import DataError
from ..engine import AtomicCheckpointer
from ..files.safe_load import WeightsError
from ..files.weights import missing_file

logger = logging.getLogger(__name__)


def read_config(config: CfgNode | str | os.PathLike, opts: Sequence[str] = ()) -> CfgNode:
    """A config that is not frozen: a copy of a ``CfgNode``, or what ``load_config`` makes of a file.

    Args:
        config: a config, or a YAML file by its path or a name that ``find_config`` finds.
        opts: ``KEY VALUE`` pairs that change it.

    Raises:
        ValueError: it is an empty path. ``ConfigError``, a ValueError: it is a ``.py`` file, or ``opts`` are no keys
            of it with their values.
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
    """The model of a config with ``MODEL.WEIGHTS``, all of them, in eval mode on its device.

    Raises:
        FileNotFoundError: ``MODEL.WEIGHTS`` is empty or no file.
        WeightsError: the file holds no weights, not all of this model's in their shapes, or those of a larger model.
    """
    path = cfg.MODEL.WEIGHTS
    if not path:
        raise FileNotFoundError("No weights: expected the path of a checkpoint (--weights, or MODEL.WEIGHTS).")
    if problem := missing_file("MODEL.WEIGHTS (or --weights)", path):
        raise FileNotFoundError(problem)
    model = build_model(cfg)
    checkpointer = AtomicCheckpointer(model)
    checkpointer.load(path)
    # A smaller network would detect something with a part of the weights; other heads, such as masks, may be left out.
    excess = [name for name in checkpointer.fit.unexpected if name.startswith(("backbone.", "head."))]
    if problems := checkpointer.fit._replace(unexpected=excess).problems():
        listed = "\n  ".join(problems[:5] + [f"... and {len(problems) - 5} more"] * (len(problems) > 5))
        raise WeightsError(
            f"{path} has not the weights of this config's model; expected a checkpoint of training with it, with the "
            "same classes (to train on from one with others: `python -m focal_plugin.deploy.convert classes`):\n  "
            f"{listed}"
        )
    return model.eval()


def class_metadata(cfg: CfgNode, model: nn.Module) -> Metadata:
    """The metadata of the first data set of ``DATASETS.TEST``, or else ``TRAIN``, that knows its ``thing_classes``.

    A data set that knows them from its files is read for them. Without any, the classes go by their numbers.

    Raises:
        ValueError: the data set has another number of classes than the model.
    """
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        if name not in DatasetCatalog:
            continue
        metadata = MetadataCatalog.get(name)
        try:
            if metadata.get("thing_classes") is None:
                DatasetCatalog.get(name)
        except (DataError, OSError) as error:
            logger.warning(f"The classes' names are not known from {name!r}: {error}")
        classes = metadata.get("thing_classes")
        if classes is None:
            continue
        expected = _num_classes(model)
        if expected is not None and len(classes) != expected:
            raise ValueError(
                f"The model has {expected} classes, but {name!r} of the config's DATASETS has {len(classes)}: expected "
                "the config that the weights were trained with."
            )
        return metadata
    logger.warning("No data set of the config's DATASETS knows the names of the classes: they go by their numbers.")
    return Metadata()


def _num_classes(model: nn.Module) -> int | None:
    for part in (model, getattr(model, "roi_heads", None)):
        if isinstance(number := getattr(part, "num_classes", None), int):
            return number
    return None
