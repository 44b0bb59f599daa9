"""Detectron2's ``DefaultTrainer`` on GPUs and CPUs."""

import logging
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from detectron2.evaluation import DatasetEvaluator, LVISEvaluator, verify_results
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from detectron2.utils.logger import setup_logger
from torch import nn

from ..config.load import build_model
from ..data import DataError, FocalDatasetMapper, has_boxes, leave_out_broken_images
from ..evaluation.evaluator import PageEvaluator
from ..evaluation.report import draw_curves, draw_detections, log_report, note_start
from ..evaluation.voc import VOCEvaluator
from ..files.write import explained_full_disk
from ..layers import compute_top_blocks_in_float32
from .average import AverageHook, WeightAverage, averaged_if_judged
from .balance import BalanceHook
from .best import BestHook, EarlyStop, check_metric
from .changes import plain_config
from .checkpoint import AtomicCheckpointer
from .console import EarlyWriter, off_screen, progress_bar
from .divergence import recorded_divergence
from .evaluate import EvaluationHook, evaluator_type
from .folder import refuse_used
from .graphs import compile_network, pins_batches
from .loader import build_train_loader, check_batch, explained_dead_worker
from .lock import sole_training
from .loggers import RunLogger, check_loggers, logged, run_writers
from .metrics import MetricsWriter
from .optimizer import build_optimizer
from .resume import CheckpointHook
from .step import StepTrainer, amp_precision, data_parallel
from .validation import NAME, ValidationLoss, build_validation_loader

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Train the model of a config as Detectron2's ``DefaultTrainer`` does, with the same classmethods and hooks.

    It also runs on CPUs, in one process or many; computes in mixed precision there too (``SOLVER.AMP``), in
    micro-batches (``SOLVER.ACCUMULATE``) and channels-last (``MODEL.FOCAL.CHANNELS_LAST``); evaluates each test set by
    its type; and ends with the results, pictures (``VIS``) and a list of its files. Each of the two loads the other's
    checkpoints. A run resumes exactly (see ``CheckpointHook``); SIGTERM and SIGINT end it once its step is saved.

    Args:
        cfg: the whole config.
        evaluate_also: called with the model after the last evaluation; its results are reported with the others.
    """

    def __init__(self, cfg: CfgNode, evaluate_also: Callable[[nn.Module], dict] | None = None):
        note_start(cfg.OUTPUT_DIR, again=False)
        # Not DefaultTrainer's, which needs GPUs for more than one process and for mixed precision.
        TrainerBase.__init__(self)
        for name in ("detectron2", "focal_plugin"):
            if not logging.getLogger(name).isEnabledFor(logging.INFO):
                setup_logger(name=name)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        check_batch(cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size(), cfg.SOLVER.ACCUMULATE)
        check_loggers(cfg.LOGGERS, cfg.VIS_PERIOD)
        check_metric(cfg, by_type=type(self).build_evaluator.__func__ is Trainer.build_evaluator.__func__)

        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        is_dense = isinstance(model, DenseDetector)
        self.average = WeightAverage(model, decay) if (decay := cfg.MODEL.FOCAL.EMA.DECAY) else None
        model = data_parallel(model)
        self._trainer = StepTrainer(
            model,
            data_loader,
            optimizer,
            precision=amp_precision(cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE, cfg.MODEL.DEVICE),
            accumulate=cfg.SOLVER.ACCUMULATE,
            max_skips=cfg.SOLVER.MAX_SKIPS,
            output_dir=cfg.OUTPUT_DIR,
            average=self.average,
        )
        if is_dense:  # registered here, since Detectron2 calls after_backward of the inner trainer's hooks alone
            self._trainer.register_hooks([BalanceHook(model)])
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        if self.average is not None:
            self.checkpointer.add_checkpointable("ema", self.average)
        self.checkpointer.config = plain_config(cfg)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.evaluate_also = evaluate_also
        self._resumes = False
        self.validation: ValidationLoss | None = None
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Do as Detectron2's; with nothing to resume from, metrics.json is emptied.

        Raises:
            ConfigError: another process trains in ``OUTPUT_DIR``; an earlier run is there, without ``resume``; the
                checkpoint does not fit the config, or has more steps than ``SOLVER.MAX_ITER``.
        """
        with sole_training(self.cfg.OUTPUT_DIR):
            self._resumes = resume
            if not resume:
                refuse_used(self.cfg.OUTPUT_DIR)
            super().resume_or_load(resume)
            self.checkpoint_hook.check_start(self.start_iter, self.max_iter, resume)

    def load_state_dict(self, state: dict) -> None:
        """Load a state; the learning rate follows the config's schedule from here on."""
        super().load_state_dict(state)
        groups = self.optimizer.param_groups
        self.scheduler.base_lrs = [group["initial_lr"] for group in groups]
        # Others go on from the rate before; and a checkpoint with too many steps is refused soon.
        if isinstance(self.scheduler, LRMultiplier) and self.scheduler.last_epoch <= self.max_iter:
            for group, lr in zip(groups, self.scheduler.get_lr()):
                group["lr"] = lr

    def train(self) -> dict | None:
        """Train, evaluate and report.

        Returns:
            The results of the last evaluation; None on other processes than the main one.
        """
        output_dir = self.cfg.OUTPUT_DIR
        loggers = [writer for writer in self.writers if isinstance(writer, RunLogger)]
        with sole_training(output_dir), explained_training(output_dir), logged(loggers, self._resumes):
            try:
                super().train()
            except EarlyStop:
                if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
                    verify_results(self.cfg, self._last_eval_results)
            if not comm.is_main_process():
                return None
            results = getattr(self, "_last_eval_results", {})
            self.report(self.cfg, self.model, results)
        return results

    @classmethod
    def report(cls, cfg: CfgNode, model: nn.Module, results: dict) -> None:
        """Draw the pictures of ``VIS``, and log the results and the files of the run; on the main process alone."""
        names = cfg.DATASETS.TEST
        if cfg.VIS.ENABLED:
            draw_curves(cfg.OUTPUT_DIR)
        if cfg.VIS.ENABLED and names and cfg.VIS.NUM_IMAGES > 0:
            draw_detections(
                cfg.OUTPUT_DIR,
                model,
                cls.build_test_loader(cfg, names[0]),
                names[0],
                image_format=cfg.INPUT.FORMAT,
                num_images=cfg.VIS.NUM_IMAGES,
                score_thresh=cfg.VIS.SCORE_THRESH,
            )
        log_report(cfg.OUTPUT_DIR, {names[0]: results} if len(names) == 1 else results)

    def build_hooks(self) -> list[HookBase | None]:
        """Build Detectron2's hooks, with others that save and evaluate, and one that writes the first steps."""
        self.writers: list[EventWriter] = []
        hooks = [hook for hook in super().build_hooks() if not isinstance(hook, PeriodicCheckpointer)]
        place = next(i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
        evaluation = EvaluationHook(self.cfg.TEST.EVAL_PERIOD, self._evaluate, lambda: self.checkpoint_hook)
        hooks[place] = evaluation
        if self.evaluate_also is not None:  # before the writers, which close after training
            hooks.insert(place + 1, EvaluationHook(0, self._evaluate_also))
        if comm.is_main_process():
            hooks.append(EarlyWriter(self.writers, evaluation=evaluation))
            hooks.insert(0, progress_bar(evaluation))
            place += 1
        if metric := self.cfg.TEST.BEST_METRIC:
            hooks.append(
                BestHook(
                    metric,
                    self.cfg.TEST.PATIENCE,
                    evaluation=evaluation,
                    checkpointer=self.checkpointer,
                    finish=lambda: self.checkpoint_hook.finish(),
                    judged=averaged_if_judged(metric, self.average),
                )
            )
        if self.cfg.DATASETS.VALIDATION:
            self.validation = ValidationLoss(self._trainer, build_validation_loader(self.cfg))
        if self.average is not None:
            hooks.insert(place, AverageHook(self.average, self.checkpointer))
        self.checkpoint_hook = CheckpointHook(
            self.checkpointer,
            self.cfg.SOLVER.CHECKPOINT_PERIOD,
            model=self.model,
            loader=self.data_loader,
            metrics=next((writer for writer in self.writers if isinstance(writer, MetricsWriter)), None),
            tail=hooks[place:],
        )
        self._trainer.signals = self.checkpoint_hook.signals
        return [*hooks[:place], self.checkpoint_hook, *hooks[place:]]

    def _evaluate(self) -> dict:
        self._last_eval_results = self.test(self.cfg, self.model)
        if self.average is not None:
            logger.info("These were the weights as they are trained. Evaluating their average (MODEL.FOCAL.EMA) ...")
            self._last_eval_results |= self.test_beside(self.cfg, self.average.averaged(), "_EMA")
        return self._last_eval_results | ({NAME: self.validation()} if self.validation else {})

    def _evaluate_also(self) -> dict:
        results = self.evaluate_also(self.model)
        self._last_eval_results |= results
        return results

    def build_writers(self) -> list[EventWriter]:
        """Build Detectron2's writers, the screen, metrics.json and TensorBoard, and those of ``LOGGERS``."""
        writers = super().build_writers()
        self.writers += run_writers(writers, self.cfg.OUTPUT_DIR, self.cfg.LOGGERS, self.checkpointer.config)
        return self.writers

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimiser that ``SOLVER`` describes."""
        return build_optimizer(cfg, model)

    @classmethod
    def test_beside(cls, cfg: CfgNode, model: nn.Module, suffix: str) -> dict:
        """Evaluate a model beside another: ``suffix`` is added to the names of the results and of ``inference``."""
        folder = os.path.join(cfg.OUTPUT_DIR, f"inference{suffix}")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        return {f"{name}{suffix}": result for name, result in cls.test(cfg, model, evaluators).items()}

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model of the config on its device, in its memory format."""
        model = build_model(cfg)
        if cfg.SOLVER.AMP.ENABLED and torch.device(cfg.MODEL.DEVICE).type == "cpu":
            compute_top_blocks_in_float32(model)
        if cfg.MODEL.FOCAL.CHANNELS_LAST:
            use_channels_last(model)
        if cfg.MODEL.FOCAL.COMPILE:
            compile_network(model)
        log_model(model)
        return model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        """Build Detectron2's loader as a ``TrainLoader``, with the mapper that reads ``INPUT.AUGMENTATIONS``.

        Raises:
            DataError: no image has a box that is no crowd.
        """
        mapper, dataset = FocalDatasetMapper(cfg, is_train=True), []
        try:
            args = build_detection_train_loader.from_config(cfg, mapper=mapper)
            dataset = args["dataset"]
        except AssertionError as error:
            if not str(error).startswith("No valid data found"):
                raise
        detects = isinstance(dataset, list) and all("annotations" in record for record in dataset)
        if detects and not any(map(has_boxes, dataset)):
            count = sum(len(DatasetCatalog.get(name)) for name in cfg.DATASETS.TRAIN)
            raise DataError(
                "nothing to train on",
                f"DATASETS.TRAIN names {', '.join(cfg.DATASETS.TRAIN)}: {count} images without a box to learn from. "
                "Look at their annotations; crowds do not count.",
            )
        return build_train_loader(**args, pin_memory=pins_batches(cfg.MODEL.DEVICE, cfg.MODEL.FOCAL.COMPILE))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        """Build Detectron2's loader without its output on the screen, with the mapper that names broken images."""
        leave_out_broken_images(dataset_name)
        with off_screen("detectron2"):
            return build_detection_test_loader(cfg, dataset_name, mapper=FocalDatasetMapper(cfg, is_train=False))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
        """Build the evaluator for the ``evaluator_type`` in a data set's metadata, COCO's if it has none.

        It writes to ``output_folder``, by default ``inference`` in ``OUTPUT_DIR``; if ``DATASETS.TEST`` has several
        data sets, to a folder in it with the data set's name. All but LVIS's write ``evaluation.{json,csv,html}``.

        Raises:
            ConfigError: the type is none of coco, lvis and pascal_voc.
        """
        leave_out_broken_images(dataset_name)
        output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(cfg.DATASETS.TEST) > 1:  # or the files of one would replace those of another
            output_folder = os.path.join(output_folder, dataset_name)
        kind = evaluator_type(dataset_name)
        # COCO's metric counts 100 detections an image; more where the user has asked the model for more.
        most = max(cfg.TEST.DETECTIONS_PER_IMAGE, 100)
        if kind == "coco":
            # Detectron2 writes a JSON file for a set without one, anew in each run: the set may have changed.
            return PageEvaluator(
                dataset_name, output_dir=output_folder, max_dets_per_image=most, allow_cached_coco=False
            )
        if kind == "lvis":
            return LVISEvaluator(dataset_name, output_dir=output_folder)
        return VOCEvaluator(dataset_name, output_dir=output_folder, max_dets_per_image=most)


@contextmanager
def explained_training(output_dir: str) -> Iterator[None]:
    """Explain the errors of a training inside: a full disk, a process that loads images and died, a divergence."""
    with explained_full_disk(output_dir), explained_dead_worker(), recorded_divergence(output_dir):
        yield


def use_channels_last(model: nn.Module) -> None:
    """Store the weights of ``model``, and the images that its backbone gets, as (N, H, W, C) in memory; in place."""
    model.to(memory_format=torch.channels_last)
    model.backbone.register_forward_pre_hook(
        lambda module, args: (args[0].contiguous(memory_format=torch.channels_last), *args[1:])
    )


def log_model(model: nn.Module) -> None:
    """Log ``model`` in full to the files, and in one line to the screen."""
    with off_screen("focal_plugin"):
        logger.info(f"Model:\n{model}")
    sizes = [parameter.numel() for parameter in model.parameters()]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info(f"{type(model).__name__} of {sum(sizes) / 1e6:.1f}M parameters, {trained / 1e6:.1f}M of them trained.")
