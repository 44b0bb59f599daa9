"""A step of an optimiser that clips gradients, when some parameters have none."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def parameters_with_gradients(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the optimizer has only those parameters that have a gradient; it would pass over the others.

    Clipping by value does not: in PyTorch 2.14 ``clip_grad_value_`` of a parameter without a gradient is an error, and
    Detectron2 clips each parameter by itself. A level of a pyramid that no head sees has such parameters.
    """
    before = [group["params"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter.grad is not None]
        yield
    finally:
        for group, parameters in zip(optimizer.param_groups, before):
            group["params"] = parameters
