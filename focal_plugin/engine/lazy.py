"""``.py`` LazyConfigs: what Detectron2's tools/lazyconfig_train_net.py does with them, on any device."""

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from torch import nn

from .console import EarlyWriter
from .divergence import recorded_divergence
from .report import log_report
from .setup import find_config, start_logs, usable_device
from .step import StepTrainer, amp_precision, data_parallel
from .trainer import log_model, use_channels_last


def main(args) -> dict | None:
    """Train or evaluate the LazyConfig ``args.config_file``, changed by the ``path.key=value`` of ``args.opts``.

    The config's parts are those of Detectron2's: ``model``, ``dataloader.{train, test, evaluator}``, ``optimizer``,
    ``lr_multiplier`` and ``train``. ``train`` may also have ``amp.dtype``, ``accumulate`` and ``channels_last``.

    Returns:
        The results of the last evaluation; None on other processes than the main one.
    """
    args.config_file = find_config(args.config_file)
    cfg = LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
    cfg.train.device = usable_device(cfg.train.device)
    start_logs(cfg, args, cfg.train.output_dir, cfg.train.device)
    model = instantiate(cfg.model).to(cfg.train.device)
    if cfg.train.get("channels_last", False):
        use_channels_last(model)
    log_model(model)
    if args.eval_only:
        model = data_parallel(model)
        DetectionCheckpointer(model, cfg.train.output_dir).resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
        results = evaluate(cfg, model)
    else:
        results = train(cfg, model, args.resume)
    if not comm.is_main_process():
        return None
    log_report(cfg.train.output_dir, {_dataset_name(cfg): results})
    return results


def evaluate(cfg, model: nn.Module) -> dict:
    """The results of ``model`` on ``dataloader.test``, {} if the config has no ``dataloader.evaluator``."""
    if "evaluator" not in cfg.dataloader:
        return {}
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    return results


def train(cfg, model: nn.Module, resume: bool) -> dict:
    """Train ``model`` as the config says. The results of the last evaluation."""
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)
    model = data_parallel(model, **cfg.train.get("ddp", {}))
    amp = cfg.train.amp
    trainer = StepTrainer(
        model,
        loader,
        optimizer,
        precision=amp_precision(amp.enabled, amp.get("dtype", ""), cfg.train.device),
        accumulate=cfg.train.get("accumulate", 1),
    )
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    results = {}

    def evaluate_now() -> dict:
        results.clear()
        results.update(evaluate(cfg, model))
        return results

    trainer.register_hooks([hooks.IterationTimer(), hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier))])
    if comm.is_main_process():
        trainer.register_hooks([hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)])
    trainer.register_hooks([hooks.EvalHook(cfg.train.eval_period, evaluate_now)])
    if comm.is_main_process():
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        trainer.register_hooks([hooks.PeriodicWriter(writers, period=cfg.train.log_period), EarlyWriter(writers)])

    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    with recorded_divergence(cfg.train.output_dir):
        trainer.train(start, cfg.train.max_iter)
    return results


def _dataset_name(cfg) -> str:
    names = cfg.dataloader.test.dataset.names
    return names if isinstance(names, str) else ", ".join(names)
