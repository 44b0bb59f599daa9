"""What the two processes of tests/engine/test_processes.py do, and one process for comparison."""

import os
import signal

import torch
from detectron2.engine import HookBase
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import distributed, nn

from focal_plugin.config.load import load_config
from focal_plugin.engine import AtomicCheckpointer, CheckpointHook, StepTrainer, Trainer, launch
from focal_plugin.engine.average import WeightAverage
from focal_plugin.engine.best import BestHook, EarlyStop
from focal_plugin.engine.evaluate import EvaluationHook
from focal_plugin.engine.step import data_parallel
from focal_plugin.engine.validation import ValidationLoss, build_validation_loader


def start(rank, port, job, folder, *args):
    """In a new process: be process ``rank`` of two, as torchrun would have it, and save what ``job`` returns."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    launch(lambda: torch.save(job(*args), f"{folder}/{rank}.pth"), 1)


def batch(boxes):
    """Images of 64 px with so many boxes each."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for number, count in enumerate(boxes):
        sizes = torch.rand(count, 2, generator=generator) * 24 + 8
        corners = torch.rand(count, 2, generator=generator) * (64 - sizes)
        instances = Instances((64, 64))
        instances.gt_boxes = Boxes(torch.cat([corners, corners + sizes], dim=1))
        instances.gt_classes = torch.randint(2, (count,), generator=generator)
        image = torch.randint(256, (3, 64, 64), dtype=torch.uint8, generator=generator)
        images.append({"image": image, "instances": instances, "file_name": f"{number}.png"})
    return images


def step(config, opts, boxes):
    """The losses and gradients of one step on this process's share of the images. The losses on the main process."""
    cfg = load_config(config, opts)
    torch.manual_seed(0)
    model = data_parallel(Trainer.build_model(cfg))
    share = batch(boxes)[comm.get_rank() :: comm.get_world_size()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = StepTrainer(model, [share], optimizer, accumulate=cfg.SOLVER.ACCUMULATE)
    trainer.train(0, 1)
    losses = {name: trainer.storage.history(name).latest() for name in LOSSES if comm.is_main_process()}
    return losses, {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}


LOSSES = ("total_loss", "loss_cls", "loss_box_reg")


def steps(config, cases):
    """``step`` for each case."""
    return [step(config, *case) for case in cases]


def evaluate(config, output):
    """The results of an untrained model, written below ``output/<rank>``. {} on other processes than the main one."""
    cfg = load_config(config, ["OUTPUT_DIR", f"{output}/{comm.get_rank()}"])
    os.makedirs(cfg.OUTPUT_DIR)
    torch.manual_seed(0)
    return Trainer.test(cfg, Trainer.build_model(cfg))


def stop_early(output):
    """When a process ends whose evaluations get no better after the second; the main one alone has the results."""
    model = data_parallel(Square())
    trainer = StepTrainer(model, [[{"image": torch.ones(1)}]] * 9, torch.optim.SGD(model.parameters(), lr=0.1))
    values = [1.0, 2.0, 1.0, 0.5, 9.0, 9.0]
    evaluation = EvaluationHook(1, lambda: {"a": {"b": values[trainer.iter]}} if comm.is_main_process() else {})
    checkpointer = AtomicCheckpointer(model, output, save_to_disk=comm.is_main_process())
    hook = BestHook("a/b", 2, evaluation=evaluation, checkpointer=checkpointer, finish=lambda: None)
    trainer.register_hooks([evaluation, hook])
    try:
        trainer.train(0, 6)
    except EarlyStop:
        return {"steps": trainer.iter, "waited": hook.waited, "value": hook.value}


def validate(config):
    """The validation losses of an untrained model, of which this process computes a part."""
    opts = ["DATASETS.VALIDATION", "('shapes_test',)", "MODEL.FOCAL.NORMALIZER", "num_fg_sync"]
    cfg = load_config(config, opts)
    torch.manual_seed(0)
    model = data_parallel(Trainer.build_model(cfg))
    trainer = StepTrainer(model, [], torch.optim.SGD(model.parameters(), lr=0.01))
    loader = build_validation_loader(cfg)
    dataset = loader.dataset  # three images and one
    share = [[dataset[index]] for index in ((0, 1, 2), (3,))[comm.get_rank()]]
    return ValidationLoss(trainer, share)()


class Square(nn.Module):
    """A loss of its one weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, batch):
        return {"loss": (self.weight * batch[0]["image"]).square().sum()}


def stop(output):
    """How many collective calls each step makes until a signal of the second process ends both, when that is, and the
    weight and its average then. The processes have other data."""
    calls, steps = [0], []
    for name in ("all_gather", "all_gather_object", "gather_object", "all_reduce", "broadcast", "barrier"):
        wrapped = getattr(distributed, name)

        def counted(*args, wrapped=wrapped, **kwargs):
            calls[-1] += 1
            return wrapped(*args, **kwargs)

        setattr(distributed, name, counted)
    model = Square()
    average = WeightAverage(model, 0.9)
    model = data_parallel(model)
    loader = [[{"image": torch.ones(1) * (comm.get_rank() + 1)}]] * 9
    trainer = StepTrainer(model, loader, torch.optim.SGD(model.parameters(), lr=0.1), average=average)
    checkpointer = AtomicCheckpointer(model, output, save_to_disk=False, trainer=trainer)
    hook = CheckpointHook(checkpointer, 100, model=model, loader=loader)
    trainer.signals = hook.signals

    class Signalled(HookBase):
        def before_step(self):
            calls.append(0)
            steps.append(self.trainer.iter)
            if self.trainer.iter == 3 and comm.get_rank() == 1:
                signal.raise_signal(signal.SIGTERM)

    trainer.register_hooks([hook, Signalled()])
    try:
        trainer.train(0, 9)
    except SystemExit as exit:
        weights = {"weight": float(model.module.weight), "average": float(average.averaged().weight)}
        return {"code": exit.code, "steps": steps, "calls": calls[1:4], **weights}
