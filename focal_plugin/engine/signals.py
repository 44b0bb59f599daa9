"""Ending a run from outside: SIGTERM and SIGINT let it finish its step and save."""

import multiprocessing
import os
import signal
import sys
import threading
import time

from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_CODES = tuple(128 + number for number in SIGNALS)  # of a run that has saved: 143 and 130

_SAME_SECONDS = 1.0


class StopSignals:
    """Notes SIGTERM and SIGINT while it is installed. The first is noted; a second ends the process at once.

    Several processes often get the same signal in more ways than one, from their terminal or scheduler and from the
    process that started them: there, what comes within a second is the same one.

    Attributes:
        received: the number of the signal, 0 for none.
    """

    def __init__(self):
        self.received = 0
        self._since = 0.0
        self._before: dict = {}

    def install(self) -> None:
        """Begin to note them, if this is the main thread: others cannot."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def remove(self) -> None:
        """From now on they do what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def agreed(self) -> int:
        """The signal that any of the processes has got, in all of them; 0 for none. Waits for the other processes."""
        return max(comm.all_gather(self.received))

    def _note(self, number: int, frame: object) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
            text = (
                f"{signal.Signals(number).name}: finishing this step, then saving. A second signal ends it at once.\n"
            )
            os.write(2, text.encode())  # a signal may come while the log is being written
        elif comm.get_world_size() == 1 or time.monotonic() - self._since > _SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def launch(main, num_gpus: int, **kwargs) -> None:
    """Detectron2's ``launch``, which passes SIGTERM and SIGINT on to the processes it starts, and their exit code back.

    Args:
        main: what each process does.
        num_gpus: processes on this machine.
        kwargs: of Detectron2's ``launch``.
    """
    if num_gpus * kwargs.get("num_machines", 1) == 1:
        detectron2_launch(main, num_gpus, **kwargs)
        return

    def pass_on(number: int, frame: object) -> None:
        for process in multiprocessing.active_children():
            os.kill(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        detectron2_launch(main, num_gpus, **kwargs)
    except ProcessExitedException as error:
        if error.exit_code in EXIT_CODES:
            sys.exit(error.exit_code)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
