"""The focal loss over all logits of a dense detector, without a copy of them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import dense_focal_torch
from .functional import GAMMA, checked_alpha

try:
    from ..kernels import dense_focal_triton
except ImportError:  # PyTorch for CPUs, for Windows and for macOS comes without Triton
    dense_focal_triton = None  # type: ignore[assignment]

# Forward stores gradients times this, and backward divides by it: in float16, gradients of easy negatives would be 0,
# because they are smaller than 6e-8, its least number. None is near 2^16 / 2^12, above which the product overflows.
_HEADROOM = {torch.float16: 2.0**12}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def dense_focal_loss(
    logits: Sequence[Tensor],
    labels: Sequence[Tensor],
    alpha: float | Sequence[float] | Tensor = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """Sum of FL(p_t) = −α_t (1 − p_t)^γ log p_t (equation 5) over all classes of all anchors that are not ignored.

    This is the sum of ``sigmoid_focal_loss`` with one-hot targets, but neither targets nor a copy of the logits are
    made. On a GPU one Triton kernel computes the loss of all levels, and another their gradients in backward. On a CPU,
    or without Triton, forward computes the loss and the gradients in plain PyTorch: block by block, each block in
    cache, on ``torch.get_num_threads()`` threads.

    Args:
        logits: one (N, A, K, H, W) tensor a level, all of one dtype (float16, bfloat16, float32 or float64) and on one
            device. Any strides: a head's (N, A·K, H, W) output as a view, channels first or last. The sizes may be 0.
        labels: one (N, A, H, W) int64 tensor a level: a class in [0, K), K for background, −1 for an ignored anchor.
        alpha: the weight of the positives in [0, 1], 1 − alpha being the negatives'; −1 leaves both at 1. Or (K,), one
            weight in [0, 1] a class.
        gamma: the focusing parameter γ ≥ 0.

    Returns:
        A scalar in float32 (float64 for float64 logits), differentiable once with respect to the logits. The gradient
        has the logits' dtype and is finite for every γ.

    Raises:
        TypeError, ValueError: an argument is not as above, or two do not fit together. Values on a GPU are not checked,
            because that synchronises: there, a label > K counts as background and one < −1 as ignored.
        RuntimeError: in backward with ``create_graph=True``, because there is no second derivative.
    """
    logits, labels = list(logits), list(labels)
    _check_levels(logits, labels)
    gamma, alpha = float(GAMMA.check(gamma, "gamma")), checked_alpha(alpha)
    if isinstance(alpha, Tensor):
        num_classes, dtype = logits[0].shape[2], torch.promote_types(logits[0].dtype, torch.float32)
        if alpha.shape != (num_classes,):
            raise ValueError(f"alpha has shape {tuple(alpha.shape)}; expected a number, or ({num_classes},).")
        alpha = alpha.detach().to(dtype).to(logits[0].device, non_blocking=True)
    # Two ways to the same numbers: on a GPU memory traffic is what costs, on a CPU the exponentials and logarithms.
    function = _OnGPU if _uses_triton(logits[0]) else _InBlocks
    return function.apply(labels, alpha, gamma, *logits)


class _OnGPU(torch.autograd.Function):
    """Compute the gradients in backward, from the logits, which the network keeps anyway."""

    @staticmethod
    def forward(ctx: Any, labels: list[Tensor], alpha: float | Tensor, gamma: float, *logits: Tensor) -> Tensor:
        ctx.labels, ctx.alpha, ctx.gamma = labels, alpha, gamma
        ctx.save_for_backward(*(level if need else None for level, need in zip(logits, ctx.needs_input_grad[3:])))
        return dense_focal_triton.loss(logits, labels, alpha, gamma)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        needed, arguments = ctx.needs_input_grad[3:], (ctx.saved_tensors, ctx.labels, ctx.alpha, ctx.gamma)
        return None, None, None, *dense_focal_triton.gradients(*arguments, needed, grad_output)


class _InBlocks(torch.autograd.Function):
    """Compute the gradients in forward, while the logits are in cache, and scale them in backward."""

    @staticmethod
    def forward(ctx: Any, labels: list[Tensor], alpha: float | Tensor, gamma: float, *logits: Tensor) -> Tensor:
        # Elsewhere a power of 2 near 1/γ, which is exact: γ times the largest logits would be infinite.
        ctx.headroom = _HEADROOM.get(logits[0].dtype, 2.0 ** -math.ceil(math.log2(gamma)) if gamma else 1.0)
        needed = ctx.needs_input_grad[3:]
        loss, gradients = dense_focal_torch.loss_and_gradients(logits, labels, alpha, gamma, needed, ctx.headroom)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        gradients = list(ctx.saved_tensors)
        if _graph_is_kept():  # a second backward may follow and needs them unscaled
            gradients = [None if gradient is None else gradient.clone() for gradient in gradients]
        dense_focal_torch.scale_([each for each in gradients if each is not None], grad_output / ctx.headroom)
        return None, None, None, *gradients


def _graph_is_kept() -> bool:
    """Return whether the running backward has ``retain_graph=True``; True if this PyTorch cannot tell."""
    keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keep_graph is None or keep_graph()


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "dense_focal_loss has no second derivative, which create_graph=True asks for; use "
            "focal_plugin.losses.functional.sigmoid_focal_loss on one-hot targets where one is needed."
        )


def _uses_triton(logits: Tensor) -> bool:
    return logits.is_cuda and dense_focal_triton is not None


def _check_levels(logits: list[Tensor], labels: list[Tensor]) -> None:
    if not logits or len(logits) != len(labels):
        raise ValueError(f"{len(logits)} levels of logits and {len(labels)} of labels; expected as many, at least 1.")
    first = logits[0]
    for i, (level, target) in enumerate(zip(logits, labels)):
        if level.ndim != 5 or target.shape != (*level.shape[:2], *level.shape[3:]):
            raise ValueError(
                f"Level {i} has logits of shape {tuple(level.shape)} and labels of shape {tuple(target.shape)}; "
                "expected (N, A, K, H, W) and (N, A, H, W)."
            )
        if level.dtype not in _DTYPES or target.dtype != torch.int64:
            found = f"Level {i} has logits of {level.dtype} and labels of {target.dtype}"
            raise TypeError(f"{found}; expected float16, bfloat16, float32 or float64, and int64.")
        if level.dtype != first.dtype or level.shape[2] != first.shape[2]:
            found = f"Level {i} has {level.shape[2]} classes of {level.dtype}"
            raise TypeError(f"{found}; expected {first.shape[2]} of {first.dtype}, as level 0 has.")
        if not level.device == target.device == first.device:
            found = f"Level {i} is on {level.device}, its labels on {target.device}"
            raise ValueError(f"{found}; expected both on {first.device}, as level 0.")
