"""Frozen batch norm as part of the convolution before it, without passes of its own over the activations."""

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn


class FrozenNormConv2d(Conv2d):
    """Detectron2's ``Conv2d`` with a ``FrozenBatchNorm2d`` that scales the weight in mixed precision.

    A frozen batch norm is y = s·x + b, channel by channel, so s·conv(x, w) + b = conv(x, s·w) + b: the same function of
    the same parameters. Detectron2's module reads and writes the activations twice more, their gradients once more, and
    rounds them each time to the lower precision. In full precision this is its very computation, to the last bit.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H', W')."""
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # which knows no meta device
            return super().forward(x)
        weight, bias = folded(self, self.norm)
        x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)


def fold_frozen_norms(model: nn.Module) -> nn.Module:
    """Make each ``Conv2d`` in ``model`` that has a ``FrozenBatchNorm2d`` a ``FrozenNormConv2d``; in place.

    The modules stay the same objects with the same parameters and buffers: whoever holds one sees the change, and
    checkpoints load as before. Classes derived from the two are left as they are.
    """
    for module in model.modules():
        if type(module) is Conv2d and type(module.norm) is FrozenBatchNorm2d:
            module.__class__ = FrozenNormConv2d
    return model


def folded(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The weight and bias of the convolution that is ``conv`` and then ``norm``, a batch norm in evaluation mode.

    Args:
        conv: a convolution to C' channels, with a bias or without.
        norm: a ``FrozenBatchNorm2d``, ``BatchNorm2d`` or the like: with running statistics, affine or not.
    """
    scale = (norm.running_var + norm.eps).rsqrt()  # (C',)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale if conv.bias is None else (conv.bias - norm.running_mean) * scale  # (C',)
    if norm.bias is not None:
        shift = shift + norm.bias
    return conv.weight * scale.view(-1, 1, 1, 1), shift
