"""A model's inference as CUDA graphs: hundreds of launches recorded once for each size of images, then replayed as one.

At a few images at a time the host needs longer to launch the kernels of a network than a GPU to run them. A graph has
fixed addresses and shapes, so there is one for each size of the padded batch.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_KEPT = 32  # graphs of a model. They share memory for activations; each needs some MB of its own
_PATIENCE = 32  # after its graph was dropped, a size is run this many times before it is captured again

Function = Callable[..., Any]


class BySize:
    """Calls a function: at the first inputs of a size as it is, from the second on by what was captured for the size.

    The least recently used of more than ``kept`` sizes is dropped. Threads take turns.

    Args:
        function: takes tensors, or lists of them.
        capture: called with ``function`` and inputs; returns a function of inputs of their shapes.
        kept: the largest number of sizes.
    """

    def __init__(self, function: Function, capture: Callable[..., Function], kept: int = _KEPT):
        self.function = function
        self._capture = capture
        self._kept = kept
        self._captured: dict[tuple, Function] = {}  # in the order of their use
        self._seen: Counter[tuple] = Counter()
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any) -> Any:
        """Return what the function returns for these inputs."""
        with self._lock:
            return self._call(inputs)

    def _call(self, inputs: tuple) -> Any:
        size = tuple((tuple(x.shape), x.stride(), x.dtype) for x in tensors(inputs))
        captured = self._captured.pop(size, None)
        if captured is None:
            self._seen[size] += 1
            if self._seen[size] < 2:  # most of the cost of a capture is lost on a size that comes once
                return self.function(*inputs)
            if len(self._captured) >= self._kept:
                oldest = next(iter(self._captured))
                del self._captured[oldest]
                self._seen[oldest] = 1 - _PATIENCE
            captured = self._capture(self.function, inputs)
        self._captured[size] = captured
        return captured(*inputs)


class Capture:
    """Captures a function as CUDA graphs that share their memory; to be called as ``BySize`` does.

    Args:
        device: the GPU.
        used: called after a capture; returns what the function reads besides its inputs and the model's weights, so
            that it is kept as long as the graph.
    """

    def __init__(self, device: torch.device, used: Callable[[], Any] = lambda: None):
        self._device = device
        self._used = used
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()  # one for all: memory is shared within a stream
        self._buffers: dict[tuple, Tensor] = {}

    def __call__(self, function: Function, inputs: tuple) -> Function:
        """Capture ``function`` for inputs of these shapes.

        Raises:
            RuntimeError: it cannot be captured. After that PyTorch may refuse other work on the GPU: end the process.
        """
        # Tensors of the inference mode could not be written to outside of it.
        with torch.cuda.device(self._device), torch.inference_mode(False), torch.no_grad():
            places = iter([self._place(number, x) for number, x in enumerate(tensors(inputs))])
            static = map_tensors(lambda _: next(places), inputs)
            _copy(inputs, static)
            graph = torch.cuda.CUDAGraph()
            try:
                assert not torch.is_autocast_enabled("cuda"), "torch.autocast is on."
                outputs = self._record(graph, function, static)
            except Exception as error:
                shapes = ", ".join(str(tuple(x.shape)) for x in tensors(inputs))
                raise RuntimeError(
                    f"MODEL.FOCAL.INFERENCE.CUDA_GRAPHS: inference on inputs of {shapes} cannot be captured: {error}\n"
                    "Set it to False for a model that reads values back or copies from the host, or under autocast."
                ) from error
        used = self._used()

        @torch.no_grad()
        def replay(*inputs: Any, used: Any = used) -> Any:
            _copy(inputs, static)
            graph.replay()
            return map_tensors(Tensor.clone, outputs)  # the next replay, of any size, overwrites them

        return replay

    def _record(self, graph: Any, function: Function, static: tuple) -> Any:
        """Capture ``function`` in ``graph`` and return its outputs, which each replay fills."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # kernels are compiled, algorithms chosen and workspaces allocated before the capture
                function(*static)
        torch.cuda.current_stream().wait_stream(self._stream)
        # Other threads, such as one that pins memory, may go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            return function(*static)

    def _place(self, number: int, x: Tensor) -> Tensor:
        """Memory for the input ``x`` of a graph. Graphs of all sizes share it, since each replay fills it anew."""
        key = number, x.dtype
        if key not in self._buffers or self._buffers[key].numel() < x.numel():
            self._buffers[key] = torch.empty(x.numel(), dtype=x.dtype, device=self._device)
        return self._buffers[key][: x.numel()].as_strided(x.shape, torch.empty_like(x, device="meta").stride())


def _copy(inputs: tuple, static: tuple) -> None:
    for x, place in zip(tensors(inputs), tensors(static), strict=True):
        place.copy_(x, non_blocking=True)


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in tuples, lists and dicts, in order."""
    if isinstance(tree, Tensor):
        yield tree
    else:
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors(value)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Return ``tree``, tensors in tuples, lists and dicts, with ``function`` of each tensor in place of it."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    return type(tree)(map_tensors(function, value) for value in tree)
