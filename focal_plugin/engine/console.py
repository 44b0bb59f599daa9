"""Keep the screen short while a run goes on; ``OUTPUT_DIR/log.txt`` has everything."""

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from detectron2.engine import HookBase
from detectron2.utils.events import CommonMetricPrinter, EventWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .evaluate import EvaluationHook
from .metrics import MetricsWriter


@contextmanager
def off_screen(name: str) -> Iterator[None]:
    """Send what the logger ``name`` logs below a warning to its files, and not to the screen."""
    target = logging.getLogger(name)

    def to_files(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            return True
        for handler in target.handlers:  # looked up at each record: Detectron2's default_setup adds them as it goes
            if getattr(handler, "stream", None) not in (sys.stdout, sys.stderr):
                handler.handle(record)
        return False

    # A logger's filter sees only the records logged with that very logger, so its children get it too.
    children = [logger for child, logger in logging.root.manager.loggerDict.items() if child.startswith(f"{name}.")]
    loggers = [target, *(child for child in children if isinstance(child, logging.Logger))]
    for logger in loggers:
        logger.addFilter(to_files)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(to_files)


class EarlyWriter(HookBase):
    """Write after the first step of a run, to show that it works, and after the fifth, when the time left is known.

    In metrics.json the steps are counted from the run's start, and not from where it was resumed. And after each
    evaluation all but the screen is written, or the next evaluation might come before its numbers are.

    Args:
        writers: the writers that Detectron2's ``PeriodicWriter`` calls from then on.
        period: the period of that hook, in steps.
        evaluation: the hook that evaluates, before this one.
    """

    def __init__(self, writers: list[EventWriter], period: int = 20, evaluation: EvaluationHook | None = None):
        self.writers, self.period, self.evaluation = writers, period, evaluation

    def after_step(self) -> None:
        """Write, if this is one of the two steps, or there was an evaluation, and it is not written anyway."""
        step = self.trainer.iter + 1
        evaluated = self.evaluation is not None and self.evaluation.last == self.trainer.iter
        if step < self.trainer.max_iter and step % self.period:
            for writer in self.writers:
                start = 0 if isinstance(writer, MetricsWriter) else self.trainer.start_iter
                if step - start in (1, 5) or (evaluated and not isinstance(writer, CommonMetricPrinter)):
                    writer.write()


class ProgressHook(HookBase):
    """A bar on the screen with the steps that are done, the time left and the loss; log lines go on above it.

    Register it as the first hook.

    Args:
        evaluation: the hook that evaluates. While it writes to the screen there is no bar.
    """

    def __init__(self, evaluation: EvaluationHook):
        self.evaluation = evaluation
        self._bar: tqdm | None = None
        self._redirected = ExitStack()

    def before_step(self) -> None:
        """Before the first step, draw the bar, and let the loggers write to the screen above it."""
        if self._bar is not None:
            return
        for name in ("detectron2", "focal_plugin", "fvcore"):
            target = logging.getLogger(name)
            screens = [h for h in target.handlers if getattr(h, "stream", None) in (sys.stdout, sys.stderr)]
            if screens:
                self._redirected.enter_context(logging_redirect_tqdm([target]))
                target.handlers[-1].setLevel(screens[0].level)  # which it forgets
        start, end = self.trainer.start_iter, self.trainer.max_iter
        self._bar = tqdm(initial=start, total=end, unit="step", dynamic_ncols=True, leave=False)

    def after_step(self) -> None:
        """Move the bar on."""
        loss = self.trainer.storage.latest().get("total_loss")
        if loss is not None:
            self._bar.set_postfix_str(f"loss {loss[0]:.4g}", refresh=False)
        self._bar.update()
        if self.evaluation.is_due():
            self._bar.clear()

    def after_train(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
        self._redirected.close()


def progress_bar(evaluation: EvaluationHook) -> ProgressHook | None:
    """Return a ``ProgressHook`` on a terminal, and None elsewhere, where the log lines alone show how far a run is."""
    return ProgressHook(evaluation) if sys.stderr.isatty() else None
