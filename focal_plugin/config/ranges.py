"""The values that the config's numbers may have: Detectron2's keys and the plugin's, checked in one place."""

import math
from collections.abc import Iterator, Sequence

from detectron2.config import CfgNode

from ..losses.functional import ALPHA, GAMMA, MARGIN, STAR_BETA, Range
from .explain import flatten
from .keys import ConfigError

_FINITE = STAR_BETA
_POSITIVE = Range(lambda x: 0 < x < math.inf, "a finite number > 0")
_NOT_NEGATIVE = Range(lambda x: 0 <= x < math.inf, "a finite number ≥ 0")
_SHARE = Range(lambda x: 0 <= x <= 1, "a number in [0, 1]")
_AT_LEAST_0 = Range(lambda x: x >= 0 and x == int(x), "a whole number ≥ 0")
_AT_LEAST_1 = Range(lambda x: x >= 1 and x == int(x), "a whole number ≥ 1")


def _each(of: Range, length: int | None = None) -> Range:
    """Return the range of lists, nested at any depth, of numbers of a range; empty ones only if ``length`` is 0."""

    def contains(values: Sequence) -> bool:
        numbers = list(_leaves(values))
        return all(map(of.contains, numbers)) and (len(numbers) == length if length else bool(numbers) or length == 0)

    return Range(contains, f"{f'{length} values' if length else 'values'}, each {of.expected}")


def _leaves(values: object) -> Iterator:
    if isinstance(values, list | tuple):
        for value in values:
            yield from _leaves(value)
    else:
        yield values


def _are_factors(entries: Sequence) -> bool:
    entries = [entry.items() if isinstance(entry, dict) else () for entry in entries]
    return all(entry and all(_is_factor(*item) for item in entry) for entry in entries)


def _is_factor(pattern: object, factor: object) -> bool:
    return isinstance(pattern, str) and not isinstance(factor, bool) and _NOT_NEGATIVE.contains(factor)


RANGES = {
    "SOLVER.OPTIMIZER": Range(lambda x: x in ("sgd", "adamw"), "sgd or adamw"),
    "SOLVER.LR_FACTORS": Range(_are_factors, "a list of {pattern: factor}, each factor a finite number ≥ 0"),
    "SOLVER.IMS_PER_BATCH": _AT_LEAST_1,
    "SOLVER.MAX_ITER": _AT_LEAST_1,
    "SOLVER.BASE_LR": _NOT_NEGATIVE,
    "SOLVER.BASE_LR_END": _NOT_NEGATIVE,
    "SOLVER.MOMENTUM": Range(lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "SOLVER.WEIGHT_DECAY": _NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_NORM": _NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_BIAS": Range(lambda x: x is None or 0 <= x < math.inf, "None or a finite number ≥ 0"),
    "SOLVER.BIAS_LR_FACTOR": _NOT_NEGATIVE,
    "SOLVER.GAMMA": _NOT_NEGATIVE,
    "SOLVER.STEPS": _each(_AT_LEAST_0, length=0),
    "SOLVER.NUM_DECAYS": _AT_LEAST_1,
    "SOLVER.WARMUP_FACTOR": _SHARE,
    "SOLVER.WARMUP_ITERS": _AT_LEAST_0,
    "SOLVER.REFERENCE_WORLD_SIZE": _AT_LEAST_0,
    "SOLVER.CHECKPOINT_PERIOD": _AT_LEAST_1,
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _POSITIVE,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": Range(lambda x: x > 0, "a number > 0"),
    "SOLVER.ACCUMULATE": _AT_LEAST_1,
    "SOLVER.MAX_SKIPS": _AT_LEAST_0,
    "INPUT.MIN_SIZE_TRAIN": _each(_AT_LEAST_0),  # 0: not resized
    "INPUT.MIN_SIZE_TEST": _AT_LEAST_0,
    "INPUT.MAX_SIZE_TRAIN": _AT_LEAST_1,
    "INPUT.MAX_SIZE_TEST": _AT_LEAST_1,
    "INPUT.CROP.SIZE": _each(_POSITIVE, length=2),
    "DATALOADER.NUM_WORKERS": _AT_LEAST_0,
    "DATALOADER.REPEAT_THRESHOLD": _NOT_NEGATIVE,
    "TEST.EVAL_PERIOD": _AT_LEAST_0,
    "TEST.DETECTIONS_PER_IMAGE": _AT_LEAST_1,
    "TEST.PRECISE_BN.NUM_ITER": _AT_LEAST_1,
    "TEST.AUG.MIN_SIZES": _each(_AT_LEAST_1, length=0),
    "TEST.AUG.MAX_SIZE": _AT_LEAST_1,
    "MODEL.PIXEL_MEAN": _each(_FINITE),
    "MODEL.PIXEL_STD": _each(_POSITIVE),
    "MODEL.BACKBONE.FREEZE_AT": _AT_LEAST_0,
    "MODEL.FPN.OUT_CHANNELS": _AT_LEAST_1,
    "MODEL.ANCHOR_GENERATOR.SIZES": _each(_POSITIVE),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": _each(_POSITIVE),
    "MODEL.ANCHOR_GENERATOR.OFFSET": Range(lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "MODEL.RETINANET.NUM_CLASSES": _AT_LEAST_1,
    "MODEL.RETINANET.NUM_CONVS": _AT_LEAST_0,
    "MODEL.RETINANET.PRIOR_PROB": Range(lambda x: 0 < x < 1, "a probability above 0 and below 1"),
    "MODEL.RETINANET.SCORE_THRESH_TEST": _SHARE,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": _AT_LEAST_1,
    "MODEL.RETINANET.NMS_THRESH_TEST": _SHARE,
    "MODEL.RETINANET.IOU_THRESHOLDS": _each(_SHARE),
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": _each(_POSITIVE, length=4),
    "MODEL.RETINANET.FOCAL_LOSS_ALPHA": ALPHA,
    "MODEL.RETINANET.FOCAL_LOSS_GAMMA": GAMMA,
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": _NOT_NEGATIVE,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": _AT_LEAST_1,
    "MODEL.RPN.POSITIVE_FRACTION": _SHARE,
    "MODEL.RPN.NMS_THRESH": _SHARE,
    "MODEL.RPN.IOU_THRESHOLDS": _each(_SHARE),
    "MODEL.RPN.LOSS_WEIGHT": _NOT_NEGATIVE,
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": _NOT_NEGATIVE,
    "MODEL.ROI_HEADS.NUM_CLASSES": _AT_LEAST_1,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": _AT_LEAST_1,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": _SHARE,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": _SHARE,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": _SHARE,
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": _each(_SHARE),
    "MODEL.FOCAL.CLASS_FREQUENCIES": _each(_NOT_NEGATIVE, length=0),
    "MODEL.FOCAL.CLS_LOSS.WEIGHT": _NOT_NEGATIVE,
    "MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA": _each(_SHARE, length=0),
    "MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA_POWER": _FINITE,
    "MODEL.FOCAL.CLS_LOSS.BETA": _FINITE,
    "MODEL.FOCAL.CLS_LOSS.HINGE_MARGIN": MARGIN,
    "MODEL.FOCAL.CLS_LOSS.OHEM.BATCH_SIZE_PER_IMAGE": _AT_LEAST_1,
    "MODEL.FOCAL.CLS_LOSS.OHEM.NMS_THRESH": _SHARE,
    "MODEL.FOCAL.CLS_LOSS.OHEM.POSITIVE_FRACTION": _SHARE,
    "MODEL.FOCAL.BOX_LOSS.WEIGHT": _NOT_NEGATIVE,
    "MODEL.FOCAL.MATCHER.TOPK": _AT_LEAST_1,
    "MODEL.FOCAL.MATCHER.IGNORE_IOA": _SHARE,
    "MODEL.FOCAL.ANCHORS.SCALES_PER_OCTAVE": _AT_LEAST_1,
    "TEST.PATIENCE": _AT_LEAST_0,
    "MODEL.FOCAL.EMA.DECAY": Range(lambda x: 0 <= x < 1, "a number in [0, 1), 0 for none"),
    "VIS_PERIOD": _AT_LEAST_0,
    "VIS.NUM_IMAGES": _AT_LEAST_0,
    "VIS.SCORE_THRESH": _SHARE,
}
_CHANNELS = {"BGR": 3, "RGB": 3, "YUV-BT.601": 3, "L": 1}  # of INPUT.FORMAT


def check_ranges(cfg: CfgNode) -> None:
    """Check that each number of ``cfg`` is one that its key may have, whether or not this model reads it.

    Raises:
        ConfigError: one is not, or PIXEL_MEAN or PIXEL_STD has another length than INPUT.FORMAT has channels (which is
            not known for a format that is none of Detectron2's).
    """
    values = flatten(cfg)
    for key, allowed in RANGES.items():
        if key in values and not _is_in(allowed, values[key]):
            raise ConfigError(f"{key} is {values[key]!r}; expected {allowed.expected}.")
    channels = _CHANNELS.get(cfg.INPUT.FORMAT)
    for key in ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"):
        if channels and len(values[key]) != channels:
            raise ConfigError(
                f"{key} is {values[key]!r}; expected {channels} values, one for each channel of INPUT.FORMAT "
                f"{cfg.INPUT.FORMAT}."
            )


def _is_in(allowed: Range, value: object) -> bool:
    try:
        return bool(allowed.contains(value))
    except (TypeError, ValueError, OverflowError):  # no number, NaN or ∞ where a whole number is expected
        return False
