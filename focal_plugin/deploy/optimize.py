"""The same detections at less cost: norms folded, channels last, bfloat16 where it is fast, compiled if asked, and
launched at once as a CUDA graph if asked."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import Tensor, nn

from ..anchors.cache import newest_anchors
from ..kernels import padded
from ..layers.fast_dtype import fast_dtype
from ..layers.frozen_norm import FrozenNormConv2d, folded
from ..layers.replace import like_conv, replace_modules
from ..retinanet import FocalRetinaNet
from .graphs import BySize, Capture, map_tensors

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def optimize_for_inference(
    model: nn.Module, dtype: torch.dtype | None = None, *, compile: bool = False, graphs: bool = False
) -> nn.Module:
    """A copy of ``model`` for inference only; ``model`` itself stays as it is.

    Batch norms with fixed statistics become part of the convolutions before them, and weights and images lie in memory
    as (N, H, W, C). The detections are the model's to rounding: in float32 the same boxes in the same order.

    Args:
        model: a FocalRetinaNet, or any model of Detectron2's, on its device.
        dtype: what the backbone, and a dense detector's head, compute in: float32, bfloat16 or float16. Boxes, scores
            and NMS are computed in float32. None: ``fast_dtype`` of the device.
        compile: let ``torch.compile`` fuse the backbone's, and a dense detector's head's, operations. It takes some
            seconds at the first image of each size, so it is for images of one size or of few (beyond eight sizes
            PyTorch stops compiling, and says so); on a CPU it needs a C++ compiler. The copy cannot be pickled.
        graphs: on a GPU, replay a CUDA graph for each size of batch, from the second batch of a size on; the 32 sizes
            used last are kept. It holds all of a FocalRetinaNet up to its detections; of another dense detector (also
            a FocalRetinaNet with its own ``candidates`` or ``forward_inference``), the backbone and the head; of other
            models, the backbone. Hooks in it are called at the first batch of a size and while capturing, and not
            afterwards. The copy has to stay on its device, out of ``torch.autocast``, and cannot be pickled.

    Raises:
        ValueError: another dtype; one below float32, ``compile`` or ``graphs`` for a model without a ``backbone``;
            ``graphs`` for a model that is not on a GPU.
    """
    has_backbone = isinstance(getattr(model, "backbone", None), nn.Module)
    if dtype is None:
        dtype = fast_dtype(next(model.parameters()).device) if has_backbone else torch.float32
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype}; expected one of {', '.join(map(str, _DTYPES))}, or None.")
    if (dtype != torch.float32 or compile or graphs) and not has_backbone:
        raise ValueError(
            f"dtype is {dtype}, compile is {compile} and graphs is {graphs}, but {type(model).__name__} has no "
            "`backbone` to compute so: use float32, not compiled, without graphs."
        )
    if graphs and (device := next(model.parameters()).device).type != "cuda":
        raise ValueError(
            f"MODEL.FOCAL.INFERENCE.CUDA_GRAPHS (graphs) is True, but the model is on {device}, where there are none: "
            "set it to False, or MODEL.DEVICE to cuda."
        )

    model = fold_norms(model).to(memory_format=torch.channels_last)
    if has_backbone:
        last = model.head if isinstance(model, DenseDetector) else model.backbone
        model.backbone.register_forward_pre_hook(partial(_prepare_images, dtype))
        if dtype != torch.float32:
            model.backbone.to(dtype)
            last.to(dtype)
            if not _is_stock(model):  # whose candidates, a few of its outputs, become float32 later
                last.register_forward_hook(_to_float32)
        if compile:
            for module in {model.backbone, last}:
                module.forward = _compiled(module.forward)  # below the hooks
        if graphs:
            _use_graphs(model, last)
    return model


@torch.no_grad()
def fold_norms(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for inference only, with batch norms of fixed statistics in the convolutions before them."""
    return replace_modules(copy.deepcopy(model).eval(), _folded_conv).requires_grad_(False)


def model_for_inference(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """``model``, or its ``optimize_for_inference`` where ``MODEL.FOCAL.INFERENCE`` asks for it.

    Its keys are ``OPTIMIZE``, ``COMPILE`` and ``CUDA_GRAPHS``.
    """
    wanted = cfg.MODEL.FOCAL.INFERENCE
    if not (wanted.OPTIMIZE or wanted.COMPILE or wanted.CUDA_GRAPHS):
        return model
    return optimize_for_inference(model, compile=wanted.COMPILE, graphs=wanted.CUDA_GRAPHS)


def _is_stock(model: nn.Module) -> bool:
    return isinstance(model, FocalRetinaNet) and padded.is_stock(model, FocalRetinaNet)


def _use_graphs(model: nn.Module, last: nn.Module) -> None:
    """Let ``model``, on a GPU, replay CUDA graphs. ``last`` is the last of its modules that can be captured."""
    device = next(model.parameters()).device
    if _is_stock(model) and padded.is_usable(model, FocalRetinaNet):
        # The anchors of a size are built on the host and kept for a while; a graph goes on to read them.
        model.detect = BySize(model.detect, Capture(device, used=partial(newest_anchors, model.anchor_generator)))
        return
    capture = Capture(device)
    for module in {model.backbone, last}:
        module.forward = BySize(module.forward, capture)  # below the hooks


def _compiled(forward: Callable) -> Callable:
    """``forward`` compiled for each shape of its inputs, its weights constants that are packed once."""
    import torch._inductor.config as inductor  # here, since it takes seconds and most runs compile nothing

    compiled = torch.compile(forward, dynamic=False)  # with sizes that may change nearly all of the gain is lost

    def call(*args: Any) -> Any:
        with inductor.patch(freezing=True):  # read at each compilation, which may happen at any call
            return compiled(*args)

    return call


def _folded_conv(conv: nn.Module) -> nn.Module | None:
    """One convolution that computes ``conv`` and its norm; None if it has none to fold."""
    if type(conv) not in (Conv2d, FrozenNormConv2d) or not isinstance(conv.norm, (FrozenBatchNorm2d, nn.BatchNorm2d)):
        return None
    new = like_conv(Conv2d, conv, activation=conv.activation)
    new.weight, new.bias = map(nn.Parameter, folded(conv, conv.norm))
    return new


def _prepare_images(dtype: torch.dtype, module: nn.Module, args: tuple) -> tuple:
    images, *others = args  # (N, C, H, W)
    return images.to(dtype, memory_format=torch.channels_last), *others


def _to_float32(module: nn.Module, args: tuple, output: Any) -> Any:
    return map_tensors(Tensor.float, output)
