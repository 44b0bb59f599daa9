"""Checks that components keep the contracts of ``registry.py``. Unchecked, a mistake may show as a lower AP alone.

Each check raises a TypeError or a ValueError that names the component, what it gave and what was expected. Shapes and
dtypes are known on the host and checked in every step. Values are checked once: reading them synchronises a GPU.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from .structures import IGNORED, NEGATIVE, POSITIVE, DenseTargets

_HEAD, _CLS_LOSS = "MODEL.FOCAL.HEAD.NAME: The head", "MODEL.FOCAL.CLS_LOSS.NAME: The class loss"


def check_head(
    head: Callable[..., Any], outputs: Any, shapes: Sequence[Sequence[int]], classes: int, positives: int | None = None
) -> None:
    """Check that ``outputs`` are logits and deltas of all anchors; if ``positives`` is given, deltas of these alone.

    ``shapes`` are (N, A, H, W) of each level: images, anchors of a cell, height and width. ``classes`` is K.
    """
    if not isinstance(outputs, (tuple, list)) or len(outputs) != 2:
        raise TypeError(f"{_HEAD} {_name(head)} gave {_describe(outputs)}; expected (logits, deltas).")
    logits, deltas = outputs
    _check_levels(head, "logits", logits, shapes, classes, "K classes (background has no channel)")
    if positives is None:
        _check_levels(head, "deltas", deltas, shapes, 4, "4 deltas")
    elif not isinstance(deltas, Tensor) or deltas.shape != (positives, 4):
        raise ValueError(
            f"{_HEAD} {_name(head)} was given the targets, and gave deltas {_describe(deltas)}; expected those of the "
            f"positives alone, (P, 4) = {(positives, 4)}."
        )


def _check_levels(
    head: Callable[..., Any], what: str, levels: Any, shapes: Sequence[Sequence[int]], channels: int, names: str
) -> None:
    if isinstance(levels, Tensor) or not isinstance(levels, Sequence) or len(levels) != len(shapes):
        raise TypeError(
            f"{_HEAD} {_name(head)} gave {what} {_describe(levels)}; expected a list of {len(shapes)} tensors, one a "
            "level."
        )
    for i, (level, (n, a, h, w)) in enumerate(zip(levels, shapes)):
        if not isinstance(level, Tensor) or level.shape != (n, a * channels, h, w):
            raise ValueError(
                f"{_HEAD} {_name(head)} gave {what} {_describe(level)} on level {i}; expected "
                f"{(n, a * channels, h, w)}: N images, A = {a} anchors × {channels}, the {names}, height, width."
            )


def check_match(matcher: Callable[..., Any], match: Any, shape: tuple[int, ...], num_boxes: int = 0) -> None:
    """Check that each anchor has a box index and a label and, if ``num_boxes`` is given, that they are in range.

    ``shape`` is (R,), or (N, R) of ``match_batch``.
    """
    name = f"MODEL.FOCAL.MATCHER.NAME: The anchor matcher {_name(matcher)}"
    if not isinstance(match, (tuple, list)) or len(match) != 2:
        raise TypeError(f"{name} gave {_describe(match)}; expected (matched, labels).")
    for what, found, dtype in zip(("matched", "labels"), match, (torch.int64, torch.int8)):
        if not isinstance(found, Tensor) or found.dtype != dtype or found.shape != shape:
            raise TypeError(
                f"{name} gave {what} {_describe(found)}; expected {dtype} of shape {shape}, one for each anchor of all "
                "levels."
            )
    if not num_boxes:
        return
    matched, labels = match
    wrong = labels[(labels < IGNORED) | (labels > POSITIVE)]
    if len(wrong):
        raise ValueError(
            f"{name} gave the label {wrong[0].item()}; expected {IGNORED} (IGNORED), {NEGATIVE} (NEGATIVE) or "
            f"{POSITIVE} (POSITIVE)."
        )
    boxes = matched[labels == POSITIVE]
    wrong = boxes[(boxes < 0) | (boxes >= num_boxes)]
    if len(wrong):
        raise ValueError(
            f"{name} matched a positive anchor to box {wrong[0].item()}; expected the index of one of the image's "
            f"{num_boxes} boxes, counted from 0."
        )


def check_cls_loss(cls_loss: Callable[..., Any], loss: Any, logits: Sequence[Tensor], targets: DenseTargets) -> None:
    """Check that ``loss`` is a float32 scalar (float64 for float64 logits) and has a gradient."""
    what = f"{_CLS_LOSS} {_name(cls_loss)}"
    if not isinstance(loss, Tensor) or loss.shape != () or not _is_float32(loss, logits[0]):
        raise TypeError(
            f"{what} gave {_describe(loss)}; expected one number, torch.float32 of shape (): the sum over all anchors "
            "that are not ignored."
        )
    _check_gradient(what, loss, "logits", logits[0], targets)


def checked_elementwise(cls_loss: Callable[..., Any], loss: Any, logits: Tensor) -> Tensor:
    """Return ``loss``, the result of ``ElementwiseLoss.elementwise``, after checking that it has the logits' shape."""
    if not isinstance(loss, Tensor) or loss.shape != logits.shape:
        raise ValueError(
            f"{_CLS_LOSS} {_name(cls_loss)} gave {_describe(loss)} for logits of shape {tuple(logits.shape)}; "
            "expected a loss for each logit, of the same shape, neither summed nor averaged."
        )
    return loss


def check_box_loss(box_loss: Callable[..., Any], loss: Any, deltas: Tensor, targets: DenseTargets) -> None:
    """Check that ``loss`` is (P,) float32 (float64 for float64 deltas) and has a gradient."""
    what = f"MODEL.FOCAL.BOX_LOSS.NAME: The box loss {_name(box_loss)}"
    if not isinstance(loss, Tensor) or loss.shape != (len(deltas),) or not _is_float32(loss, deltas):
        raise TypeError(
            f"{what} gave {_describe(loss)}; expected one number a positive, torch.float32 of shape "
            f"{(len(deltas),)}, neither summed nor averaged."
        )
    _check_gradient(what, loss, "deltas", deltas, targets)


def _is_float32(loss: Tensor, predictions: Tensor) -> bool:
    return loss.dtype in (torch.float32, torch.promote_types(predictions.dtype, torch.float32))


def _check_gradient(what: str, loss: Tensor, name: str, predictions: Tensor, targets: DenseTargets) -> None:
    # Without positives a loss may be a constant, such as a sum over no anchors.
    if predictions.requires_grad and not loss.requires_grad and targets.num_positives:
        raise ValueError(
            f"{what} gave a loss without a gradient; expected one that is computed from the {name} by differentiable "
            "operations, without detach(), item() or torch.no_grad()."
        )


def fill_bias(bias_init: Callable[..., Any], classifier: nn.Module, num_anchors: int, num_classes: int) -> None:
    """Call a bias init on a conv or linear layer, and check that it filled the bias in place, with finite numbers."""
    expected = _describe(classifier.bias)
    given = bias_init(classifier, num_anchors, num_classes)
    bias, what = classifier.bias, f"MODEL.FOCAL.BIAS_INIT.NAME: The bias init {_name(bias_init)}"
    if given is not None and given is not bias:
        raise ValueError(
            f"{what} gave {_describe(given)}; expected nothing, and the classifier's bias filled in place."
        )
    if not isinstance(bias, Tensor) or _describe(bias) != expected or not bias.requires_grad:
        raise ValueError(f"{what} made the bias {_describe(bias)}; expected {expected} as before, with a gradient.")
    if not (bias.is_meta or is_fake(bias) or bias.isfinite().all()):  # the first two have no values to look at
        raise ValueError(f"{what} left a NaN or infinity in the bias; expected finite numbers.")


def _name(component: Callable[..., Any]) -> str:
    return getattr(component, "__name__", type(component).__name__)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}" if value is not None else "None"
