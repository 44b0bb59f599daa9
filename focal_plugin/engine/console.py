"""Keep the screen short while a run goes on; ``OUTPUT_DIR/log.txt`` has everything."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.engine import HookBase
from detectron2.utils.events import EventWriter

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

    In metrics.json the steps are counted from the run's start, and not from where it was resumed.

    Args:
        writers: the writers that Detectron2's ``PeriodicWriter`` calls from then on.
        period: the period of that hook, in steps.
    """

    def __init__(self, writers: list[EventWriter], period: int = 20):
        self.writers, self.period = writers, period

    def after_step(self) -> None:
        """Write, if this is one of the two steps and not written anyway."""
        step = self.trainer.iter + 1
        if step < self.trainer.max_iter and step % self.period:
            for writer in self.writers:
                start = 0 if isinstance(writer, MetricsWriter) else self.trainer.start_iter
                if step - start in (1, 5):
                    writer.write()
