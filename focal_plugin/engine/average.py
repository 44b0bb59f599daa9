"""The exponential moving average (EMA) of the weights in training."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..config import ConfigError
from .checkpoint import AtomicCheckpointer

_RAMP = 9  # steps: after n of them, the average is over about the last n / 9


class WeightAverage:
    """The moving average of a model's trained parameters; each process computes the same one.

    The first update copies the weights. The decay then grows with the number n of updates, as n / (n + 9), up to
    ``decay``, so that the average forgets its beginning in short runs too.

    Args:
        model: on its device, and not in DistributedDataParallel. It may load weights before the first update.
        decay: the weight of the average beside that of the new weights, in (0, 1).

    Raises:
        ConfigError: ``decay`` is not in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 < decay < 1:
            raise ConfigError(
                f"MODEL.FOCAL.EMA.DECAY (in a LazyConfig train.ema.decay) is {decay}; expected a number in [0, 1), 0 "
                "for no average."
            )
        self.decay, self.updates = decay, 0
        self._model, self._copy = model, copy.deepcopy(model).eval().requires_grad_(False)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        averages = dict(self._copy.named_parameters())
        self._weights = list(trained.values())
        self._averages = {name: averages[name] for name in trained}

    def update(self) -> None:
        """Take in the weights of the model, after a step that has changed them."""
        decay = min(self.decay, self.updates / (self.updates + _RAMP))
        get_ema_multi_avg_fn(decay)(list(self._averages.values()), self._weights, self.updates)
        self.updates += 1

    @torch.no_grad()
    def averaged(self) -> nn.Module:
        """Return the averaged model, in eval mode. It is the same object each time.

        Its buffers, such as the statistics of batch norms, are the model's of this moment, and so are frozen weights;
        all are before the first update.
        """
        theirs = self._model.state_dict()
        for name, ours in self._copy.state_dict().items():
            if name not in self._averages or not self.updates:
                ours.copy_(theirs[name])
        return self._copy

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates, and the averages by the names of the parameters."""
        return {"updates": self.updates, "weights": {name: value.detach() for name, value in self._averages.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            KeyError: it lacks a parameter.
        """
        for name, average in self._averages.items():
            average.copy_(state["weights"][name])
        self.updates = state["updates"]


class AverageHook(HookBase):
    """Write the averaged model as ``model_ema_final.pth``, a plain model for MODEL.WEIGHTS, when a run is complete."""

    def __init__(self, average: WeightAverage, checkpointer: AtomicCheckpointer):
        self.average, self.checkpointer = average, checkpointer

    def after_train(self) -> None:
        """Write it, unless the run has ended before its last step."""
        if self.trainer.iter >= self.trainer.max_iter and comm.is_main_process():
            self.checkpointer.save_weights("model_ema_final", self.average.averaged())


def averaged_if_judged(metric: str, average: WeightAverage | None) -> Callable[[], nn.Module] | None:
    """Return what gives the averaged model, if its evaluation gives ``metric``; else None."""
    return average.averaged if average is not None and "_EMA/" in metric else None
