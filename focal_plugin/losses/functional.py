"""The focal loss, its variant FL*, the hinge loss and the losses on soft targets, element by element.

A logit x gives the probability p = σ(x) of one class at one anchor. The target is 1 for the anchor's class and 0 for
every other. p_t is the probability of the right answer (equation 2): p for target 1, 1 − p for target 0. Its logit is
x_t: x for target 1, −x for target 0.

All functions take ``inputs``, logits of any shape and floating dtype; ``targets`` of the same shape: 1 for the positive
class, 0 for the negative, or a number in between (a soft target); and a ``reduction``: "none", "mean" or "sum". They
compute in float32 (float64 for float64 inputs) and return a loss for each input, or a scalar, in that dtype.
They raise a TypeError for inputs that are not floating point and for a hyper-parameter that is not a number. They raise
a ValueError for different shapes, an unknown reduction, a hyper-parameter out of range and targets outside [0, 1].
Values of tensors are checked on the CPU only: on a GPU that would synchronise.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Range(NamedTuple):
    """The values that a hyper-parameter may have, in the functions here and in the modules that use them."""

    contains: Callable[[float], bool]
    expected: str

    def check(self, value: float, name: str) -> float:
        """Return ``value``. Raise a TypeError if it is not a number, a ValueError if it is out of range."""
        try:
            if self.contains(value):
                return value
        except TypeError:
            raise TypeError(f"{name} is {value!r}; expected a number.") from None
        raise ValueError(f"{name} is {value}; expected {self.expected}.")


ALPHA = Range(lambda alpha: alpha == -1 or 0 <= alpha <= 1, "a number in [0, 1], or -1 for no weighting")
# float32 holds neither 1/γ nor γ times a loss for others.
GAMMA = Range(lambda gamma: gamma == 0 or 1e-30 <= gamma <= 1e30, "0 or a number in [1e-30, 1e30]")
STAR_GAMMA = Range(lambda gamma: 1e-30 <= gamma <= 1e30, "a number in [1e-30, 1e30], because FL* divides by it")
STAR_BETA = Range(lambda beta: -math.inf < beta < math.inf, "a finite number")
MARGIN = Range(lambda margin: 0 < margin <= 1, "a probability above 0, at most 1")
# For β between 0 and 1 the gradient of |y − σ|^β is unbounded where σ is close to y.
QUALITY_BETA = Range(lambda beta: beta == 0 or 1 <= beta <= 1e30, "0 or a number in [1, 1e30]")
NEGATIVE_WEIGHT = Range(lambda alpha: 0 <= alpha < math.inf, "a finite number ≥ 0")

_FAR = 2.0**14  # beyond ± this, σ is 0 or 1 in any float, and a loss proportional to its logit


def checked_alpha(alpha: float | Sequence[float] | Tensor, name: str = "alpha") -> float | Tensor:
    """Return α as a float, or as a tensor if there is more than one.

    A TypeError if it is neither a number nor a sequence of numbers, a ValueError if it is not in [0, 1] (a single one
    may be −1). Values on a GPU are not checked: reading them would synchronise.
    """
    if isinstance(alpha, Real):
        return float(ALPHA.check(float(alpha), name))
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

    The signature is that of ``fvcore.nn.sigmoid_focal_loss``, and so are the values where those are finite. The
    gradient is finite for every γ. For the sum over all logits of a detector, ``dense_focal_loss`` is much faster.

    Args:
        alpha: the weight of the positives in [0, 1]; 1 − alpha is the negatives'. −1 leaves both at 1. Or a tensor of
            such weights that broadcasts to ``inputs``.
        gamma: the focusing parameter γ ≥ 0; 0 is the α-balanced cross entropy of equation 3.
    """
    inputs, targets = _check(inputs, targets, reduction)
    GAMMA.check(gamma, "gamma")
    inputs, growth = _near(inputs)
    positive, negative = F.logsigmoid(inputs), F.logsigmoid(-inputs)  # log p, log(1 − p)
    cross_entropy = -(targets * positive + (1 - targets) * negative)
    # (1 − p_t)^γ is the paper's idea: an easy anchor, p_t → 1, counts for next to nothing, so that 100,000 of them do
    # not drown the few hard ones. At γ = 2 one with p_t = .9 weighs 100 times less than in the cross entropy.
    # For γ < 1 the power has no derivative at 0, hence the clamp. It changes nothing that a float can show, because
    # there the cross entropy is as small as 1 − p_t.
    modulator = _one_minus_p_t(inputs, targets).clamp(min=torch.finfo(inputs.dtype).tiny) ** gamma
    return _reduce(_balance(cross_entropy * modulator * growth, targets, alpha), reduction)


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

    The signature is that of ``fvcore.nn.sigmoid_focal_loss_star``, whose β is 0.

    Args:
        alpha: as for ``sigmoid_focal_loss``.
        gamma: the steepness γ > 0; 1, with β = 0, is the cross entropy.
        beta: the shift β, finite; the paper's (γ, β) are (2, 1) and (4, 0).
    """
    inputs, targets = _check(inputs, targets, reduction)
    STAR_GAMMA.check(gamma, "gamma")
    STAR_BETA.check(beta, "beta")
    # The cross entropy of a steeper, shifted logit also vanishes early where x_t is large. Appendix A uses it to show
    # that the exact form of the focal loss does not matter: only that easy examples get little loss.
    x_t, far = inputs * (2 * targets - 1), min((_FAR + abs(beta)) / gamma, torch.finfo(inputs.dtype).max)
    near = torch.where(x_t.abs() > far, x_t.detach().clamp(-far, far), x_t)  # γ x_t may be ∞
    loss = -F.logsigmoid(gamma * near + beta) / gamma + F.relu(-x_t - far)
    return _reduce(_balance(loss, targets, alpha), reduction)


def sigmoid_hinge_loss(inputs: Tensor, targets: Tensor, margin: float = 0.9, reduction: str = "none") -> Tensor:
    """max(0, m − p_t), with p_t = σ(± inputs): a hinge on the probability, 0 for p_t ≥ m (section 5.1).

    ``margin`` is m in (0, 1]; 1 gives the loss 1 − p_t.
    """
    inputs, targets = _check(inputs, targets, reduction)
    MARGIN.check(margin, "margin")
    # m − p_t = (1 − p_t) − (1 − m). Beyond the margin the gradient is 0: such an anchor teaches nothing.
    return _reduce((_one_minus_p_t(inputs, targets) - (1 - margin)).clamp(min=0), reduction)


def quality_focal_loss(inputs: Tensor, targets: Tensor, beta: float = 2, reduction: str = "none") -> Tensor:
    """QFL = −|y − σ|^β ((1 − y) log(1 − σ) + y log σ), with σ = σ(inputs) and a soft target y.

    From "Generalized Focal Loss" (Li et al., NeurIPS 2020). For targets 0 and 1 it is the focal loss without α.

    Args:
        targets: y in [0, 1]: 0 for a negative, the IoU of its predicted box for a positive.
        beta: the focusing parameter β: 0, for the cross entropy, or at least 1.
    """
    inputs, targets = _check(inputs, targets, reduction)
    QUALITY_BETA.check(beta, "beta")
    inputs, growth = _near(inputs)
    cross_entropy = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    distance = targets * torch.sigmoid(-inputs) - (1 - targets) * torch.sigmoid(inputs)  # y − σ, exact also where σ ≈ 1
    return _reduce(distance.abs() ** beta * cross_entropy * growth, reduction)


def varifocal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.75, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    """VFL = −q (q log p + (1 − q) log(1 − p)) for a soft target q > 0 and −α p^γ log(1 − p) for q = 0.

    From "VarifocalNet" (Zhang et al., CVPR 2021): only negatives are down-weighted by a power of p, and the
    weight of a positive is its quality.

    Args:
        targets: q in [0, 1]: 0 for a negative, the IoU of its predicted box for a positive.
        alpha: the weight of the negatives, ≥ 0: the counterpart of 1 − alpha in ``sigmoid_focal_loss``.
        gamma: the focusing parameter γ ≥ 0.
    """
    NEGATIVE_WEIGHT.check(alpha, "alpha")
    inputs, targets = _check(inputs, targets, reduction)
    # Positives are rare and precious, so none is held down for being easy; a good box makes one count more.
    cross_entropy = targets * F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    negative = alpha * sigmoid_focal_loss(inputs, torch.zeros_like(targets), gamma=gamma)
    return _reduce(torch.where(targets > 0, cross_entropy, negative), reduction)


def _check(inputs: Tensor, targets: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Check the arguments that all losses share, and return both tensors in the dtype of the computation."""
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


def _near(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits clamped to ± ``_FAR``, and the factor of their loss: 1, or |x| / ``_FAR`` beyond."""
    # Beyond, the gradient of (1 − p_t)^γ would be 0 times γ times the cross entropy, and that product may be ∞.
    size = inputs.abs()
    near = torch.where(size > _FAR, inputs.detach().clamp(-_FAR, _FAR), inputs)
    return near, torch.where(size > _FAR, size / _FAR, 1.0)


def _one_minus_p_t(inputs: Tensor, targets: Tensor) -> Tensor:
    """1 − p_t from two sigmoids: subtracting p_t from 1 would round a small difference to 0."""
    return (1 - targets) * torch.sigmoid(inputs) + targets * torch.sigmoid(-inputs)


def _balance(loss: Tensor, targets: Tensor, alpha: float | Tensor) -> Tensor:
    """Multiply the loss by α_t: alpha for positives, 1 − alpha for negatives (equation 3)."""
    alpha = checked_alpha(alpha)
    if isinstance(alpha, Tensor):
        try:
            alpha = alpha.expand_as(loss)
        except RuntimeError:
            message = f"alpha has shape {tuple(alpha.shape)}, which does not broadcast to {tuple(loss.shape)}."
            raise ValueError(message) from None
    elif alpha == -1:
        return loss
    return (alpha * targets + (1 - alpha) * (1 - targets)) * loss


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else getattr(loss, reduction)()
