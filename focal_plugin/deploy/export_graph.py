"""A ``FocalRetinaNet`` as one function from a tensor to tensors, which exporters can trace for images of any size."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from ..anchors.foreign import TorchvisionAnchorGenerator
from ..layers.replace import like_conv, replace_modules
from ..retinanet import FocalRetinaNet

# (boxes (N, C, 4), scores (N, C), −1 for no candidate, classes (N, C), K, IoU threshold, D) → scores (N, D), −1 past
# the last, and the indices (N, D) of the D best boxes that NMS keeps in each image, best first; or all C, if C < D.
ClassWiseNMS = Callable[[Tensor, Tensor, Tensor, int, float, int], tuple[Tensor, Tensor]]


LAYOUTS = ("CHW", "HWC", "NCHW", "NHWC")
DTYPES = {"float32": torch.float32, "uint8": torch.uint8}
PRECISIONS = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class ImageInput:
    """How an exported model takes its image or its images.

    Attributes:
        layout: the order of its dimensions, one of ``LAYOUTS``; None for CHW, or NCHW with ``batch``.
        dtype: one of ``DTYPES``.
        batch: N is any number of images of one size. Otherwise it is 1.

    Raises:
        ValueError: one has another value, or a batch has a layout without N.
    """

    layout: str | None = None
    dtype: str = "float32"
    batch: bool = False

    def __post_init__(self):
        if self.layout is None:
            object.__setattr__(self, "layout", "NCHW" if self.batch else "CHW")
        for option, value, choices in (("layout", self.layout, LAYOUTS), ("dtype", self.dtype, DTYPES)):
            if value not in choices:
                raise ValueError(f"--input-{option} is {value!r}; expected one of {', '.join(choices)}.")
        if self.batch and not self.layout.startswith("N"):
            raise ValueError(f"--input-layout {self.layout} has no N for --batch: use N{self.layout}.")

    def pack(self, images: Tensor) -> Tensor:
        """Lay out (N, C, H, W) images, one without ``batch``, as the exported model takes them."""
        images = images.permute(0, 2, 3, 1) if self.layout.endswith("C") else images
        images = images if self.layout.startswith("N") else images[0]
        return images.to(DTYPES[self.dtype]).contiguous()

    def unpack(self, images: Tensor) -> Tensor:
        """Return the (N, C, H, W) images in the input of the exported model, in its dtype."""
        images = images if self.layout.startswith("N") else images[None]
        return images.permute(0, 3, 1, 2) if self.layout.endswith("C") else images


class ExportedHeads(nn.Module):
    """The network alone: its logits and deltas, before they become boxes.

    ``forward`` takes images in the channel order of ``INPUT.FORMAT`` with values from 0 to 255, laid out as
    ``image_input`` says, normalises them and pads them at the right and the bottom to what the backbone needs. It
    returns the logits (N, A·K, H', W') of each level, finest first, and then the deltas (N, A·4, H', W') of each, all
    in float32.

    Args:
        model: a copy for this module alone, in eval mode; some layers are changed for the exporters.
        image_input: the layout and dtype of the images.
        dtype: what the backbone and the head compute in.
    """

    def __init__(self, model: FocalRetinaNet, image_input: ImageInput, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model = model
        self.image_input = image_input
        self.dtype = dtype
        for module in (model.backbone, model.head):
            module.to(dtype)
        replace_modules(model.backbone, _same_size_twin)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        logits, deltas = self.predict(self.image_input.unpack(images))
        return *logits, *deltas

    def predict(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the logits and the deltas of each level for (N, C, H, W) images."""
        model = self.model
        images = (images.to(model.pixel_mean) - model.pixel_mean) / model.pixel_std
        logits, deltas = model.head(model.features(self._pad(images).to(self.dtype)))
        return [x.float() for x in logits], [x.float() for x in deltas]

    def _pad(self, images: Tensor) -> Tensor:
        constraints = self.model.backbone.padding_constraints or {}
        divisor = constraints.get("size_divisibility", self.model.backbone.size_divisibility)
        side = constraints.get("square_size", 0)
        height, width = images.shape[-2:]
        if side > 0:
            return F.pad(images, (0, side - width, 0, side - height))
        return F.pad(images, (0, -width % divisor, 0, -height % divisor)) if divisor > 1 else images


class ExportedDetector(ExportedHeads):
    """The whole detector. Its detections are the model's, in float32.

    ``forward`` takes the images as ``ExportedHeads`` does. It returns the detections of all images one after another:
    boxes (D, 4), XYXY in pixels of the image and clipped to it; scores (D,); classes (D,) int64. Those of an image come
    best first, at most the model's ``max_detections_per_image``. A batch has a fourth output, the counts (N,) int64 of
    its images' detections.

    Args:
        model, image_input, dtype: see ``ExportedHeads``.
        class_wise_nms: NMS class by class, in operators that the format has.
    """

    def __init__(self, *args, class_wise_nms: ClassWiseNMS):
        super().__init__(*args)
        self.class_wise_nms = class_wise_nms

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        model, images = self.model, self.image_input.unpack(images)
        logits, deltas = self.predict(images)
        levels = [self._best_of_level(*level) for level in zip(logits, deltas, *self._grids(logits))]
        scores, classes, deltas, anchors = (torch.cat(parts, dim=1) for parts in zip(*levels))  # (N, C, ...)
        boxes = model.box2box_transform.apply_deltas(deltas.flatten(0, 1), anchors.flatten(0, 1)).view_as(anchors)
        if model.clip_before_nms:
            boxes = _clip_boxes(boxes, images)
        scores = scores.masked_fill(~(scores > model.test_score_thresh), -1.0)

        count = model.max_detections_per_image
        scores, order = self.class_wise_nms(boxes, scores, classes, model.num_classes, model.test_nms_thresh, count)
        boxes = _clip_boxes(boxes.gather(1, order[..., None].expand(-1, -1, 4)), images)  # (N, D, 4)
        wanted = (scores >= 0) & (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
        image, place = wanted.nonzero().unbind(1)  # image by image
        found = boxes[image, place], scores[image, place], classes.gather(1, order)[image, place]
        return (*found, wanted.sum(dim=1)) if self.image_input.batch else found

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
        """The scores (N, C), classes (N, C), deltas (N, C, 4) and anchors (N, C, 4) of a level's best pairs.

        A pair is an anchor and a class.

        Args:
            logits: (N, A·K, H, W). deltas: (N, A·4, H, W). anchors, step: see ``_grids``.
        """
        k, a, limit = self.model.num_classes, len(anchors), self.model.test_topk_candidates
        n, _, h, w = logits.shape
        logits = logits.flatten(1)  # (N, A·K·H·W)
        count = _at_most(logits.shape[1], limit)
        logits, indices = logits.topk(count, dim=1)
        # C becomes a constant: exporters take far longer where it is a term of H and W.
        logits = F.pad(logits, (0, limit - count), value=-math.inf)  # (N, C)
        indices = F.pad(indices, (0, limit - count))
        rows, x = _divmod(indices, w)
        pairs, y = _divmod(rows, h)
        anchor, classes = _divmod(pairs, k)
        image = torch.arange(n, device=indices.device)[:, None]  # (N, 1)
        deltas = deltas.view(n, a, 4, h, w)[image, anchor, :, y, x]  # (N, C, 4)
        y, x = y * step[0], x * step[1]
        return logits.sigmoid(), classes, deltas, torch.stack((x, y, x, y), dim=2) + anchors[anchor]


def offset_nms(
    boxes: Tensor, scores: Tensor, classes: Tensor, num_classes: int, threshold: float, count: int
) -> tuple[Tensor, Tensor]:
    """Class-wise NMS in one call of torchvision's: boxes of different images or classes are moved apart.

    Offsets are multiples of the span of all coordinates, also of those outside the image. In float64, since float32
    rounds to 1/128 pixel from 65536 on, which offsets reach with many classes or large images.
    """
    n = scores.shape[0]
    candidates = (scores.flatten() >= 0).nonzero().squeeze(1)
    groups = classes + num_classes * torch.arange(n, device=classes.device)[:, None]  # (N, C)
    # Two boxes of further groups come last: an exported torchvision.ops.nms assumes that it keeps at least two.
    values = F.pad(scores.flatten()[candidates].double(), (0, 2), value=-1.0)
    spread = F.pad(boxes.flatten(0, 1)[candidates].double(), (0, 0, 0, 2))
    further = n * num_classes + torch.arange(2, device=classes.device)
    groups = torch.cat((groups.flatten()[candidates], further))
    span = spread.max() - spread.min() + 1
    kept = candidates[nms(spread + (groups * span)[:, None], values, threshold)[:-2]]
    scores = torch.full_like(scores, -1.0).flatten().index_copy(0, kept, scores.flatten()[kept]).view_as(scores)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :count], order[:, :count]


@torch.library.custom_op("focal_plugin::class_wise_nms", mutates_args=())
def class_wise_nms(
    boxes: Tensor, scores: Tensor, classes: Tensor, num_classes: int, threshold: float, count: int
) -> tuple[Tensor, Tensor]:
    """``offset_nms`` as one operator, which becomes ONNX's ``NonMaxSuppression``, itself class-wise."""
    scores, order = offset_nms(boxes, scores, classes, num_classes, threshold, count)
    return scores.clone(), order.clone()  # an operator returns no views


@class_wise_nms.register_fake
def _(boxes, scores, classes, num_classes, threshold, count):
    n, c = scores.shape
    return scores.new_empty(n, torch.sym_min(c, count)), classes.new_empty(n, torch.sym_min(c, count))


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


def _clip_boxes(boxes: Tensor, images: Tensor) -> Tensor:
    """Clip (N, C, 4) boxes to (N, C, H, W) images."""
    x1, y1, x2, y2 = boxes.unbind(2)
    height, width = images.shape[-2:]
    return torch.stack((_clip(x1, width), _clip(y1, height), _clip(x2, width), _clip(y2, height)), dim=2)


def _clip(coordinates: Tensor, size: int | Tensor) -> Tensor:
    """Clip coordinates to [0, ``size``], which is a tensor while PyTorch traces."""
    if isinstance(size, Tensor):
        return torch.minimum(coordinates.clamp(min=0), size.to(coordinates))
    return coordinates.clamp(min=0, max=size)


def _at_most(size: int | Tensor, limit: int) -> int | Tensor:
    """The minimum of both. ``size`` is a tensor while PyTorch traces, and a symbol in ``torch.export``."""
    return size.clamp(max=limit) if isinstance(size, Tensor) else torch.sym_min(size, limit)
