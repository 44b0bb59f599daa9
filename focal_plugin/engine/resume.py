"""Write checkpoints when they are due, with the state of a run that Detectron2's checkpoints lack."""

import logging
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from fvcore.common.checkpoint import PeriodicCheckpointer
from torch import nn

from ..config import ConfigError
from .checkpoint import AtomicCheckpointer
from .metrics import MetricsWriter, load_storage_state, storage_state
from .processes import unwrapped
from .rng import rng_state, set_rng_state
from .signals import StopSignals

logger = logging.getLogger(__name__)


class CheckpointHook(HookBase):
    """Save every ``period`` steps, after the last one, and on SIGTERM or SIGINT, which then ends the run.

    A signal waits for the end of a step, but not for that of an evaluation in ``interruptible``.

    The saved state adds the random generators and the model's buffers of each process, the loader's position,
    metrics.json and the numbers it is written from. A run that resumes first completes the step of the checkpoint, by
    calling the hooks in ``tail``. So it continues as if it had not been interrupted.

    Register it in every process; Detectron2's ``PeriodicCheckpointer`` runs on the main process only.

    Args:
        checkpointer: has the trainer among its checkpointables.
        period: in steps.
        model: the one that is trained.
        loader: a ``TrainLoader``; another loader begins from the start when a run resumes.
        metrics: the writer of metrics.json; None on other processes than the main one.
        tail: the hooks that follow this one.
        max_to_keep: the number of checkpoints to keep, besides the last step's; None for all.

    Raises:
        ConfigError: ``period`` is below 1.
    """

    def __init__(
        self,
        checkpointer: AtomicCheckpointer,
        period: int,
        *,
        model: nn.Module,
        loader: Iterable,
        metrics: MetricsWriter | None = None,
        tail: Sequence[HookBase] = (),
        max_to_keep: int | None = None,
    ):
        if period < 1:
            raise ConfigError(
                f"SOLVER.CHECKPOINT_PERIOD (in a LazyConfig train.checkpointer.period) is {period}; expected a number "
                "of steps ≥ 1. With more than the run has, only its last step is saved."
            )
        self.periodic = PeriodicCheckpointer(checkpointer, period, max_to_keep=max_to_keep)
        self.model = unwrapped(model)
        self.loader, self.metrics, self.tail = loader, metrics, list(tail)
        self.signals = StopSignals()
        self._processes: list[dict] = []  # of this step, from all processes
        self._state: dict | None = None  # of the step, while what follows it is interruptible
        self._weights: dict = {}  # of the step, too
        self._saved: int | None = None  # the step that was saved last
        self._tail_is_done = False
        self._loaded: dict | None = None

    def before_train(self) -> None:
        """Continue where the checkpoint was taken, if one was loaded."""
        self.periodic.max_iter = self.trainer.max_iter
        steps = self.periodic.checkpointer.numbered()
        earlier = [path for path in steps if 0 <= steps[path] < self.trainer.start_iter]
        self.periodic.recent_checkpoints = sorted(earlier, key=steps.get)  # what max_to_keep counts
        self.signals.install()
        if self._loaded is not None:
            self._restore(self._loaded)
        elif self.trainer.start_iter > 0:
            logger.warning(
                "The checkpoint has weights and optimizer, but neither the position in the data nor the state of the "
                "random numbers: both begin from the start."
            )

    def after_step(self) -> None:
        """Save, if a checkpoint is due; end the run, if a signal came.

        Raises:
            SystemExit: 143 or 130, after SIGTERM or SIGINT.
        """
        step = self.trainer.iter
        is_due = (step + 1) % self.periodic.period == 0 or step >= self.trainer.max_iter - 1
        received = self.signals.agreed(at_once=is_due)
        if is_due or received:
            self._processes = comm.all_gather(self._process_state())
            if comm.is_main_process():
                self._save(step, is_due)
            self._processes = []
        if received:
            self._stop(received)

    def finish(self) -> None:
        """Save the step that is done, and all that follows it, as the run's last. For all processes."""
        self._processes, self._tail_is_done = comm.all_gather(self._process_state()), True
        if comm.is_main_process():
            self.periodic.save("model_final", iteration=self.trainer.iter)
        self._processes = []

    def _stop(self, received: int) -> NoReturn:
        comm.synchronize()  # as soon as one process ends, its launcher ends the others
        self.signals.remove()
        logger.warning(self._stopped(received))
        raise SystemExit(128 + received)

    def _stopped(self, received: int) -> str:
        return (
            f"{signal.Signals(received).name}: stopped after {self.trainer.iter + 1} steps, which are saved in "
            f"{self.periodic.checkpointer.save_dir}. The same command with --resume goes on."
        )

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, a signal saves the step that is done and ends the process at once: for an evaluation after a step.

        For all processes. What is inside must change neither weights nor optimizer, and buffers only until its end; a
        resumed run does it again. The random numbers that it draws, which may depend on the processes that load images,
        are none of training's.
        """
        rng = rng_state()
        self._processes = comm.all_gather(self._process_state())
        peers = comm.all_gather((socket.gethostname(), os.getpid()))
        received = self.signals.agreed()
        self._state, self._weights = self.state_dict(), self.model.state_dict()
        self._weights |= {name: buffer.clone() for name, buffer in self.model.named_buffers() if name in self._weights}
        try:
            if received:
                self._save_once()
                self._stop(received)
            with self.signals.answered(lambda number: self._leave(number, peers)):
                yield
        finally:
            self._processes, self._state, self._weights = [], None, {}
            set_rng_state(rng)

    def _leave(self, received: int, peers: list[tuple[str, int]]) -> NoReturn:
        """Tell the run's other processes on this host, save if this is the main one, and end the process."""
        code = 128 + received
        try:
            for host, pid in peers:
                if host == socket.gethostname() and pid != os.getpid():
                    with suppress(ProcessLookupError):
                        os.kill(pid, received)
            self._save_once()
            logger.warning(self._stopped(received))
        except Exception as error:
            code = 1
            logger.error(f"{signal.Signals(received).name}: the last steps could not be saved: {error}")
        finally:
            for process in multiprocessing.active_children():  # those that load images
                process.kill()
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)  # not an error in the main thread, which may be waiting for another process

    def _save_once(self) -> None:
        if comm.is_main_process() and self._saved != self.trainer.iter:
            self._save(self.trainer.iter, is_due=False, model=self._weights)

    def after_train(self) -> None:
        """Save the steps before a failure of the data. From here on, signals end the process."""
        self.signals.remove()
        if unread := getattr(self.loader, "unread", None):
            logger.warning(
                f"{len(unread)} images could not be read, {unread.total()} times in all, and others took their places "
                "(on_error: skip). Each is named above."
            )
        trainer, failed = self.trainer, getattr(self.loader, "failed", False)
        # A run that had no step left to do counts one too many.
        trainer.iter = trainer.storage.iter = min(trainer.iter, trainer.max_iter)
        if failed and comm.get_world_size() == 1 and trainer.iter > trainer.start_iter:
            trainer.iter -= 1  # the last step that was completed
            self._tail_is_done = True
            self._save(trainer.iter, is_due=False)
            logger.error("The next images could not be loaded. All steps before are saved: --resume continues there.")

    def _save(self, step: int, is_due: bool, **content: Any) -> None:
        if is_due:
            self.periodic.step(step)
        else:
            self.periodic.save(f"model_{step:07d}", iteration=step, **content)
        self._saved = step

    def _process_state(self) -> dict:
        state = {"rng": rng_state()}
        if comm.get_world_size() > 1:  # each has its own statistics; the checkpoint has the main process's
            state["buffers"] = {name: buffer.cpu() for name, buffer in self.model.named_buffers()}
        return state

    def state_dict(self) -> dict:
        """Return the state as plain containers and tensors."""
        if self._state is not None:
            return self._state
        state = {"processes": self._processes or [self._process_state()], "tail_is_done": self._tail_is_done}
        if hasattr(self.loader, "state_dict"):
            state["loader"] = self.loader.state_dict()
        if self.metrics is not None and hasattr(self.trainer, "storage"):
            state["metrics"] = self.metrics.state_dict()
            state["storage"] = storage_state(self.trainer.storage)
        return state

    def load_state_dict(self, state: dict) -> None:
        """Keep ``state`` until training starts."""
        self._loaded = state

    def check_start(self, start_iter: int, max_iter: int, resume: bool) -> None:
        """Check, before training, that the checkpoint has no more steps than the run.

        An attempt that ended before its first checkpoint is forgotten on ``resume``: its metrics are written again.

        Raises:
            ConfigError: it has.
        """
        if start_iter > max_iter:
            raise ConfigError(
                f"{self.periodic.checkpointer.resumed_from} has {start_iter} steps, and SOLVER.MAX_ITER (in a "
                f"LazyConfig train.max_iter) is {max_iter}: nothing is left to train. Raise it, or use --eval-only."
            )
        if resume and self.metrics is not None and not self.periodic.checkpointer.has_checkpoint():
            self.metrics.load_state_dict({"bytes": 0, "last": -1})

    def _restore(self, state: dict) -> None:
        if "loader" in state and hasattr(self.loader, "load_state_dict"):
            self.loader.load_state_dict(state["loader"])
        else:
            logger.warning("The order of the training images begins from the start: the loader has no position.")
        if self.metrics is not None and "metrics" in state:
            self.metrics.load_state_dict(state["metrics"])
            load_storage_state(self.trainer.storage, state["storage"])
        if len(state["processes"]) == comm.get_world_size():
            mine = state["processes"][comm.get_rank()]
            set_rng_state(mine["rng"])
            with torch.no_grad():
                for name, buffer in self.model.named_buffers():
                    if name in mine.get("buffers", {}):
                        buffer.copy_(mine["buffers"][name])
        else:
            logger.warning(
                f"The checkpoint is of {len(state['processes'])} processes, this run of {comm.get_world_size()}: the "
                "random numbers begin from the start."
            )
        if not state["tail_is_done"]:
            self._finish_step()

    def _finish_step(self) -> None:
        """Do what the step of the checkpoint still lacks, where it is due: save it as the last, evaluate, write."""
        trainer = self.trainer
        trainer.iter = trainer.storage.iter = self._saved = trainer.start_iter - 1
        if trainer.start_iter == trainer.max_iter:
            self._processes = comm.all_gather(self._process_state())
            if not self.periodic.checkpointer.resumed_from.endswith("model_final.pth"):
                self.periodic.save("model_final", iteration=trainer.iter)
            self._processes = []
        for hook in self.tail:
            hook.after_step()
        trainer.iter = trainer.storage.iter = trainer.start_iter
