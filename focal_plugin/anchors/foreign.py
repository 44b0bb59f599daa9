"""The anchors of torchvision and Detectron, for weights that were trained with them.

Both round numbers that Detectron2 does not. Sizes and aspect ratios are ``MODEL.ANCHOR_GENERATOR``'s. The anchors of a
location are in Detectron2's order: all ratios of one size, then of the next. Impossible numbers are a ValueError.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, BufferList, DefaultAnchorGenerator
from detectron2.structures import Boxes
from torch import Tensor, nn

_Levels = Sequence[float] | Sequence[Sequence[float]]  # numbers for all levels, or a list of numbers for each


@ANCHOR_GENERATOR_REGISTRY.register()
class TorchvisionAnchorGenerator(nn.Module):
    """The anchors of torchvision's ``AnchorGenerator``.

    Their corners are rounded to whole pixels. Their locations are not a feature's nominal stride apart, but the batch's
    size over the feature's, rounded down: for 13 columns over 800 pixels 61, not 64.

    Args:
        sizes: square roots of the anchors' areas in pixels, a list for each feature, or one list for all.
        aspect_ratios: height / width, the same way.
        strides: of the features, finest first; the first feature times its stride is the size of the batch's images.
        offset: of the first location from the image's corner; has to be 0, torchvision's.
    """

    box_dim: int = 4

    @configurable
    def __init__(self, *, sizes: _Levels, aspect_ratios: _Levels, strides: Sequence[int], offset: float = 0.0):
        super().__init__()
        if offset:
            raise ValueError(f"MODEL.ANCHOR_GENERATOR.OFFSET is {offset}; torchvision's anchors have 0.")
        self.first_stride = strides[0]  # an attribute `strides` would promise a regular grid
        levels = zip(_per_level(sizes, len(strides)), _per_level(aspect_ratios, len(strides)), strict=True)
        self.shapes = BufferList([self.generate_cell_anchors(*level) for level in levels])

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, object]:
        return DefaultAnchorGenerator.from_config(cfg, input_shape)

    @property
    def num_anchors(self) -> list[int]:
        """A of each level."""
        return [len(shapes) for shapes in self.shapes]

    @staticmethod
    def generate_cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
        """The (A, 4) anchors of a location at the origin. In float32, where torchvision rounds."""
        areas = torch.tensor(sizes, dtype=torch.float32)[:, None]
        root = torch.tensor(aspect_ratios, dtype=torch.float32).sqrt()
        w, h = ((1 / root) * areas).flatten(), (root * areas).flatten()  # (A,)
        return (torch.stack([-w, -h, w, h], dim=1) / 2).round()

    def forward(self, features: list[Tensor]) -> list[Boxes]:
        """The H·W·A anchors of each (N, C, H, W) feature."""
        image = [size * self.first_stride for size in features[0].shape[-2:]]
        boxes = []
        for feature, shapes in zip(features, self.shapes):
            y, x = (
                torch.arange(size, device=shapes.device) * (pixels // size)
                for size, pixels in zip(feature.shape[-2:], image)
            )
            y, x = torch.meshgrid(y, x, indexing="ij")  # (H, W)
            corners = torch.stack([x, y, x, y], dim=-1).view(-1, 1, 4)  # (H·W, 1, 4)
            boxes.append(Boxes((corners + shapes).view(-1, 4)))  # (H·W·A, 4)
        return boxes


@ANCHOR_GENERATOR_REGISTRY.register()
class Detectron1AnchorGenerator(DefaultAnchorGenerator):
    """The anchors of Detectron's RetinaNet.

    The sides of an anchor have its aspect ratio and an area of stride², are rounded to whole pixels, and are then
    multiplied by size / stride. In Detectron a box from x1 to x2 is x2 − x1 + 1 pixels wide; here, as in all of
    Detectron2, it ends at x2 + 1. So the first centre is half a stride from the image's corner.

    Args:
        sizes, aspect_ratios, strides: see ``DefaultAnchorGenerator``.
        offset: of the first location from the image's corner, in strides; has to be .5, Detectron's.
    """

    @configurable
    def __init__(self, *, sizes: _Levels, aspect_ratios: _Levels, strides: Sequence[int], offset: float = 0.5):
        if offset != 0.5:
            raise ValueError(f"MODEL.ANCHOR_GENERATOR.OFFSET is {offset}; Detectron's anchors have 0.5.")
        super().__init__(sizes=sizes, aspect_ratios=aspect_ratios, strides=strides, offset=offset)
        levels = zip(_per_level(sizes, len(strides)), _per_level(aspect_ratios, len(strides)), strides, strict=True)
        self.cell_anchors = BufferList([_detectron1_cell(*level) for level in levels])


def _detectron1_cell(sizes: Sequence[float], aspect_ratios: Sequence[float], stride: int) -> Tensor:
    """The (A, 4) anchors of a location at the origin."""
    anchors = []
    for size in sizes:
        for ratio in aspect_ratios:
            width = round(math.sqrt(stride**2 / ratio))
            w, h = (side * size / stride / 2 for side in (width, round(width * ratio)))
            anchors.append([-w, -h, w, h])
    return torch.tensor(anchors, dtype=torch.float32)


def _per_level(values: _Levels, num_levels: int) -> list[Sequence[float]]:
    levels: list[Any] = list(values) if values and isinstance(values[0], Sequence) else [values]
    if len(levels) not in (1, num_levels) or not all(levels):
        raise ValueError(
            f"MODEL.ANCHOR_GENERATOR has {levels} for its {num_levels} features; expected a list of numbers for each, "
            "or one for all, in SIZES and in ASPECT_RATIOS."
        )
    return levels * num_levels if len(levels) == 1 else levels
