"""The network of a detector, its forward and its backward pass, recorded once a size and then replayed by the GPU.

A training step launches a thousand kernels. To start them one by one from Python takes a host longer than an H100 needs
to compute them; replayed as a CUDA graph they take one call.
"""

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ConfigError
from ..retinanet import FocalRetinaNet

logger = logging.getLogger(__name__)

MAX_SIZES = 8  # each keeps its logits, deltas and gradients: about 0.9 GB for 8 images of 800 × 1216 in float16

# In PyTorch 2.11 no other thread may use the GPU while it records.
_RECORDS_BESIDE_THREADS = "capture_error_mode" in inspect.signature(torch.cuda.make_graphed_callables).parameters

Maps = tuple[list[Tensor], list[Tensor]]


def compile_network(model: FocalRetinaNet) -> FocalRetinaNet:
    """Let ``model``, on a GPU, replay its backbone and head in training (``MODEL.FOCAL.COMPILE``); in place.

    Raises:
        ConfigError: the model is none that can be recorded.
    """
    if not isinstance(model, FocalRetinaNet) or model.device.type != "cuda":
        raise ConfigError(
            f"MODEL.FOCAL.COMPILE is True for {type(model).__name__} on {next(model.parameters()).device.type}; it is "
            "for FocalRetinaNet on a GPU. Set it False."
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise ConfigError(
                f"MODEL.FOCAL.COMPILE is True, and {name} is a SyncBatchNorm, whose processes talk within the network. "
                "Set COMPILE False, or choose another norm."
            )
    model.compiled = GraphedNetwork(model)
    return model


def pins_batches(device: str, compiled: bool) -> bool:
    """Whether a loader pins its batches, in a thread: for a GPU, unless this PyTorch cannot record beside threads."""
    return torch.device(device).type == "cuda" and (_RECORDS_BESIDE_THREADS or not compiled)


class GraphedNetwork:
    """Calls a model's backbone and head, from the second batch of a size on by replaying a recording.

    Args:
        model: its parameters stay where they are: the optimiser and checkpoints may change their values.
        max_sizes: the number of sizes to record. Further ones are computed as without recordings.
        record: called with a module and an example of its input; returns what replays the module.
    """

    def __init__(
        self,
        model: FocalRetinaNet,
        max_sizes: int = MAX_SIZES,
        record: Callable[[nn.Module, Tensor], Callable[[Tensor], Any]] | None = None,
    ):
        self.model, self.max_sizes, self.record = model, max_sizes, record or CudaRecorder()
        self.network = _Network(model)
        self.replays: dict[Any, Callable[[Tensor], Any]] = {}
        self.is_full = False

    def __call__(self, images: Tensor) -> Maps:
        """Return the logits (N, A·K, H, W) and the deltas (N, A·4, H, W) of each level for (N, 3, H, W) images.

        They are overwritten by the next call.
        """
        device = images.device.type
        key = images.shape, torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        replay = self.replays.get(key)
        if replay is None and len(self.replays) < self.max_sizes:
            logger.info(f"MODEL.FOCAL.COMPILE: recording the network for images of {tuple(images.shape)}.")
            replay = self.replays[key] = self.record(_Network(self.model), images)
        if replay is None:
            if not self.is_full:
                logger.info(
                    f"MODEL.FOCAL.COMPILE: the network is recorded for {self.max_sizes} sizes of batches, the most "
                    f"that are kept; others, such as {tuple(images.shape)}, are computed without a recording."
                )
            self.is_full = True
            replay = self.network
        outputs = replay(images)
        return list(outputs[: len(outputs) // 2]), list(outputs[len(outputs) // 2 :])

    def __deepcopy__(self, memo: dict) -> None:
        """Return None: a copy of the model has parameters of its own, which these recordings do not read."""


class CudaRecorder:
    """Records modules as CUDA graphs that share their memory, since one is replayed at a time."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, module: nn.Module, images: Tensor) -> Callable[[Tensor], Any]:
        """Return what replays ``module``, with its gradients, for images of this shape."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        # Warming up moves batch norms' statistics and draws random numbers, as if there had been more steps.
        buffers = {buffer: buffer.clone() for buffer in module.buffers()}
        random = torch.cuda.get_rng_state(images.device)
        is_mixed = torch.is_autocast_enabled("cuda")
        mode = {"capture_error_mode": "thread_local"} if _RECORDS_BESIDE_THREADS else {}
        # Autocast keeps what it has converted until its end, and a replay needs the conversions.
        with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), enabled=is_mixed, cache_enabled=False):
            replay = torch.cuda.make_graphed_callables(
                module, (images.clone(),), allow_unused_input=True, pool=self.pool, **mode
            )
        torch.cuda.set_rng_state(random, images.device)
        with torch.no_grad():
            for buffer, before in buffers.items():
                buffer.copy_(before)
        return replay


class _Network(nn.Module):
    """From images to logits and deltas."""

    def __init__(self, model: FocalRetinaNet):
        super().__init__()
        self.backbone, self.head, self.names = model.backbone, model.head, model.head_in_features

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.backbone(images)
        logits, deltas = self.head([features[name] for name in self.names])
        return (*logits, *deltas)
