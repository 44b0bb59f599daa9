"""Which boxes of a training set get a positive anchor from which level: what ``anchors`` measures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling.backbone import Backbone, build_backbone
from detectron2.structures import Boxes, BoxMode, Instances
from torch import nn
from tqdm import tqdm

from ..data.records import check_image
from ..registry import build_matcher
from ..structures import POSITIVE, Anchors
from .common import UserError


@dataclass(frozen=True)
class Image:
    """A training image as the network gets it: (height, width), and boxes (G, 4) float32 with their original areas."""

    size: tuple[int, int]
    boxes: torch.Tensor
    areas: np.ndarray


@dataclass(frozen=True)
class Coverage:
    """What each of G boxes gets, over all images.

    Attributes:
        positives: (G, L) int64, anchors a level that are positive for the box.
        regular: (G,) bool, whether it has positives without the low-quality rule.
    """

    positives: np.ndarray
    regular: np.ndarray

    @property
    def covered(self) -> np.ndarray:
        """(G,) bool, whether the box has a positive at all."""
        return self.positives.any(axis=1)

    def row(self, chosen: np.ndarray | slice = slice(None)) -> dict[str, float]:
        """The ``chosen`` boxes in numbers: how many, and the percentages of each fate."""
        covered, regular = self.covered[chosen], self.regular[chosen]
        count = len(covered)

        def percent(which):
            return 100 * float(which.sum()) / count if count else 0.0

        return {
            "boxes": count,
            "regular (%)": percent(regular),
            "low quality only (%)": percent(covered & ~regular),
            "none (%)": percent(~covered),
            "positives a box": float(self.positives[chosen].sum() / count) if count else 0.0,
        }


def read_images(cfg: CfgNode, records: Sequence[dict]) -> list[Image]:
    """The sizes and boxes of ``records`` after the resizing of training; crowds are left out."""
    rng = np.random.default_rng(0)
    return [_read_image(cfg, record, rng) for record in tqdm(records, desc="Boxes", unit="image", delay=2)]


def _read_image(cfg: CfgNode, record: dict, rng: np.random.Generator) -> Image:
    if "height" in record and "width" in record:
        width, height = record["width"], record["height"]
    else:
        width, height = check_image(record["file_name"], None, "DATASETS.TRAIN")
    new_height, new_width = resized(cfg, height, width, rng)
    annotations = [a for a in record.get("annotations", []) if not a.get("iscrowd", 0)]
    boxes = np.array(
        [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations], dtype=np.float64
    ).reshape(-1, 4)
    boxes = boxes.clip(0, [width, height, width, height])  # as Detectron2's mapper does
    sides = boxes[:, 2:] - boxes[:, :2]
    real = (sides > 0).all(axis=1)
    boxes = boxes[real] * (np.array([new_width, new_height] * 2) / [width, height, width, height])
    return Image((new_height, new_width), torch.tensor(boxes, dtype=torch.float32), sides[real].prod(axis=1))


def resized(cfg: CfgNode, height: int, width: int, rng: np.random.Generator) -> tuple[int, int]:
    """The (height, width) of an image after ``INPUT.MIN_SIZE_TRAIN`` and ``MAX_SIZE_TRAIN``."""
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    sizes = [sizes] if isinstance(sizes, int) else list(sizes)
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range":
        short = int(rng.integers(sizes[0], sizes[-1] + 1))
    else:
        short = int(rng.choice(sizes))
    if short == 0:
        return height, width
    return ResizeShortestEdge.get_output_shape(height, width, short, cfg.INPUT.MAX_SIZE_TRAIN)


def ratios_of(boxes: np.ndarray) -> np.ndarray:
    """Height ÷ width of (G, 4) boxes."""
    return (boxes[:, 3] - boxes[:, 1]) / (boxes[:, 2] - boxes[:, 0])


class FeatureGrid:
    """The levels of a config's backbone: their shapes, and how large their maps are for an image.

    Args:
        cfg: the config.
        backbone: its backbone, if it is built already.

    Attributes:
        shapes: a ``ShapeSpec`` a level of ``MODEL.RETINANET.IN_FEATURES``.

    Raises:
        UserError: the backbone lacks one of these levels.
    """

    def __init__(self, cfg: CfgNode, backbone: Backbone | None = None):
        if backbone is None:
            cfg = cfg.clone()
            given = cfg.MODEL.WEIGHTS or cfg.MODEL.FOCAL.TIMM.WEIGHTS
            cfg.MODEL.WEIGHTS, cfg.MODEL.FOCAL.TIMM.WEIGHTS = given, ""  # none is loaded: only its shape is asked for
            backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        if missing := [name for name in cfg.MODEL.RETINANET.IN_FEATURES if name not in shapes]:
            raise UserError(
                f"MODEL.RETINANET.IN_FEATURES names {', '.join(missing)}; the backbone has {', '.join(shapes)}. "
                "Give the config of a RetinaNet."
            )
        self.shapes = [shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
        self.divisor = max(backbone.size_divisibility, 1)

    def features(self, size: tuple[int, int]) -> list[torch.Tensor]:
        """Empty feature maps, one a level, of the sizes that an image of (height, width) gets."""
        padded = [-(-side // self.divisor) * self.divisor for side in size]
        return [torch.empty(1, 0, *(-(-side // shape.stride) for side in padded)) for shape in self.shapes]


def measure(
    cfg: CfgNode, grid: FeatureGrid, generator: nn.Module, images: Sequence[Image], progress: str = "Matching"
) -> Coverage:
    """What each box of ``images`` gets from the anchors of ``generator`` and the config's matcher."""
    strict_cfg = cfg.clone()
    strict_cfg.MODEL.FOCAL.MATCHER.LOW_QUALITY = "none"
    matcher, strict = build_matcher(cfg), build_matcher(strict_cfg)

    @lru_cache(maxsize=8)
    def anchors_of(size: tuple[int, int]) -> Anchors:
        return Anchors.from_generator(generator, grid.features(size))

    positives, regular = [], []
    for image in tqdm(images, desc=progress, unit="image", delay=2, leave=False):
        anchors = anchors_of(image.size)
        positives.append(_positives(matcher, anchors, image))  # (G, L)
        regular.append(_positives(strict, anchors, image).any(axis=1))  # (G,)
    return Coverage(np.concatenate(positives), np.concatenate(regular))


def _positives(matcher: Callable, anchors: Anchors, image: Image) -> np.ndarray:
    """(G, L): how many anchors of each level are positive for each box."""
    instances = Instances(image.size, gt_boxes=Boxes(image.boxes))
    instances.gt_classes = torch.zeros(len(image.boxes), dtype=torch.int64)
    if not len(image.boxes):
        return np.zeros((0, len(anchors.boxes)), dtype=np.int64)
    matched, labels = matcher(anchors, instances)
    sizes = [len(level) for level in anchors.boxes]
    return np.stack(
        [
            torch.bincount(level[codes == POSITIVE], minlength=len(image.boxes)).numpy()
            for level, codes in zip(matched.split(sizes), labels.split(sizes))
        ],
        axis=1,
    )
