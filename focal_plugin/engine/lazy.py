"""Train and evaluate ``.py`` LazyConfigs, as Detectron2's tools/lazyconfig_train_net.py does, on any device.

Beyond the tool: resuming exactly, micro-batches, bfloat16, steps that are not finite, checks of files and words.
"""

import copy
from collections.abc import Mapping
from contextlib import suppress

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import build_detection_train_loader
from detectron2.engine import HookBase, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from torch import nn

from ..config import ConfigError
from ..config.arguments import check_arguments, check_override
from ..config.load import find_config, usable_device
from ..data import check_files_of, leave_out_broken_images
from ..evaluation.report import log_report
from ..files.write import kept_on_error
from ..kernels.conv_relu import fuse_blocks
from ..layers import compute_top_blocks_in_float32, fold_frozen_norms
from ..retinanet import FocalRetinaNet
from .average import AverageHook, WeightAverage, averaged_if_judged
from .balance import BalanceHook
from .best import BestHook, EarlyStop, check_judged
from .changes import plain_config
from .checkpoint import AtomicCheckpointer
from .console import EarlyWriter, progress_bar
from .evaluate import EvaluationHook
from .folder import training_folder
from .graphs import compile_network, pins_batches
from .loader import build_train_loader, check_batch
from .lock import sole_training
from .loggers import RunLogger, check_loggers, logged, run_writers
from .metrics import MetricsWriter
from .resume import CheckpointHook
from .setup import evaluation_folder, settled_seed, start_logs
from .step import StepTrainer, amp_precision, data_parallel
from .trainer import explained_training, log_model, use_channels_last
from .validation import NAME, ValidationLoss

_DETECTRON2_LOADERS = (
    build_detection_train_loader,
    "detectron2.data.build_detection_train_loader",
    "detectron2.data.build.build_detection_train_loader",
)


def main(args) -> dict | None:
    """Train or evaluate the LazyConfig ``args.config_file``, changed by the ``path.key=value`` of ``args.opts``.

    The config has Detectron2's sections: ``model``, ``dataloader.{train, test, evaluator}``, ``optimizer``,
    ``lr_multiplier`` and ``train``. ``train`` may also have ``amp.dtype``, ``accumulate``, ``max_skips``,
    ``channels_last``, ``compile``, ``ema.decay``, ``loggers``, ``best_metric`` and ``patience``; and ``dataloader`` a
    loader ``validation``, with ground truth.

    Returns:
        The results of the last evaluation; None on other processes than the main one.

    Raises:
        ConfigError: a word of ``args.opts`` gives no value, or changes nothing that is read; there is no evaluator;
            ``train.device`` is no device; or a part of the model does not take one of its arguments.
        FileNotFoundError: the files of a data set are not there.
    """
    args.config_file = find_config(args.config_file)
    if words := [str(word) for word in args.opts if "=" not in str(word) and not str(word).startswith("~")]:
        raise ConfigError(
            f"{' '.join(words)}: a LazyConfig's keys are changed by path.key=value, as in optimizer.lr=0.01, without "
            "spaces."
        )
    cfg = LazyConfig.load(args.config_file)
    for word in args.opts:
        check_override(cfg, word)
        LazyConfig.apply_overrides(cfg, [word])
    if args.eval_only and not cfg.dataloader.get("evaluator"):
        raise ConfigError(f"{args.config_file}: dataloader.evaluator is missing; expected one for --eval-only.")
    cfg.train.device = usable_device(cfg.train.device, "train.device")
    run = cfg.train.output_dir
    if args.resume or not args.eval_only:
        run = training_folder(run, args.resume)
        _move_output(cfg, run)
    if args.eval_only:
        _move_output(cfg, evaluation_folder(run))
        results = evaluate(cfg, _start(cfg, args, run))
    else:
        with sole_training(run):
            results = train(cfg, args)
    if not comm.is_main_process():
        return None
    log_report(cfg.train.output_dir, {", ".join(_dataset_names(cfg, "test")): results})
    return results


def _move_output(cfg, folder: str) -> None:
    """Let a run and its evaluator write to ``folder`` in place of ``train.output_dir``."""
    before, evaluator = cfg.train.output_dir, cfg.dataloader.get("evaluator")
    output = evaluator.get("output_dir") if isinstance(evaluator, Mapping) else None
    if output and f"{output}/".startswith(f"{before}/"):
        evaluator.output_dir = folder + output[len(before) :]
    cfg.train.output_dir = folder


def _start(cfg, args, run: str) -> nn.Module:
    """Open the logs and build the model; for an evaluation with its weights, of ``run`` if it resumes."""
    cfg.train.seed = settled_seed(cfg.train.get("seed", -1), run, args.resume or args.eval_only)
    start_logs(cfg, args, cfg.train.output_dir, cfg.train.device)
    _check_files(cfg, args.eval_only)
    check_arguments(cfg.model, "model")
    model = instantiate(cfg.model).to(cfg.train.device)
    if isinstance(model, FocalRetinaNet):
        fuse_blocks(fold_frozen_norms(model))
    if torch.device(cfg.train.device).type == "cpu":
        compute_top_blocks_in_float32(model)
    if cfg.train.get("channels_last", False):
        use_channels_last(model)
    if cfg.train.get("compile", False):
        compile_network(model)
    log_model(model)
    if args.eval_only:
        model = data_parallel(model)
        AtomicCheckpointer(model, run).resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    return model


def evaluate(cfg, model: nn.Module, suffix: str = "") -> dict:
    """Return the results of ``model`` on ``dataloader.test``; {} if the config has no ``dataloader.evaluator``.

    A ``suffix`` is added to their names and to the evaluator's ``output_dir``.
    """
    evaluator = copy.deepcopy(cfg.dataloader.get("evaluator"))
    if not evaluator:
        return {}
    if suffix and isinstance(evaluator, Mapping) and evaluator.get("output_dir"):
        evaluator.output_dir += suffix
    for name in _dataset_names(cfg, "test"):
        leave_out_broken_images(name)
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return {f"{task}{suffix}": result for task, result in results.items()}


def train(cfg, args) -> dict:
    """Train the model as the config says, and return the results of the last evaluation."""
    results: dict = {}
    with kept_on_error(f"{cfg.train.output_dir}/config.yaml"):
        trainer, start, loggers = _build_trainer(cfg, args, results)
    with explained_training(cfg.train.output_dir), logged(loggers, args.resume), suppress(EarlyStop):
        trainer.train(start, cfg.train.max_iter)
    return results


def _build_trainer(cfg, args, results: dict) -> tuple[StepTrainer, int, list[RunLogger]]:
    """Return the trainer, whose evaluations put their results into ``results``, its first step, and its loggers."""
    names, metric = cfg.train.get("loggers", ["tensorboard"]), cfg.train.get("best_metric", "")
    check_loggers(names)
    decay, validation = cfg.train.get("ema", {}).get("decay", 0), cfg.dataloader.get("validation")
    given = {"tested": cfg.dataloader.get("evaluator"), "validated": validation, "averaged": decay}
    check_judged(metric, cfg.train.get("patience", 0), cfg.train.eval_period, **given)
    model, saved = _start(cfg, args, cfg.train.output_dir), plain_config(cfg)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = _build_loader(cfg)
    balance = [BalanceHook(model)] if isinstance(model, DenseDetector) else []
    average = WeightAverage(model, decay) if decay else None
    model = data_parallel(model, **cfg.train.get("ddp", {}))
    amp = cfg.train.amp
    trainer = StepTrainer(
        model,
        loader,
        optimizer,
        precision=amp_precision(amp.enabled, amp.get("dtype", ""), cfg.train.device),
        accumulate=cfg.train.get("accumulate", 1),
        max_skips=cfg.train.get("max_skips", 0),
        output_dir=cfg.train.output_dir,
        average=average,
    )
    checkpointer = AtomicCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    checkpointer.config = saved
    if average is not None:
        checkpointer.add_checkpointable("ema", average)

    validate = ValidationLoss(trainer, instantiate(validation)) if validation else None

    def evaluate_now() -> dict:
        results.clear()
        results.update(evaluate(cfg, model))
        if average is not None:
            results.update(evaluate(cfg, average.averaged(), "_EMA"))
        return results | ({NAME: validate()} if validate else {})

    evaluation = EvaluationHook(cfg.train.eval_period, evaluate_now, lambda: save)
    tail: list[HookBase] = [AverageHook(average, checkpointer)] if average is not None else []
    tail += [evaluation]
    writers = []
    if comm.is_main_process():
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        writers = run_writers(writers, cfg.train.output_dir, names, saved)
        period = cfg.train.log_period
        tail += [hooks.PeriodicWriter(writers, period=period), EarlyWriter(writers, period, evaluation)]
    if metric:
        tail.append(
            BestHook(
                metric,
                cfg.train.get("patience", 0),
                evaluation=evaluation,
                checkpointer=checkpointer,
                finish=lambda: save.finish(),
                judged=averaged_if_judged(metric, average),
            )
        )
    metrics = next((writer for writer in writers if isinstance(writer, MetricsWriter)), None)
    save = CheckpointHook(
        checkpointer, **cfg.train.checkpointer, model=model, loader=loader, metrics=metrics, tail=tail
    )
    trainer.signals = save.signals
    schedule = hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier))
    bar = progress_bar(evaluation) if comm.is_main_process() else None
    trainer.register_hooks([bar, *balance, hooks.IterationTimer(), schedule, save, *tail])

    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    start = trainer.iter + 1 if args.resume and checkpointer.has_checkpoint() else 0
    save.check_start(start, cfg.train.max_iter, args.resume)
    return trainer, start, [writer for writer in writers if isinstance(writer, RunLogger)]


def _build_loader(cfg):
    """Build the training loader; where it is Detectron2's, ours, which resumes."""
    train = cfg.dataloader.train
    if train.get("_target_") in _DETECTRON2_LOADERS:
        train._target_ = build_train_loader
        check_batch(train.get("total_batch_size", 0), comm.get_world_size(), cfg.train.get("accumulate", 1))
        if "pin_memory" not in train:
            train.pin_memory = pins_batches(cfg.train.device, cfg.train.get("compile", False))
    return instantiate(train)


def _check_files(cfg, eval_only: bool) -> None:
    """Check that the files of the needed data sets are there, if the config names the sets as Detectron2's do.

    Raises:
        FileNotFoundError: one is not there.
    """
    needed = ["train"] * (not eval_only) + ["test"] * bool(cfg.dataloader.get("evaluator"))
    for part in needed:
        for name in _dataset_names(cfg, part):
            hint = "Register data of your own with focal_plugin.data.register_local_dataset in the config."
            check_files_of(name, f"dataloader.{part}.dataset.names", hint)


def _dataset_names(cfg, part: str) -> list[str]:
    names = cfg.dataloader.get(part, {}).get("dataset", {}).get("names", [])  # []: another kind of loader
    return [names] if isinstance(names, str) else list(names)
