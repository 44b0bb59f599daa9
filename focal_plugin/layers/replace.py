"""Replacing modules inside a model: the new ones share the parameters of the old."""

from collections.abc import Callable
from typing import Any

from torch import nn


def replace_modules(model: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Replace every module of ``model`` for which ``make`` gives another one; in place.

    Args:
        model: is searched with all that is inside.
        make: called with each module. It returns a module to put in its place, or None to leave it.

    Returns:
        ``model``, or what ``make`` gave for it.
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
    """Build a convolution of class ``kind`` with the geometry of ``conv`` and its very parameters.

    Args:
        kind: the class.
        conv: keeps its parameters, which the new module shares.
        kwargs: more arguments of the constructor of ``kind``.
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
