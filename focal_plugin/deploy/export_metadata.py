"""What an exported file says of itself: the names of its outputs, and its metadata."""

from typing import Any

from detectron2.config import CfgNode
from torch import nn

from ..anchors.foreign import TorchvisionAnchorGenerator
from ..retinanet import FocalRetinaNet
from .export_graph import ImageInput
from .loading import class_metadata


def output_names(model: FocalRetinaNet, raw: bool, batch: bool) -> list[str]:
    """Return the names of an exported model's outputs."""
    if not raw:
        return ["boxes", "scores", "classes", *["counts"] * batch]
    return [f"{kind}_{level}" for kind in ("logits", "deltas") for level in model.head_in_features]


def describe(cfg: CfgNode, model: FocalRetinaNet, raw: bool, image_input: ImageInput, precision: str) -> dict[str, Any]:
    """Return the metadata of an exported model: what one needs to know to use it."""
    about = {
        "input_format": cfg.INPUT.FORMAT,
        "input_layout": image_input.layout,
        "input_dtype": image_input.dtype,
        "batch": image_input.batch,
        "precision": precision,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "pixel_mean": model.pixel_mean.flatten().tolist(),
        "classes": class_metadata(cfg, model).get("thing_classes") or [str(i) for i in range(model.num_classes)],
    }
    return about | (_describe_decoding(model) if raw else {})


def _describe_decoding(model: FocalRetinaNet) -> dict[str, Any]:
    """What turns logits and deltas into detections."""
    return _describe_anchors(model.anchor_generator) | {
        "bbox_reg_weights": list(model.box2box_transform.weights),
        "scale_clamp": model.box2box_transform.scale_clamp,
        "score_thresh": model.test_score_thresh,
        "topk_candidates": model.test_topk_candidates,
        "nms_thresh": model.test_nms_thresh,
        "detections_per_image": model.max_detections_per_image,
    }


def _describe_anchors(generator: nn.Module) -> dict[str, Any]:
    if isinstance(generator, TorchvisionAnchorGenerator):
        return {"first_stride": generator.first_stride, "cell_anchors": [cell.tolist() for cell in generator.shapes]}
    return {
        "strides": list(generator.strides),
        "cell_anchors": [cell.tolist() for cell in generator.cell_anchors],  # around (0, 0)
        "anchor_offset": generator.offset,
    }
