"""Checks of the run's length, its learning rate over time, and the sizes of its images."""

import math
from collections.abc import Iterator

from detectron2.config import CfgNode

from ...engine.advice import scaled_learning_rate, scaling
from .case import OK, WARNING, Case, Finding

_STEPPED = ("WarmupMultiStepLR", "WarmupStepWithFixedGammaLR")  # the schedulers that read SOLVER.STEPS
_FAR = 100  # times what linear scaling gives, or a part of it: nothing that clipping or another schedule explains
_MANY_EPOCHS = 1000
_USUAL_EPOCHS, _FEWEST_STEPS = 12, 500  # COCO's schedule 1x; the shortest shipped recipe, for 292 images
_OTHER_SIZE = 2  # times the size of training: objects then have sizes that were not trained


def check_schedule(case: Case) -> Iterator[Finding]:
    """Check the learning rate, the warm-up, the steps and the number of epochs against each other."""
    solver = case.cfg.SOLVER
    epochs = solver.MAX_ITER * solver.IMS_PER_BATCH / max(len(case.used_records), 1)
    length = f"{solver.MAX_ITER:,} steps of {solver.IMS_PER_BATCH} images, {_number(epochs)} epochs"
    usual = math.ceil(_USUAL_EPOCHS * len(case.used_records) / solver.IMS_PER_BATCH / 100) * 100
    advice = f"Set SOLVER.MAX_ITER near {max(usual, _FEWEST_STEPS):,}, and SOLVER.STEPS to fit."
    problems = [*_rate(case.cfg), *_warmup(case.cfg), *_steps(case.cfg)]
    if epochs > _MANY_EPOCHS:
        problems.append(f"{length} of {len(case.used_records):,} images, as for a larger set. {advice}")
    elif epochs < 1:
        problems.append(f"{length}: not all {len(case.used_records):,} images are seen. {advice}")
    yield from [Finding(WARNING, problem) for problem in problems] or [Finding(OK, length)]


def _rate(cfg: CfgNode) -> Iterator[str]:
    rate, scaled = cfg.SOLVER.BASE_LR, scaled_learning_rate(cfg)
    if rate > _FAR * scaled or rate < scaled / _FAR:
        effect = "training diverges, even with clipping" if rate > scaled else "next to nothing is learnt"
        share = f"1/{_number(scaled / rate)} of" if 0 < rate < scaled else f"{_number(rate / scaled)} times"
        yield (
            f"SOLVER.BASE_LR is {rate:g}, {share} what {scaling(cfg)} gives for IMS_PER_BATCH "
            f"{cfg.SOLVER.IMS_PER_BATCH}: {effect}. Set it near {scaled:g}."
        )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _warmup(cfg: CfgNode) -> Iterator[str]:
    warmup, length = cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.MAX_ITER
    if warmup >= length:
        yield (
            f"SOLVER.WARMUP_ITERS is {warmup:,} and SOLVER.MAX_ITER {length:,}: the rate never reaches BASE_LR. "
            f"Set WARMUP_ITERS {length // 10} or less."
        )


def _steps(cfg: CfgNode) -> Iterator[str]:
    length = cfg.SOLVER.MAX_ITER
    beyond = [step for step in cfg.SOLVER.STEPS if step >= length]
    if beyond and cfg.SOLVER.LR_SCHEDULER_NAME in _STEPPED:
        yield (
            f"SOLVER.STEPS {tuple(beyond)} come after the run's end, SOLVER.MAX_ITER {length:,}: the rate stays as it "
            f"is. Set STEPS such as ({length * 2 // 3}, {length * 8 // 9}), or () to keep it."
        )


def check_sizes(case: Case) -> Iterator[Finding]:
    """Check that images have similar sizes in training and in evaluation."""
    trained, tested = case.cfg.INPUT.MIN_SIZE_TRAIN, case.cfg.INPUT.MIN_SIZE_TEST
    if case.cfg.INPUT.CROP.ENABLED:  # a crop's scale is not that of its image
        yield Finding(OK, f"crops (INPUT.CROP) of shorter side {tuple(trained)} in training, {tested} in evaluation")
    elif min(trained) > 0 and tested > 0 and not min(trained) / _OTHER_SIZE < tested < max(trained) * _OTHER_SIZE:
        yield Finding(
            WARNING,
            f"INPUT.MIN_SIZE_TEST is {tested} and INPUT.MIN_SIZE_TRAIN {tuple(trained)}: in evaluation objects have "
            f"other sizes than were trained. Set MIN_SIZE_TEST {max(trained)}.",
        )
    else:
        yield Finding(OK, f"shorter side {tuple(trained)} in training, {tested} in evaluation (0: as it is)")
