"""The focal loss, its variant FL*, the hinge loss and the losses on soft targets, element by element."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float | Tensor = -1, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    """FL(p_t) = −α_t (1 − p_t)^γ log p_t, with p = σ(inputs) (equation 5).

    The signature is that of ``fvcore.nn.sigmoid_focal_loss``, and so are the values wherever fvcore's are finite. The
    gradient is finite for every γ. For the sum over all of a detector's logits, ``dense_focal_loss`` is faster by far.

    Args:
        inputs: logits x of any shape and floating dtype; float16 and bfloat16 are computed in float32.
        targets: of the same shape: 1 for the positive class, 0 for the negative, or a float in between (a soft target).
        alpha: the weight of the positives in [0, 1]; 1 − alpha is the negatives'. −1 leaves both at 1. Or a tensor of
            such weights that broadcasts to ``inputs``.
        gamma: the focusing parameter γ ≥ 0; 0 is the α-balanced cross entropy of equation 3.
        reduction: "none", "mean" or "sum".

    Returns:
        The loss in float32 (float64 for float64 inputs): of the shape of ``inputs``, or a scalar.

    Raises:
        TypeError: inputs that are not floating point.
        ValueError: shapes that differ; targets outside [0, 1] (looked at on the CPU only: a GPU would have to be waited
            for); alpha neither −1 nor in [0, 1] (a tensor is looked at on the CPU only), or of a shape that does not
            broadcast; gamma negative or not finite; an unknown reduction.
    """
    inputs, targets = _check(inputs, targets, alpha, reduction)
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma is {gamma}; expected a finite number ≥ 0.")
    positive, negative = F.logsigmoid(inputs), F.logsigmoid(-inputs)  # log p, log(1 − p)
    cross_entropy = -(targets * positive + (1 - targets) * negative)
    # The power has no derivative at 0 for γ < 1, but near 0 the cross entropy is as small: what the clamp changes is
    # below the smallest float.
    loss = cross_entropy * _wrongness(inputs, targets).clamp(min=torch.finfo(inputs.dtype).tiny) ** gamma
    return _reduce(_balance(loss, targets, alpha), reduction)


def sigmoid_focal_loss_star(
    inputs: Tensor,
    targets: Tensor,
    alpha: float | Tensor = -1,
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
        alpha: the weight of the positives in [0, 1]; 1 − alpha is the negatives'. −1 leaves both at 1. Or a tensor of
            such weights that broadcasts to ``inputs``.
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


def sigmoid_hinge_loss(inputs: Tensor, targets: Tensor, margin: float = 0.9, reduction: str = "none") -> Tensor:
    """max(0, m − p_t), with p_t = σ(± inputs): a hinge on the probability, 0 for p_t ≥ m (section 5.1).

    Args:
        inputs, targets, reduction: as those of ``sigmoid_focal_loss``.
        margin: m in (0, 1]; 1 is the loss 1 − p_t.

    Raises:
        TypeError, ValueError: as ``sigmoid_focal_loss``; and margin is not in (0, 1].
    """
    inputs, targets = _check(inputs, targets, -1, reduction)
    if not 0 < margin <= 1:
        raise ValueError(f"margin is {margin}; expected a probability above 0, at most 1.")
    return _reduce((_wrongness(inputs, targets) - (1 - margin)).clamp(min=0), reduction)


def quality_focal_loss(inputs: Tensor, targets: Tensor, beta: float = 2, reduction: str = "none") -> Tensor:
    """QFL = −|y − σ|^β ((1 − y) log(1 − σ) + y log σ), with σ = σ(inputs) and a soft target y.

    From "Generalized Focal Loss" (Li et al., NeurIPS 2020). For targets 0 and 1 it is the focal loss without α.

    Args:
        inputs, reduction: as those of ``sigmoid_focal_loss``.
        targets: y in [0, 1]: 0 for a negative, the IoU of its predicted box for a positive.
        beta: the focusing parameter β: 0, for the cross entropy, or at least 1. Between them the gradient has no bound
            where σ is close to a soft target.

    Raises:
        TypeError, ValueError: as ``sigmoid_focal_loss``; and beta is negative, between 0 and 1, or not finite.
    """
    inputs, targets = _check(inputs, targets, -1, reduction)
    if not (beta == 0 or 1 <= beta < float("inf")):
        raise ValueError(f"beta is {beta}; expected 0 or a finite number ≥ 1.")
    cross_entropy = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    distance = targets * torch.sigmoid(-inputs) - (1 - targets) * torch.sigmoid(inputs)  # y − σ, with all its bits
    return _reduce(distance.abs() ** beta * cross_entropy, reduction)


def varifocal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.75, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    """VFL = −q (q log p + (1 − q) log(1 − p)) for a soft target q > 0 and −α p^γ log(1 − p) for q = 0.

    From "VarifocalNet" (Zhang et al., CVPR 2021): only negatives are focused, and positives weigh as much as
    their quality.

    Args:
        inputs, reduction: as those of ``sigmoid_focal_loss``.
        targets: q in [0, 1]: 0 for a negative, the IoU of its predicted box for a positive.
        alpha: the weight of the negatives, ≥ 0: the counterpart of 1 − alpha in ``sigmoid_focal_loss``.
        gamma: the focusing parameter γ ≥ 0.

    Raises:
        TypeError, ValueError: as ``sigmoid_focal_loss``; and alpha is negative or not finite.
    """
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha is {alpha}; expected a finite number ≥ 0.")
    inputs, targets = _check(inputs, targets, -1, reduction)
    cross_entropy = targets * F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    negative = alpha * sigmoid_focal_loss(inputs, torch.zeros_like(targets), gamma=gamma)
    return _reduce(torch.where(targets > 0, cross_entropy, negative), reduction)


def _check(inputs: Tensor, targets: Tensor, alpha: float | Tensor, reduction: str) -> tuple[Tensor, Tensor]:
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
    _check_alpha(alpha, inputs.shape)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f'reduction is {reduction!r}; expected "none", "mean" or "sum".')
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    return inputs.to(dtype), targets.to(dtype)


def _check_alpha(alpha: float | Tensor, shape: torch.Size) -> None:
    if not isinstance(alpha, Tensor):
        if not (alpha == -1 or 0 <= alpha <= 1):
            raise ValueError(f"alpha is {alpha}; expected a number in [0, 1], or -1 for no weighting.")
        return
    sizes = zip(reversed(alpha.shape), reversed(shape))
    if alpha.ndim > len(shape) or any(size not in (1, wanted) for size, wanted in sizes):
        raise ValueError(f"alpha has shape {tuple(alpha.shape)}, which does not broadcast to {tuple(shape)}.")
    if alpha.device.type == "cpu" and not ((alpha >= 0) & (alpha <= 1)).all():
        raise ValueError(f"alpha is {alpha.flatten().tolist()}; expected numbers in [0, 1].")


def _wrongness(inputs: Tensor, targets: Tensor) -> Tensor:
    """1 − p_t, with all its bits."""
    return (1 - targets) * torch.sigmoid(inputs) + targets * torch.sigmoid(-inputs)


def _balance(loss: Tensor, targets: Tensor, alpha: float | Tensor) -> Tensor:
    """The loss times α_t: alpha for positives, 1 − alpha for negatives."""
    if not isinstance(alpha, Tensor) and alpha == -1:
        return loss
    return (alpha * targets + (1 - alpha) * (1 - targets)) * loss


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else getattr(loss, reduction)()
