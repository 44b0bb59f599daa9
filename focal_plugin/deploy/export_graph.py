"""A ``FocalRetinaNet`` as one function from a tensor to tensors, which exporters can trace for any image size."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from ..anchors.foreign import TorchvisionAnchorGenerator
from ..layers.replace import like_conv, replace_modules
from ..retinanet import FocalRetinaNet

# (boxes (C, 4), scores (C,), classes (C,), K, IoU threshold, D) → the indices of the boxes that NMS keeps, best first,
# or at least those of the D best of each class.
ClassWiseNMS = Callable[[Tensor, Tensor, Tensor, int, float, int], Tensor]


LAYOUTS = ("CHW", "HWC", "NCHW", "NHWC")
DTYPES = {"float32": torch.float32, "uint8": torch.uint8}


@dataclass(frozen=True)
class ImageInput:
    """How an exported model takes its image.

    Attributes:
        layout: the order of its dimensions, one of ``LAYOUTS``; N is a batch of one.
        dtype: one of ``DTYPES``.

    Raises:
        ValueError: one has another value.
    """

    layout: str
    dtype: str

    def __post_init__(self):
        for option, value, choices in (("layout", self.layout, LAYOUTS), ("dtype", self.dtype, DTYPES)):
            if value not in choices:
                raise ValueError(f"--input-{option} is {value!r}; expected one of {', '.join(choices)}.")

    def pack(self, image: Tensor) -> Tensor:
        """Lay out a (C, H, W) image as the exported model takes it."""
        image = image.permute(1, 2, 0) if self.layout.endswith("C") else image
        image = image[None] if self.layout.startswith("N") else image
        return image.to(DTYPES[self.dtype]).contiguous()

    def unpack(self, image: Tensor) -> Tensor:
        """Return the (C, H, W) image in the input of the exported model, in its dtype."""
        image = image[0] if self.layout.startswith("N") else image
        return image.permute(2, 0, 1) if self.layout.endswith("C") else image


class ExportedHeads(nn.Module):
    """The network alone: its logits and deltas, before they become boxes.

    ``forward`` takes an image in the channel order of ``INPUT.FORMAT`` with values from 0 to 255, laid out as
    ``image_input`` says, normalises it and pads it at the right and the bottom to what the backbone needs. It returns
    the logits (1, A·K, H', W') of each level, finest first, and then the deltas (1, A·4, H', W') of each.

    Args:
        model: a copy for this module alone, in eval mode; some layers are changed for the exporters.
        image_input: the layout and dtype of the image.
    """

    def __init__(self, model: FocalRetinaNet, image_input: ImageInput):
        super().__init__()
        self.model = model
        self.image_input = image_input
        replace_modules(model.backbone, _same_size_twin)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        logits, deltas = self.predict(self.image_input.unpack(image))
        return *logits, *deltas

    def predict(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the logits and the deltas of each level for a (C, H, W) image."""
        model = self.model
        image = (image.to(model.pixel_mean) - model.pixel_mean) / model.pixel_std
        return model.head(model.features(self._pad(image)[None]))

    def _pad(self, image: Tensor) -> Tensor:
        constraints = self.model.backbone.padding_constraints or {}
        divisor = constraints.get("size_divisibility", self.model.backbone.size_divisibility)
        side = constraints.get("square_size", 0)
        height, width = image.shape[-2:]
        if side > 0:
            return F.pad(image, (0, side - width, 0, side - height))
        return F.pad(image, (0, -width % divisor, 0, -height % divisor)) if divisor > 1 else image


class ExportedDetector(ExportedHeads):
    """The whole detector for one image. Its detections are the model's, in float32.

    ``forward`` takes the image as ``ExportedHeads`` does. It returns boxes (D, 4), XYXY in pixels of the image and
    clipped to it; scores (D,); classes (D,) int64. Best first; D is at most the model's ``max_detections_per_image``.

    Args:
        model: see ``ExportedHeads``.
        class_wise_nms: NMS class by class, in operators that the format has.
        image_input: see ``ExportedHeads``.
    """

    def __init__(self, model: FocalRetinaNet, class_wise_nms: ClassWiseNMS, image_input: ImageInput):
        super().__init__(model, image_input)
        self.class_wise_nms = class_wise_nms

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model, image = self.model, self.image_input.unpack(image)
        logits, deltas = self.predict(image)
        levels = [self._best_of_level(*level) for level in zip(logits, deltas, *self._grids(logits))]
        scores, classes, deltas, anchors = (torch.cat(parts) for parts in zip(*levels))  # (C, ...)
        boxes = model.box2box_transform.apply_deltas(deltas, anchors)  # (C, 4)
        if model.clip_before_nms:
            boxes = _clip_boxes(boxes, image)
        wanted = (scores > model.test_score_thresh).nonzero().squeeze(1)
        boxes, scores, classes = boxes[wanted], scores[wanted], classes[wanted]

        count = model.max_detections_per_image
        keep = self.class_wise_nms(boxes, scores, classes, model.num_classes, model.test_nms_thresh, count)[:count]
        boxes, scores, classes = _clip_boxes(boxes[keep], image), scores[keep], classes[keep]
        inside = ((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])).nonzero().squeeze(1)
        return boxes[inside], scores[inside], classes[inside]

    def _grids(self, logits: list[Tensor]) -> tuple[list[Tensor], list[tuple]]:
        """For each level, the (A, 4) anchors of its first location, and its steps (y, x) in pixels."""
        generator = self.model.anchor_generator
        if isinstance(generator, TorchvisionAnchorGenerator):
            height, width = (size * generator.first_stride for size in logits[0].shape[-2:])
            return list(generator.shapes), [(height // x.shape[-2], width // x.shape[-1]) for x in logits]
        strides = generator.strides
        anchors = [anchors + generator.offset * stride for anchors, stride in zip(generator.cell_anchors, strides)]
        return anchors, [(stride, stride) for stride in strides]

    def _best_of_level(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor, step: tuple
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The scores (C,), classes (C,), deltas (C, 4) and anchors (C, 4) of a level's best (anchor, class) pairs.

        Args:
            logits: (1, A·K, H, W). deltas: (1, A·4, H, W). anchors, step: see ``_grids``.
        """
        k, a = self.model.num_classes, len(anchors)
        h, w = logits.shape[-2:]
        logits = logits.flatten()  # (A·K·H·W,)
        logits, indices = logits.topk(_at_most(logits.shape[0], self.model.test_topk_candidates))
        rows, x = _divmod(indices, w)
        pairs, y = _divmod(rows, h)
        anchor, classes = _divmod(pairs, k)
        deltas = deltas.view(a, 4, h, w)[anchor, :, y, x]  # (C, 4)
        y, x = y * step[0], x * step[1]
        return logits.sigmoid(), classes, deltas, torch.stack((x, y, x, y), dim=1) + anchors[anchor]


def offset_nms(
    boxes: Tensor, scores: Tensor, classes: Tensor, num_classes: int, threshold: float, count: int
) -> Tensor:
    """Class-wise NMS in one call of torchvision's: boxes of different classes are moved apart.

    Offsets are multiples of the span of all coordinates, also of those outside the image. In float64, since float32
    rounds to 1/128 pixel from 65536 on, which offsets reach with many classes or large images.
    """
    # Two boxes of further classes come last: an exported torchvision.ops.nms assumes that it keeps at least two.
    boxes = F.pad(boxes.double(), (0, 0, 0, 2))
    scores = F.pad(scores.double(), (0, 2), value=-1.0)
    classes = torch.cat((classes, torch.arange(num_classes, num_classes + 2, device=classes.device)))
    span = boxes.max() - boxes.min() + 1
    return nms(boxes + (classes * span)[:, None], scores, threshold)[:-2]


@torch.library.custom_op("focal_plugin::class_wise_nms", mutates_args=())
def class_wise_nms(
    boxes: Tensor, scores: Tensor, classes: Tensor, num_classes: int, threshold: float, count: int
) -> Tensor:
    """``offset_nms`` as one operator, which becomes ONNX's ``NonMaxSuppression``, itself class-wise."""
    return offset_nms(boxes, scores, classes, num_classes, threshold, count)


@class_wise_nms.register_fake
def _(boxes, scores, classes, num_classes, threshold, count):
    return classes.new_empty(torch.library.get_ctx().new_dynamic_size())


class ConvToSameSize(nn.Conv2d):
    """timm's ``Conv2dSame`` for images whose sides are multiples of its stride: the padding is then constant.

    timm computes the padding from the size of its input. Where sizes are symbols, these terms multiply from layer to
    layer, too many for an exporter.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H/stride, W/stride)."""
        pads = []
        for size, stride, dilation in zip(self.kernel_size[::-1], self.stride[::-1], self.dilation[::-1]):  # x, y
            total = max((size - 1) * dilation + 1 - stride, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


def _same_size_twin(module: nn.Module) -> nn.Module | None:
    if type(module).__name__ != "Conv2dSame":  # timm's, which need not be installed
        return None
    return like_conv(ConvToSameSize, module)


def _divmod(indices: Tensor, size: int | Tensor) -> tuple[Tensor, Tensor]:
    """Quotient and remainder, in operations that ONNX's exporter accepts with a symbolic ``size``."""
    quotient = indices // size
    return quotient, indices - quotient * size


def _clip_boxes(boxes: Tensor, image: Tensor) -> Tensor:
    """Clip (C, 4) boxes to a (3, H, W) image."""
    x1, y1, x2, y2 = boxes.unbind(1)
    height, width = image.shape[-2:]
    return torch.stack((_clip(x1, width), _clip(y1, height), _clip(x2, width), _clip(y2, height)), dim=1)


def _clip(coordinates: Tensor, size: int | Tensor) -> Tensor:
    """Clip coordinates to [0, ``size``], which is a tensor while PyTorch traces."""
    if isinstance(size, Tensor):
        return torch.minimum(coordinates.clamp(min=0), size.to(coordinates))
    return coordinates.clamp(min=0, max=size)


def _at_most(size: int | Tensor, limit: int) -> int | Tensor:
    """The minimum of both. ``size`` is a tensor while PyTorch traces, and a symbol in ``torch.export``."""
    return size.clamp(max=limit) if isinstance(size, Tensor) else torch.sym_min(size, limit)
