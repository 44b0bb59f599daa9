"""Reads files of weights, and writes a checkpoint with its config."""

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from torch import Tensor, nn

from ...config import add_focal_config
from ...files.regular import regular_path
from ...files.safe_load import WeightsError, load_torch, load_zoo
from ...files.weights import compare
from ...files.write import check_free, replace_file


class ConvertError(ValueError):
    """Weights that cannot be converted. The message says what was found and what was expected."""


@dataclass
class Converted:
    """Converted weights, and the config that goes with them.

    Attributes:
        weights: the tensors by Detectron2's names.
        settings: the keys of the config that they need, nested as in a YAML file.
        notes: sentences that a user should read.
        heuristics: whether Detectron2 is to match the names by their endings, as it does for backbones.
    """

    weights: dict[str, Tensor]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    heuristics: bool = False

    @property
    def cfg(self) -> CfgNode:
        """The whole config, for the CPU."""
        cfg = get_cfg()
        add_focal_config(cfg)
        cfg.merge_from_other_cfg(CfgNode(self.settings))
        cfg.MODEL.DEVICE = "cpu"
        return cfg


def read_content(path: str) -> dict[str, Any]:
    """Return the content of a file of weights, in the format of its ending. No code in it is executed.

    Raises:
        OSError: it cannot be opened.
        WeightsError: it has no weights, or objects that are not plain data.
    """
    if path.endswith((".pkl", ".pyth")):
        return load_zoo(path)
    if path.endswith(".safetensors"):
        try:
            safetensors, torch_part = map(importlib.import_module, ("safetensors", "safetensors.torch"))
        except ImportError as error:
            raise ConvertError(f"{path} needs the package safetensors: pip install safetensors") from error
        try:
            return torch_part.load_file(regular_path(path))
        except safetensors.SafetensorError as error:
            raise WeightsError(f"{path} is damaged or no file of safetensors': {error}") from error
    return load_torch(path)


def find_weights(content: Mapping[str, Any], path: str) -> dict[str, Tensor]:
    """Return the tensors by name in a file's content: at its top, or under ``model`` or ``state_dict``.

    The prefix "module." of ``DistributedDataParallel`` is removed.

    Raises:
        WeightsError: there is something else.
    """
    key = next((key for key in ("model", "state_dict") if isinstance(content.get(key), dict)), None)
    weights = content if key is None else content[key]
    weights = {name: torch.as_tensor(value) if _is_array(value) else value for name, value in weights.items()}
    other = next((name for name, value in weights.items() if not isinstance(value, Tensor)), None)
    if other is not None or not weights:
        found = f"{type(weights[other]).__name__} for {other!r}" if weights else "nothing"
        raise WeightsError(f"{path} has {found}; expected tensors by name, alone or under model or state_dict.")
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return weights


def averaged_weights(path: str) -> dict[str, Tensor]:
    """Return the averaged weights in a checkpoint of a training with ``MODEL.FOCAL.EMA``, and its other weights.

    Raises:
        ConvertError: it has none.
    """
    content = read_content(path)
    average = content["ema"].get("weights") if isinstance(content.get("ema"), dict) else None
    weights = find_weights(content, path)
    if not isinstance(average, dict) or not average.keys() <= weights.keys():
        raise ConvertError(
            f"{path} has no average of its weights; expected a checkpoint of a training with MODEL.FOCAL.EMA.DECAY."
        )
    return find_weights({"model": weights | average}, path)


def _is_array(value: object) -> bool:
    return type(value).__module__ == "numpy" and hasattr(value, "dtype")


def check_complete(weights: Mapping[str, Tensor], module: nn.Module) -> None:
    """Check that ``weights`` are exactly those of ``module``.

    Raises:
        ConvertError: they are not; lists all differences.
    """
    if problems := compare(weights, module.state_dict()).problems():
        raise ConvertError("The weights are not those of the model:\n  " + "\n  ".join(problems))


def write(converted: Converted, output: str, source: str, force: bool = False) -> str:
    """Write the checkpoint ``output`` and its config, a ``.yaml`` of the same name, and return the config's path.

    Args:
        converted: the weights and the config.
        output: a name that ends in ``.pth``.
        source: the source of the weights, for the config's first line.
        force: whether to overwrite files.

    Raises:
        ConvertError: ``output`` has another ending.
        OSError: one of the files exists, or cannot be written.
    """
    config = check_output(output, force)
    lines = [f"# Weights of {source}, converted.", *(f"# {note}" for note in converted.notes)]
    settings = merge(converted.settings, {"VERSION": 2, "MODEL": {"WEIGHTS": os.path.abspath(output)}})
    text = "\n".join(lines) + "\n" + yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=120)
    content: dict[str, Any] = {"model": converted.weights}
    if converted.heuristics:
        content |= {"matching_heuristics": True, "__author__": source}
    replace_file(output, lambda file: torch.save(content, file))
    replace_file(config, lambda file: file.write(text.encode()))
    return config


def check_output(output: str, force: bool, with_config: bool = True) -> str:
    """Check that a checkpoint and its config can be written, and return the config's path.

    Raises:
        ConvertError: ``output`` does not end in ``.pth``.
        FileExistsError: a file exists, and ``force`` is not given.
    """
    if not output.endswith(".pth"):
        raise ConvertError(f"{output} does not end in .pth, as the checkpoint to write must.")
    config = output.removesuffix(".pth") + ".yaml"
    for path in (output, config)[: 1 + with_config]:
        if not force:
            check_free(path, "OUT", "overwrite it with --force")
    return config


def merge(into: Mapping, other: Mapping) -> dict:
    """Merge two nested dicts. Where both have a value, ``other``'s is used."""
    result = dict(into)
    for key, value in other.items():
        both = isinstance(value, Mapping) and isinstance(into.get(key), Mapping)
        result[key] = merge(into[key], value) if both else value
    return result
