"""The focal loss of "Focal Loss for Dense Object Detection" and its variant FL*, element by element."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = -1, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    """FL(p_t) = −α_t (1 − p_t)^γ log p_t, with p = σ(inputs) (equation 5).

    The signature is that of ``fvcore.nn.sigmoid_focal_loss``, and so are the values wherever fvcore's are finite. The
    gradient is finite for every γ. For the sum over all of a detector's logits, ``dense_focal_loss`` is faster by far.

    Args:
        inputs: logits x of any shape and floating dtype; float16 and bfloat16 are computed in float32.
        targets: of the same shape: 1 for the positive class, 0 for the negative, or a float in between (a soft target).
        alpha: the weight of the positives in [0, 1]; 1 − alpha is the negatives'. −1 leaves both at 1.
        gamma: the focusing parameter γ ≥ 0; 0 is the α-balanced cross entropy of equation 3.
        reduction: "none", "mean" or "sum".

    Returns:
        The loss in float32 (float64 for float64 inputs): of the shape of ``inputs``, or a scalar.

    Raises:
        TypeError: inputs that are not floating point.
        ValueError: shapes that differ; targets outside [0, 1] (looked at on the CPU only: a GPU would have to be waited
            for); alpha neither −1 nor in [0, 1]; gamma negative or not finite; an unknown reduction.
    """
    inputs, targets = _check(inputs, targets, alpha, reduction)
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma is {gamma}; expected a finite number ≥ 0.")
    positive, negative = F.logsigmoid(inputs), F.logsigmoid(-inputs)  # log p, log(1 − p)
    cross_entropy = -(targets * positive + (1 - targets) * negative)
    # 1 − p_t, with all its bits. Its power has no derivative at 0 for γ < 1, but near 0 the cross entropy is as small:
    # what the clamp changes is below the smallest float.
    wrongness = (1 - targets) * torch.sigmoid(inputs) + targets * torch.sigmoid(-inputs)
    loss = cross_entropy * wrongness.clamp(min=torch.finfo(inputs.dtype).tiny) ** gamma
    return _reduce(_balance(loss, targets, alpha), reduction)


def sigmoid_focal_loss_star(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = -1,
    gamma: float = 1,
    reduction: str = "none",
    *,
    beta: float = 0,
) -> Tensor:
    """FL* = −α_t log σ(γ x_t + β) / γ, with x_t = ± inputs (appendix A).

    The signature is that of ``fvcore.nn.sigmoid_focal_loss_star``, which has no β: there it is 0.

    Args:
        inputs: logits x of any shape and floating dtype; float16 and bfloat16 are computed in float32.
        targets: of the same shape: 1 for the positive class, 0 for the negative, or a float in between (x_t is then the
            inputs times 2·targets − 1).
        alpha: the weight of the positives in [0, 1]; 1 − alpha is the negatives'. −1 leaves both at 1.
        gamma: the steepness γ > 0; 1, with β = 0, is the cross entropy.
        reduction: "none", "mean" or "sum".
        beta: the shift β; the paper's (γ, β) are (2, 1) and (4, 0).

    Returns:
        The loss in float32 (float64 for float64 inputs): of the shape of ``inputs``, or a scalar.

    Raises:
        TypeError, ValueError: as ``sigmoid_focal_loss``; and gamma is 0, or beta is not finite.
    """
    inputs, targets = _check(inputs, targets, alpha, reduction)
    if not 0 < gamma < float("inf"):
        raise ValueError(f"gamma is {gamma}; expected a finite number > 0, for FL* divides by it.")
    if not abs(beta) < float("inf"):
        raise ValueError(f"beta is {beta}; expected a finite number.")
    loss = -F.logsigmoid(gamma * (inputs * (2 * targets - 1)) + beta) / gamma
    return _reduce(_balance(loss, targets, alpha), reduction)


def _check(inputs: Tensor, targets: Tensor, alpha: float, reduction: str) -> tuple[Tensor, Tensor]:
    """Both tensors in the dtype to compute in, if all four arguments make sense."""
    if not inputs.is_floating_point():
        raise TypeError(f"inputs are {inputs.dtype}; expected logits of a floating dtype.")
    if inputs.shape != targets.shape:
        raise ValueError(
            f"inputs have shape {tuple(inputs.shape)} and targets {tuple(targets.shape)}; expected one shape. "
            "Class indices become targets by one_hot."
        )
    if targets.device.type == "cpu" and targets.numel() and not ((targets >= 0) & (targets <= 1)).all():
        raise ValueError(
            "targets hold values outside [0, 1]; expected 1 for the positive class and 0 for the negative."
        )
    if not (alpha == -1 or 0 <= alpha <= 1):
        raise ValueError(f"alpha is {alpha}; expected a number in [0, 1], or -1 for no weighting.")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f'reduction is {reduction!r}; expected "none", "mean" or "sum".')
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    return inputs.to(dtype), targets.to(dtype)


def _balance(loss: Tensor, targets: Tensor, alpha: float) -> Tensor:
    """The loss times α_t: alpha for positives, 1 − alpha for negatives."""
    return loss if alpha == -1 else (alpha * targets + (1 - alpha) * (1 - targets)) * loss


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else getattr(loss, reduction)()
