"""The components that a config names, before any of them is built."""

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry

from .. import registry


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


def _chosen_names(cfg: CfgNode) -> dict[Registry, str]:
    focal = cfg.MODEL.FOCAL
    return {
        registry.DENSE_HEAD_REGISTRY: focal.HEAD.NAME,
        registry.CLS_LOSS_REGISTRY: focal.CLS_LOSS.NAME,
        registry.BOX_LOSS_REGISTRY: focal.BOX_LOSS.NAME,
        registry.ANCHOR_MATCHER_REGISTRY: focal.MATCHER.NAME,
        registry.BIAS_INIT_REGISTRY: focal.BIAS_INIT.NAME,
    }
