"""Let a run finish its step and save on SIGTERM and SIGINT; what may take minutes is not waited for."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from detectron2.utils import comm

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_CODES = tuple(128 + number for number in SIGNALS)  # of a run that has saved: 143 and 130

_SAME_SECONDS = 1.0


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end what is inside by ``SystemExit`` with 143, so that files are closed and folders removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
        self._answers = False

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

    @contextmanager
    def answered(self, answer: Callable[[int], None]) -> Iterator[None]:
        """Answer the first signal inside at once, in a thread: also while the process waits for others or for C++.

        Does nothing if the signals are not installed.

        Args:
            answer: called with the signal; ends the process. What is inside goes on meanwhile, but does not end.
        """
        if not self._before:
            yield
            return
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        turn, over = threading.Lock(), threading.Event()

        def watch() -> None:
            while byte := ours.recv(1):  # b"" once the other end is closed
                if byte[0] in SIGNALS:
                    with turn:
                        if not over.is_set():
                            answer(byte[0])

        thread = threading.Thread(target=watch, daemon=True)
        before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._answers = True
        thread.start()
        try:
            yield
        except BaseException:  # perhaps since the signal has ended another process, for which this one waited
            time.sleep(0)  # lets the handler run, if a signal is waiting for it
            if self.received:
                with turn:
                    answer(self.received)
            raise
        finally:
            with turn:
                over.set()
            self._answers = False
            signal.set_wakeup_fd(before)
            theirs.close()
            thread.join()
            ours.close()

    def _note(self, number: int, frame: object) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
            what = "saving, then stopping" if self._answers else "finishing this step, then saving"
            text = f"{signal.Signals(number).name}: {what}. A second signal ends it at once.\n"
            os.write(2, text.encode())  # not the logger, which may be in the middle of a record
        elif self._answers and comm.get_world_size() > 1:
            return  # from the processes that have stopped already; this one may be saving
        elif comm.get_world_size() == 1 or time.monotonic() - self._since > _SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
