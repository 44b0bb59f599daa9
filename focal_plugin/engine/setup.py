"""Prepare training or evaluation: logs, seed, threads, and checks of the data sets."""

import logging
import os
import re
import sys
from contextlib import nullcontext

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..config import ConfigError
from ..config.class_frequencies import needs_class_frequencies
from ..data import check_files, check_num_classes
from ..evaluation.report import note_start
from ..files.regular import read_regular
from ..files.safe_yaml import MOST_BYTES
from ..files.write import free_paths, set_aside
from .advice import advise, faster
from .changes import SEEDS
from .checkpoint import AtomicCheckpointer
from .console import off_screen
from .lock import LOCK, check_local

logger = logging.getLogger(__name__)

_OF_A_TRAINING = (LOCK, "metrics.json", "last_checkpoint")  # the last two are Detectron2's, too

# Detectron2 collects facts about its environment when a run starts; PyTorch then warns that CUDA finds no GPU.
logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: "No CUDA runtime" not in record.getMessage())


def settled_seed(seed: int, output_dir: str, again: bool) -> int:
    """Return ``seed`` or, if it is negative, a random one, the same in all processes.

    Each run records its seed in its checkpoints and ``config.yaml``, so that it can be resumed exactly, and repeated.

    Args:
        seed: the config's ``SEED``, or a LazyConfig's ``train.seed``.
        output_dir: the run's folder.
        again: whether to take the seed of the run in ``output_dir``, if there is one.
    """
    if seed >= 0:
        return seed
    seed = int.from_bytes(os.urandom(4)) >> 1
    if again and comm.is_main_process() and (found := _recorded_seed(output_dir)) is not None:
        seed = found
    return comm.all_gather(seed)[0]


def _recorded_seed(output_dir: str) -> int | None:
    """Return the seed of the run in a folder, by its checkpoints or its config.yaml; None if it is not known."""
    config, path = AtomicCheckpointer(None, output_dir).recorded_config(), os.path.join(output_dir, "config.yaml")
    if found := [config[key] for key in SEEDS if config.get(key) is not None]:
        return found[0]
    if not os.path.exists(path):
        return None
    # As text: a LazyConfig's file may name classes, which must not be imported. And a disk may have damaged it.
    text = read_regular(path, MOST_BYTES).decode(errors="replace")
    match = re.search(r"^(?:SEED|train:\n(?: .*\n)*?  seed): (\d+)$", text, re.MULTILINE)
    return int(match[1]) if match else None


def evaluation_folder(output_dir: str) -> str:
    """Return where an evaluation writes: ``output_dir``, or if that is a training's, a new folder ``eval`` in it.

    So it leaves what the training has written, or is writing at this moment. For all processes of a run.

    Raises:
        ConfigError: it is a URL.
    """
    check_local(output_dir)
    folder = output_dir
    if comm.is_main_process() and any(os.path.lexists(os.path.join(output_dir, name)) for name in _OF_A_TRAINING):
        (folder,) = free_paths(output_dir, "eval")
        os.makedirs(folder)
    return comm.all_gather(folder)[0]


def start_run(cfg: CfgNode, args) -> None:
    """Open the logs, set the seed, write config.yaml, give advice, and check the data sets.

    Args:
        cfg: the whole config.
        args: the parsed command line.

    Raises:
        ConfigError: no data set or step is named, or the data sets and the model disagree on the classes.
        FileNotFoundError: the files of a data set are not there.
    """
    start_logs(cfg, args, cfg.OUTPUT_DIR, cfg.MODEL.DEVICE)
    for message in advise(cfg):
        logger.warning(message)
    for message in faster(cfg):
        logger.info(f"{message}.")
    if needs_class_frequencies(cfg):
        logger.info(f"Frequencies of the classes (MODEL.FOCAL.CLASS_FREQUENCIES): {cfg.MODEL.FOCAL.CLASS_FREQUENCIES}.")
    if args.eval_only:  # the training set need not be there
        cfg = cfg.clone()
        cfg.defrost()
        cfg.DATASETS.TRAIN = cfg.DATASETS.PROPOSAL_FILES_TRAIN = cfg.DATASETS.VALIDATION = ()
    needed = "TEST" if args.eval_only else "TRAIN"
    if not cfg.DATASETS[needed]:
        where = args.config_file or "Detectron2's own config; name yours with --config-file"
        raise ConfigError(f"DATASETS.{needed} is empty; expected the name of a data set. This is {where}.")
    check_num_classes(cfg)
    check_files(cfg)


def start_logs(cfg, args, output_dir: str, device: str) -> None:
    """Do Detectron2's ``default_setup`` (seed, log files, config.yaml) without its hundreds of lines on the screen.

    Args:
        cfg: a ``CfgNode`` or a LazyConfig.
        args: the parsed command line.
        output_dir: the run's folder.
        device: what the model will run on.
    """
    note_start(output_dir)
    config = set_aside(os.path.join(output_dir, "config.yaml")) if comm.is_main_process() else nullcontext()
    with off_screen("detectron2"), config:
        default_setup(cfg, args)
    plugin_logger = setup_logger(output_dir, distributed_rank=comm.get_rank(), name="focal_plugin")
    for handler in plugin_logger.handlers:
        if handler.stream is sys.stdout:  # details, such as each record that was left out, go to the file alone
            handler.setLevel(logging.INFO)
    logger.info(f"Config: {args.config_file or 'defaults'}. In full: {output_dir}/config.yaml. Log: log.txt there.")
    if torch.device(device).type == "cpu":
        _prepare_cpu()


def _prepare_cpu() -> None:
    """Log that the run is on the CPU, and divide its cores among the machine's processes unless the user has."""
    processes = comm.get_world_size()
    if processes > 1 and torch.distributed.get_backend() == "nccl":
        raise ValueError(
            f"The device is cpu, but the {processes} processes communicate through GPUs (NCCL). To use the CPU alone, "
            "set CUDA_VISIBLE_DEVICES to nothing in the environment."
        )
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // comm.get_local_size()))
    reason = "Running on the CPU" if torch.cuda.is_available() else "No GPU found: running on the CPU"
    logger.info(f"{reason}, {processes} process{'es' * (processes > 1)} of {torch.get_num_threads()} threads.")
