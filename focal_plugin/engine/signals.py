"""Let a run finish its step and save on SIGTERM and SIGINT."""

import os
import signal
import threading
import time

from detectron2.utils import comm

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_CODES = tuple(128 + number for number in SIGNALS)  # of a run that has saved: 143 and 130

_SAME_SECONDS = 1.0


class StopSignals:
    """Note the first SIGTERM or SIGINT while installed; a second one ends the process at once.

    With several processes the same signal often arrives twice, from the terminal or scheduler and from the process that
    started them: there, a second signal within a second counts as the first.

    Attributes:
        received: the number of the signal, 0 for none.
        shared: the largest ``received`` of all processes when a ``StepTrainer`` last gathered it; None before.
    """

    def __init__(self):
        self.received = 0
        self.shared: int | None = None
        self._since = 0.0
        self._before: dict = {}

    def install(self) -> None:
        """Begin to note signals; only a process's main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def remove(self) -> None:
        """Restore what the signals did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def agreed(self, at_once: bool = True) -> int:
        """Return the signal that any of the processes has received, the same in all of them; 0 for none.

        Args:
            at_once: wait for the other processes. If not, a signal that came to another process since the numbers of
                the step were gathered is known one step later, where a ``StepTrainer`` gathers it.
        """
        if comm.get_world_size() == 1:
            return self.received
        if at_once or self.shared is None:
            return max(comm.all_gather(self.received))
        return self.shared

    def _note(self, number: int, frame: object) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
            text = (
                f"{signal.Signals(number).name}: finishing this step, then saving. A second signal ends it at once.\n"
            )
            os.write(2, text.encode())  # not the logger, which may be in the middle of a record
        elif comm.get_world_size() == 1 or time.monotonic() - self._since > _SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
