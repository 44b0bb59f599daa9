"""The anchors of torchvision and Detectron, for weights that were trained with them.

Both round what Detectron2 does not. Sizes and aspect ratios are ``MODEL.ANCHOR_GENERATOR``'s. The anchors of a location
are in Detectron2's order: sizes outside, ratios inside.
"""

import math
from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, BufferList, DefaultAnchorGenerator
from detectron2.structures import Boxes
from torch import Tensor, nn


@ANCHOR_GENERATOR_REGISTRY.register()
class TorchvisionAnchorGenerator(nn.Module):
    """The anchors of torchvision's ``AnchorGenerator``.

    Their corners are rounded to whole pixels. Locations are not the feature's stride apart but as many whole pixels as
    go into the batch's width over the feature's: 61, not 64, for a feature of 13 columns over 800 pixels.

    Args:
        sizes: square roots of the anchors' areas in pixels, a list for each feature, or one list for all.
        aspect_ratios: height / width, the same way.
        strides: of the features, finest first; the first feature times its stride is the size of the batch's images.
        offset: of the first location from the corner, 0: torchvision knows no other.

    Raises:
        ValueError: another offset, or lists for another number of features.
    """

    box_dim: int = 4

    @configurable
    def __init__(self, *, sizes: Sequence, aspect_ratios: Sequence, strides: Sequence[int], offset: float = 0.0):
        super().__init__()
        if offset:
            raise ValueError(f"MODEL.ANCHOR_GENERATOR.OFFSET is {offset}; torchvision's anchors have 0.")
        self.first_stride = strides[0]  # `strides` would promise a grid that is not there
        levels = zip(_per_level(sizes, len(strides)), _per_level(aspect_ratios, len(strides)), strict=True)
        self.shapes = BufferList([self.generate_cell_anchors(*level) for level in levels])

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]):
        return _from_config(cfg, input_shape)

    @property
    def num_anchors(self) -> list[int]:
        """A of each level."""
        return [len(shapes) for shapes in self.shapes]

    @staticmethod
    def generate_cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
        """The (A, 4) anchors of a location at the origin. In float32, where torchvision rounds."""
        sizes = torch.tensor(sizes, dtype=torch.float32)[:, None]
        root = torch.tensor(aspect_ratios, dtype=torch.float32).sqrt()
        w, h = ((1 / root) * sizes).flatten(), (root * sizes).flatten()  # (A,)
        return (torch.stack([-w, -h, w, h], dim=1) / 2).round()

    def forward(self, features: list[Tensor]) -> list[Boxes]:
        """Anchors of each (N, C, H, W) feature: H·W·A boxes."""
        image = [size * self.first_stride for size in features[0].shape[-2:]]
        boxes = []
        for feature, shapes in zip(features, self.shapes):
            y, x = (
                torch.arange(size, device=shapes.device) * (pixels // size)
                for size, pixels in zip(feature.shape[-2:], image)
            )
            y, x = torch.meshgrid(y, x, indexing="ij")  # (H, W)
            corners = torch.stack([x, y, x, y], dim=-1).view(-1, 1, 4)  # (H·W, 1, 4)
            boxes.append(Boxes((corners + shapes).view(-1, 4)))
        return boxes


@ANCHOR_GENERATOR_REGISTRY.register()
class Detectron1AnchorGenerator(DefaultAnchorGenerator):
    """The anchors of Detectron's RetinaNet.

    The sides of an anchor are, in whole pixels, those of its aspect ratio with the area of stride × stride; times its
    size over the stride. In Detectron a box from x1 to x2 is x2 − x1 + 1 pixels wide; here, as in all of Detectron2,
    it ends at x2 + 1. So the centres are half a stride from the corner.

    Args:
        sizes, aspect_ratios, strides: see ``DefaultAnchorGenerator``.
        offset: of the first location from the corner in strides, .5: Detectron knows no other.

    Raises:
        ValueError: another offset.
    """

    @configurable
    def __init__(self, *, sizes: Sequence, aspect_ratios: Sequence, strides: Sequence[int], offset: float = 0.5):
        if offset != 0.5:
            raise ValueError(f"MODEL.ANCHOR_GENERATOR.OFFSET is {offset}; Detectron's anchors have 0.5.")
        super().__init__(sizes=sizes, aspect_ratios=aspect_ratios, strides=strides, offset=offset)
        levels = zip(_per_level(sizes, len(strides)), _per_level(aspect_ratios, len(strides)), strides, strict=True)
        self.cell_anchors = BufferList([_detectron1_cell(*level) for level in levels])

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]):
        return _from_config(cfg, input_shape)


def _detectron1_cell(sizes: Sequence[float], aspect_ratios: Sequence[float], stride: int) -> Tensor:
    anchors = []
    for size in sizes:
        for ratio in aspect_ratios:
            width = round(math.sqrt(stride**2 / ratio))
            w, h = (side * size / stride / 2 for side in (width, round(width * ratio)))
            anchors.append([-w, -h, w, h])
    return torch.tensor(anchors, dtype=torch.float32)


def _per_level(values: Sequence, levels: int) -> list[Sequence[float]]:
    """A list of numbers for each level, from one for all or one each."""
    values = list(values) if values and isinstance(values[0], Sequence) else [values]
    if len(values) not in (1, levels) or not all(values):
        raise ValueError(
            f"MODEL.ANCHOR_GENERATOR has {values} for its {levels} features; expected a list of numbers for each, or "
            "one for all, in SIZES and in ASPECT_RATIOS."
        )
    return values * levels if len(values) == 1 else values


def _from_config(cfg, input_shape: list[ShapeSpec]) -> dict:
    return {
        "sizes": cfg.MODEL.ANCHOR_GENERATOR.SIZES,
        "aspect_ratios": cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS,
        "strides": [shape.stride for shape in input_shape],
        "offset": cfg.MODEL.ANCHOR_GENERATOR.OFFSET,
    }
