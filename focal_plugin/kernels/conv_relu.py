"""A convolution, its bias, a residual and ReLU in one pass over the activations, by cuDNN's fused kernels.

PyTorch launches a kernel for each of the four. In float16 on a GPU the three small ones together take longer than the
convolutions of a ResNet-50: each reads and writes all activations. Elsewhere, and for layers that cannot be fused, the
functions here compute the same with PyTorch's own operators.
"""

import logging
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..layers.frozen_norm import FrozenNormConv2d
from ..layers.replace import replace_modules

logger = logging.getLogger(__name__)

# By norm: the state that its scale and shift are of, the buffers of that state, and scale and shift. Not in the norm,
# so that copies and pickles of it have none; freed with the norm.
_kept: WeakKeyDictionary[nn.Module, tuple[Any, list[Tensor], tuple[Tensor, Tensor]]] = WeakKeyDictionary()

_without_kernel: set[Any] = set()

Geometry = tuple[Any, Any, Any, int]  # stride, padding, dilation, groups


def conv_relu(conv: nn.Conv2d, xs: Sequence[Tensor], residual: Tensor | None = None) -> list[Tensor]:
    """Return ReLU(conv(x) + residual) for each of ``xs``.

    Args:
        conv: with a norm or without.
        xs: (N, C, H, W) each, such as the levels of a pyramid.
        residual: (N, C', H', W'), for a single x; it may be overwritten where no gradient is needed for that.
    """
    dtype = _fused_dtype(conv, xs)
    if dtype is None:
        outputs = [conv(x) for x in xs]
        return [F.relu_(y if residual is None else y.add_(residual)) for y in outputs]
    scale, bias = _scale_and_shift(conv.norm, dtype) if isinstance(conv, FrozenNormConv2d) else (None, conv.bias)
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    xs = [x.to(dtype) for x in xs]
    residual = None if residual is None else residual.to(dtype, memory_format=torch.channels_last)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (conv.weight, bias, residual, *xs)
    )
    if needs_grad:
        return list(_ConvReLU.apply(geometry, dtype, conv.weight, scale, bias, residual, *xs))
    weight = _scaled(conv.weight, scale, dtype)
    return [_fused(x, weight, None if bias is None else bias.to(dtype), residual, geometry) for x in xs]


def subnet(layers: nn.Sequential, xs: Sequence[Tensor]) -> list[Tensor]:
    """Return ``layers(x)`` for each of ``xs``, with each convolution and the ReLU after it in one pass if possible."""
    kinds: list[type] = [type(layer) for layer in layers]
    if kinds != [nn.Conv2d, nn.ReLU] * (len(kinds) // 2) or _has_hooks(layers, *layers):
        return [layers(x) for x in xs]
    for conv in list(layers)[::2]:
        xs = conv_relu(conv, xs)  # type: ignore[arg-type]
    return list(xs)


class FusedBlock(CNNBlockBase):
    """Detectron2's residual block, ``BasicBlock`` or ``BottleneckBlock``, with the same layers and fewer passes."""

    def __init__(self, block: BasicBlock | BottleneckBlock):
        super().__init__(block.in_channels, block.out_channels, block.stride)
        self.shortcut = block.shortcut
        for name, conv in block.named_children():
            self.add_module(name, conv)
        self.convs = [name for name in ("conv1", "conv2", "conv3") if hasattr(block, name)]
        self.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H', W')."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        *first, last = (getattr(self, name) for name in self.convs)
        for conv in first:
            (x,) = conv_relu(conv, [x])
        return conv_relu(last, [x], shortcut)[0]


class FusedStem(CNNBlockBase):
    """Detectron2's ``BasicStem`` with the same convolution and fewer passes."""

    def __init__(self, stem: BasicStem):
        super().__init__(stem.in_channels, stem.out_channels, stem.stride)
        self.conv1 = stem.conv1
        self.train(stem.training)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, C, H / 4, W / 4)."""
        return F.max_pool2d(conv_relu(self.conv1, [x])[0], kernel_size=3, stride=2, padding=1)


def fuse_blocks(model: nn.Module) -> nn.Module:
    """Replace the blocks and stems of Detectron2's ResNets in ``model`` by their fused twins; in place.

    The layers stay the same objects under the same names, so checkpoints load as before. Subclasses are not replaced.
    """
    return replace_modules(model, _fused_twin)


def _fused_twin(module: Any) -> nn.Module | None:
    if type(module) is BasicStem:
        return FusedStem(module)
    return FusedBlock(module) if type(module) in (BasicBlock, BottleneckBlock) else None


def _fused_dtype(conv: nn.Conv2d, xs: Sequence[Tensor]) -> torch.dtype | None:
    """Return what the fused kernels would compute in; None if they can't compute this."""
    if not xs[0].is_cuda or torch.version.cuda is None or not torch.backends.cudnn.enabled:
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else xs[0].dtype
    if dtype not in (torch.float16, torch.bfloat16):  # in float32, results would differ with the matrix units' rounding
        return None
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a compiler fuses by itself
        return None
    norm, activation = getattr(conv, "norm", None), getattr(conv, "activation", None)
    is_folded = type(conv) is FrozenNormConv2d and conv.bias is None and torch.is_autocast_enabled("cuda")
    is_bare = type(conv) in (nn.Conv2d, Conv2d) and norm is None
    if not (is_folded or is_bare) or activation is not None or conv.padding_mode != "zeros" or _has_hooks(conv):
        return None
    channels_last = (t.is_contiguous(memory_format=torch.channels_last) for t in (conv.weight, *xs))
    return dtype if all(channels_last) and all(x.numel() for x in xs) else None


def _scale_and_shift(norm: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a frozen norm's s (C, 1, 1, 1) float32 and b (C,) in ``dtype``: the same tensors until it changes."""
    buffers = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    if any(buffer.is_inference() for buffer in buffers):
        return _computed(norm, dtype)
    # `_version` counts changes in place. What is kept holds the buffers, so no other tensor can get their ids.
    state = dtype, [(id(buffer), buffer._version) for buffer in buffers]
    if norm not in _kept or _kept[norm][0] != state:
        _kept[norm] = state, buffers, _computed(norm, dtype)
    return _kept[norm][2]


def _computed(norm: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()  # (C,)
    return scale.view(-1, 1, 1, 1), (norm.bias - norm.running_mean * scale).to(dtype)


def _has_hooks(*modules: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _scaled(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return ``weight · scale``, rounded once."""
    if scale is None:
        return weight.to(dtype)
    return torch.mul(weight.detach(), scale, out=torch.empty_like(weight, dtype=dtype))


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, geometry: Geometry) -> Tensor:
    """Run the fused kernel, or where cuDNN has none the four operators, which is logged once for each kind of layer."""
    kind = x.dtype, weight.shape, geometry, residual is None
    if kind not in _without_kernel:
        try:
            if residual is None:
                return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
            stride, padding, dilation, groups = geometry
            return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride, padding, dilation, groups)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # in words that differ between versions; what is wrong with x, the next lines say
            shape = "×".join(map(str, weight.shape))
            logger.info(f"cuDNN has no fused kernel for a convolution with weights of {shape} in {x.dtype}: {error}")
            _without_kernel.add(kind)
    y = F.conv2d(x, weight, bias, *geometry)
    return F.relu_(y if residual is None else y.add_(residual))


class _ConvReLU(torch.autograd.Function):
    """The fused kernels, for which PyTorch has no gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        geometry: Geometry,
        dtype: torch.dtype,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        weight = _scaled(weight, scale, dtype)
        bias = None if bias is None else bias.to(dtype)
        ys = [_fused(x, weight, bias, residual, geometry) for x in xs]
        ctx.geometry = geometry
        ctx.save_for_backward(weight, scale, *xs, *ys)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, *maps = ctx.saved_tensors
        needs_weight, _, needs_bias, needs_residual, needs_x = ctx.needs_input_grad[2:7]
        stride, padding, dilation, groups = ctx.geometry
        grad_xs: list[Tensor] = []
        grad_weights: list[Tensor] = []
        grad_biases: list[Tensor] = []
        for grad, x, y in zip(grads, maps[: len(grads)], maps[len(grads) :]):
            grad = torch.ops.aten.threshold_backward(grad, y, 0)  # ReLU's
            found = torch.ops.aten.convolution_backward(
                grad,
                x,
                weight,
                [len(weight)],
                stride,
                padding,
                dilation,
                False,
                [0] * len(stride),
                groups,
                [needs_x, needs_weight, needs_bias],
            )
            for values, value in zip((grad_xs, grad_weights, grad_biases), found):
                values.append(value)
        grad_weight = _total(grad_weights, scale) if needs_weight else None
        grad_bias = _total(grad_biases) if needs_bias else None
        return (None, None, grad_weight, None, grad_bias, grad if needs_residual else None, *grad_xs)


def _total(parts: list[Tensor], scale: Tensor | None = None) -> Tensor:
    """Return the sum of ``parts``, in float32, times ``scale``."""
    if len(parts) == 1:
        return parts[0].float() if scale is None else parts[0] * scale
    total = sum(parts[1:], start=parts[0].float())
    return total if scale is None else total * scale
