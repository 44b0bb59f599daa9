"""Checks of what the config builds: the components, the weights to start from, the first loss."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from detectron2.solver import build_lr_scheduler

from ...data import FocalDatasetMapper
from ...engine import AtomicCheckpointer, StepTrainer
from ...engine.optimizer import build_optimizer
from ...files.weights import Fit, missing_file
from ...retinanet import FocalRetinaNet
from ..init import find_problems, first_step
from .case import ERROR, OK, SKIPPED, WARNING, Case, Finding, few, first_batch_config, percent
from .settings import has_encoder_weights

_FIRST_BATCH = 2  # images: enough for a loss, and few enough for a CPU
_TOLERANCE = 0.25  # of the first loss, as in the analysis `init`


def check_components(case: Case) -> Iterator[Finding]:
    """Check that the model, the mapper, the optimiser and its schedule can be built."""
    model, cfg = case.model, case.cfg
    FocalDatasetMapper(cfg, is_train=True)
    build_lr_scheduler(cfg, build_optimizer(cfg, model))
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    yield Finding(OK, f"{type(model).__name__} of {size:.1f}M parameters, mapper, optimiser and schedule are built")


class _QuietCheckpointer(AtomicCheckpointer):
    """Loads weights as training does, without logging what does not fit, which the checks report."""

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        pass


def check_weights(case: Case) -> Iterator[Finding]:
    """Check that ``MODEL.WEIGHTS`` loads, for the same classes, and that no random parameter is frozen."""
    if case.resumes:
        yield _resumed(case)
        return
    model, path = case.model, case.cfg.MODEL.WEIGHTS
    if not path:
        encoder = "those of the encoder only (MODEL.FOCAL.TIMM.WEIGHTS)"
        text = encoder if has_encoder_weights(case.cfg) else "none: all are random"
        yield from _frozen(case, [name for name, _ in model.named_parameters()]) or [Finding(OK, text)]
        return
    if problem := missing_file("MODEL.WEIGHTS", path, "a path, a URL, or nothing for random weights"):
        yield Finding(ERROR, problem)
        return
    checkpointer = _QuietCheckpointer(model)
    checkpointer.load(path)
    fit = checkpointer.fit
    starts_anew = [*fit.missing, *(name for name, _, _ in fit.other_shapes)]
    total = len(model.state_dict())
    if len(starts_anew) == total:
        yield Finding(
            ERROR,
            f"{path} has none of the model's {total} tensors: nothing is loaded. Give weights of this architecture, or "
            "set MODEL.WEIGHTS to nothing.",
        )
        return
    findings = [_other_shapes(case, fit)] if fit.other_shapes else []
    findings += _frozen(case, starts_anew)
    loaded = total - len(starts_anew)
    rest = "" if loaded == total else f"; the rest, such as {few(starts_anew, most=2)}, is initialised"
    yield from findings or [Finding(OK, f"{percent(loaded, total)} of the model's tensors are in {path}{rest}")]


def _resumed(case: Case) -> Finding:
    """Load the checkpoint that the run resumes from, as training does; an error if model or optimiser do not fit."""
    trainer = StepTrainer(case.model, [], build_optimizer(case.cfg, case.model))
    states = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: trainer.load_state_dict(state["_trainer"]))
    checkpointer = _QuietCheckpointer(case.model, case.run.save_dir, trainer=states)
    checkpointer.resume_or_load("")
    return Finding(OK, f"model and optimiser take the state of {checkpointer.resumed_from}")


def _other_shapes(case: Case, fit: Fit) -> Finding:
    """Return the finding on tensors of other shapes, whose cause is most often another number of classes."""
    shapes = {name: (theirs, ours) for name, theirs, ours in fit.other_shapes}
    others = f"{len(shapes)} tensors of MODEL.WEIGHTS have other shapes than the model's"
    bias = shapes.get("head.cls_score.bias")
    if bias and set(shapes) <= {"head.cls_score.bias", "head.cls_score.weight"}:
        (theirs,), (ours,) = bias
        num_classes = case.cfg.MODEL.RETINANET.NUM_CLASSES
        classes = theirs * num_classes / ours
        if classes == int(classes):
            return Finding(
                WARNING,
                f"MODEL.WEIGHTS has a classifier for {int(classes)} classes, and MODEL.RETINANET.NUM_CLASSES is "
                f"{num_classes}: head.cls_score is initialised, all else is loaded. That is right for new classes. To "
                "keep classes of the same names, use `python -m focal_plugin convert classes`; for the old "
                f"classes, set NUM_CLASSES {int(classes)}.",
            )
    listed = few((f"{name} {theirs} for {ours}" for name, (theirs, ours) in shapes.items()), most=2)
    return Finding(WARNING, f"{others}, and are not loaded: {listed}. Give weights of this architecture.")


def _frozen(case: Case, random: list[str]) -> list[Finding]:
    """Return a finding if some of the ``random`` parameters are not trained."""
    random = set(random)
    if has_encoder_weights(case.cfg):
        random = {name for name in random if not name.startswith("backbone.bottom_up.")}
    frozen = [name for name, p in case.model.named_parameters() if name in random and not p.requires_grad]
    if not frozen:
        return []
    keys = "MODEL.BACKBONE.FREEZE_AT 0 and a norm that trains, such as MODEL.RESNETS.NORM GN"
    return [
        Finding(
            WARNING,
            f"{len(frozen)} parameters are random and never trained, such as {frozen[0]}. Give MODEL.WEIGHTS that have "
            f"them, or to train from random weights set {keys}.",
        )
    ]


def check_first_loss(case: Case) -> Iterator[Finding]:
    """Check the class loss of the first step against its closed form."""
    if FocalRetinaNet.__name__ != case.cfg.MODEL.META_ARCHITECTURE:
        yield Finding(SKIPPED, f"{case.cfg.MODEL.META_ARCHITECTURE} is no FocalRetinaNet")
        return
    if case.resumes:
        yield Finding(SKIPPED, "the run resumes, and MODEL.WEIGHTS is not read")
        return
    step = first_step(first_batch_config(case.cfg, _FIRST_BATCH))
    observed, expected = f"{step.observed:.3g} a positive", f"{step.expected:.3g}"
    trained = bool(case.cfg.MODEL.WEIGHTS) and step.bias_off is not None and step.bias_off > 1e-3
    if trained and math.isfinite(step.observed):
        yield Finding(OK, f"{observed}: MODEL.WEIGHTS has a trained classifier, a new one would start at {expected}")
        return
    problems = find_problems(step, _TOLERANCE)
    yield from [Finding(ERROR, problem) for problem in problems] or [
        Finding(OK, f"loss_cls is {observed}, by its closed form {expected} (prior {step.prior:.3g})")
    ]
