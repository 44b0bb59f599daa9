"""One optimiser step on any device, in full or mixed precision, on the batch at once or in micro-batches."""

import inspect
import logging
import math
import time
from contextlib import nullcontext

import torch
from detectron2.engine import SimpleTrainer
from detectron2.engine.defaults import create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..config import ConfigError
from ..layers.fast_dtype import fast_dtype
from .average import WeightAverage
from .divergence import Divergence, explain
from .optimizer import parameters_with_gradients
from .processes import gather_numbers, unwrapped
from .signals import StopSignals
from .window import counted_together, divide_gradients, split

logger = logging.getLogger(__name__)

_PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_LEAST_SCALE = 1.0  # the loss scale of float16 at which a gradient that overflows is no fault of the scale


def amp_precision(enabled: bool, name: str, device: str) -> torch.dtype | None:
    """Return the dtype for autocast; None for full precision.

    Args:
        enabled: whether mixed precision is asked for.
        name: "float16" or "bfloat16". Empty: float16 on a GPU, bfloat16 on a CPU that computes in it; other CPUs would
            be slower in it and stay in full precision, which is logged.
        device: such as "cuda".

    Raises:
        ConfigError: ``name`` is neither float16 nor bfloat16.
    """
    if not enabled:
        return None
    if not name and torch.device(device).type == "cpu" and fast_dtype(device) == torch.float32:
        logger.info("SOLVER.AMP: this CPU does not compute in bfloat16, so it stays with float32.")
        return None
    name = name or ("bfloat16" if torch.device(device).type == "cpu" else "float16")
    if name not in _PRECISIONS:
        raise ConfigError(
            f"SOLVER.AMP.DTYPE is {name!r}; expected {', '.join(_PRECISIONS)}, or empty for the device's. (In a "
            "LazyConfig it is train.amp.dtype.)"
        )
    return _PRECISIONS[name]


def data_parallel(model: nn.Module, *, broadcast_buffers: bool = False, **kwargs) -> nn.Module:
    """Return ``model`` in DistributedDataParallel if there is more than one process, on GPUs or CPUs.

    Args:
        model: on its device already.
        broadcast_buffers: whether every forward pass sends the buffers of the first process to the others.
        kwargs: further arguments of DistributedDataParallel and of Detectron2's ``create_ddp_model``.
    """
    on_gpu = next(model.parameters()).is_cuda
    device_ids = [comm.get_local_rank()] if on_gpu else None  # None is what a CPU model needs
    # Newer PyTorch has renamed the argument, and warns of the old name.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    buffers = {"forward_sync_buffers" if renamed else "broadcast_buffers": broadcast_buffers}
    return create_ddp_model(model, device_ids=device_ids, **buffers, **kwargs)


class StepTrainer(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` and ``AMPTrainer`` in one, on GPUs and CPUs; their checkpoints load.

    Every step checks the losses and gradients of all processes before the weights change. One that is not finite stops
    the run or skips the step (see ``Divergence``), except that in float16 gradients that overflow only lower the loss
    scale, down to 1.

    Args:
        model: returns a dict of losses (or one loss) for a batch, in training mode; may be a DistributedDataParallel.
            For bfloat16 on a CPU, give it to ``layers.compute_top_blocks_in_float32`` before.
        data_loader: an iterable of batches, each a list of images as the model takes them.
        optimizer: what updates the model.
        precision: float16 or bfloat16 to compute under autocast, with a gradient scaler for float16; None, as is.
        accumulate: the number of micro-batches of a batch. A model with a ``normalizer`` gets exactly the gradients of
            the whole batch (but padding and batch norm see a micro-batch); another gets their mean over the images.
        max_skips: the number of steps of a run that may be skipped before one that is not finite stops it.
        output_dir: where to save the batch of a step that is not finite, for ``engine.replay``; empty for nowhere.
        gather_metric_period: the losses are written every so many steps, as in Detectron2, and checked in all.
        average: takes in the weights after each step that has changed them.

    Raises:
        ConfigError: ``accumulate`` is below 1, or ``max_skips`` below 0.

    Attributes:
        signals: if set, each step tells the other processes which signal this one has received.
    """

    def __init__(
        self,
        model,
        data_loader,
        optimizer,
        *,
        precision: torch.dtype | None = None,
        accumulate: int = 1,
        max_skips: int = 0,
        output_dir: str = "",
        gather_metric_period: int = 1,
        average: WeightAverage | None = None,
    ):
        for key, value, least in (("ACCUMULATE", accumulate, 1), ("MAX_SKIPS", max_skips, 0)):
            if value < least:
                key = f"SOLVER.{key} (in a LazyConfig train.{key.lower()})"
                raise ConfigError(f"{key} is {value}; expected a whole number ≥ {least}.")
        super().__init__(model, data_loader, optimizer, gather_metric_period)
        self.device_type = next(model.parameters()).device.type
        self.precision = precision
        self.accumulate = accumulate
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=precision == torch.float16)
        self.max_skips, self.skips = max_skips, 0
        self.output_dir = output_dir
        self.average, self._overflowed = average, False
        self.signals: StopSignals | None = None

    def run_step(self) -> None:
        """Take a batch, compute its gradients, write its metrics, update the weights."""
        assert self.model.training, "the model was left in eval mode"
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        buffers = [buffer.clone() for buffer in self.model.buffers()] if self.max_skips else []

        self.optimizer.zero_grad()
        losses = self.forward_backward(batch)
        self.after_backward()

        if self._write(losses, data_time, batch):
            with parameters_with_gradients(self.optimizer):
                self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
            if self.average is not None and not self._overflowed:
                self.average.update()
        else:  # restore running statistics, the normaliser's too
            for buffer, before in zip(self.model.buffers(), buffers):
                buffer.copy_(before)

    def forward_backward(self, batch: list[dict]) -> dict[str, Tensor]:
        """Return the losses of a batch, and add its gradients to those of the parameters."""
        if self.accumulate > 1:
            return self._forward_backward_in_parts(batch)
        losses = self.forward(self.model, batch)
        self._backward(losses)
        return losses

    def forward(self, model: nn.Module, batch: list[dict]) -> dict[str, Tensor]:
        """Return the losses of ``model`` for a batch, computed in this trainer's precision."""
        with self.autocast():
            losses = model(batch)
        return {"total_loss": losses} if isinstance(losses, Tensor) else losses

    def autocast(self) -> torch.autocast:
        """The context that computes in this trainer's precision."""
        return torch.autocast(self.device_type, dtype=self.precision, enabled=self.precision is not None)

    def _backward(self, losses: dict[str, Tensor]) -> None:
        self.grad_scaler.scale(sum(losses.values())).backward()

    def _forward_backward_in_parts(self, batch: list[dict]) -> dict[str, Tensor]:
        """As ``forward_backward``, micro-batch after micro-batch."""
        parts, totals = split(batch, self.accumulate), {}
        parallel = isinstance(self.model, DistributedDataParallel)
        with counted_together(unwrapped(self.model)) as window:
            for i, part in enumerate(parts):
                last = i == len(parts) - 1
                with self.model.no_sync() if parallel and not last else nullcontext():
                    if last and window is not None:
                        window.closing = True
                    losses = self.forward(self.model, part)
                    if window is None:
                        losses = {name: loss * (len(part) / len(batch)) for name, loss in losses.items()}
                    elif last:  # its own losses are divided already, those before it not yet
                        divide_gradients(self.model, window.rest)
                        totals = {name: total / window.rest for name, total in totals.items()}
                    self._backward(losses)
                    if i == 0:
                        _keep_gradients(self.model)
                totals = {name: totals.get(name, 0) + loss.detach() for name, loss in losses.items()}
        return totals

    def _write(self, losses: dict[str, Tensor], data_time: float, batch: list[dict]) -> bool:
        """Check the losses and gradients of all processes, and put the mean losses into the event storage.

        Returns:
            Whether all of them are finite.

        Raises:
            Divergence: one is not, and no more steps may be skipped.
        """
        # The one place where a step waits, for the GPU and for the other processes: a few numbers, in one transfer.
        values = [*(loss.detach().float() for loss in losses.values()), largest_gradient(self.model)]
        received = 0 if self.signals is None else self.signals.received
        *columns, gradients, data_times, signals = zip(*gather_numbers(torch.stack(values), data_time, received))
        if self.signals is not None:
            self.signals.shared = int(max(signals))
        is_due = (self.iter + 1) % self.gather_metric_period == 0
        storage = get_event_storage()
        if is_due:
            storage.put_scalar("rank_data_time", data_time)
        if is_due and comm.is_main_process():
            storage.put_scalar("data_time", max(data_times))
        finite = all(math.isfinite(loss) for column in columns for loss in column)
        self._overflowed = not all(map(math.isfinite, gradients))
        if not finite or (self._overflowed and not self._scale_may_fall()):
            rank = comm.get_rank()
            self._skip_or_stop({name: column[rank] for name, column in zip(losses, columns)}, batch)
            return False
        if is_due and comm.is_main_process():
            mean = {name: sum(column) / len(column) for name, column in zip(losses, columns)}
            storage.put_scalar("total_loss", sum(mean.values()))
            if len(mean) > 1:
                storage.put_scalars(**mean)
        return True

    def _scale_may_fall(self) -> bool:
        """Return whether gradients that overflow only tell the scaler to lower its scale."""
        return self.grad_scaler.is_enabled() and self.grad_scaler.get_scale() > _LEAST_SCALE

    def _skip_or_stop(self, losses: dict[str, float], batch: list[dict]) -> None:
        reports = explain(self, losses, batch)
        error = Divergence(self.iter, max(group["lr"] for group in self.optimizer.param_groups), reports)
        if self.skips >= self.max_skips:
            raise error
        self.skips += 1
        logger.warning(f"{error}\nThis step is skipped: {self.skips} of {self.max_skips} (SOLVER.MAX_SKIPS).")

    def state_dict(self) -> dict:
        """Return the state as Detectron2's ``AMPTrainer`` (or ``SimpleTrainer``) has it, and the skipped steps."""
        state = super().state_dict()
        if self.skips:
            state["skips"] = self.skips
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state saved in any precision; the scaler keeps its initial state if ``state_dict`` has none.

        The optimizer keeps its own learning rate, momentum, weight decay and the like, which the config says now; the
        learning rate of the moment is scaled to it.

        Raises:
            ValueError: the state is of another kind of optimizer, or of other groups of parameters.
        """
        settings = [_settings(group) for group in self.optimizer.param_groups]
        for group, ours, own in zip(state_dict["optimizer"]["param_groups"], settings, self.optimizer.param_groups):
            if other := {"momentum", "betas", "alpha", "rho"} & (group.keys() ^ ours.keys()):
                raise ValueError(f"it is of another kind of optimizer, by {', '.join(sorted(other))}")
            if (names := group.get("param_names")) and own.get("param_names", names) != names:
                raise ValueError("its parameters are in other groups, by learning rate or weight decay")
        super().load_state_dict(state_dict)
        for group, ours in zip(self.optimizer.param_groups, settings):
            before = group.get("initial_lr", group["lr"])
            now = ours.setdefault("initial_lr", ours["lr"])
            group.update(ours, lr=group["lr"] if before == now or not before else group["lr"] * now / before)
        self.skips = state_dict.get("skips", 0)
        if self.grad_scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _keep_gradients(model: nn.Module) -> None:
    """Copy the gradients, which the next replay of a compiled network would overwrite before it is added to them."""
    if getattr(unwrapped(model), "compiled", None) is not None:
        for parameter in model.parameters():
            parameter.grad = None if parameter.grad is None else parameter.grad.clone()


def _settings(group: dict) -> dict:
    """The settings of an optimizer's group of parameters."""
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}


def largest_gradient(model: nn.Module) -> Tensor:
    """Return the largest absolute value in the gradients of ``model``, a float32 scalar; finite if all of them are."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), device=next(model.parameters()).device)
    return nn.utils.get_total_norm(gradients, norm_type=math.inf).float()
