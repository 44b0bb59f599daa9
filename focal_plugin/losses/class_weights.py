"""α, the weight of the positives: one for all classes or one for each, and the class frequencies behind the latter."""

import math
from collections.abc import Sequence

from detectron2.config import CfgNode

from ..config import ConfigError


def alpha_from_config(cfg: CfgNode) -> float | list[float]:
    """Return α: one number for all classes, or a list with one for each.

    The number is ``MODEL.RETINANET.FOCAL_LOSS_ALPHA``. A list is given by ``MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA``, or
    derived from the class frequencies if ``CLASS_ALPHA_POWER`` is not 0 (see ``frequency_alpha``).

    A ConfigError if both are given, if CLASS_ALPHA has another length than K, or as in ``frequency_alpha``.
    """
    alpha, loss = cfg.MODEL.RETINANET.FOCAL_LOSS_ALPHA, cfg.MODEL.FOCAL.CLS_LOSS
    if loss.CLASS_ALPHA and loss.CLASS_ALPHA_POWER:
        raise ConfigError(
            "MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA lists an alpha for each class and CLASS_ALPHA_POWER "
            f"({loss.CLASS_ALPHA_POWER}) would derive them from the class frequencies: empty one, or set the other 0."
        )
    if loss.CLASS_ALPHA:
        return _one_a_class(cfg, "MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA", loss.CLASS_ALPHA)
    if loss.CLASS_ALPHA_POWER:
        return frequency_alpha(alpha, class_shares(cfg), loss.CLASS_ALPHA_POWER)
    return alpha


def alpha_needs_class_frequencies(cfg: CfgNode) -> bool:
    """Whether ``alpha_from_config`` reads the class frequencies."""
    return cfg.MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA_POWER != 0


def frequency_alpha(alpha: float, shares: Sequence[float], power: float) -> list[float]:
    """Return one α_k a class, with α_k / (1 − α_k) = α / (1 − α) · (g / f_k)^power; g is the geometric mean of the f_k.

    The left side is the weight of a positive of class k over that of a negative. With power 1 it is proportional to the
    inverse frequency, with .5 to its root, and with 0 it is the same for all classes. Its geometric mean over the
    classes is always α / (1 − α).

    Args:
        alpha: the weight of a class of mean frequency, in (0, 1).
        shares: f_k > 0, the classes' shares of the boxes.
        power: 0 ignores the frequencies; any finite number.

    Raises:
        ConfigError: alpha is not in (0, 1), or power is not finite.
    """
    if not 0 < alpha < 1:
        raise ConfigError(
            f"MODEL.RETINANET.FOCAL_LOSS_ALPHA is {alpha}; with MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA_POWER expected a "
            "number between 0 and 1."
        )
    if not math.isfinite(power):
        raise ConfigError(f"MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA_POWER is {power}; expected a finite number.")
    logs = [math.log(share) for share in shares]
    mean = sum(logs) / len(logs)  # log g
    # Powers of odds and not of α itself, which would leave [0, 1] for a rare class.
    odds = [alpha / (1 - alpha) * math.exp(power * (mean - log)) for log in logs]
    return [odd / (1 + odd) for odd in odds]  # in (0, 1) for any odds


def class_shares(cfg: CfgNode) -> list[float]:
    """Return each class's share of the boxes from ``MODEL.FOCAL.CLASS_FREQUENCIES``. They add up to 1.

    A class without boxes gets the count of the rarest class that has any: it is rare, but not impossible.

    A ConfigError if the key is empty, has another length than K, or has numbers that are not frequencies.
    """
    counts = cfg.MODEL.FOCAL.CLASS_FREQUENCIES
    if not counts:
        raise ConfigError(
            "MODEL.FOCAL.CLASS_FREQUENCIES is empty, and a component that the config names needs it: give the number "
            "of boxes of each class, or their shares. load_config, and so train_net.py, counts them in DATASETS.TRAIN."
        )
    counts = _one_a_class(cfg, "MODEL.FOCAL.CLASS_FREQUENCIES", counts)
    if not all(0 <= count < math.inf for count in counts) or not any(counts):
        raise ConfigError(
            f"MODEL.FOCAL.CLASS_FREQUENCIES is {counts}; expected finite numbers ≥ 0, at least one of them above 0."
        )
    rarest = min(count for count in counts if count > 0)
    counts = [count or rarest for count in counts]
    return [count / sum(counts) for count in counts]


def _one_a_class(cfg: CfgNode, key: str, numbers: Sequence[float]) -> list[float]:
    num_classes = cfg.MODEL.RETINANET.NUM_CLASSES
    if len(numbers) != num_classes:
        raise ConfigError(
            f"{key} has {len(numbers)} numbers and MODEL.RETINANET.NUM_CLASSES is {num_classes}; expected one a class."
        )
    return list(numbers)
