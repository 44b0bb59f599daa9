"""What a process of tests/engine/test_faults.py does: train, until it is killed at a given place."""

import ctypes
import importlib.util
import io
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from detectron2.engine import default_argument_parser
from detectron2.utils import comm

import focal_plugin  # noqa: F401
from focal_plugin.data import FocalDatasetMapper
from focal_plugin.engine import StepTrainer, Trainer, launch

TRAIN_NET = Path(__file__).parents[2] / "train_net.py"


def train_rank(rank, port, *args):
    """``train`` as process ``rank`` of two, as torchrun would have it."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    train(*args)


def train(words, log, fault=None, place=0):
    """Run train_net.py with ``words``, its screen in the file ``log``, killed by one of the ``FAULTS`` at a place."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of its workers; it has inherited another one
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with open(log, "a") as screen:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(screen.fileno(), stream.fileno())
    if fault:
        FAULTS[fault](place)
    spec = importlib.util.spec_from_file_location("train_net", TRAIN_NET)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    launch(module.main, 1, args=(default_argument_parser().parse_args([str(word) for word in words]),))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_write(place):
    """Half of a checkpoint is written."""
    save, count = torch.save, iter(range(1, 99))

    def half(content, file):
        if next(count) < place:
            return save(content, file)
        buffer = io.BytesIO()
        save(content, buffer)
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        die()

    torch.save = half


def before_a_call(name):
    """A call of the operating system's does not happen: a file is not synced, or not renamed."""

    def arrange(place):
        original, count = getattr(os, name), iter(range(1, 9999))

        def killed(*args):
            if next(count) == place:
                die()
            return original(*args)

        setattr(os, name, killed)

    return arrange


def in_a_step(place):
    """The gradients are there, the weights are as before."""
    forward_backward = StepTrainer.forward_backward

    def killed(trainer, batch):
        losses = forward_backward(trainer, batch)
        if trainer.iter == place:
            die()
        return losses

    StepTrainer.forward_backward = killed


def worker(place):
    """Not this process, but one that loads its data, is killed, before a step."""
    run_step = StepTrainer.run_step

    def without(trainer):
        if trainer.iter == place:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        run_step(trainer)

    StepTrainer.run_step = without


def signalled(where):
    """A signal arrives in an evaluation, which takes a minute: of Python's code, or of C++ code that no signal ends."""

    def arrange(place):
        test, count = Trainer.test, iter(range(1, 99))

        def slow(*args):
            if next(count) == place:
                os.kill(os.getpid(), signal.SIGTERM)
                torch.rand(3)  # as a sampler does
                if where == "python":
                    time.sleep(60)
                else:
                    ctypes.CDLL(None).system(b"sleep 60 & wait")
            return test(*args)

        Trainer.test = staticmethod(slow)

    return arrange


def slow_rank(place):
    """The process of that rank is in an evaluation for a minute, and others wait for it; the log says when."""
    test = Trainer.test

    def slow(*args):
        print("EVALUATES", flush=True)
        if comm.get_rank() == place:
            time.sleep(60)
        return test(*args)

    Trainer.test = staticmethod(slow)


def full_disk(place):
    """No file may have more bytes than that."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (place, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def broken_image(place):
    """The image of that number is broken, as the training's mapper says it."""
    read, count = FocalDatasetMapper.__call__, iter(range(1, 9999))

    def broken(mapper, record):
        if mapper.is_train and next(count) == place:
            raise ValueError(f"{record['file_name']} is broken")
        return read(mapper, record)

    FocalDatasetMapper.__call__ = broken


FAULTS = {
    "signal in Python": signalled("python"),
    "signal in C++": signalled("c++"),
    "slow rank": slow_rank,
    "full disk": full_disk,
    "broken image": broken_image,
    "in a write": in_a_write,
    "before a sync": before_a_call("fsync"),
    "before a rename": before_a_call("replace"),
    "in a step": in_a_step,
    "worker": worker,
}
