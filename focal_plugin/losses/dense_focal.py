"""The focal loss over all of a dense detector's logits: loss and gradient in one pass, without a copy of the logits."""

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import dense_focal_torch

try:
    from . import dense_focal_triton
except ImportError:  # PyTorch for CPUs, for Windows and for macOS comes without Triton
    dense_focal_triton = None

# What stored gradients are multiplied by until backward knows their factor. float16 ends at 6e-8, which is where the
# gradients of easy negatives begin; no gradient of the focal loss of one logit comes near 2^16 / 2^12.
_HEADROOM = {torch.float16: 2.0**12}


def dense_focal_loss(
    logits: Sequence[Tensor],
    labels: Sequence[Tensor],
    alpha: float | Sequence[float] | Tensor = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """The sum of FL(p_t) = −α_t (1 − p_t)^γ log p_t (equation 5) over all anchors and classes that are not ignored.

    It is ``sigmoid_focal_loss`` on one-hot targets, without the targets: one pass reads the logits where they lie and
    writes their gradient; backward only multiplies. On a GPU that is one Triton kernel a level. On a CPU, and where
    there is no Triton, it is plain PyTorch: blocks that stay in cache, on as many threads as
    ``torch.get_num_threads()``, the few positives and the ignored anchors dealt with by index.

    Args:
        logits: one (N, A, K, H, W) tensor a level, all of one dtype (float16, bfloat16, float32 or float64) and on one
            device. Any strides: a head's (N, A·K, H, W) output as a view, channels first or last. The sizes may be 0.
        labels: one (N, A, H, W) int64 tensor a level: a class in [0, K), K for background, −1 for an ignored anchor.
        alpha: the weight of the positives in [0, 1], 1 − alpha being the negatives'; −1 leaves both at 1. Or one such
            weight a class, each in [0, 1].
        gamma: the focusing parameter γ ≥ 0.

    Returns:
        A scalar in float32 (float64 for float64 logits), differentiable once with respect to the logits. The gradient
        has the logits' dtype, and is finite for every γ.

    Raises:
        TypeError: a dtype other than those above, or levels of several dtypes.
        ValueError: no level; shapes or devices of logits and labels that don't fit; alpha or gamma outside their range;
            on the CPU, a label outside [−1, K]. On a GPU nobody looks at the labels, nor at an alpha that lives there,
            for that would wait for it: a label > K then counts as background, one < −1 as ignored.
        RuntimeError: from backward with ``create_graph=True``: there is no second derivative.
    """
    logits, labels = list(logits), list(labels)
    _check_levels(logits, labels)
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma is {gamma}; expected a finite number ≥ 0.")
    alpha = _check_alpha(alpha, logits[0])
    if torch.is_grad_enabled() and any(level.requires_grad for level in logits):
        return _DenseFocalLoss.apply(labels, alpha, float(gamma), *logits)
    return _backend(logits[0]).loss_and_gradients(logits, labels, alpha, float(gamma), [False] * len(logits), 1.0)[0]


class _DenseFocalLoss(torch.autograd.Function):
    """Forward writes the gradients, and backward hands them out times its factor."""

    @staticmethod
    def forward(ctx, labels: list[Tensor], alpha: float | Tensor, gamma: float, *logits: Tensor) -> Tensor:
        ctx.headroom = _HEADROOM.get(logits[0].dtype, 1.0)
        ctx.backend, needed = _backend(logits[0]), ctx.needs_input_grad[3:]
        loss, gradients = ctx.backend.loss_and_gradients(logits, labels, alpha, gamma, needed, ctx.headroom)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "dense_focal_loss has no second derivative, which create_graph=True asks for; use "
                "focal_plugin.losses.functional.sigmoid_focal_loss on one-hot targets where one is needed."
            )
        gradients = list(ctx.saved_tensors)
        if _graph_is_kept():  # for another backward, which will want them as they are
            gradients = [None if gradient is None else gradient.clone() for gradient in gradients]
        ctx.backend.scale_([gradient for gradient in gradients if gradient is not None], grad_output / ctx.headroom)
        return None, None, None, *gradients


def _graph_is_kept() -> bool:
    """Whether the running backward was called with ``retain_graph=True``; True where PyTorch does not tell."""
    tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return tell is None or tell()


def _backend(logits: Tensor) -> ModuleType:
    """The module that computes on the logits' device."""
    return dense_focal_triton if logits.is_cuda and dense_focal_triton is not None else dense_focal_torch


def _check_levels(logits: list[Tensor], labels: list[Tensor]) -> None:
    if not logits or len(logits) != len(labels):
        raise ValueError(
            f"{len(logits)} levels of logits and {len(labels)} of labels; expected as many, and at least 1."
        )
    for i, (level, codes) in enumerate(zip(logits, labels)):
        if level.ndim != 5 or codes.shape != (*level.shape[:2], *level.shape[3:]):
            raise ValueError(
                f"Level {i} has logits of shape {tuple(level.shape)} and labels of shape {tuple(codes.shape)}; "
                "expected (N, A, K, H, W) and (N, A, H, W)."
            )
        if level.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(f"Level {i} has logits of {level.dtype}; expected float16, bfloat16, float32 or float64.")
        if level.dtype != logits[0].dtype or level.shape[2] != logits[0].shape[2]:
            raise TypeError(
                f"Level {i} has {level.shape[2]} classes of {level.dtype} and level 0 {logits[0].shape[2]} of "
                f"{logits[0].dtype}; expected the same on all levels."
            )
        if codes.dtype != torch.int64:
            raise TypeError(f"Level {i} has labels of {codes.dtype}; expected int64.")
        if not level.device == codes.device == logits[0].device:
            raise ValueError(
                f"Level {i} is on {level.device}, its labels on {codes.device}; level 0 on {logits[0].device}."
            )


def _check_alpha(alpha: float | Sequence[float] | Tensor, logits: Tensor) -> float | Tensor:
    """A number, or a (K,) tensor on the logits' device in the dtype to compute in."""
    if isinstance(alpha, (int, float)):
        if not (alpha == -1 or 0 <= alpha <= 1):
            raise ValueError(
                f"alpha is {alpha}; expected a number in [0, 1], -1 for no weighting, or one number a class."
            )
        return float(alpha)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    alpha = torch.as_tensor(alpha, dtype=dtype).detach()
    num_classes = logits.shape[2]
    if alpha.shape != (num_classes,):
        raise ValueError(f"alpha has shape {tuple(alpha.shape)}; expected a number, or ({num_classes},): one a class.")
    if alpha.device.type == "cpu" and not ((alpha >= 0) & (alpha <= 1)).all():
        raise ValueError(f"alpha is {alpha.tolist()}; expected numbers in [0, 1].")
    return alpha.to(logits.device, non_blocking=True)
