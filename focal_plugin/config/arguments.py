"""What a LazyConfig and its command line say, checked before the first object is made."""

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from numbers import Real
from typing import Any

from detectron2.config.instantiate import locate

from .keys import ConfigError

# What training reads besides the arguments of objects, be it in the file or not.
_TRAIN = "accumulate amp.dtype amp.enabled best_metric channels_last checkpointer compile cudnn_benchmark ddp"
_TRAIN += " device ema.decay eval_period init_checkpoint log_period loggers max_iter max_skips output_dir patience seed"
_READ = [*(f"train.{name}" for name in _TRAIN.split()), "dataloader.evaluator", "dataloader.validation"]


def check_override(cfg: Mapping, word: str) -> None:
    """Check that a word of the command line, ``path.key=value``, changes what the config has or training reads.

    Raises:
        ConfigError: it does not.
    """
    key, node, path = word.lstrip("+").partition("=")[0], cfg, ""
    for name in key.split("."):
        if not isinstance(node, Mapping) or "_target_" in node:
            return
        if name not in node:
            break
        node, path = node[name], f"{path}{name}."
    else:
        return
    if not any(f"{read}.".startswith(f"{key}.") or key.startswith(f"{read}.") for read in _READ):
        near = get_close_matches(key, [*(f"{path}{other}" for other in node), *_READ])
        hint = f" Near it: {', '.join(near)}." if near else ""
        raise ConfigError(f"{key}: the config has no such key, and training reads none.{hint}")


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
