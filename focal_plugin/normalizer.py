"""Normalisers: divisors of the summed losses, so that these do not grow with the number of objects (section 4.1)."""

from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn

from .config import ConfigError


class NumPositives(nn.Module):
    """The number of positives of this batch, at least 1: the paper's normaliser (section 4.1).

    Args:
        sync: take the mean over all processes, so that several GPUs minimise the loss of their joint batch.
            (The mean and not the sum, because DistributedDataParallel averages the gradients.)
    """

    def __init__(self, *, sync: bool = False):
        super().__init__()
        self.sync = sync

    def forward(self, num_positives: int, device: torch.device) -> Tensor:
        """Return the normaliser, a float32 scalar on ``device``. With ``sync``, waits for the other processes."""
        # Not the number of all anchors: the vast majority are easy negatives, whose focal loss is next to nothing.
        count = torch.full((), float(num_positives), device=device)  # no copy to the device, which would synchronise
        world_size = comm.get_world_size()
        if self.sync and world_size > 1:
            torch.distributed.all_reduce(count)
            count /= world_size
            return count.clamp(min=1.0 / world_size)  # at least one positive in the joint batch
        return count.clamp(min=1.0)


class EMANumPositives(nn.Module):
    """Detectron2's normaliser: a running mean of the number of positives, here kept in the checkpoint.

    A batch with very few positives then does not get a huge loss. As in Detectron2 each process has its own mean;
    unlike there, the mean survives ``--resume``.

    Args:
        initial: the mean before the first batch; 100 in Detectron2.
        momentum: the weight of the old mean in the new one; 0.9 in Detectron2.
    """

    mean: Tensor

    def __init__(self, *, initial: float = 100.0, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        # A buffer: it is in checkpoints, so that a resumed run divides by what the interrupted one would have.
        self.register_buffer("mean", torch.tensor(float(initial)))

    def forward(self, num_positives: int, device: torch.device) -> Tensor:
        """Update the mean with the batch's number of positives, and return it as a scalar float32 tensor."""
        self.mean.mul_(self.momentum).add_(max(num_positives, 1) * (1 - self.momentum))
        return self.mean.to(device, copy=True)  # a copy: the next batch must not change what this one divides by


_NORMALIZERS: dict[str, Callable[[], nn.Module]] = {
    "ema": EMANumPositives,
    "num_fg": NumPositives,
    "num_fg_sync": lambda: NumPositives(sync=True),
}


def build_normalizer(cfg: CfgNode) -> nn.Module:
    """Build the normaliser that ``MODEL.FOCAL.NORMALIZER`` names: ``ema``, ``num_fg`` or ``num_fg_sync``."""
    name = cfg.MODEL.FOCAL.NORMALIZER
    if name not in _NORMALIZERS:
        raise ConfigError(f"MODEL.FOCAL.NORMALIZER is {name!r}; expected one of {', '.join(_NORMALIZERS)}.")
    return _NORMALIZERS[name]()
