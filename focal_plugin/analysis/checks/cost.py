"""An estimate of the time and the memory of a training step, from steps of the config's own model and data."""

import math
import os
import resource
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from tqdm import tqdm

from ...engine import StepTrainer, Trainer
from ...engine.advice import faster
from ...engine.average import WeightAverage
from ...engine.step import amp_precision
from .case import ERROR, OK, WARNING, Case, Finding, first_batch_config

_CPU_IMAGES = 2  # of a step that is measured on a CPU; a larger one is estimated from it
_LONG = 3.0  # seconds of a first step, of one image, after which no second one is measured
_WARM_UP = 3  # steps on a GPU that are not measured: the second one records, if MODEL.FOCAL.COMPILE is True
_GB = 2**30
_CPU = "the CPU", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True)
class Cost:
    """What a step costs.

    Attributes:
        images: the number of images of the step that was measured.
        seconds: of computing, without loading.
        loading: seconds of loading an image in one process.
        memory: the largest number of bytes in use, of this process or of the GPU, for as many images as were asked for.
    """

    images: int
    seconds: float
    loading: float
    memory: float


def check_cost(case: Case) -> Iterator[Finding]:
    """Estimate how long a step and the run take, and how much memory."""
    solver, device = case.cfg.SOLVER, case.own_cfg.MODEL.DEVICE
    on_gpu = torch.device(device).type == "cuda"
    images = max(1, solver.IMS_PER_BATCH // case.num_gpus) if on_gpu else solver.IMS_PER_BATCH
    micro = math.ceil(images / solver.ACCUMULATE)
    where, total = ("the GPU", torch.cuda.get_device_properties(device).total_memory) if on_gpu else _CPU
    remedy = f"Set SOLVER.ACCUMULATE {2 * solver.ACCUMULATE} or more, or smaller images or batches."
    try:
        cost = measure(case.cfg, device, micro)
    except torch.cuda.OutOfMemoryError:
        yield Finding(ERROR, f"{micro} images at a time need more than the {total / _GB:.3g} GB of {where}. {remedy}")
        return
    computing, loading = cost.seconds * images / cost.images, cost.loading * images
    workers = case.cfg.DATALOADER.NUM_WORKERS
    seconds = max(computing, loading / workers) if workers else computing + loading
    plural = "s" if cost.images > 1 else ""
    text = (
        f"estimate: ~{duration(seconds)} and ~{cost.memory / _GB:.2g} GB a step on {where}, from one of {cost.images} "
        f"image{plural}; ~{duration(seconds * solver.MAX_ITER)} for {solver.MAX_ITER:,} steps, without evaluations"
    )
    if cost.memory > total:
        yield Finding(WARNING, f"{text}. {where} has {total / _GB:.3g} GB. {remedy}")
    elif workers and loading / workers > computing:
        yield Finding(OK, f"{text}. Loading takes longest: more DATALOADER.NUM_WORKERS than {workers} may help")
    else:
        yield Finding(OK, ". ".join([text, *faster(case.own_cfg)]))


def measure(cfg: CfgNode, device: str, images: int) -> Cost:
    """Return the cost of a step whose memory is that of ``images`` images. No weight changes: the learning rate is 0.

    On a GPU the step has all of them. On a CPU it has one and then, if that did not take long, two.
    """
    on_gpu = torch.device(device).type == "cuda"
    most = images if on_gpu else min(images, _CPU_IMAGES)
    cfg = first_batch_config(cfg, most)
    cfg.MODEL.DEVICE, cfg.SOLVER.BASE_LR, cfg.SOLVER.ACCUMULATE = device, 0.0, 1
    loader = iter(Trainer.build_train_loader(cfg))
    start = time.perf_counter()
    batch = next(loader)
    loading = (time.perf_counter() - start) / most
    model = Trainer.build_model(cfg).train()
    optimizer = Trainer.build_optimizer(cfg, model)
    counts = [most] * (_WARM_UP + 1) if on_gpu else [1, most]
    precision = amp_precision(cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE, device)
    average = WeightAverage(model, decay) if (decay := cfg.MODEL.FOCAL.EMA.DECAY) else None
    batches = [batch[:count] for count in counts]
    trainer = StepTrainer(model, batches, optimizer, precision=precision, average=average)
    before, state, times = _start_of_peak(on_gpu), 0, []
    with EventStorage(), tqdm(total=len(counts), desc="Measuring a step", leave=False, disable=None) as bar:
        while len(times) < len(counts) and (on_gpu or not times or times[0] < _LONG):
            state, start = _state(optimizer), time.perf_counter()
            trainer.run_step()  # it ends with reading the losses from the GPU
            times.append(time.perf_counter() - start)
            bar.update()
    measured = counts[len(times) - 1]
    # What does not grow with the number of images: the optimiser's state, which the first step makes, and gradients.
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    activations = max(0, _peak(on_gpu) - before - state - gradients) * images / measured
    return Cost(measured, times[-1], loading, before + _state(optimizer) + gradients + activations)


def _state(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of an optimiser's state."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def _start_of_peak(on_gpu: bool) -> int:
    """Return the bytes in use, and forget how many it were at most."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with suppress(OSError):  # not on Linux, or not allowed: then it is the peak since the process began
        Path("/proc/self/clear_refs").write_text("5")
    return _peak(on_gpu)


def _peak(on_gpu: bool) -> int:
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    with suppress(OSError, StopIteration), open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def duration(seconds: float) -> str:
    """Return a time in words, as in "3.4 h"."""
    units = (("s", 1, 90), ("min", 60, 90), ("h", 3600, 72), ("days", 86_400, math.inf))
    unit, size = next((unit, size) for unit, size, most in units if seconds < most * size)
    value = seconds / size
    return f"{value:.2g} {unit}" if value < 10 else f"{value:,.0f} {unit}"
