"""An exported network in float16 as a GPU computes it, on the CPU.

On a CPU, ONNX Runtime takes float16 weights but computes in float32 from layer to layer, so it does not see numbers
that are too large for float16. PyTorch computes in float16, but on most CPUs tens of times slower than in float32.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .export_formats import Run
from .export_graph import ExportedHeads
from .graphs import map_tensors


def run_rounded(module: ExportedHeads) -> Run:
    """Return a function that runs ``module`` in float32, and rounds what each operation of its network gives.

    ``module`` is changed.
    """
    module.dtype = torch.float32
    for part in (module.model.backbone, module.model.head):
        part.float()  # the weights are rounded already
        part.forward = _rounded(part.forward)

    def run(images: Tensor) -> list:
        with torch.no_grad():
            return [output.numpy() for output in module(images)]

    return run


class _Rounding(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        output = func(*args, **kwargs or {})
        return _round(output) if isinstance(output, Tensor) else output


def _rounded(forward: Callable) -> Callable:
    def call(*args: Any) -> Any:
        with _Rounding():
            return forward(*map_tensors(_round, args))

    return call


def _round(x: Tensor) -> Tensor:
    return x.half().float() if x.dtype == torch.float32 else x
