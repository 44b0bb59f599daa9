"""A picture of images from a data set, each beside itself: with its ground truth, and with what a detector finds."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.evaluation import inference_context
from detectron2.structures import BoxMode
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from torch import nn

from ..files.progress import progress
from .style import class_color

_DETECTED, _TRUTH = class_color(0), class_color(1)  # of a single class; of several, each has its colour on both sides
_MOST_LABELS = 15  # an image with more boxes than this has no labels, which would hide it


@dataclass(frozen=True)
class Sample:
    """An image with its ground truth and its detections; boxes are XYXY in pixels of the original image.

    Attributes:
        name: the image's file name.
        image: (H, W, 3) uint8 RGB, at the network's input size.
        size: (height, width) of the original.
        gt_boxes, gt_classes: (G, 4) and (G,).
        boxes, classes, scores: (D, 4), (D,) and (D,), of all detections.
    """

    name: str
    image: np.ndarray
    size: tuple[int, int]
    gt_boxes: np.ndarray
    gt_classes: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray


def sample_detections(
    model: nn.Module, loader, records: Sequence[dict], *, num_images: int, image_format: str
) -> list[Sample]:
    """Run ``model`` on images spread evenly over a data set, on those with boxes if there are any.

    Args:
        model: a Detectron2 detector, or one in DistributedDataParallel.
        loader: a Detectron2 test loader of the data set.
        records: the data set's records, in the loader's order.
        num_images: the number of images; all of them, if the data set has fewer.
        image_format: the channel order of the loader's images, as in ``INPUT.FORMAT``.
    """
    model = getattr(model, "module", model)
    candidates = [i for i, record in enumerate(records) if record.get("annotations")] or range(len(records))
    num_images = min(num_images, len(candidates))
    chosen = [candidates[i * len(candidates) // num_images] for i in range(num_images)]
    with inference_context(model), torch.no_grad():
        shown = progress(chosen, desc="Drawing detections")
        return [_sample(model, loader.dataset[i], records[i], image_format) for i in shown]


def _sample(model: nn.Module, inputs: dict, record: dict, image_format: str) -> Sample:
    found = model([inputs])[0]["instances"].to("cpu")
    annotations = [a for a in record.get("annotations", []) if not a.get("iscrowd", 0)]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    return Sample(
        name=os.path.basename(inputs.get("file_name", "")),
        image=convert_image_to_rgb(inputs["image"].permute(1, 2, 0), image_format).astype(np.uint8),  # (H, W, 3)
        size=(inputs["height"], inputs["width"]),
        gt_boxes=np.asarray(boxes, dtype=np.float32).reshape(-1, 4),
        gt_classes=np.asarray([a["category_id"] for a in annotations], dtype=np.int64),
        boxes=found.pred_boxes.tensor.numpy(),
        classes=found.pred_classes.numpy(),
        scores=found.scores.numpy(),
    )


def save_detections(
    path: str, samples: Sequence[Sample], class_names: Sequence[str] | None = None, *, score_thresh: float
) -> None:
    """Draw ``samples`` to the PNG ``path``: each image twice, with its ground truth and with its detections.

    Args:
        path: the PNG.
        samples: the images, at least one.
        class_names: the K class names; None, classes are numbered. A single class has a colour for the ground truth and
            one for the detections; several have a colour each.
        score_thresh: the lowest score of a detection to draw.
    """
    single = class_names is not None and len(class_names) == 1
    per_row = min(len(samples), 2)
    rows = math.ceil(len(samples) / per_row)
    height, width = samples[0].size
    figure = Figure(figsize=(6.4 * per_row, (3.2 * height / width + 0.3) * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, 2 * per_row, squeeze=False).reshape(-1, 2)
    for axis in axes.flat:
        axis.set_axis_off()
    legend: dict[int, str] = {}
    for sample, (left, right) in zip(samples, axes):
        shown = sample.scores >= score_thresh
        truth, found = sample.gt_classes, sample.classes[shown]
        legend |= {int(k): class_names[k] if class_names else f"class {k}" for k in (*truth, *found)}
        scores = [f"{score:.2f}" for score in sample.scores[shown]] if len(found) <= _MOST_LABELS else None
        _draw(left, sample, sample.gt_boxes, [_TRUTH] * len(truth) if single else map(class_color, truth))
        _draw(
            right, sample, sample.boxes[shown], [_DETECTED] * len(found) if single else map(class_color, found), scores
        )
        left.set_title(f"{len(truth)} in the ground truth", fontsize=8, loc="left")
        right.set_title(f"{len(found)} found (score ≥ {score_thresh:g})", fontsize=8, loc="left")
        left.text(0, -0.01, sample.name, transform=left.transAxes, va="top", fontsize=6, color="gray")
    if single:
        entries = {f"{class_names[0]}, ground truth": _TRUTH, f"{class_names[0]}, detected": _DETECTED}
    else:
        entries = {name: class_color(k) for k, name in sorted(legend.items())}
    if entries:
        handles = [Patch(facecolor=color, label=name) for name, color in entries.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 10), frameon=False)
    figure.savefig(path, dpi=110)


def _draw(
    axes: Axes, sample: Sample, boxes: np.ndarray, colors: Iterable[str], labels: Sequence[str] | None = None
) -> None:
    """Draw the image with (B, 4) boxes of B colours, and B labels if given."""
    height, width = sample.size
    axes.imshow(sample.image, extent=(0, width, height, 0))
    shadow = [withStroke(linewidth=2.4, foreground="black", alpha=0.35)]
    for i, ((x0, y0, x1, y1), color) in enumerate(zip(boxes, colors)):
        style = {"edgecolor": color, "linewidth": 1.4, "path_effects": shadow}
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **style))
        if labels is not None:
            plate = {"facecolor": color, "edgecolor": "none", "pad": 0.8}
            axes.text(x0, y0, labels[i], color="white", fontsize=5.5, va="bottom", bbox=plate, clip_on=True)
