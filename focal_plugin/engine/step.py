"""One optimiser step on any device: full or mixed precision, the batch at once or in parts."""

import inspect
import logging
import time
from contextlib import nullcontext

import torch
from detectron2.engine import SimpleTrainer
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..deploy import fast_dtype
from .divergence import DivergenceReport, raise_if_diverged
from .window import counted_together, divide_gradients, split

logger = logging.getLogger(__name__)

_PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def amp_precision(enabled: bool, name: str, device: str) -> torch.dtype | None:
    """What to compute in: None for full precision, else the dtype ``name``; empty, the device's usual one.

    That is float16 on a GPU and bfloat16 on a CPU that computes in it; others would be slower for it and stay in full
    precision, which is logged.

    Raises:
        ValueError: ``name`` is none of float16 and bfloat16.
    """
    if not enabled:
        return None
    if not name and torch.device(device).type == "cpu" and fast_dtype(device) == torch.float32:
        logger.info("SOLVER.AMP: this CPU does not compute in bfloat16, so it stays with float32.")
        return None
    name = name or ("bfloat16" if torch.device(device).type == "cpu" else "float16")
    if name not in _PRECISIONS:
        raise ValueError(f"SOLVER.AMP.DTYPE is {name!r}; expected {', '.join(_PRECISIONS)}, or empty for the device's.")
    return _PRECISIONS[name]


def data_parallel(model: nn.Module, *, broadcast_buffers: bool = False, **kwargs) -> nn.Module:
    """``model`` in DistributedDataParallel if there are more processes than one, on GPUs or CPUs.

    Args:
        model: is on its device already.
        broadcast_buffers: whether every forward pass sends the buffers of the first process to the others.
        kwargs: more of DistributedDataParallel's, and ``fp16_compression`` of Detectron2's ``create_ddp_model``.
    """
    on_gpu = next(model.parameters()).is_cuda
    device_ids = [comm.get_local_rank()] if on_gpu else None  # None is what a CPU model needs
    # Newer PyTorch has another word for it, and warns of the old one.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    buffers = {"forward_sync_buffers" if renamed else "broadcast_buffers": broadcast_buffers}
    return create_ddp_model(model, device_ids=device_ids, **buffers, **kwargs)


class StepTrainer(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` and ``AMPTrainer`` in one, on GPUs and CPUs; their checkpoints load.

    Every step's losses of every process are checked before the weights change: see ``raise_if_diverged``.

    Args:
        model: returns a dict of losses (or one loss) for a batch, in training mode; may be a DistributedDataParallel.
        data_loader: an iterable of batches, each a list of images as the model takes them.
        optimizer: what updates the model.
        precision: float16 or bfloat16 to compute under autocast, with a gradient scaler for float16; None, as is.
        accumulate: into how many parts a batch is split. A model with a ``normalizer`` gets the gradients of the whole
            batch, exactly (but for padding and batch norm, which see a part); another one the mean over its images.
    """

    def __init__(self, model, data_loader, optimizer, *, precision: torch.dtype | None = None, accumulate: int = 1):
        super().__init__(model, data_loader, optimizer)
        self.device_type = next(model.parameters()).device.type
        self.precision = precision
        self.accumulate = accumulate
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=precision == torch.float16)

    def run_step(self) -> None:
        """Take a batch, compute its gradients, write its metrics, update the weights."""
        assert self.model.training, "the model was left in eval mode"
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        self.optimizer.zero_grad()
        if self.accumulate == 1:
            losses = self._forward(batch)
            self._backward(losses)
        else:
            losses = self._forward_backward_in_parts(batch)
        self.after_backward()

        self._write(losses, data_time, batch)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _forward(self, batch: list[dict]) -> dict[str, Tensor]:
        with torch.autocast(self.device_type, dtype=self.precision, enabled=self.precision is not None):
            losses = self.model(batch)
        return {"total_loss": losses} if isinstance(losses, Tensor) else losses

    def _backward(self, losses: dict[str, Tensor]) -> None:
        self.grad_scaler.scale(sum(losses.values())).backward()

    def _forward_backward_in_parts(self, batch: list[dict]) -> dict[str, Tensor]:
        """The gradients of the whole batch, added up part after part, and its losses."""
        parts, totals = split(batch, self.accumulate), {}
        parallel = isinstance(self.model, DistributedDataParallel)
        with counted_together(self.model.module if parallel else self.model) as window:
            for i, part in enumerate(parts):
                last = i == len(parts) - 1
                with self.model.no_sync() if parallel and not last else nullcontext():
                    if last and window is not None:
                        window.closing = True
                    losses = self._forward(part)
                    if window is None:
                        losses = {name: loss * (len(part) / len(batch)) for name, loss in losses.items()}
                    elif last:  # its own losses are divided already; all before it wait for this number
                        divide_gradients(self.model, window.total)
                        totals = {name: total / window.total for name, total in totals.items()}
                    self._backward(losses)
                totals = {name: totals.get(name, 0) + loss.detach() for name, loss in losses.items()}
        return totals

    def _write(self, losses: dict[str, Tensor], data_time: float, batch: list[dict]) -> None:
        """Put the losses, averaged over processes, where Detectron2's writers look for them."""
        # The one place where a step waits for the GPU: all losses in one transfer.
        values = torch.stack([loss.detach().float() for loss in losses.values()]).tolist()
        mine = dict(zip(losses, values))
        report = DivergenceReport.of(mine, self.model, batch, self._forward)
        storage = get_event_storage()
        storage.put_scalar("rank_data_time", data_time)
        everyone = comm.gather((mine, data_time, report))
        if not comm.is_main_process():
            return
        all_losses, data_times, reports = zip(*everyone)
        raise_if_diverged(self.iter, self.optimizer, reports)
        mean = {name: sum(each[name] for each in all_losses) / len(all_losses) for name in mine}
        storage.put_scalar("data_time", max(data_times))
        storage.put_scalar("total_loss", sum(mean.values()))
        if len(mean) > 1:
            storage.put_scalars(**mean)

    def state_dict(self) -> dict:
        """As Detectron2's ``AMPTrainer``; without float16 as its ``SimpleTrainer``."""
        state = super().state_dict()
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state saved at any precision: the scaler starts anew if it was saved without one."""
        super().load_state_dict(state_dict)
        if self.grad_scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
