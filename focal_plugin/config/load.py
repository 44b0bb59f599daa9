"""A config from a file and a command line."""

import os

import torch
from detectron2.config import CfgNode, get_cfg

from ..data import register_local_datasets
from ..files.safe_yaml import merge_from_file
from ..losses.class_weights import fill_class_frequencies
from ..registry import import_user_modules
from .explain import explained_keys, merge_from_list
from .keys import ConfigError, add_focal_config


def find_config(name: str) -> str:
    """The path of the config file ``name``: a file, or a name of Detectron2's model zoo such as
    ``COCO-Detection/retinanet_R_50_FPN_1x.yaml``.

    Raises:
        FileNotFoundError: it is neither.
    """
    if os.path.exists(name) or "://" in name:
        return name
    try:
        from detectron2 import model_zoo  # only here, since it needs a setuptools that not everyone has

        return model_zoo.get_config_file(name)
    except ImportError as error:
        zoo = f"Detectron2's model zoo cannot be imported ({error})"
    except (RuntimeError, ValueError):
        zoo = "no such name in Detectron2's model zoo"
    raise FileNotFoundError(f"--config-file {name}: there is no such file in {os.getcwd()}, and {zoo}.")


def load_config(config_file: str = "", opts: list[str] | tuple[str, ...] = ()) -> CfgNode:
    """Detectron2's defaults and the plugin's, then the file, then ``KEY VALUE`` pairs. The config is not frozen.

    The modules of ``MODEL.FOCAL.IMPORTS`` are imported and the data sets of ``DATASETS.LOCAL`` registered; an empty
    ``MODEL.FOCAL.CLASS_FREQUENCIES`` is counted if a component needs it. Without a GPU, ``MODEL.DEVICE`` becomes
    ``cpu``.

    Raises:
        ConfigError: the file, or one that it is based on, is no YAML mapping or asks for code to be run; it is a
            ``.py``; or it or ``opts`` has a key that there is not, or a value of another type.
    """
    if config_file.endswith(".py"):
        raise ConfigError(f"{config_file} is a LazyConfig; expected a YAML config, such as a run's config.yaml.")
    cfg = get_cfg()
    add_focal_config(cfg)
    if config_file:
        with explained_keys(cfg, config_file):
            merge_from_file(cfg, find_config(config_file))
    merge_from_list(cfg, opts)
    cfg.MODEL.DEVICE = usable_device(cfg.MODEL.DEVICE)
    import_user_modules(cfg)
    register_local_datasets(cfg)
    fill_class_frequencies(cfg)
    return cfg


def usable_device(device: str, key: str = "MODEL.DEVICE") -> str:
    """``device``, or ``cpu`` where it is a GPU and there is none; ``key`` is where it is from.

    Raises:
        ValueError: PyTorch knows no such device.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"{key} is {device!r}; expected cpu, cuda, or cuda:N for the GPU N.") from None
    return "cpu" if kind == "cuda" and not torch.cuda.is_available() else device
