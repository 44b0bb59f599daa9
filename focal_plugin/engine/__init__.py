"""Training and evaluation: Detectron2's trainer on any device, what a run shows of itself, and how it goes on."""

from . import lazy
from .advice import advise
from .checkpoint import AtomicCheckpointer
from .folder import training_folder
from .loader import TrainLoader, build_train_loader
from .lock import sole_training
from .processes import launch
from .resume import CheckpointHook
from .setup import evaluation_folder, settled_seed, start_run
from .step import StepTrainer
from .trainer import Trainer

__all__ = [
    "AtomicCheckpointer",
    "CheckpointHook",
    "StepTrainer",
    "TrainLoader",
    "Trainer",
    "advise",
    "build_train_loader",
    "evaluation_folder",
    "launch",
    "lazy",
    "settled_seed",
    "sole_training",
    "start_run",
    "training_folder",
]
