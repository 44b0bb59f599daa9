"""From candidates to detections on a GPU, for all images of a batch at once, read once by the host.

Everything is padded: an image has as many rows as any, and those of detections that it does not have are never looked
at. So shapes depend on nothing that only the GPU knows, nothing waits for it, and a CUDA graph can hold it all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

try:
    from . import nms_triton
except ImportError:  # PyTorch for CPUs, for Windows and for macOS comes without Triton
    nms_triton = None  # type: ignore[assignment]

_NOT_FINITE = -1  # for a number of detections


def is_stock(model: Any, base: type) -> bool:
    """Whether ``model``, a ``base`` or of a subclass, turns a head's outputs into detections as ``base`` does."""
    return all(getattr(type(model), name) is getattr(base, name) for name in ("candidates", "forward_inference"))


def is_usable(model: Any, base: type) -> bool:
    """Whether ``forward`` can do the inference of ``model``: of a subclass only if it ``is_stock``."""
    is_on_gpu = model.device.type == "cuda" and nms_triton is not None
    return is_on_gpu and is_stock(model, base) and not torch.jit.is_tracing()


def forward(model: Any, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Do what a FocalRetinaNet's ``forward`` does in inference, on a GPU. Only ``to_instances`` reads back."""
    images = model.preprocess_image(batched_inputs)
    sizes = [(x.get("height", h), x.get("width", w)) for x, (h, w) in zip(batched_inputs, images.image_sizes)]
    placed = frames(images.image_sizes, sizes).to(images.tensor.device, non_blocking=True)
    rows, counts = model.detect(images.tensor, placed)
    return [{"instances": found} for found in to_instances(rows, counts, sizes)]


def frames(network_sizes: Sequence[tuple[int, int]], sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Describe where each image's detections are, and where they are wanted.

    Args:
        network_sizes: (height, width) of each image as the network sees it, without padding.
        sizes: (height, width) of each image as it was.

    Returns:
        (N, 6) float32 on the CPU: the network's width and height, the image's, and the factors from one to the other.
    """
    pairs = zip(network_sizes, sizes, strict=True)
    return torch.tensor([(w, h, width, height, width / w, height / h) for (h, w), (height, width) in pairs])


def detections(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    frames: Tensor,
    *,
    iou_thresh: float,
    max_detections: int,
    clip: bool = False,
) -> tuple[Tensor, Tensor]:
    """Suppress, scale and clip, as ``inference.suppress`` and then Detectron2's ``detector_postprocess`` do.

    Args:
        boxes: (N, C, 4) float32. scores: (N, C) float32, −∞ where there is no candidate. classes: (N, C).
        frames: (N, 6), what ``frames`` returns, on the boxes' device.
        iou_thresh, max_detections, clip: see ``inference.suppress``.

    Returns:
        (N, D, 6) float32: the box, the score and the class of each detection, best first.
        (N,) int32: their numbers; −1 for an image with a box that is not finite. ``to_instances`` reads both.
    """
    if clip:
        boxes = _clipped(boxes, frames[:, :2])
    rows = torch.cat([boxes, scores[..., None], classes[..., None].to(boxes.dtype)], dim=2)  # (N, C, 6)
    rows = _take(rows, scores.sort(dim=1, descending=True, stable=True).indices)
    keep, counts = nms_triton.batched_nms(rows, iou_thresh, max_detections)  # (N, D), (N,)
    rows = _take(rows, keep)

    boxes = rows[..., :4] * frames[:, None, 4:].repeat(1, 1, 2)
    exists = torch.arange(keep.shape[1], device=keep.device) < counts[:, None]  # (N, D)
    is_finite = (boxes.isfinite().all(2) | ~exists).all(1)  # (N,)
    boxes = _clipped(boxes, frames[:, 2:4])
    exists &= (boxes[..., 2:] > boxes[..., :2]).all(2)  # boxes outside of the image have no area left
    rows = _take(torch.cat([boxes, rows[..., 4:]], dim=2), (~exists).int().sort(dim=1, stable=True).indices)
    return rows, exists.sum(1, dtype=torch.int32).masked_fill(~is_finite, _NOT_FINITE)


def to_instances(rows: Tensor, counts: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Instances]:
    """Return each image's detections, on the GPU. Waits for it, once, to read their numbers.

    Args:
        rows, counts: what ``detections`` returned.
        sizes: (height, width) of each image.

    Raises:
        AssertionError: a box is not finite; Detectron2 raises the same.
    """
    boxes, scores, classes = rows[..., :4].contiguous(), rows[..., 4].contiguous(), rows[..., 5].long()
    found = []
    for i, (count, size) in enumerate(zip(counts.tolist(), sizes, strict=True)):
        assert count != _NOT_FINITE, "Box tensor contains infinite or NaN!"
        this = Instances(size, pred_boxes=Boxes(boxes[i, :count]), scores=scores[i, :count])
        this.pred_classes = classes[i, :count]
        found.append(this)
    return found


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """The rows (N, D, 6) of (N, C, 6) at ``index`` (N, D)."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))


def _clipped(boxes: Tensor, size: Tensor) -> Tensor:
    """``boxes`` (N, C, 4) inside images of ``size`` (N, 2): width and height."""
    return boxes.clamp(min=0).minimum(size[:, None].repeat(1, 1, 2))
