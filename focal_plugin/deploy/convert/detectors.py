"""Converts RetinaNets of torchvision, MMDetection and Detectron."""

import re
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from torch import Tensor

from ...files.safe_load import load_zoo
from .backbones import BASE, NORM_EPS, RGB, match_norm_eps, resnet_settings
from .files import Converted, ConvertError, check_complete, find_weights, merge, read_content
from .names import (
    BOTTOM_UP,
    COUNTERS,
    DETECTRON1_IGNORED,
    DETECTRON1_RULES,
    mmdetection_rules,
    rename,
    torchvision_rules,
)

_SIZES, _RATIOS = 3, 3  # of the anchors of a location
_A = _SIZES * _RATIOS
_COCO_ROWS = 91  # of torchvision's classifier: COCO's category ids up to 90, also the unused ones and 0

_CLIPPED = {"MODEL": {"FOCAL": {"INFERENCE": {"CLIP_BEFORE_NMS": True}}}}


def convert_torchvision(path: str, classes: str = "", norm_eps: float | None = None) -> Converted:
    """Convert torchvision's ``retinanet_resnet50_fpn`` or ``_v2``, or its ``RetinaNet`` on another ResNet.

    Args:
        path: a file with its ``state_dict``.
        classes: the classifier's rows to keep: "all", or "coco", those of COCO's 80 classes among 91; empty, "coco" if
            there are 91.
        norm_eps: ε of the backbone's norms, which is not in the file; None, torchvision's: 0 for frozen norms and 91
            rows, as in its COCO weights of v1, otherwise 1e-5.
    """
    found = find_weights(read_content(path), path)
    is_v2 = "head.classification_head.conv.0.1.weight" in found
    is_frozen = not any(name.endswith("num_batches_tracked") for name in found)
    weights = rename(found, torchvision_rules(is_v2), COUNTERS)
    rows = _num_classes(weights)
    classes = classes or ("coco" if rows == _COCO_ROWS else "all")
    if norm_eps is None:
        norm_eps = 0.0 if is_frozen and rows == _COCO_ROWS and not is_v2 else NORM_EPS
    weights = _sizes_outside(match_norm_eps(weights, norm_eps))
    if classes == "coco":
        weights = _keep_classes(weights, _coco_ids(rows))
    settings = {
        "MODEL": {
            "RESNETS": resnet_settings(weights, BOTTOM_UP),
            "FOCAL": {"TOP_BLOCK": _top_block(weights)},
            "ANCHOR_GENERATOR": {
                "NAME": "TorchvisionAnchorGenerator",
                "SIZES": [[x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))] for x in (32, 64, 128, 256, 512)],
            },
        },
        "TEST": {"DETECTIONS_PER_IMAGE": 300},
    }
    if is_v2:
        weights = _with_conv_biases(weights)
        settings = merge(settings, {"MODEL": {"RETINANET": {"NORM": "GN", "BBOX_REG_LOSS_TYPE": "giou"}}})
    notes = [
        f"The backbone's norms have an ε of {norm_eps:g} (--norm-eps sets another).",
        "Scores of resized images differ a little: torchvision resizes with PyTorch, Detectron2 with PIL.",
    ]
    if classes == "coco":
        notes.append(f"Of the classifier's {rows} rows, COCO's 80 classes are kept (--classes all keeps all).")
    return _finish(weights, [RGB, _CLIPPED, settings], notes)


def convert_mmdetection(path: str, style: str = "") -> Converted:
    """Convert MMDetection's ``RetinaNet`` of a ``ResNet`` or ``ResNeXt``, an ``FPN`` and a ``RetinaHead``.

    Args:
        path: a checkpoint.
        style: of its ResNet, "pytorch" or "caffe"; empty, that in the checkpoint's config.
    """
    content = read_content(path)
    meta = content.get("meta") if isinstance(content.get("meta"), dict) else {}
    if not style:
        config = str(meta.get("cfg") or meta.get("config") or "")
        match = re.search(r"""style['"]?\s*[=:]\s*['"](pytorch|caffe)['"]""", config)
        if match is None:
            raise ConvertError(
                f"{path} has no config with the style of its ResNet. Expected --style caffe if its config's name has "
                "'caffe', else --style pytorch: they differ in strides, colour order and pixel statistics."
            )
        style = match[1]
    found, left_out = _without_ema(find_weights(content, path))
    has_norm = "bbox_head.cls_convs.0.gn.weight" in found
    weights = _sizes_outside(rename(found, mmdetection_rules(has_norm), COUNTERS))
    weights = match_norm_eps(weights, NORM_EPS)
    settings = {
        "MODEL": {
            "RESNETS": resnet_settings(weights, BOTTOM_UP, stride_in_1x1=style == "caffe"),
            "FOCAL": {"TOP_BLOCK": f"{_top_block(weights)}-linear"},
        }
    }
    if has_norm:
        weights = _with_conv_biases(weights)
        settings = merge(settings, {"MODEL": {"RETINANET": {"NORM": "GN"}}})
    notes = [f"Strides, colour order and pixel statistics are those of ResNets of style {style}."]
    if left_out:
        notes.append(f"Its {left_out} buffers ema_* are left out: MMDetection evaluates the weights with plain names.")
    if str(meta.get("mmdet_version", "2")).startswith(("0.", "1.")):
        notes.append(
            f"Boxes differ by about a pixel: MMDetection {meta['mmdet_version']} rounded anchors and shifted them by "
            "half a pixel."
        )
    pixels = RGB if style == "pytorch" else {}  # Detectron2's defaults are those of caffe models
    return _finish(weights, [pixels, _CLIPPED, settings], notes)


def _without_ema(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The weights without the buffers of MMDetection 2.x's ``EMAHook``, and the number of these buffers.

    An example is ema_backbone_conv1_weight beside backbone.conv1.weight. During an epoch, the buffers are the averages;
    after it, the hook swaps both, so that the weights with plain names, in a checkpoint, are the averages.
    """
    buffers = {f"ema_{name.replace('.', '_')}" for name in weights} & weights.keys()
    return {name: value for name, value in weights.items() if name not in buffers}, len(buffers)


def convert_detectron1(path: str) -> Converted:
    """Convert Detectron's RetinaNet of a ResNet or ResNeXt, with sigmoid outputs.

    Args:
        path: a ``.pkl`` of its blobs.
    """
    content = load_zoo(path)
    weights = rename(find_weights(content["model"], path), DETECTRON1_RULES, DETECTRON1_IGNORED)
    weights = match_norm_eps(weights, eps=0.0)  # affine layers in place of norms
    first = weights.get(f"{BOTTOM_UP}res2.0.conv2.weight")
    is_resnext = first is not None and first.shape[0] != first.shape[1]
    settings = {
        "MODEL": {
            "PIXEL_MEAN": [102.9801, 115.9465, 122.7717],
            "RESNETS": resnet_settings(weights, BOTTOM_UP, stride_in_1x1=not is_resnext),
            "ANCHOR_GENERATOR": {"NAME": "Detectron1AnchorGenerator", "OFFSET": 0.5},
        }
    }
    notes = [
        "Scores near the right and lower border differ a little: Detectron pads images to multiples of 128 pixels, "
        "Detectron2 to multiples of 32. Detectron also keeps detections of any score on P7."
    ]
    return _finish(weights, [_CLIPPED, settings], notes)


def _finish(weights: dict[str, Tensor], settings: list[dict[str, Any]], notes: list[str]) -> Converted:
    """Merge ``settings``, in order, into those of all RetinaNets, and check the weights against the config's model."""
    num_classes = _num_classes(weights)
    merged = merge(BASE, {"MODEL": {"RETINANET": {"NUM_CLASSES": num_classes}}})
    for more in settings:
        merged = merge(merged, more)
    channels = weights["head.bbox_pred.weight"].shape[1]
    if channels != 256:
        merged = merge(merged, {"MODEL": {"FPN": {"OUT_CHANNELS": channels}}})
    layers = 3 if merged["MODEL"]["RETINANET"].get("NORM") else 2
    convs = sum(bool(re.fullmatch(r"head\.cls_subnet\.\d+\.weight", n)) for n in weights) // (layers - 1)
    if convs != 4:
        merged = merge(merged, {"MODEL": {"RETINANET": {"NUM_CONVS": convs}}})
    if num_classes != 80:  # not COCO
        merged = merge(merged, {"DATASETS": {"TRAIN": [], "TEST": []}})
        notes.append(f"Set DATASETS.TRAIN and DATASETS.TEST to data of its {num_classes} classes.")
    converted = Converted(weights, merged, notes)
    check_complete(weights, build_model(converted.cfg))
    return converted


def _num_classes(weights: dict[str, Tensor]) -> int:
    """The number of classes of a head with nine anchors a location.

    Raises:
        ConvertError: there are no weights of such a head.
    """
    missing = [name for name in ("head.cls_score.bias", "head.bbox_pred.bias") if name not in weights]
    if missing:
        raise ConvertError(f"There are no weights for {' and '.join(missing)}: this is no RetinaNet.")
    rows, deltas = len(weights["head.cls_score.bias"]), len(weights["head.bbox_pred.bias"])
    if deltas != 4 * _A or rows % _A:
        raise ConvertError(
            f"The head has {deltas} deltas and {rows} logits a location; expected {4 * _A} and a multiple of {_A}, for "
            f"{_A} anchors ({_SIZES} sizes, {_RATIOS} aspect ratios)."
        )
    return rows // _A


def _rows(weights: dict[str, Tensor], layer: str) -> list[str]:
    return [f"head.{layer}.{part}" for part in ("weight", "bias") if f"head.{layer}.{part}" in weights]


def _sizes_outside(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reorder the predictors' rows from anchors by (ratio, size) to Detectron2's order, by (size, ratio)."""
    weights = dict(weights)
    for name in (*_rows(weights, "cls_score"), *_rows(weights, "bbox_pred")):
        rows = weights[name].unflatten(0, (_RATIOS, _SIZES, -1))  # (ratios, sizes, K or 4, ...)
        weights[name] = rows.transpose(0, 1).flatten(0, 2).clone()
    return weights


def _keep_classes(weights: dict[str, Tensor], classes: list[int]) -> dict[str, Tensor]:
    """Keep the classifier's rows of these classes, for each anchor."""
    weights = dict(weights)
    for name in _rows(weights, "cls_score"):
        weights[name] = weights[name].unflatten(0, (_A, -1))[:, classes].flatten(0, 1).clone()
    return weights


def _coco_ids(rows: int) -> list[int]:
    ids = sorted(MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id)
    if rows != _COCO_ROWS:
        raise ConvertError(
            f"--classes coco: the classifier has {rows} rows; expected {_COCO_ROWS}, for COCO's category ids 0 to 90."
        )
    return ids


def _top_block(weights: dict[str, Tensor]) -> str:
    """Return what P6 is computed from: "c5", or "p5", also if both have the same number of channels."""
    p6, lateral = weights.get("backbone.top_block.p6.weight"), weights.get("backbone.fpn_lateral5.weight")
    if p6 is None or lateral is None:
        raise ConvertError("There are no weights for P6, or for C5 in the pyramid: this is no RetinaNet on P3 to P7.")
    return "p5" if p6.shape[1] == p6.shape[0] else "c5"


def _with_conv_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add biases of 0 to the subnets' convolutions, which have none before a norm."""
    result = dict(weights)
    for name, weight in weights.items():
        if re.fullmatch(r"head\.\w+_subnet\.\d+\.weight", name) and weight.ndim == 4:
            result.setdefault(name.removesuffix("weight") + "bias", torch.zeros(len(weight)))
    return result
