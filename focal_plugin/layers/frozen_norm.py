"""Frozen batch norm as part of the convolution before it, without passes of its own over the activations."""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

from .replace import like_conv, replace_modules


class FrozenNormConv2d(Conv2d):
    """Detectron2's ``Conv2d`` with a ``FrozenBatchNorm2d`` that scales the weight in mixed precision.

    A frozen batch norm is y = s·x + b, channel by channel, so s·conv(x, w) + b = conv(x, s·w) + b: the same function of
    the same parameters. Detectron2's module makes two more passes over the activations and one over their gradients,
    each of which rounds to the lower precision. In full precision this is Detectron2's computation to the last bit.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H', W')."""
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # autocast does not know the meta device
            return super().forward(x)
        weight, bias = folded(self, self.norm)
        x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)


def fold_frozen_norms(model: nn.Module) -> nn.Module:
    """Replace each ``Conv2d`` in ``model`` that has a ``FrozenBatchNorm2d`` by a ``FrozenNormConv2d``; in place.

    The parameters and buffers stay the same objects under the same names, so checkpoints load as before. Subclasses
    of the two are not replaced. ``FocalRetinaNet.from_config`` does this to the backbone it builds; do it
    to a backbone of yours before you hand it over.

    Returns ``model``, or its replacement if it is such a convolution itself.
    """
    return replace_modules(model, _frozen_twin)


def _frozen_twin(module: Any) -> nn.Module | None:
    if type(module) is not Conv2d or type(module.norm) is not FrozenBatchNorm2d:
        return None
    return like_conv(FrozenNormConv2d, module, norm=module.norm, activation=module.activation)


def folded(conv: nn.Conv2d, norm: Any) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of one convolution that equals ``conv`` and then ``norm`` in evaluation mode.

    ``conv`` may have a bias or not. ``norm`` is any batch norm with running statistics, affine or not.
    """
    # y = (x − mean) / √(var + ε) · weight + bias is s·x + shift, channel by channel.
    scale = (norm.running_var + norm.eps).rsqrt()  # (C',)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale if conv.bias is None else (conv.bias - norm.running_mean) * scale  # (C',)
    if norm.bias is not None:
        shift = shift + norm.bias
    return conv.weight * scale.view(-1, 1, 1, 1), shift
