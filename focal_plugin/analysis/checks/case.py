"""What the checks share: the run to check, whose parts are made once and only if needed, and their findings."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.utils.env import seed_all_rng
from torch import nn

from ...config.load import build_model, load_config
from ...data import has_boxes, is_dense_detector
from ...engine import AtomicCheckpointer, training_folder
from ...retinanet import FocalRetinaNet
from ..common import read_records, spread
from ..coverage import Coverage, FeatureGrid, Image, measure, read_images

OK, WARNING, ERROR, SKIPPED = "ok", "warning", "error", "skipped"


@dataclass(frozen=True)
class Finding:
    """A result of a check: a level (OK, WARNING, ERROR or SKIPPED), and a line that says what to change."""

    level: str
    text: str


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        name: what is checked.
        function: called with a ``Case``, it yields one or more findings. An exception is reported as an ERROR.
        needs: names of earlier checks; if one of them found an error or was skipped, this one is skipped.
    """

    name: str
    function: Callable[["Case"], Iterable[Finding]]
    needs: Sequence[str] = ()


@dataclass
class Case:
    """A run that is about to start.

    Attributes:
        config_file, opts: the arguments of ``load_config``.
        weights: the weights to start from; ``MODEL.WEIGHTS`` if empty.
        resume: whether the run resumes the one in its ``OUTPUT_DIR``.
        num_images: the number of images to match anchors on, spread over the training set; 0 for all.
        num_gpus: the number of GPUs to train on.
    """

    config_file: str
    opts: Sequence[str] = ()
    weights: str = field(default="", kw_only=True)
    resume: bool = field(default=False, kw_only=True)
    num_images: int = field(default=1000, kw_only=True)
    num_gpus: int = field(default=1, kw_only=True)

    @cached_property
    def own_cfg(self) -> CfgNode:
        """The config as it trains on so many GPUs (SOLVER.REFERENCE_WORLD_SIZE)."""
        return DefaultTrainer.auto_scale_workers(load_config(self.config_file, list(self.opts)), self.num_gpus)

    @cached_property
    def cfg(self) -> CfgNode:
        """The config, with the device set to the CPU."""
        cfg = self.own_cfg.clone()
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.WEIGHTS = self.weights or cfg.MODEL.WEIGHTS
        return cfg

    @property
    def is_dense(self) -> bool:
        """Whether the model is a RetinaNet or similar."""
        return is_dense_detector(self.cfg.MODEL.META_ARCHITECTURE)

    @property
    def has_anchors(self) -> bool:
        """Whether the model reads the config's anchors, and matches them to boxes."""
        return self.is_dense and isinstance(self.model, FocalRetinaNet | RetinaNet)

    @cached_property
    def run(self) -> AtomicCheckpointer:
        """The checkpoints in the folder that the run writes to, which is an error if it holds another run."""
        return AtomicCheckpointer(None, training_folder(self.cfg.OUTPUT_DIR, self.resume))

    @property
    def resumes(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return self.resume and self.run.has_checkpoint()

    @property
    def levels(self) -> list[str]:
        """The names of the L levels."""
        return list(self.cfg.MODEL.RETINANET.IN_FEATURES)

    @cached_property
    def records(self) -> list[dict]:
        """The records of ``DATASETS.TRAIN``, including images without boxes."""
        return read_records(self.cfg, "TRAIN")

    @cached_property
    def used_records(self) -> list[dict]:
        """The records that are trained on."""
        filters = self.cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        return [record for record in self.records if has_boxes(record) or not filters]

    @cached_property
    def model(self) -> nn.Module:
        """The model of the config, without ``MODEL.WEIGHTS``."""
        seed_all_rng(max(self.cfg.SEED, 0))
        return build_model(self.cfg)

    @cached_property
    def grid(self) -> FeatureGrid:
        """The levels of the backbone."""
        return FeatureGrid(self.cfg, self.model.backbone)

    @cached_property
    def anchor_generator(self) -> nn.Module:
        """The anchor generator of the config."""
        return build_anchor_generator(self.cfg, self.grid.shapes)

    @cached_property
    def images(self) -> list[Image]:
        """The sizes and boxes of ``num_images`` training images."""
        return read_images(self.cfg, spread(self.used_records, self.num_images))

    @cached_property
    def areas(self) -> np.ndarray:
        """(G,) areas of all boxes of ``images`` in the original images, in pixels²."""
        return np.concatenate([image.areas for image in self.images])

    @cached_property
    def coverage(self) -> Coverage:
        """The positives of each box of ``images``."""
        return measure(self.cfg, self.grid, self.anchor_generator, self.images)


def first_batch_config(cfg: CfgNode, images: int) -> CfgNode:
    """Return the config for a first batch of at most so many images, loaded in this process, with a fixed seed."""
    cfg = cfg.clone()
    cfg.SOLVER.IMS_PER_BATCH = min(images, cfg.SOLVER.IMS_PER_BATCH)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SEED = max(cfg.SEED, 0)
    return cfg


def few(names: Iterable[object], most: int = 3) -> str:
    """Return the first ``most`` of some names, and the number of the others, for a message."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def percent(part: int, whole: int) -> str:
    """Return ``part`` of ``whole`` as in "12 of 34 (35.3 %)"."""
    return f"{part:,} of {whole:,} ({100 * part / max(whole, 1):.1f} %)"
