"""The arguments of the objects that a LazyConfig makes, checked before the first of them is made."""

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from numbers import Real
from typing import Any

from detectron2.config.instantiate import locate

from .keys import ConfigError


def check_arguments(node: Any, path: str) -> None:
    """Check that each object of a part of a LazyConfig takes the arguments that the config gives.

    Args:
        node: the part, such as ``cfg.model``, or any value in it.
        path: what it is called in messages, such as "model".

    Raises:
        ConfigError: an argument is unknown, or text where the default is a number.
    """
    if isinstance(node, Mapping):
        for key, value in node.items():
            check_arguments(value, f"{path}.{key}")
        if "_target_" in node:
            _check_call(node, path)
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for i, value in enumerate(node):
            check_arguments(value, f"{path}[{i}]")


def _check_call(node: Mapping[str, Any], path: str) -> None:
    target = locate(node["_target_"]) if isinstance(node["_target_"], str) else node["_target_"]
    try:
        known = inspect.signature(target).parameters
    except (TypeError, ValueError):  # not written in Python
        return
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for key in set(node) - {"_target_"}:
        name, value = f"{path}.{key}", node[key]
        if key not in known and not takes_any:
            near = get_close_matches(key, known)
            hint = f"Near it: {', '.join(near)}." if near else f"It has {', '.join(known) or 'none'}."
            raise ConfigError(f"{name}: {target.__qualname__} has no such argument. {hint}")
        default = known[key].default if key in known else None
        if isinstance(value, str) and isinstance(default, Real):
            raise ConfigError(f"{name} is {value!r}; expected a number, such as its default {default}.")
