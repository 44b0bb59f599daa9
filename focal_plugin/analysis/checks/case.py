"""What the checks share: the run that is looked at, its parts made once and only if asked for, and what was found."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.utils.env import seed_all_rng
from torch import nn

from ...config.load import load_config
from ...data import is_dense_detector
from ..common import read_records, spread
from ..coverage import Coverage, FeatureGrid, Image, measure, read_images

OK, WARNING, ERROR, SKIPPED = "ok", "warning", "error", "skipped"


@dataclass(frozen=True)
class Finding:
    """What a check found: a level, OK, WARNING, ERROR or SKIPPED, and a line that says what to change."""

    level: str
    text: str


@dataclass(frozen=True)
class Check:
    """A row of the list of checks.

    Attributes:
        name: what is checked.
        function: called with a ``Case``, it gives findings, at least one. An exception is an ERROR.
        needs: names of checks before it; if one of them found an error, or was skipped, this one is skipped.
    """

    name: str
    function: Callable[["Case"], Iterable[Finding]]
    needs: Sequence[str] = ()


class Case:
    """A run that is about to start.

    Args:
        config_file, opts: as of ``load_config``.
        weights: in place of ``MODEL.WEIGHTS``; empty, those.
        resume: whether the run goes on with the one in its ``OUTPUT_DIR``.
        num_images: how many images are matched, spread over the training set; 0 for all.
    """

    def __init__(
        self,
        config_file: str,
        opts: Sequence[str] = (),
        *,
        weights: str = "",
        resume: bool = False,
        num_images: int = 1000,
    ):
        self.config_file, self.opts = config_file, list(opts)
        self.weights, self.resume, self.num_images = weights, resume, num_images

    @cached_property
    def cfg(self) -> CfgNode:
        """The config, for the CPU."""
        cfg = load_config(self.config_file, self.opts)
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.WEIGHTS = self.weights or cfg.MODEL.WEIGHTS
        return cfg

    @property
    def is_dense(self) -> bool:
        """Whether the model is a RetinaNet or of its kind."""
        return is_dense_detector(self.cfg.MODEL.META_ARCHITECTURE)

    @cached_property
    def records(self) -> list[dict]:
        """Those of ``DATASETS.TRAIN``, also of images without boxes."""
        return read_records(self.cfg, "TRAIN")

    @cached_property
    def used_records(self) -> list[dict]:
        """Those that are trained on."""
        return [record for record in self.records if objects(record) or not self.filters_empty]

    @property
    def filters_empty(self) -> bool:
        """Whether images without objects are left out."""
        return self.cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS

    @cached_property
    def model(self) -> nn.Module:
        """The model as the config makes it, without ``MODEL.WEIGHTS``."""
        seed_all_rng(max(self.cfg.SEED, 0))
        return build_model(self.cfg)

    @cached_property
    def grid(self) -> FeatureGrid:
        """The levels of the backbone."""
        return FeatureGrid(self.cfg, self.model.backbone)

    @cached_property
    def anchor_generator(self) -> nn.Module:
        """Of the config."""
        return build_anchor_generator(self.cfg, self.grid.shapes)

    @cached_property
    def images(self) -> list[Image]:
        """The sizes and boxes of ``num_images`` images."""
        return read_images(self.cfg, spread(self.used_records, self.num_images))

    @cached_property
    def areas(self) -> np.ndarray:
        """(G,), of all boxes of ``images``, in pixels of the original images."""
        return np.concatenate([image.areas for image in self.images])

    @cached_property
    def coverage(self) -> Coverage:
        """What each box of ``images`` gets from the anchors."""
        return measure(self.cfg, self.grid, self.anchor_generator, self.images)


def objects(record: dict) -> list[dict]:
    """The annotations of a record but for crowds."""
    return [annotation for annotation in record.get("annotations", []) if annotation.get("iscrowd", 0) == 0]


def few(names: Iterable[object], most: int = 3) -> str:
    """The first of some names, for a message."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def percent(part: int, whole: int) -> str:
    """``part`` of ``whole`` as "12 of 34 (35.3 %)"."""
    return f"{part:,} of {whole:,} ({100 * part / max(whole, 1):.1f} %)"
