"""Training and evaluation: Detectron2's trainer on any device, and what a run shows of itself."""

from . import lazy
from .advice import advise
from .setup import find_config, load_config, start_run
from .step import StepTrainer
from .trainer import Trainer

__all__ = ["StepTrainer", "Trainer", "advise", "find_config", "lazy", "load_config", "start_run"]
