"""The weight of the positives: one number for all classes, or one a class."""

import math
from collections.abc import Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor

from .class_frequencies import class_shares


def alpha_from_config(cfg) -> float | list[float]:
    """α of a config: ``FOCAL_LOSS_ALPHA``, or one number a class where the config asks for it.

    ``MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA`` lists them; ``MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA_POWER`` derives them from the
    classes' frequencies, see ``frequency_alpha``.

    Raises:
        ValueError: both are given; as many numbers as classes are not; what ``frequency_alpha`` raises.
    """
    alpha, loss = cfg.MODEL.RETINANET.FOCAL_LOSS_ALPHA, cfg.MODEL.FOCAL.CLS_LOSS
    if loss.CLASS_ALPHA and loss.CLASS_ALPHA_POWER:
        raise ValueError(
            "MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA lists an alpha for each class and CLASS_ALPHA_POWER "
            f"({loss.CLASS_ALPHA_POWER}) would derive them from the class frequencies: empty one, or set the other 0."
        )
    if loss.CLASS_ALPHA:
        if len(loss.CLASS_ALPHA) != cfg.MODEL.RETINANET.NUM_CLASSES:
            raise ValueError(
                f"MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA has {len(loss.CLASS_ALPHA)} numbers and "
                f"MODEL.RETINANET.NUM_CLASSES is {cfg.MODEL.RETINANET.NUM_CLASSES}; expected one number a class."
            )
        return list(loss.CLASS_ALPHA)
    if loss.CLASS_ALPHA_POWER:
        return frequency_alpha(alpha, class_shares(cfg), loss.CLASS_ALPHA_POWER)
    return alpha


def frequency_alpha(alpha: float, shares: Sequence[float], power: float) -> list[float]:
    """α of each class such that α_k / (1 − α_k) = α / (1 − α) · (g / f_k)^power, g being the geometric mean of the f_k.

    The left side is how much more a positive of class k weighs than a negative, so that weight goes as the inverse
    frequency (power 1), its root (.5), or is the same for all (0). It is always in (0, 1), and its geometric mean over
    the classes stays that of ``alpha``.

    Args:
        alpha: the weight of a class of mean frequency, in (0, 1).
        shares: f_k > 0, the classes' shares of the boxes.
        power: how much frequency counts.

    Raises:
        ValueError: alpha is not in (0, 1), or power is not finite.
    """
    if not 0 < alpha < 1:
        raise ValueError(
            f"MODEL.RETINANET.FOCAL_LOSS_ALPHA is {alpha}; with MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA_POWER expected a "
            "number between 0 and 1."
        )
    if not math.isfinite(power):
        raise ValueError(f"MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA_POWER is {power}; expected a finite number.")
    logs = [math.log(share) for share in shares]
    mean = sum(logs) / len(logs)
    odds = [alpha / (1 - alpha) * math.exp(power * (mean - log)) for log in logs]
    return [odd / (1 + odd) for odd in odds]


def checked_alpha(alpha: float | Sequence[float]) -> float | Tensor:
    """``alpha`` as a number, or as a (K,) float32 tensor, if it is one that a loss takes.

    Raises:
        ValueError: a number neither −1 nor in [0, 1], or one of several that is not in [0, 1]. TypeError: no numbers.
    """
    if isinstance(alpha, Real):
        if not (alpha == -1 or 0 <= alpha <= 1):
            raise ValueError(
                f"MODEL.RETINANET.FOCAL_LOSS_ALPHA is {alpha}; expected a number in [0, 1], or -1 for no weighting."
            )
        return float(alpha)
    if not isinstance(alpha, Iterable) or not all(isinstance(number, Real) for number in alpha):
        raise TypeError(f"MODEL.RETINANET.FOCAL_LOSS_ALPHA is {alpha!r}; expected a number, or one for each class.")
    alpha = [float(number) for number in alpha]
    if not alpha or not all(0 <= number <= 1 for number in alpha):
        raise ValueError(f"MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA is {alpha}; expected a number in [0, 1] for each class.")
    return torch.tensor(alpha)
