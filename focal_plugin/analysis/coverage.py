"""Which boxes of a training set get a positive anchor, and from which level: what ``anchors`` measures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import build_augmentation
from detectron2.data.transforms import RandomCrop, ResizeShortestEdge
from detectron2.modeling.backbone import Backbone, build_backbone
from detectron2.structures import Boxes, BoxMode, Instances
from torch import nn

from ..config import ConfigError
from ..data.images import check_image
from ..data.records import objects
from ..engine.rng import seeded
from ..files.progress import progress
from ..registry import build_matcher
from ..structures import POSITIVE, Anchors


@dataclass(frozen=True)
class Image:
    """A training image as the network gets it.

    Attributes:
        size: (height, width) in pixels.
        boxes: (G, 4) float32 XYXY in pixels.
        areas: (G,) the areas of the boxes in the original image, in pixels².
    """

    size: tuple[int, int]
    boxes: torch.Tensor
    areas: np.ndarray


@dataclass(frozen=True)
class Coverage:
    """The positives of the G boxes of a set of images.

    Attributes:
        positives: (G, L) int64, the number of positive anchors of each box on each of the L levels.
        regular: (G,) bool, whether a box has positives without the low-quality rule.
    """

    positives: np.ndarray
    regular: np.ndarray

    @property
    def covered(self) -> np.ndarray:
        """(G,) bool, whether a box has a positive at all."""
        return self.positives.any(axis=1)

    def row(self, chosen: np.ndarray | slice = slice(None)) -> dict[str, float]:
        """Return the number of the ``chosen`` boxes and the percentages of those with and without positives."""
        covered, regular = self.covered[chosen], self.regular[chosen]
        count = len(covered)
        total = max(count, 1)
        return {
            "boxes": count,
            "regular (%)": 100 * float(regular.sum()) / total,
            "low quality only (%)": 100 * float((covered & ~regular).sum()) / total,
            "none (%)": 100 * float((~covered).sum()) / total,
            "positives a box": float(self.positives[chosen].sum()) / total,
        }


def read_images(cfg: CfgNode, records: Sequence[dict]) -> list[Image]:
    """Return the sizes and boxes of ``records`` after the resizing of training, without crowds.

    With ``INPUT.CROP``, they are those of the whole image at the scale that its crops are resized to. Where
    ``INPUT.MIN_SIZE_TRAIN`` offers several sizes, each image gets a random one, the same in every call.
    """
    resize = build_augmentation(cfg, is_train=True)[0]
    crop = RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE) if cfg.INPUT.CROP.ENABLED else None
    with seeded(0):
        return [_read_image(resize, crop, record) for record in progress(records, desc="Boxes")]


def _read_image(resize: ResizeShortestEdge, crop: RandomCrop | None, record: dict) -> Image:
    if "height" in record and "width" in record:
        width, height = record["width"], record["height"]
    else:
        width, height = check_image(record["file_name"], None, "DATASETS.TRAIN")
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects(record)]
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)  # (G, 4)
    boxes = boxes.clip(0, [width, height, width, height])  # as Detectron2's mapper does
    sides = boxes[:, 2:] - boxes[:, :2]
    real = (sides > 0).all(axis=1)
    resized = crop.get_crop_size((height, width)) if crop else (height, width)
    transform = resize.get_transform(np.empty((*resized, 0)))  # multiplies coordinates, inside a crop or not
    ((new_width, new_height),) = transform.apply_coords(np.array([[width, height]], dtype=np.float64))
    boxes = torch.tensor(transform.apply_box(boxes[real]), dtype=torch.float32)
    return Image((round(new_height), round(new_width)), boxes, sides[real].prod(axis=1))


def ratios_of(boxes: np.ndarray) -> np.ndarray:
    """Return height ÷ width of (G, 4) boxes."""
    return (boxes[:, 3] - boxes[:, 1]) / (boxes[:, 2] - boxes[:, 0])


class FeatureGrid:
    """The levels of a config's backbone, and the sizes of their feature maps.

    Args:
        cfg: the config.
        backbone: its backbone, if there is one already.

    Attributes:
        shapes: a ``ShapeSpec`` for each level of ``MODEL.RETINANET.IN_FEATURES``.

    Raises:
        ConfigError: the backbone lacks one of these levels.
    """

    def __init__(self, cfg: CfgNode, backbone: Backbone | None = None):
        if backbone is None:
            cfg = cfg.clone()
            # Load no weights, as only the shape is needed, but name some, or the encoder is reported as random.
            given = cfg.MODEL.WEIGHTS or cfg.MODEL.FOCAL.TIMM.WEIGHTS
            cfg.MODEL.WEIGHTS, cfg.MODEL.FOCAL.TIMM.WEIGHTS = given, ""
            backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        if missing := [name for name in cfg.MODEL.RETINANET.IN_FEATURES if name not in shapes]:
            raise ConfigError(
                f"MODEL.RETINANET.IN_FEATURES names {', '.join(missing)}; the backbone has {', '.join(shapes)}. "
                "Give the config of a RetinaNet."
            )
        self.shapes = [shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
        self.divisor = max(backbone.size_divisibility, 1)

    def features(self, size: tuple[int, int]) -> list[torch.Tensor]:
        """Return empty feature maps (1, 0, H, W), one a level, of the sizes for an image of (height, width)."""
        padded = [-(-side // self.divisor) * self.divisor for side in size]
        return [torch.empty(1, 0, *(-(-side // shape.stride) for side in padded)) for shape in self.shapes]


def measure(cfg: CfgNode, grid: FeatureGrid, generator: nn.Module, images: Sequence[Image]) -> Coverage:
    """Return the positives of each box of ``images`` among the anchors of ``generator``, by the config's matcher."""
    strict_cfg = cfg.clone()
    strict_cfg.MODEL.FOCAL.MATCHER.LOW_QUALITY = "none"
    matcher, strict = build_matcher(cfg), build_matcher(strict_cfg)

    @lru_cache(maxsize=8)
    def anchors_of(size: tuple[int, int]) -> Anchors:
        return Anchors.from_generator(generator, grid.features(size))

    positives, regular = [], []
    for image in progress(images, desc="Matching"):
        classes = torch.zeros(len(image.boxes), dtype=torch.int64)
        instances = Instances(image.size, gt_boxes=Boxes(image.boxes), gt_classes=classes)
        anchors = anchors_of(image.size)
        positives.append(count_positives(matcher, anchors, instances))  # (G, L)
        regular.append(count_positives(strict, anchors, instances).any(axis=1))  # (G,)
    return Coverage(np.concatenate(positives), np.concatenate(regular))


def count_positives(matcher: Callable, anchors: Anchors, instances: Instances) -> np.ndarray:
    """Return (G, L) int64, the number of positive anchors of each of the G boxes on each level."""
    matched, labels = matcher(anchors, instances)
    sizes = [len(level) for level in anchors.boxes]
    levels = zip(matched.split(sizes), labels.split(sizes))
    return np.stack(
        [torch.bincount(match[label == POSITIVE], minlength=len(instances)).numpy() for match, label in levels], axis=1
    )
