"""The best weights of a run by a metric of its evaluations, and the end of a run that gets no better."""

import logging
import math
import re
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from ..config import ConfigError
from ..config.explain import near_keys
from .checkpoint import AtomicCheckpointer
from .evaluate import EvaluationHook, evaluator_type
from .validation import NAME

logger = logging.getLogger(__name__)

BEST = "model_best"  # the checkpoint's name
_COCO = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_METRICS = {"coco": _COCO, "lvis": (*_COCO, "APr", "APc", "APf"), "pascal_voc": ("AP", "AP50", "AP75")}


class EarlyStop(BaseException):
    """Ends a run as complete before ``SOLVER.MAX_ITER``. No ``Exception``, which Detectron2 would log as an error."""


class BestHook(HookBase):
    """After each evaluation, keep the weights if they are the best so far, or end the run if none was for too long.

    Detectron2's ``BestCheckpointer`` forgets the best value when a run resumes, lets ``--resume`` go on from the best
    checkpoint in place of the last, and knows the metric on the main process alone, which cannot end the others.

    Register it in every process, as the last hook: a run that it ends has nothing left to do for its last step.

    Args:
        metric: a name in the event storage. The least is best if its last word has "loss" in it, else the most.
        patience: so many evaluations in a row without a better value end the run by ``EarlyStop``; 0 for never.
        evaluation: the hook that evaluates.
        checkpointer: writes ``model_best.pth``.
        finish: saves the step that is done as the run's last; ``max_iter`` is its number by then.
        judged: returns the model whose evaluation gives the metric, if that is not the checkpointer's.
    """

    def __init__(
        self,
        metric: str,
        patience: int,
        *,
        evaluation: EvaluationHook,
        checkpointer: AtomicCheckpointer,
        finish: Callable[[], None],
        judged: Callable[[], nn.Module] | None = None,
    ):
        self.metric, self.patience = metric, patience
        self.evaluation, self.checkpointer, self.finish = evaluation, checkpointer, finish
        self.judged = judged or (lambda: checkpointer.model)
        self.value: float | None = None  # the best
        self.steps = 0  # that it was reached after
        self.waited = 0  # evaluations since
        self._judged: int | None = None  # the step whose evaluation was judged last

    def before_train(self) -> None:
        """End a run at once that has ended so before.

        Raises:
            EarlyStop: it has, by the patience that is asked for now.
        """
        self._judged = None
        if self._is_over():
            self._stop(self.trainer.start_iter)

    def after_step(self) -> None:
        """Judge the evaluation of this step, if there was one.

        Raises:
            EarlyStop: the patience is exhausted.
            ConfigError: the evaluation has not given the metric.
        """
        if self.evaluation.last == self.trainer.iter:
            self._judge(steps=self.trainer.iter + 1)
            if self._is_over():
                self.trainer.max_iter = self.trainer.iter + 1
                self.finish()
                self._stop(self.trainer.max_iter)

    def after_train(self) -> None:
        """Judge the evaluation after the last step."""
        if self.evaluation.last == self.trainer.iter == self.trainer.max_iter and not self._is_over():
            self._judge(steps=self.trainer.iter)
        if self.value is not None:
            logger.info(f"Best {self._now()}: {self.checkpointer.save_dir}/{BEST}.pth.")

    def _is_over(self) -> bool:
        return 0 < self.patience <= self.waited

    def _stop(self, steps: int) -> None:
        logger.info(
            f"TEST.PATIENCE: stopping after {steps} steps, since {self.metric} was not better in {self.waited} "
            f"evaluations. To go on, use --resume with another TEST.PATIENCE."
        )
        self.trainer.iter = self.trainer.max_iter = steps  # complete: the other hooks end as after the last step
        raise EarlyStop

    def _judge(self, steps: int) -> None:
        if self._judged == self.evaluation.last:
            return
        self._judged = self.evaluation.last
        value = self._value()
        if math.isfinite(value) and (self.value is None or self._is_better(value)):
            self.value, self.steps, self.waited = value, steps, 0
            if comm.is_main_process():
                notes = {"iteration": steps - 1, "metric": self.metric, "value": value}
                self.checkpointer.save_weights(BEST, self.judged(), **notes)
        else:
            self.waited += 1
            best = "none is known yet" if self.value is None else f"the best is {self._now()}"
            logger.info(f"{self.metric} is {value:.4f}, not better for {self.waited} evaluations in a row; {best}.")

    def _now(self) -> str:
        return f"{self.metric} {self.value:.4f}, after {self.steps} steps"

    def _is_better(self, value: float) -> bool:
        return value < self.value if "loss" in self.metric.rpartition("/")[2] else value > self.value

    def _value(self) -> float:
        """The value of this evaluation, which is known on the main process, in all of them."""
        storage, step = self.trainer.storage, self.evaluation.last
        found = {name: value for name, (value, at) in storage.latest().items() if at == step and "/" in name}
        found = comm.all_gather(found)[0]
        if self.metric not in found:
            near = near_keys(self.metric, list(found)) or sorted(found)[:6]
            raise ConfigError(
                f"TEST.BEST_METRIC (in a LazyConfig train.best_metric) is {self.metric!r}, which the evaluation has "
                f"not given; expected one of its names, such as {', '.join(near)}."
            )
        return found[self.metric]

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and how long ago it was."""
        return {"metric": self.metric, "value": self.value, "steps": self.steps, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; from none if it is of another metric."""
        if state["metric"] == self.metric:
            self.value, self.steps, self.waited = state["value"], state["steps"], state["waited"]
        else:
            logger.warning(f"TEST.BEST_METRIC was {state['metric']}: the best {self.metric} counts from here on.")


def check_judged(
    metric: str, patience: int, period: int, *, tested: object, validated: object, averaged: object
) -> None:
    """Check that a run with patience has evaluations and knows what to compare, and that these can give it.

    They have results on test sets if ``tested``, losses if ``validated``, and an averaged model if ``averaged``.

    Raises:
        ConfigError: it has none, or does not; or they cannot.
    """
    if patience and not metric:
        raise ConfigError(
            f"TEST.PATIENCE is {patience}, and TEST.BEST_METRIC is empty; expected what is to get better, such as "
            "bbox/AP. (In a LazyConfig train.patience and train.best_metric.)"
        )
    if patience and not period:
        raise ConfigError(
            f"TEST.PATIENCE is {patience}, and TEST.EVAL_PERIOD is 0; expected evaluations every so many steps. (In a "
            "LazyConfig train.patience and train.eval_period.)"
        )
    losses, (plain, beside) = metric.startswith(f"{NAME}/"), _judged_beside(metric)
    if beside == "_TTA":
        raise ConfigError(
            f"TEST.BEST_METRIC is {metric!r}, and test-time augmentation is evaluated after the last step alone; "
            f"expected a metric of each evaluation, such as {plain}."
        )
    for needed, given, key, lazy in (
        (losses, validated, "DATASETS.VALIDATION is empty; expected a data set", "dataloader.validation"),
        (metric and not losses, tested, "DATASETS.TEST is empty; expected a data set", "dataloader.evaluator"),
        (
            beside == "_EMA",
            averaged,
            "MODEL.FOCAL.EMA.DECAY is 0; expected a decay, such as 0.999",
            "train.ema.decay",
        ),
    ):
        if needed and not given:
            raise ConfigError(f"TEST.BEST_METRIC is {metric!r}, and {key}. (In a LazyConfig {lazy}.)")


def _judged_beside(metric: str) -> tuple[str, str]:
    """Split a metric of what is judged beside the model, as bbox_EMA/AP, into bbox/AP and _EMA; others and ""."""
    found = re.search(r"(?:^|/)(?:bbox|segm|keypoints)(_EMA|_TTA)/", metric)
    return (metric[: found.start(1)] + metric[found.end(1) :], found[1]) if found else (metric, "")


def check_metric(cfg: CfgNode, by_type: bool) -> None:
    """Check ``TEST.BEST_METRIC``, ``TEST.PATIENCE`` and the test sets, as far as one knows without evaluating.

    Args:
        cfg: the whole config.
        by_type: whether each test set is evaluated by its ``evaluator_type``, so that the names are known.

    Raises:
        ConfigError: no evaluation will give the metric, or as ``check_judged`` and ``evaluator_type``.
    """
    metric, sets, data = cfg.TEST.BEST_METRIC, list(cfg.DATASETS.TEST), cfg.DATASETS
    given = {"tested": sets, "validated": data.VALIDATION, "averaged": cfg.MODEL.FOCAL.EMA.DECAY}
    check_judged(metric, cfg.TEST.PATIENCE, cfg.TEST.EVAL_PERIOD, **given)
    kinds = [evaluator_type(name) for name in sets if by_type]
    if not metric or metric.startswith(f"{NAME}/") or not by_type:
        return
    known = {
        f"{name}/bbox/{ap}" if len(sets) > 1 else f"bbox/{ap}"
        for name, kind in zip(sets, kinds)
        for ap in _METRICS[kind]
    }
    plain, _ = _judged_beside(metric)
    group, _, name = plain.rpartition("/")
    is_class = name.startswith("AP-") and any(one.startswith(f"{group}/") for one in known)
    is_task = group.rpartition("/")[2] not in ("", "bbox")  # of masks or keypoints
    if plain not in known and not is_class and not is_task:
        near = near_keys(metric, sorted(known)) or sorted(known)[:1]
        raise ConfigError(
            f"TEST.BEST_METRIC is {metric!r}; expected a name that metrics.json will have, such as {', '.join(near)}."
        )
