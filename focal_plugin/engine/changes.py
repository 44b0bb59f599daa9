"""What differs between the config of a checkpoint and that of the run that resumes it."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from detectron2.config import CfgNode

from ..config import ConfigError
from ..config.explain import flatten

_NOT_THE_RUN = {"output_dir", "device", "num_workers"}  # the last words of keys that say where, not what
_SPENT = {  # keys that a run reads at its start alone
    "MODEL.WEIGHTS": "the checkpoint has the weights",
    "train.init_checkpoint": "the checkpoint has the weights",
    "MODEL.FOCAL.TIMM.WEIGHTS": "the checkpoint has the weights",
    "MODEL.RETINANET.PRIOR_PROB": "the bias is trained",
    "MODEL.FOCAL.BIAS_INIT.NAME": "the bias is trained",
}
SEEDS = ("SEED", "train.seed")
_PLAIN = (str, int, float, bool, type(None))


def plain_config(cfg) -> dict[str, Any]:
    """Return a ``CfgNode`` or a LazyConfig by its whole keys, as plain values, without those that only say where."""
    content = yaml.safe_load(cfg.dump()) if isinstance(cfg, CfgNode) else cfg
    return {key: _plain(value) for key, value in flatten(content).items() if _last(key) not in _NOT_THE_RUN}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what has changed between two of ``plain_config``: (before, now) by key, where a missing one is None."""
    keys = [key for key in {**before, **now} if _last(key) not in _NOT_THE_RUN]
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def describe(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Return changes for a message: "SOLVER.BASE_LR 0.01 → 0.02; ..."."""
    notes = {key: f" (not read any more: {_SPENT[key]})" for key in changed if key in _SPENT}
    return "; ".join(f"{key} {_show(old)} → {_show(new)}{notes.get(key, '')}" for key, (old, new) in changed.items())


def refuse_seed(path: str, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse to resume ``path`` with another seed, since its random numbers go on.

    Raises:
        ConfigError: the seed has changed.
    """
    for key in changed.keys() & set(SEEDS):
        old, new = changed[key]
        raise ConfigError(
            f"{key} is {new}, and {path} is of a run with {old}, whose random numbers go on. Leave {key} out or set it "
            f"to {old}; for a run with another seed, set another OUTPUT_DIR."
        )


def _show(value: Any) -> str:
    return "(empty)" if value == "" else "(absent)" if value is None else str(value)


def _last(key: str) -> str:
    return key.rpartition(".")[2].lower()


def _plain(value: Any) -> Any:
    """Return ``value`` of plain containers alone; what is none, such as a class, becomes its name."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
