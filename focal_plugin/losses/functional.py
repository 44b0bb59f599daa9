"""The focal loss, its variant FL*, the hinge loss and the losses on soft targets, element by element.

A logit x says how likely one class is at one anchor: p = σ(x). The target is 1 for the anchor's class and 0 for every
other; p_t is p for target 1 and 1 − p for target 0, the probability of what is right. Likewise x_t = ±x.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Range(NamedTuple):
    """The values that a hyper-parameter may have, for the functions here and for the modules made of them."""

    contains: Callable[[float], bool]
    expected: str

    def check(self, value: float, name: str) -> float:
        """Return ``value``, a hyper-parameter that is called ``name`` in errors.

        Raises:
            TypeError: it is no number. ValueError: it is out of range.
        """
        try:
            is_inside = self.contains(value)
        except TypeError:
            raise TypeError(f"{name} is {value!r}; expected a number.") from None
        if not is_inside:
            raise ValueError(f"{name} is {value}; expected {self.expected}.")
        return value


ALPHA = Range(lambda alpha: alpha == -1 or 0 <= alpha <= 1, "a number in [0, 1], or -1 for no weighting")
GAMMA = Range(lambda gamma: 0 <= gamma < math.inf, "a finite number ≥ 0")
STAR_GAMMA = Range(lambda gamma: 0 < gamma < math.inf, "a finite number > 0, because FL* divides by it")
STAR_BETA = Range(lambda beta: -math.inf < beta < math.inf, "a finite number")
MARGIN = Range(lambda margin: 0 < margin <= 1, "a probability above 0, at most 1")
# Between 0 and 1 the gradient of |y − σ|^β has no bound where σ is close to a soft target.
QUALITY_BETA = Range(lambda beta: beta == 0 or 1 <= beta < math.inf, "0 or a finite number ≥ 1")
NEGATIVE_WEIGHT = Range(lambda alpha: 0 <= alpha < math.inf, "a finite number ≥ 0")


def checked_alpha(alpha: float | Sequence[float] | Tensor, name: str = "alpha") -> float | Tensor:
    """Return α as a float, or as a tensor if it is several weights (float64 if it was none).

    Raises:
        TypeError: it is no number and has none.
        ValueError: a number neither −1 nor in [0, 1]; several, one of them not in [0, 1]. The values of a tensor on a
            GPU are not checked: reading them synchronises.
    """
    if isinstance(alpha, Real):
        return float(ALPHA.check(alpha, name))
    if not isinstance(alpha, Tensor):
        if not isinstance(alpha, Iterable) or not all(isinstance(number, Real) for number in alpha):
            raise TypeError(f"{name} is {alpha!r}; expected a number, or one for each class.")
        alpha = torch.tensor([float(number) for number in alpha], dtype=torch.float64)
    if alpha.device.type == "cpu" and not ((alpha >= 0) & (alpha <= 1)).all():
        raise ValueError(f"{name} is {alpha.tolist()}; expected numbers in [0, 1].")
    return alpha


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float | Tensor = -1, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    """FL(p_t) = −α_t (1 − p_t)^γ log p_t, with p = σ(inputs) (equation 5).

    The signature is that of ``fvcore.nn.sigmoid_focal_loss``, and so are the values wherever fvcore's are finite. The
    gradient is finite for every γ. For the sum over all of a detector's logits, ``dense_focal_loss`` is much faster.

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
        TypeError: the inputs are not floating point, or a hyper-parameter is no number.
        ValueError: the shapes differ or do not broadcast; targets or alpha are outside [0, 1] (checked on the CPU only:
            on a GPU it synchronises); gamma is negative or not finite; the reduction is unknown.
    """
    inputs, targets = _check(inputs, targets, reduction)
    GAMMA.check(gamma, "gamma")
    positive, negative = F.logsigmoid(inputs), F.logsigmoid(-inputs)  # log p, log(1 − p)
    cross_entropy = -(targets * positive + (1 - targets) * negative)
    # (1 − p_t)^γ is the paper's idea: an easy anchor, p_t → 1, counts for next to nothing, so that 100,000 of them do
    # not drown the few hard ones. At γ = 2 one with p_t = .9 weighs 100 times less than in the cross entropy.
    # The power has no derivative at 0 for γ < 1, but near 0 the cross entropy is as small: what the clamp changes is
    # below the smallest float.
    modulator = _one_minus_p_t(inputs, targets).clamp(min=torch.finfo(inputs.dtype).tiny) ** gamma
    return _reduce(_balance(cross_entropy * modulator, targets, alpha), reduction)


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
        inputs, alpha, reduction: as those of ``sigmoid_focal_loss``.
        targets: likewise; for a soft target x_t is the inputs times 2·targets − 1.
        gamma: the steepness γ > 0; 1, with β = 0, is the cross entropy.
        beta: the shift β; the paper's (γ, β) are (2, 1) and (4, 0).

    Returns:
        The loss in float32 (float64 for float64 inputs): of the shape of ``inputs``, or a scalar.

    Raises:
        TypeError, ValueError: as ``sigmoid_focal_loss``; and gamma is 0, or beta is not finite.
    """
    inputs, targets = _check(inputs, targets, reduction)
    STAR_GAMMA.check(gamma, "gamma")
    STAR_BETA.check(beta, "beta")
    # The cross entropy of a steeper, shifted logit also flattens where x_t is large: that the exact form of the focal
    # loss does not matter is what appendix A shows with it.
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
    inputs, targets = _check(inputs, targets, reduction)
    MARGIN.check(margin, "margin")
    return _reduce((_one_minus_p_t(inputs, targets) - (1 - margin)).clamp(min=0), reduction)


def quality_focal_loss(inputs: Tensor, targets: Tensor, beta: float = 2, reduction: str = "none") -> Tensor:
    """QFL = −|y − σ|^β ((1 − y) log(1 − σ) + y log σ), with σ = σ(inputs) and a soft target y.

    From "Generalized Focal Loss" (Li et al., NeurIPS 2020). For targets 0 and 1 it is the focal loss without α.

    Args:
        inputs, reduction: as those of ``sigmoid_focal_loss``.
        targets: y in [0, 1]: 0 for a negative, the IoU of its predicted box for a positive.
        beta: the focusing parameter β: 0, for the cross entropy, or at least 1.

    Raises:
        TypeError, ValueError: as ``sigmoid_focal_loss``; and beta is negative, between 0 and 1, or not finite.
    """
    inputs, targets = _check(inputs, targets, reduction)
    QUALITY_BETA.check(beta, "beta")
    cross_entropy = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    distance = targets * torch.sigmoid(-inputs) - (1 - targets) * torch.sigmoid(inputs)  # y − σ, with all its bits
    return _reduce(distance.abs() ** beta * cross_entropy, reduction)


def varifocal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.75, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    """VFL = −q (q log p + (1 − q) log(1 − p)) for a soft target q > 0 and −α p^γ log(1 − p) for q = 0.

    From "VarifocalNet" (Zhang et al., CVPR 2021): only negatives are focused, and the weight of a positive is its
    quality.

    Args:
        inputs, reduction: as those of ``sigmoid_focal_loss``.
        targets: q in [0, 1]: 0 for a negative, the IoU of its predicted box for a positive.
        alpha: the weight of the negatives, ≥ 0: the counterpart of 1 − alpha in ``sigmoid_focal_loss``.
        gamma: the focusing parameter γ ≥ 0.

    Raises:
        TypeError, ValueError: as ``sigmoid_focal_loss``; and alpha is negative or not finite.
    """
    NEGATIVE_WEIGHT.check(alpha, "alpha")
    inputs, targets = _check(inputs, targets, reduction)
    cross_entropy = targets * F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    negative = alpha * sigmoid_focal_loss(inputs, torch.zeros_like(targets), gamma=gamma)
    return _reduce(torch.where(targets > 0, cross_entropy, negative), reduction)


def _check(inputs: Tensor, targets: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Check the arguments that all losses have, and return both tensors in the dtype to compute in."""
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
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f'reduction is {reduction!r}; expected "none", "mean" or "sum".')
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    return inputs.to(dtype), targets.to(dtype)


def _one_minus_p_t(inputs: Tensor, targets: Tensor) -> Tensor:
    """1 − p_t from two sigmoids: a subtraction would lose the bits of a small 1 − p_t."""
    return (1 - targets) * torch.sigmoid(inputs) + targets * torch.sigmoid(-inputs)


def _balance(loss: Tensor, targets: Tensor, alpha: float | Tensor) -> Tensor:
    """The loss times α_t: alpha for positives, 1 − alpha for negatives (equation 3)."""
    alpha = checked_alpha(alpha)
    if not isinstance(alpha, Tensor):
        return loss if alpha == -1 else (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    shape = tuple(loss.shape)
    sizes = zip(reversed(alpha.shape), reversed(shape))
    if alpha.ndim > len(shape) or any(size not in (1, wanted) for size, wanted in sizes):
        raise ValueError(f"alpha has shape {tuple(alpha.shape)}, which does not broadcast to {shape}.")
    return (alpha * targets + (1 - alpha) * (1 - targets)) * loss


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else getattr(loss, reduction)()
