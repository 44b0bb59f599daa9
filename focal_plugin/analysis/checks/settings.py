"""Checks of the config, and of the folder that the run writes to."""

import os
from collections.abc import Iterator

from detectron2.config import CfgNode

from ...config import ConfigError
from ...config.explain import flatten
from ...engine.advice import learning_rate, scaled_learning_rate, scaling, unread_keys, warmup
from ...engine.best import check_metric
from ...engine.changes import changes, describe, plain_config
from ...engine.checkpoint import read_whole
from ...engine.loader import check_batch
from ...engine.lock import holder
from ...engine.loggers import check_loggers
from ...files.regular import read_regular
from ...files.safe_yaml import MOST_BYTES, parse_yaml
from .case import ERROR, OK, WARNING, Case, Finding, few


def check_config(case: Case) -> Iterator[Finding]:
    """Check that the config can be read, its modules imported and its data sets registered."""
    imports = case.cfg.MODEL.FOCAL.IMPORTS
    own = [f"{key} {value}" for key, value in flatten(case.cfg).items() if ".ARGS." in key]
    with_imports = f", with {few(imports)} imported" if imports else ""
    yield Finding(OK, "; ".join([f"{case.config_file or 'defaults'}{with_imports}", *own]))


def check_learning_rate(case: Case) -> Iterator[Finding]:
    """Check that a step's images can be divided, ``BASE_LR`` against their number, and the warm-up."""
    solver = case.cfg.SOLVER
    check_batch(solver.IMS_PER_BATCH, case.num_gpus, solver.ACCUMULATE)
    fine = (
        f"SOLVER.BASE_LR {solver.BASE_LR:g} with {solver.IMS_PER_BATCH} images a step ({scaling(case.cfg)}: "
        f"{scaled_learning_rate(case.cfg):g}), WARMUP_ITERS {solver.WARMUP_ITERS}"
    )
    yield from _warnings([*learning_rate(case.cfg), *warmup(case.cfg)], fine)


def check_clipping(case: Case) -> Iterator[Finding]:
    """Check that gradients are clipped if training starts from random weights."""
    solver = case.cfg.SOLVER
    if solver.CLIP_GRADIENTS.ENABLED:
        clip = solver.CLIP_GRADIENTS
        yield Finding(OK, f"clipped by {clip.CLIP_TYPE} at {clip.CLIP_VALUE:g}")
    elif case.resumes or case.cfg.MODEL.WEIGHTS or has_encoder_weights(case.cfg):
        yield Finding(OK, "not clipped, and trained from given weights")
    else:
        yield Finding(
            WARNING,
            "all weights are random (MODEL.WEIGHTS is empty) and gradients are not clipped: training may diverge. Set "
            "SOLVER.CLIP_GRADIENTS.ENABLED True with CLIP_TYPE norm and CLIP_VALUE 10.0, or start from weights.",
        )


def check_unread_keys(case: Case) -> Iterator[Finding]:
    """Check that the model and the backbone read the keys that are set."""
    yield from _warnings([message for _, message in unread_keys(case.cfg)], "none among those of heads and backbone")


def check_evaluations(case: Case) -> Iterator[Finding]:
    """Check what evaluations are compared by, and where the run is logged."""
    cfg = case.cfg
    check_loggers(cfg.LOGGERS, cfg.VIS_PERIOD)
    check_metric(cfg, by_type=True)
    best = f"the best by {cfg.TEST.BEST_METRIC}" if cfg.TEST.BEST_METRIC else "no TEST.BEST_METRIC"
    when = f"every {cfg.TEST.EVAL_PERIOD} steps" if cfg.TEST.EVAL_PERIOD else "at the end"
    yield Finding(OK, f"{when}, {best}; logged to {few(cfg.LOGGERS)}")


def check_output_dir(case: Case) -> Iterator[Finding]:
    """Check that the run has a folder of its own, or is one that can go on."""
    if training := holder(case.cfg.OUTPUT_DIR):
        yield Finding(
            ERROR,
            f"OUTPUT_DIR {case.cfg.OUTPUT_DIR} is in use: {training} trains there. Wait, or set another OUTPUT_DIR.",
        )
    if case.resumes:
        yield from _check_resumed(case)
        return
    problem = "there is no run to --resume: training starts from the beginning" if case.resume else ""
    yield Finding(WARNING if problem else OK, f"OUTPUT_DIR {case.run.save_dir}: {problem or 'no earlier run'}")


def _check_resumed(case: Case) -> Iterator[Finding]:
    """Check what a resumed run does with the keys that have changed since its checkpoint."""
    path, most = case.run.last_whole_checkpoint(), case.cfg.SOLVER.MAX_ITER
    content = read_whole(path)
    theirs = content.get("config") or _read_config(os.path.join(case.run.save_dir, "config.yaml"))
    changed = changes(theirs, plain_config(case.cfg)) if theirs else {}
    if case.cfg.SEED < 0:
        changed.pop("SEED", None)  # the run's is taken
    if (steps := content.get("iteration", -1) + 1) > most:
        yield Finding(ERROR, f"{path} has {steps} steps, and SOLVER.MAX_ITER is {most}: nothing is left to train.")
    elif "SEED" in changed:
        yield Finding(ERROR, f"{path} is of a run with other values of {describe(changed)}: leave out SEED.")
    elif changed:
        yield Finding(WARNING, f"resumes from {path}, with other values from there on: {describe(changed)}.")
    else:
        yield Finding(OK, f"OUTPUT_DIR {case.run.save_dir}: resumes from {os.path.basename(path)}")


def has_encoder_weights(cfg: CfgNode) -> bool:
    """Return whether the backbone loads weights of its own."""
    return cfg.MODEL.BACKBONE.NAME == "build_timm_fpn_backbone" and bool(cfg.MODEL.FOCAL.TIMM.WEIGHTS)


def _warnings(messages: list[str], fine: str) -> Iterator[Finding]:
    yield from [Finding(WARNING, message) for message in messages] or [Finding(OK, fine)]


def _read_config(path: str) -> dict | None:
    """Return the keys of a config file; None if it cannot be read."""
    try:
        return flatten(parse_yaml(read_regular(path, MOST_BYTES), path))
    except (OSError, ConfigError):
        return None
