"""Start the processes of a run, or join those that torchrun has started."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable

import torch
from detectron2.engine import DEFAULT_TIMEOUT
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm
from torch import Tensor, distributed, nn
from torch.multiprocessing import ProcessExitedException
from torch.nn.parallel import DistributedDataParallel

from .signals import EXIT_CODES, SIGNALS

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # what it sets in the environment


def launch(main: Callable, num_gpus: int, *, num_machines: int = 1, args: tuple = (), **kwargs) -> None:
    """Call ``main(*args)`` in each process of a run.

    Under torchrun this process is one of them. Otherwise Detectron2's ``launch`` starts them; SIGTERM and SIGINT are
    passed on to them, and if they stop for these, this process ends with their exit code.

    Args:
        main: the function that each process calls.
        num_gpus: processes on this machine.
        num_machines: machines.
        args: the arguments of ``main``.
        kwargs: further arguments of Detectron2's ``launch``: ``machine_rank``, ``dist_url``, ``timeout``.

    Raises:
        ValueError: torchrun has started this process and the arguments ask for others; or there are too few GPUs.
    """
    if all(name in os.environ for name in _TORCHRUN):
        _join_torchrun(main, args, num_gpus, num_machines)
    elif num_gpus * num_machines <= 1:  # this process is the only one
        detectron2_launch(main, num_gpus, args=args, **kwargs)
    else:
        _start(main, num_gpus, num_machines=num_machines, args=args, **kwargs)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model in a DistributedDataParallel; another one as it is."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def gather_numbers(values: Tensor, *numbers: float) -> list[list[float]]:
    """Return the ``values`` and ``numbers`` of every process, a row each by rank, in all processes.

    One transfer from the GPU and, with more processes than one, one collective call.

    Args:
        values: (V,) float32 on the device of the process group; as many in each process.
        numbers: more of them, which are known on the CPU.
    """
    if comm.get_world_size() == 1:
        return [[*values.tolist(), *numbers]]
    mine = torch.cat([values, values.new_tensor(numbers)])
    rows = [torch.empty_like(mine) for _ in range(comm.get_world_size())]
    distributed.all_gather(rows, mine)
    return torch.stack(rows).tolist()


def _join_torchrun(main: Callable, args: tuple, num_gpus: int, num_machines: int) -> None:
    world_size, local_rank, local_size = (int(os.environ[name]) for name in _TORCHRUN[1:])
    if num_gpus * num_machines != 1:
        raise ValueError(
            f"torchrun has started {world_size} processes, and --num-gpus {num_gpus} and --num-machines {num_machines} "
            "ask each of them to start more. Leave these two out, or start train_net.py without torchrun."
        )
    gpus = torch.cuda.device_count()
    if gpus and local_size > gpus:
        raise ValueError(
            f"--nproc-per-node is {local_size}, and this machine has {gpus} GPUs. To use the CPU alone, set "
            "CUDA_VISIBLE_DEVICES to nothing in the environment."
        )
    if gpus:
        torch.cuda.set_device(local_rank)
    if world_size == 1:
        main(*args)
        return
    # The address of the first process is in the environment.
    distributed.init_process_group("nccl" if gpus else "gloo", timeout=DEFAULT_TIMEOUT)
    try:
        comm.create_local_process_group(local_size)
        comm.synchronize()  # a process that starts late may find the others gone
        main(*args)
    finally:
        distributed.destroy_process_group()


def _start(main: Callable, num_gpus: int, **kwargs) -> None:
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
