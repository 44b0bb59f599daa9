"""Mistakes in a config that Detectron2 accepts without a word. Each function looks at a config and changes nothing."""

import math
from collections.abc import Iterator

from detectron2.config import CfgNode, get_cfg

# The schedule of Detectron2's RetinaNet configs, which the paper's section 4.1 also uses.
_REFERENCE_BATCH, _REFERENCE_LR = 16, 0.01

# Keys that two-stage models read under MODEL.ROI_HEADS and RetinaNet under MODEL.RETINANET.
_TWINS = ("NUM_CLASSES", "SCORE_THRESH_TEST", "NMS_THRESH_TEST", "IOU_THRESHOLDS", "IOU_LABELS")


def advise(cfg: CfgNode) -> list[str]:
    """What is probably not meant in ``cfg``, each a message that names the key and says what to do instead."""
    return [*_learning_rate(cfg), *_roi_heads_keys(cfg)]


def _learning_rate(cfg: CfgNode) -> Iterator[str]:
    """The learning rate of 16 images a step, kept with fewer: the usual cause of a loss that becomes NaN."""
    solver = cfg.SOLVER
    batch, lr = solver.IMS_PER_BATCH, solver.BASE_LR
    if solver.CLIP_GRADIENTS.ENABLED or batch >= _REFERENCE_BATCH or not math.isclose(lr, _REFERENCE_LR):
        return
    scaled = lr * batch / _REFERENCE_BATCH
    yield (
        f"SOLVER.BASE_LR {lr:g} is for {_REFERENCE_BATCH} images a step, and SOLVER.IMS_PER_BATCH is {batch}: the loss "
        f"may become NaN. Linear scaling gives SOLVER.BASE_LR {scaled:g}, and {_REFERENCE_BATCH / batch:g} times the "
        "MAX_ITER, STEPS and WARMUP_ITERS. (Or leave the batch as it was: SOLVER.REFERENCE_WORLD_SIZE 8 scales all of "
        "them to the number of GPUs, and SOLVER.ACCUMULATE fits a large batch into little memory.)"
    )


def _roi_heads_keys(cfg: CfgNode) -> Iterator[str]:
    """Values set under MODEL.ROI_HEADS, which no RetinaNet reads."""
    model = cfg.MODEL
    if "RetinaNet" not in model.META_ARCHITECTURE:
        return
    defaults = get_cfg().MODEL.ROI_HEADS
    for key in _TWINS:
        value, read = model.ROI_HEADS[key], model.RETINANET[key]
        if value not in (defaults[key], read):
            yield (
                f"MODEL.ROI_HEADS.{key} is set to {value}, but {model.META_ARCHITECTURE} reads MODEL.RETINANET.{key}, "
                f"which is {read}: set that instead."
            )
