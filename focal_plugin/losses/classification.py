"""Classification losses over a batch's dense logits, each a module that holds only its hyper-parameters."""

from abc import ABC, abstractmethod

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from ..registry import CLS_LOSS_REGISTRY
from ..structures import IGNORED, DenseTargets
from .dense_focal import dense_focal_loss


class ElementwiseLoss(nn.Module, ABC):
    """A loss that is a sum over anchors and classes of a function of one logit and its 0/1 target.

    A subclass defines ``elementwise`` and nothing else; this class makes the targets, leaves the ignored anchors out
    and sums. It costs a one-hot copy of the logits a level: write a loss that must be cheaper as a module of its own.
    """

    @abstractmethod
    def elementwise(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of each element. ``logits``, ``targets`` and the result are float tensors of one shape."""

    def forward(self, logits: list[Tensor], targets: DenseTargets) -> Tensor:
        """The sum over all that is not ignored, a float32 scalar. ``logits``: one (N, A, K, H, W) view a level."""
        total = torch.zeros((), device=logits[0].device)
        for level, labels in zip(logits, targets.labels):
            classes = torch.arange(level.shape[2], device=level.device).view(-1, 1, 1)  # (K, 1, 1)
            level = level.float() if level.dtype in (torch.float16, torch.bfloat16) else level
            onehot = (labels.unsqueeze(2) == classes).to(level.dtype)  # (N, A, K, H, W)
            loss = self.elementwise(level, onehot)  # (N, A, K, H, W)
            # where, not a product with the mask: an ignored anchor's loss may be infinite
            total = total + torch.where(labels.unsqueeze(2) == IGNORED, 0.0, loss).sum()
        return total


@CLS_LOSS_REGISTRY.register()
class SigmoidFocalLoss(nn.Module):
    """The paper's focal loss, FL(p_t) = −α_t (1 − p_t)^γ log p_t (equation 5), in one pass over the logits.

    Args:
        alpha: the weight of the positive class; 1 − alpha is the negative's. −1 leaves both at 1.
        gamma: the focusing parameter, ≥ 0; 0 is the α-balanced cross entropy of equation 3.
    """

    @configurable
    def __init__(self, *, alpha: float = 0.25, gamma: float = 2.0):
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma

    @classmethod
    def from_config(cls, cfg):
        return {"alpha": cfg.MODEL.RETINANET.FOCAL_LOSS_ALPHA, "gamma": cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA}

    def forward(self, logits: list[Tensor], targets: DenseTargets) -> Tensor:
        """The sum over all that is not ignored, a float32 scalar. ``logits``: one (N, A, K, H, W) view a level."""
        return dense_focal_loss(logits, targets.labels, alpha=self.alpha, gamma=self.gamma)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, gamma={self.gamma}"
