"""Make a config from a file and a command line, and the model of a config."""

import os
import re
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

import torch
from detectron2 import modeling
from detectron2.config import CfgNode, get_cfg
from torch import nn

from ..data import register_local_datasets
from ..files.safe_yaml import merge_from_file
from ..files.shipped import CONFIGS, shipped
from ..registry import import_user_modules
from .class_frequencies import fill_class_frequencies
from .components import fill_args
from .explain import explained_keys, flatten, merge_from_list
from .keys import ConfigError, add_focal_config
from .ranges import check_ranges

# Not through detectron2.model_zoo, whose import needs pkg_resources, which setuptools no longer has.
_ZOO = Path(str(files("detectron2") / "model_zoo" / "configs"))


def find_config(name: str) -> str:
    """Return the path of the config file ``name``, which is, in this order:

    - a file, relative to the current folder, or a URL;
    - a shipped config such as ``quickstart/trees.yaml``, with or without ``configs/`` before it;
    - a config of Detectron2's model zoo such as ``COCO-Detection/retinanet_R_50_FPN_1x.yaml``.

    Raises:
        FileNotFoundError: it is none of them.
    """
    if os.path.exists(name) or "://" in name:
        return name
    for path in (shipped(name), _ZOO / name):
        if path.is_file():
            return str(path)
    names = [str(file.relative_to(folder)) for folder in (CONFIGS, _ZOO) for file in sorted(folder.rglob("*.*"))]
    near = get_close_matches(name.removeprefix("configs/"), names)
    hint = f" Near it: {', '.join(near)}." if near else ""
    raise FileNotFoundError(
        f"--config-file {name}: there is no such file in {os.getcwd()}, and no such config in {CONFIGS} or in "
        f"Detectron2's model zoo.{hint}"
    )


def load_config(config_file: str = "", opts: list[str] | tuple[str, ...] = ()) -> CfgNode:
    """Return a config, not frozen and ready to run: the defaults, then the file, then ``KEY VALUE`` pairs.

    Args:
        config_file: a YAML file, as ``find_config`` finds it; empty for the defaults of Detectron2 and the plugin.
        opts: keys and values in turn.

    Raises:
        ConfigError: the file, or one that it is based on, is no YAML mapping or asks for code to be run; it is a
            ``.py``; it or ``opts`` has an unknown key or a value of another type; or as ``prepare``.
        FileNotFoundError: there is no such file.
        ImportError: as ``prepare``.
    """
    if config_file.endswith(".py"):
        raise ConfigError(f"{config_file} is a LazyConfig; expected a YAML config, such as a run's config.yaml.")
    cfg = get_cfg()
    add_focal_config(cfg)
    if config_file:
        with explained_keys(cfg, config_file):
            merge_from_file(cfg, find_config(config_file))
    merge_from_list(cfg, opts)
    prepare(cfg)
    return cfg


def prepare(cfg: CfgNode) -> None:
    """Make ``cfg`` ready to run, in place; a second call changes nothing.

    The modules of ``MODEL.FOCAL.IMPORTS`` are imported and the data sets of ``DATASETS.LOCAL`` registered; components'
    own keys get their defaults (``fill_args``); an empty ``MODEL.FOCAL.CLASS_FREQUENCIES`` is counted if a component
    needs it; and a GPU in ``MODEL.DEVICE`` becomes ``cpu`` where there is none.

    Raises:
        ConfigError: ``cfg`` does not have the plugin's keys, a component does not have a key of its section ``ARGS``, a
            number is none that its key may have (``check_ranges``), ``MODEL.DEVICE`` is no device, or an entry of
            ``DATASETS.LOCAL`` is malformed.
        ImportError: a module is not found.
    """
    import_user_modules(cfg)
    fill_args(cfg)
    check_ranges(cfg)
    cfg.MODEL.DEVICE = usable_device(cfg.MODEL.DEVICE)
    register_local_datasets(cfg)
    fill_class_frequencies(cfg)


def build_model(cfg: CfgNode) -> nn.Module:
    """Build the model of ``cfg`` on its device, as Detectron2's ``build_model`` does.

    Raises:
        ConfigError: a number is none that its key may have, a component does not have a key of its section ``ARGS``, or
            a name is none that Detectron2 knows, such as MODEL.BACKBONE.NAME.
    """
    check_ranges(cfg)
    if "FOCAL" in cfg.MODEL:
        fill_args(cfg.clone())
    try:
        return modeling.build_model(cfg)
    except KeyError as error:  # of a registry, or of a table such as that of a ResNet's depths
        unknown = error.args[0]
        if found := re.match("No object named '(.*)' found in '", str(unknown)):
            unknown = found[1]
        values = flatten(cfg.MODEL, "MODEL.").items()
        keys = [key for key, value in values if type(value) is type(unknown) and value == unknown]
        if not keys:
            raise
        raise ConfigError(
            f"{' or '.join(keys)} is {unknown!r}, which Detectron2 does not know ({error}). If it is defined in a "
            "module of yours, add that module to MODEL.FOCAL.IMPORTS."
        ) from error


def usable_device(device: str, key: str = "MODEL.DEVICE") -> str:
    """Return ``device``, or "cpu" where it is a GPU and there is none.

    Args:
        device: such as "cpu", "cuda" or "cuda:1".
        key: the config key that it is from, for the message.

    Raises:
        ConfigError: PyTorch knows no such device.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ConfigError(f"{key} is {device!r}; expected cpu, cuda, or cuda:N for the GPU N.") from None
    return "cpu" if kind == "cuda" and not torch.cuda.is_available() else device
