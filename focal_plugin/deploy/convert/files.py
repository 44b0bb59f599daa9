"""Reading what others wrote, and writing a checkpoint with its config."""

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
from ...files.safe_load import WeightsError, load_torch, load_zoo
from ...files.weights import compare
from ...files.write import check_free, replace_file


class ConvertError(ValueError):
    """Weights that cannot be converted as asked. The message says what was found and what was expected."""


@dataclass
class Converted:
    """Weights by Detectron2's names, and what goes with them.

    Attributes:
        weights: the model's tensors by name.
        settings: the config's keys that they need, nested as in a YAML file.
        notes: what a user should know, a sentence each.
        heuristics: whether Detectron2 finds the weights' places by the ends of their names, as it does for backbones.
    """

    weights: dict[str, Tensor]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    heuristics: bool = False

    @property
    def cfg(self) -> CfgNode:
        """The whole config, for the CPU."""
        cfg = _defaults()
        cfg.merge_from_other_cfg(CfgNode(self.settings))
        cfg.MODEL.DEVICE = "cpu"
        return cfg


def _defaults() -> CfgNode:
    cfg = get_cfg()
    add_focal_config(cfg)
    return cfg


def read_content(path: str) -> dict[str, Any]:
    """What is in a file of weights, by its ending; nothing in it is executed.

    Raises:
        OSError: it cannot be opened.
        WeightsError: it holds no weights, or asks for more than data.
    """
    if path.endswith((".pkl", ".pyth")):
        return load_zoo(path)
    if path.endswith(".safetensors"):
        try:
            safetensors, torch_part = map(importlib.import_module, ("safetensors", "safetensors.torch"))
        except ImportError as error:
            raise ConvertError(f"{path} needs the package safetensors: pip install safetensors") from error
        try:
            return torch_part.load_file(path)
        except safetensors.SafetensorError as error:
            raise WeightsError(f"{path} is damaged or no file of safetensors': {error}") from error
    return load_torch(path)


def find_weights(content: Mapping[str, Any], path: str) -> dict[str, Tensor]:
    """The tensors by name among what is in a file: at its top or under ``model`` or ``state_dict``.

    "module.", which ``DistributedDataParallel`` puts before all names, is taken away.

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


def _is_array(value: object) -> bool:
    return type(value).__module__ == "numpy" and hasattr(value, "dtype")


def check_complete(weights: Mapping[str, Tensor], module: nn.Module) -> None:
    """Check that ``weights`` are those of ``module``: all of them, in their shapes, and no other.

    Raises:
        ConvertError: they are not; lists every difference.
    """
    if problems := compare(weights, module.state_dict()).problems():
        raise ConvertError("The weights are not those of the model:\n  " + "\n  ".join(problems))


def write(converted: Converted, output: str, source: str, force: bool = False) -> str:
    """Write the checkpoint ``output`` and, beside it, the config of the same name.

    Args:
        converted: what to write.
        output: a name that ends in ``.pth``.
        source: where the weights are from, for the config's first line.
        force: whether to overwrite files.

    Returns:
        The config's path.

    Raises:
        ConvertError: ``output`` has another ending.
        OSError: one of the files is there, or cannot be written.
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
    """The path of the config beside the checkpoint ``output``.

    Raises:
        ConvertError: ``output`` does not end in ``.pth``.
        FileExistsError: a file is there, and ``force`` is not given.
    """
    if not output.endswith(".pth"):
        raise ConvertError(f"{output} does not end in .pth, the ending of the file to write.")
    config = output.removesuffix(".pth") + ".yaml"
    for path in (output, config)[: 1 + with_config]:
        if not force:
            check_free(path, "OUT", "overwrite it with --force")
    return config


def merge(into: Mapping, other: Mapping) -> dict:
    """Both dicts' keys, nested; ``other``'s values where both have one."""
    result = dict(into)
    for key, value in other.items():
        both = isinstance(value, Mapping) and isinstance(into.get(key), Mapping)
        result[key] = merge(into[key], value) if both else value
    return result
