"""When a checkpoint is written, and all of a run's state in it that Detectron2's checkpoints do not have."""

import logging
import signal
from collections.abc import Iterable, Sequence

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from fvcore.common.checkpoint import PeriodicCheckpointer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .checkpoint import AtomicCheckpointer
from .metrics import MetricsWriter, load_storage_state, storage_state
from .rng import rng_state, set_rng_state
from .signals import StopSignals

logger = logging.getLogger(__name__)


class CheckpointHook(HookBase):
    """Saves every ``period`` steps, after the last one, and when SIGTERM or SIGINT come, which then ends the run.

    Its own state is that of the random numbers and the model's buffers in each process, the loader's position,
    metrics.json and what it is written from. A run that resumes first does what was still to be done in the step of the
    checkpoint, the ``tail``. So it goes on as if it had not been interrupted.

    Register it in every process, for Detectron2 calls only the main one's ``PeriodicCheckpointer``.

    Args:
        checkpointer: has the trainer among its checkpointables.
        period: in steps.
        model: the one that is trained.
        loader: a ``TrainLoader``; another one starts anew when a run resumes.
        metrics: the writer of metrics.json; None on other processes than the main one.
        tail: the hooks that follow this one.
        max_to_keep: how many checkpoints to keep, besides the last step's; None for all.

    Raises:
        ValueError: ``period`` is below 1.
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
            raise ValueError(
                f"SOLVER.CHECKPOINT_PERIOD (in a LazyConfig train.checkpointer.period) is {period}; expected a number "
                "of steps ≥ 1. More than the run has leaves its last checkpoint alone."
            )
        self.periodic = PeriodicCheckpointer(checkpointer, period, max_to_keep=max_to_keep)
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.loader, self.metrics, self.tail = loader, metrics, list(tail)
        self.signals = StopSignals()
        self._processes: list[dict] = []  # of this step, from all processes
        self._tail_is_done = False
        self._loaded: dict | None = None

    def before_train(self) -> None:
        """Go on where the checkpoint was taken, if one was loaded."""
        self.periodic.max_iter = self.trainer.max_iter
        self.signals.install()
        if self._loaded is not None:
            self._restore(self._loaded)
        elif self.trainer.start_iter > 0:
            logger.warning(
                "The checkpoint has weights and optimizer, but not where the data and the random numbers stood: these "
                "start anew."
            )

    def after_step(self) -> None:
        """Save, if it is time to; end the run, if it was told to.

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
            comm.synchronize()  # a process that ends has its launcher end the others
            self.signals.remove()
            logger.warning(
                f"{signal.Signals(received).name}: stopped after {step + 1} steps, which are saved in "
                f"{self.periodic.checkpointer.save_dir}. The same command with --resume goes on."
            )
            raise SystemExit(128 + received)

    def after_train(self) -> None:
        """Save what a failure of the data has not lost. From here on, signals end the process."""
        self.signals.remove()
        trainer, failed = self.trainer, getattr(self.loader, "failed", False)
        # A run that had nothing left to do counts a step too many.
        trainer.iter = trainer.storage.iter = min(trainer.iter, trainer.max_iter)
        if failed and comm.get_world_size() == 1 and trainer.iter > trainer.start_iter:
            trainer.iter -= 1  # the last one that was done
            self._tail_is_done = True
            self._save(trainer.iter, is_due=False)
            logger.error("The next images could not be loaded. All steps before are saved: --resume goes on with them.")

    def _save(self, step: int, is_due: bool) -> None:
        if is_due:
            self.periodic.step(step)
        else:
            self.periodic.save(f"model_{step:07d}", iteration=step)

    def _process_state(self) -> dict:
        state = {"rng": rng_state()}
        if comm.get_world_size() > 1:  # each has statistics of its own, and the checkpoint has the main one's
            state["buffers"] = {name: buffer.cpu() for name, buffer in self.model.named_buffers()}
        return state

    def state_dict(self) -> dict:
        """Plain containers and tensors."""
        state = {"processes": self._processes or [self._process_state()], "tail_is_done": self._tail_is_done}
        if hasattr(self.loader, "state_dict"):
            state["loader"] = self.loader.state_dict()
        if self.metrics is not None and hasattr(self.trainer, "storage"):
            state["metrics"] = self.metrics.state_dict()
            state["storage"] = storage_state(self.trainer.storage)
        return state

    def load_state_dict(self, state: dict) -> None:
        """Keep a state for when training starts."""
        self._loaded = state

    def start_again(self) -> None:
        """Forget an attempt that was ended before its first checkpoint: what it has written is written again."""
        if self.metrics is not None:
            self.metrics.clear()

    def _restore(self, state: dict) -> None:
        if "loader" in state and hasattr(self.loader, "load_state_dict"):
            self.loader.load_state_dict(state["loader"])
        else:
            logger.warning("The order of the training images starts anew: the loader does not know its position.")
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
                "random numbers start anew."
            )
        if not state["tail_is_done"]:
            self._finish_step()

    def _finish_step(self) -> None:
        """What the step of the checkpoint had still to do, where it is due: save it as the last, evaluate, write."""
        trainer = self.trainer
        trainer.iter = trainer.storage.iter = trainer.start_iter - 1
        if trainer.start_iter == trainer.max_iter:
            self._processes = comm.all_gather(self._process_state())
            if not self.periodic.checkpointer.get_checkpoint_file().endswith("model_final.pth"):
                self.periodic.save("model_final", iteration=trainer.iter)
            self._processes = []
        for hook in self.tail:
            hook.after_step()
        trainer.iter = trainer.storage.iter = trainer.start_iter
