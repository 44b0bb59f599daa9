"""Replacement of modules inside a model. The new modules share the parameters of the old ones."""

from collections.abc import Callable
from typing import Any

from torch import nn


def replace_modules(model: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Replace every module of ``model`` for which ``make`` returns another one; in place.

    Args:
        model: searched at all depths.
        make: called with each module. Returns the module to put in its place, or None to keep it.

    Returns ``model``, or its own replacement.
    """
    made = {module: new for module in model.modules() if (new := make(module)) is not None}
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child in made:
                setattr(parent, name, made[child])
        for value in vars(parent).values():  # Detectron2's FPN keeps its convolutions in lists as well
            if isinstance(value, list):
                value[:] = [made.get(item, item) if isinstance(item, nn.Module) else item for item in value]
    return made.get(model, model)


def like_conv(kind: Callable[..., nn.Conv2d], conv: nn.Conv2d, **kwargs: Any) -> nn.Conv2d:
    """Build a convolution of class ``kind`` with the geometry of ``conv`` that shares its parameters.

    ``conv`` is not changed. ``kwargs`` are further arguments for the constructor of ``kind``.
    """
    new = kind(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        device="meta",  # no memory for parameters that are replaced at once
        **kwargs,
    )
    new.weight, new.bias = conv.weight, conv.bias
    return new.train(conv.training)
