"""The images of a batch as the network's input, without a wait for the GPU and in few launches."""

from typing import Any

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList


def batch_images(model: DenseDetector, batched_inputs: list[dict[str, Any]]) -> ImageList:
    """Return what ``DenseDetector.preprocess_image`` does, bit for bit; it can replace that method in a class.

    Detectron2 normalises image by image and waits for each to be copied to the GPU. This copies asynchronously (where
    the images are in pinned memory) and normalises all images at once.

    Args:
        model: has ``pixel_mean`` and ``pixel_std`` (C, 1, 1), and a ``backbone`` that says how it wants images padded.
        batched_inputs: each has an ``image``, (C, H, W), of any dtype and on any device.

    Returns:
        The normalised images (N, C, H', W') on the model's device, padded with zeros below and on the right.
    """
    if torch.jit.is_tracing():  # Detectron2's traces the sizes too
        return DenseDetector.preprocess_image(model, batched_inputs)
    mean, std, device = model.pixel_mean, model.pixel_std, model.device
    to_gpu = device.type == "cuda"  # the other way, the host has to wait
    images = [image["image"].to(device, non_blocking=to_gpu) for image in batched_inputs]
    sizes = [(image.shape[-2], image.shape[-1]) for image in images]
    height, width = padded_size(sizes, model.backbone.size_divisibility, model.backbone.padding_constraints)
    batch = mean.new_empty((len(images), len(mean), height, width), dtype=torch.result_type(images[0], mean))
    batch.copy_(mean)  # what is left of it is padding, and becomes 0
    for i, (image, (h, w)) in enumerate(zip(images, sizes)):
        batch[i, :, :h, :w] = image
    return ImageList(batch.sub_(mean).div_(std), sizes)


def padded_size(
    sizes: list[tuple[int, int]], divisibility: int, constraints: dict[str, int] | None = None
) -> tuple[int, int]:
    """Return the (height, width) that ``ImageList.from_tensors`` pads images of these ``sizes`` to.

    Args:
        sizes: (height, width) of each image.
        divisibility: both sides become multiples of it; 0 or 1 leaves them.
        constraints: a backbone's ``padding_constraints``: ``square_size`` and ``size_divisibility`` replace the above.
    """
    constraints = constraints or {}
    divisor = max(constraints.get("size_divisibility", divisibility), 1)
    square = constraints.get("square_size", 0)
    height, width = (square, square) if square > 0 else (max(h for h, _ in sizes), max(w for _, w in sizes))
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor
