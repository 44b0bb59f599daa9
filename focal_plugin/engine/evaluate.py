"""When a run evaluates, and by which rules."""

from collections.abc import Callable
from contextlib import nullcontext

from detectron2.data import MetadataCatalog
from detectron2.engine.hooks import EvalHook

from ..config import ConfigError
from .resume import CheckpointHook


class EvaluationHook(EvalHook):
    """Detectron2's ``EvalHook``, except that it evaluates after training only if all steps are done.

    Detectron2's also does when the last step has failed, or when a signal ends the run there. And a signal during an
    evaluation between steps does not wait for its end.

    Args:
        period, function: as those of ``EvalHook``.
        save: returns the ``CheckpointHook`` of the run.

    Attributes:
        last: the iteration of the last evaluation, ``max_iter`` for the one after training; None before.
    """

    def __init__(self, period: int, function: Callable[[], dict], save: Callable[[], CheckpointHook] | None = None):
        super().__init__(period, function)
        self._save = save
        self.last: int | None = None

    def after_step(self) -> None:
        """Evaluate, if this step is one of the period's but not the last."""
        with self._save().interruptible() if self._save and self.is_due() else nullcontext():
            super().after_step()

    def is_due(self) -> bool:
        """Return whether there is an evaluation after this step and before the next."""
        done = self.trainer.iter + 1
        return self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter

    def after_train(self) -> None:
        """Evaluate, if the run is complete."""
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()

    def _do_eval(self) -> None:
        super()._do_eval()
        self.last = self.trainer.iter


def evaluator_type(dataset_name: str) -> str:
    """Return by whose rules a data set is evaluated: coco, lvis or pascal_voc, as its metadata says; else coco.

    Raises:
        ConfigError: the metadata says something else.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if kind not in ("coco", "lvis", "pascal_voc"):
        raise ConfigError(
            f"{dataset_name!r} of DATASETS.TEST is of evaluator type {kind!r}; expected coco, lvis or pascal_voc. "
            "For others, override build_evaluator of focal_plugin.engine.Trainer."
        )
    return kind
