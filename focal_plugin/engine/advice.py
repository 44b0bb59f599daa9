"""Find probable mistakes in a config that Detectron2 accepts silently. No rule changes the config."""

from collections.abc import Iterator

from detectron2.config import CfgNode, get_cfg

# The schedule of Detectron2's RetinaNet configs, which the paper's section 4.1 also uses.
_REFERENCE_BATCH, _REFERENCE_LR, _REFERENCE_WARMUP = 16, 0.01, 1000
_TOO_HIGH = 2  # times the scaled rate; below that it may be another schedule than the reference's
# That of torchvision's RetinaNet v2. From random weights ten times as much can be right, too.
_REFERENCE_LR_ADAMW, _TOO_HIGH_ADAMW = 1e-4, 50
_SHORT_WARMUP = 100

# Keys that two-stage models read under MODEL.ROI_HEADS and RetinaNet under MODEL.RETINANET.
_TWINS = ("NUM_CLASSES", "SCORE_THRESH_TEST", "NMS_THRESH_TEST", "IOU_THRESHOLDS", "IOU_LABELS")

# Detectron2's builders, which do not read MODEL.FOCAL.TOP_BLOCK.
_FIXED_TOP_BLOCK = ("build_retinanet_resnet_fpn_backbone", "build_resnet_fpn_backbone")


def advise(cfg: CfgNode) -> list[str]:
    """Return a message for each probable mistake in ``cfg``: the key, and what to do instead."""
    return [*learning_rate(cfg), *warmup(cfg), *(message for _, message in unread_keys(cfg))]


def scaled_learning_rate(cfg: CfgNode) -> float:
    """Return the reference's learning rate for the optimiser of ``cfg``, scaled to its images per step.

    Linearly for SGD; by the square root for AdamW (https://arxiv.org/abs/2205.10287).
    """
    larger = cfg.SOLVER.IMS_PER_BATCH / _REFERENCE_BATCH
    return _REFERENCE_LR_ADAMW * larger**0.5 if cfg.SOLVER.OPTIMIZER == "adamw" else _REFERENCE_LR * larger


def scaling(cfg: CfgNode) -> str:
    """Return what ``scaled_learning_rate`` does, for messages."""
    return "square-root scaling (AdamW)" if cfg.SOLVER.OPTIMIZER == "adamw" else "linear scaling"


def learning_rate(cfg: CfgNode) -> Iterator[str]:
    """Find a learning rate for larger batches, without clipping, or for SGD: the usual causes of a NaN as loss."""
    solver, scaled = cfg.SOLVER, scaled_learning_rate(cfg)
    if scaled <= 0:  # no images a step: the loader raises an error
        return
    if solver.OPTIMIZER == "adamw":  # whose steps clipping does not shorten
        if _TOO_HIGH_ADAMW * scaled <= solver.BASE_LR * (1 + 1e-6):
            yield (
                f"SOLVER.BASE_LR {solver.BASE_LR:g} is {solver.BASE_LR / scaled:.3g} times what AdamW is trained with "
                f"at {solver.IMS_PER_BATCH} images a step: a rate for SGD? Set SOLVER.BASE_LR {scaled:.1g}, or up to "
                "ten times that from random weights."
            )
        return
    if solver.CLIP_GRADIENTS.ENABLED or _TOO_HIGH * scaled * (1 - 1e-6) > solver.BASE_LR:
        return
    batch = solver.IMS_PER_BATCH
    yield (
        f"SOLVER.BASE_LR {solver.BASE_LR:g} is {solver.BASE_LR / scaled:g} times what linear scaling gives for "
        f"SOLVER.IMS_PER_BATCH {batch} ({_REFERENCE_LR:g} for {_REFERENCE_BATCH} images): the loss may become NaN. Set "
        f"SOLVER.BASE_LR {scaled:g}, and take {_REFERENCE_BATCH / batch:g} times the MAX_ITER, STEPS and WARMUP_ITERS "
        f"of {_REFERENCE_BATCH} images. (Or keep the rate: with SOLVER.CLIP_GRADIENTS.ENABLED True, or with a larger "
        "batch, which SOLVER.ACCUMULATE fits into little memory. SOLVER.REFERENCE_WORLD_SIZE scales all of them to the "
        "number of GPUs.)"
    )


def warmup(cfg: CfgNode) -> Iterator[str]:
    """Find a warm-up that reaches the whole learning rate within a few steps, without clipping."""
    solver = cfg.SOLVER
    if solver.CLIP_GRADIENTS.ENABLED or solver.WARMUP_ITERS >= _SHORT_WARMUP:
        return
    if scaled_learning_rate(cfg) * (1 - 1e-6) <= solver.BASE_LR:
        yield (
            f"SOLVER.WARMUP_ITERS is {solver.WARMUP_ITERS} and gradients are not clipped: the first steps may diverge. "
            f"Set SOLVER.WARMUP_ITERS {_REFERENCE_WARMUP}, as RetinaNet's schedules have it, or "
            "SOLVER.CLIP_GRADIENTS.ENABLED True with CLIP_TYPE norm and CLIP_VALUE 10.0."
        )


def faster(cfg: CfgNode) -> Iterator[str]:
    """Find what would make steps on a GPU faster, as measured on one (``docs/results.md``), and changes no result."""
    model = cfg.MODEL
    is_mixed = model.DEVICE.startswith("cuda") and cfg.SOLVER.AMP.ENABLED
    if is_mixed and model.META_ARCHITECTURE == "FocalRetinaNet" and not model.FOCAL.CHANNELS_LAST:
        yield "On a GPU in mixed precision, steps are faster with MODEL.FOCAL.CHANNELS_LAST True"


def unread_keys(cfg: CfgNode) -> Iterator[tuple[str, str]]:
    """Yield what ``cfg`` sets and its model does not read: the key or section, and the message."""
    yield from _solver_keys(cfg)
    yield from _roi_heads_keys(cfg)
    yield from _backbone_keys(cfg)


def _solver_keys(cfg: CfgNode) -> Iterator[tuple[str, str]]:
    """Find keys of SGD that are set for AdamW."""
    for key in ("MOMENTUM", "NESTEROV") if cfg.SOLVER.OPTIMIZER == "adamw" else ():
        if (value := cfg.SOLVER[key]) != get_cfg().SOLVER[key]:
            yield (
                f"SOLVER.{key}",
                f"SOLVER.{key} is set to {value}, but SOLVER.OPTIMIZER adamw does not read it: leave it out.",
            )


def _roi_heads_keys(cfg: CfgNode) -> Iterator[tuple[str, str]]:
    """Find values under MODEL.ROI_HEADS, which no RetinaNet reads."""
    model = cfg.MODEL
    if "RetinaNet" not in model.META_ARCHITECTURE:
        return
    defaults = get_cfg().MODEL.ROI_HEADS
    for key in _TWINS:
        value, read = model.ROI_HEADS[key], model.RETINANET[key]
        if value not in (defaults[key], read):
            yield (
                f"MODEL.ROI_HEADS.{key}",
                f"MODEL.ROI_HEADS.{key} is set to {value}, but {model.META_ARCHITECTURE} reads MODEL.RETINANET.{key}, "
                f"which is {read}: set that instead.",
            )


def _backbone_keys(cfg: CfgNode) -> Iterator[tuple[str, str]]:
    """Find keys of one backbone builder that are set for another."""
    source, name = cfg.MODEL.FOCAL.TOP_BLOCK, cfg.MODEL.BACKBONE.NAME
    if source != "c5" and name in _FIXED_TOP_BLOCK:
        yield (
            "MODEL.FOCAL.TOP_BLOCK",
            f"MODEL.FOCAL.TOP_BLOCK is set to {source!r}, but Detectron2's {name} does not read it: set "
            "MODEL.BACKBONE.NAME build_focal_resnet_fpn_backbone, which is the same but for that.",
        )
    depth = cfg.MODEL.RESNETS.DEPTH
    if name == "build_timm_fpn_backbone" and depth != get_cfg().MODEL.RESNETS.DEPTH:
        yield (
            "MODEL.RESNETS",
            f"MODEL.RESNETS.DEPTH is set to {depth}, but {name} makes the encoder that MODEL.FOCAL.TIMM.NAME names, "
            f"{cfg.MODEL.FOCAL.TIMM.NAME}: set that instead.",
        )
