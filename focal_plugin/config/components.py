"""The components that a config names, before any of them is built."""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry

from .. import registry
from .keys import ConfigError

_VALUES = (str, int, float, bool, list, tuple, type(None))  # what a config holds
_CONVERTED = {(int, float), (list, tuple), (tuple, list)}


def chosen_components(cfg: CfgNode) -> list[Callable[..., Any]]:
    """Return the registered components that ``cfg`` names, without those that are empty or not known."""
    return [kind.get(name) for kind, name in _chosen_names(cfg).items() if name in kind]


def check_names(cfg: CfgNode) -> None:
    """Check that the components that ``cfg`` names are registered.

    Raises:
        ConfigError: one is not registered.
    """
    for kind, name in _chosen_names(cfg).items():
        if name:  # of the box loss; the others' names are never empty
            registry.get_component(kind, name)


def fill_args(cfg: CfgNode) -> None:
    """Complete the sections ``ARGS`` of ``cfg``, in place, with the defaults of the components that it names.

    Raises:
        ConfigError: a section has a key that its component does not have, or a value of another type.
    """
    for kind, name in _chosen_names(cfg).items():
        if name in kind:  # others are an error when they are built
            given = registry.args_of(kind, cfg)
            args = own_args(kind, name, given)
            given.clear()
            given.update(args)


def own_args(kind: Registry, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a component's own keys: those ``given``, or else the defaults. None is as not given.

    The keys are the keyword-only arguments of its constructor (of ``from_config``, if it is configurable) whose
    defaults a config can hold, in upper case.

    Raises:
        ConfigError: the component has no such key, or the value has another type than the default.
    """
    args, section = _defaults(kind.get(name)), registry.CONFIG_KEYS[kind._name].replace("NAME", "ARGS")
    for key, value in given.items():
        if value is None:
            continue
        if key not in args:
            known = ", ".join(args) or "none; keyword-only arguments of its constructor would be"
            raise ConfigError(f"{section}.{key}: {name} has no such key. It has {known}. The value None leaves it out.")
        args[key] = _as_type_of(args[key], value, f"{section}.{key}")
    return args


def _defaults(component: Callable[..., Any]) -> dict[str, Any]:
    constructor = component.__init__ if inspect.isclass(component) else component
    configurable = hasattr(constructor, "__wrapped__") and hasattr(component, "from_config")
    declared = inspect.signature(component.from_config if configurable else component).parameters.values()
    own = {p.name.upper(): copy.deepcopy(p.default) for p in declared if p.kind is p.KEYWORD_ONLY and p.name.islower()}
    return {key: default for key, default in own.items() if isinstance(default, _VALUES)}


def _as_type_of(default: Any, value: Any, key: str) -> Any:
    kind = type(default)
    if default is None or type(value) is kind:
        return value
    if (type(value), kind) in _CONVERTED:
        return kind(value)
    raise ConfigError(f"{key} is {value!r} ({type(value).__name__}); expected a value of type {kind.__name__}.")


def _chosen_names(cfg: CfgNode) -> dict[Registry, str]:
    focal, stock = cfg.MODEL.FOCAL, cfg.MODEL.RETINANET.BBOX_REG_LOSS_TYPE
    return {
        registry.DENSE_HEAD_REGISTRY: focal.HEAD.NAME,
        registry.CLS_LOSS_REGISTRY: focal.CLS_LOSS.NAME,
        registry.BOX_LOSS_REGISTRY: focal.BOX_LOSS.NAME or registry.STOCK_BOX_LOSSES.get(stock, ""),
        registry.ANCHOR_MATCHER_REGISTRY: focal.MATCHER.NAME,
        registry.BIAS_INIT_REGISTRY: focal.BIAS_INIT.NAME,
    }
