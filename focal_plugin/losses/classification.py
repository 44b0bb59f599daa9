"""Classification losses over a batch's dense logits, each a module that holds only its hyper-parameters."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import ClassVar

import torch
from detectron2.config import configurable
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..contracts import checked_elementwise
from ..registry import CLS_LOSS_REGISTRY
from ..structures import IGNORED, DenseTargets
from .class_alpha import alpha_from_config, checked_alpha
from .dense_focal import dense_focal_loss
from .functional import (
    quality_focal_loss,
    sigmoid_focal_loss,
    sigmoid_focal_loss_star,
    sigmoid_hinge_loss,
    varifocal_loss,
)

_BLOCK_SIZE = 2**22  # logits whose temporaries are in memory at a time


class ElementwiseLoss(nn.Module, ABC):
    """A loss that is a sum over anchors and classes of a function of one logit and its target.

    A subclass defines ``elementwise`` and nothing else; this class makes the targets, leaves the ignored anchors out
    and sums. The targets, and whatever ``elementwise`` computes on its way, are in memory for a few million logits at a
    time, and are computed again in backward.

    Targets are 0 and 1. With the class attribute ``needs_quality = True`` they are soft: a positive's target for its
    class is its quality, the IoU of the box that is predicted for it with its ground truth.
    """

    needs_quality = False

    @abstractmethod
    def elementwise(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of each element. ``logits``, ``targets`` and the result are float tensors of one shape."""

    def forward(self, logits: list[Tensor], targets: DenseTargets) -> Tensor:
        """The sum over all that is not ignored, a float32 scalar. ``logits``: one (N, A, K, H, W) view a level.

        Raises:
            ValueError: the loss needs the positives' quality, and ``targets`` have none.
        """
        total = torch.zeros((), device=logits[0].device)
        for i, (level, labels) in enumerate(zip(logits, targets.labels)):
            quality = torch.ones(labels.shape, device=labels.device)  # (N, A, H, W)
            if self.needs_quality:
                quality.view(-1)[targets.positives[i]] = self._quality(targets, i).to(quality.dtype)
            for block in _blocks(level, labels, quality):
                total = total + checkpoint(self._sum, *block, use_reentrant=False)
        return total

    def _sum(self, logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
        """The sum over logits (..., K, H, W) with labels and quality (..., H, W)."""
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        labels = labels.unsqueeze(-3)  # (..., 1, H, W)
        classes = torch.arange(logits.shape[-3], device=logits.device).view(-1, 1, 1)  # (K, 1, 1)
        wanted = torch.where(labels == classes, quality.unsqueeze(-3), 0.0).to(logits.dtype)  # (..., K, H, W)
        loss = checked_elementwise(self, self.elementwise(logits, wanted), logits)
        return torch.where(labels == IGNORED, 0.0, loss).sum()  # no product: an ignored anchor's may be infinite

    def _quality(self, targets: DenseTargets, level: int) -> Tensor:
        """The quality of the positives of a level, (P_l,)."""
        if targets.quality is None:
            raise ValueError(
                f"{type(self).__name__} needs the quality of each positive, and these DenseTargets have none: give it "
                "targets.with_quality(boxes), with the predicted boxes of the positives."
            )
        return targets.quality.split([len(positives) for positives in targets.positives])[level]


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, cut along their first dimension and that of the parts, until the first has few elements."""
    if tensors[0].numel() <= _BLOCK_SIZE or tensors[0].dim() <= 3:
        yield tensors
        return
    for parts in zip(*(tensor.unbind() for tensor in tensors)):
        yield from _blocks(*parts)


class _FunctionLoss(ElementwiseLoss):
    """A loss that is a function of ``losses.functional``. What that refuses is refused when the loss is made.

    Attributes:
        function: what is called with (logits, targets, **hyper-parameters).
        config_keys: the hyper-parameters, which are attributes of the loss, and the key of a config that each is.
    """

    function: Callable[..., Tensor]
    config_keys: ClassVar[Mapping[str, str]]

    def __init__(self, **numbers: float | Tensor):
        super().__init__()
        for name, value in numbers.items():
            if isinstance(value, Tensor):  # one number a class, (K,)
                self.register_buffer(name, value, persistent=False)  # a checkpoint holds what is learnt
            elif isinstance(value, Real):
                setattr(self, name, float(value))
            else:
                raise TypeError(f"{name} ({self.config_keys[name]}) is {value!r}; expected a number.")
        num_classes = max(torch.as_tensor(value).numel() for value in numbers.values())
        example = torch.zeros(num_classes, 1, 1)
        try:
            _FunctionLoss.elementwise(self, example, example)
        except ValueError as error:
            keys = " and ".join(f"{name} is {key}" for name, key in self.config_keys.items())
            raise ValueError(f"{type(self).__name__}: {error} In a config, {keys}.") from error

    def elementwise(self, logits: Tensor, targets: Tensor) -> Tensor:
        """``function`` of each element."""
        numbers = {name: getattr(self, name) for name in self.config_keys}
        numbers = {name: x.view(-1, 1, 1) if isinstance(x, Tensor) else x for name, x in numbers.items()}
        return self.function(logits, targets, **numbers)  # of (..., K, H, W)

    def extra_repr(self) -> str:
        numbers = {name: getattr(self, name) for name in self.config_keys}
        return ", ".join(f"{name}={x.tolist() if isinstance(x, Tensor) else x}" for name, x in numbers.items())


class _AlphaLoss(_FunctionLoss):
    """A loss with the weight of the positives, α: a number, or one a class."""

    def __init__(self, alpha: float | Sequence[float], **numbers: float):
        super().__init__(alpha=checked_alpha(alpha), **numbers)

    @classmethod
    def needs_class_frequencies(cls, cfg) -> bool:
        """Whether α comes from the classes' frequencies."""
        return cfg.MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA_POWER != 0


@CLS_LOSS_REGISTRY.register()
class SigmoidFocalLoss(_AlphaLoss):
    """The paper's focal loss, FL(p_t) = −α_t (1 − p_t)^γ log p_t (equation 5), in one pass over the logits.

    Args:
        alpha: the weight of the positives; 1 − alpha is the negatives'. −1 leaves both at 1. Or one weight a class.
        gamma: the focusing parameter, ≥ 0; 0 is the α-balanced cross entropy of equation 3.

    Raises:
        ValueError: alpha is not such a weight, or gamma negative or not finite. TypeError: one is no number.
    """

    function = staticmethod(sigmoid_focal_loss)
    config_keys: ClassVar = {"alpha": "MODEL.RETINANET.FOCAL_LOSS_ALPHA", "gamma": "MODEL.RETINANET.FOCAL_LOSS_GAMMA"}

    @configurable
    def __init__(self, *, alpha: float | Sequence[float] = 0.25, gamma: float = 2.0):
        super().__init__(alpha, gamma=gamma)

    @classmethod
    def from_config(cls, cfg):
        return {"alpha": alpha_from_config(cfg), "gamma": cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA}

    def forward(self, logits: list[Tensor], targets: DenseTargets) -> Tensor:
        """The sum over all that is not ignored, a float32 scalar. ``logits``: one (N, A, K, H, W) view a level."""
        return dense_focal_loss(logits, targets.labels, alpha=self.alpha, gamma=self.gamma)


@CLS_LOSS_REGISTRY.register()
class AlphaBalancedBCELoss(SigmoidFocalLoss):
    """The α-balanced cross entropy CE(p_t) = −α_t log p_t (equation 3, table 1a): the focal loss at γ = 0.

    Args:
        alpha: as of ``SigmoidFocalLoss``; .75 is the paper's best here.
    """

    @configurable
    def __init__(self, *, alpha: float | Sequence[float] = 0.75):
        super().__init__(alpha=alpha, gamma=0.0)

    @classmethod
    def from_config(cls, cfg):
        return {"alpha": alpha_from_config(cfg)}


@CLS_LOSS_REGISTRY.register()
class BCELoss(SigmoidFocalLoss):
    """The cross entropy CE(p_t) = −log p_t (equation 1), over all anchors: the focal loss at γ = 0, without α."""

    @configurable
    def __init__(self):
        super().__init__(alpha=-1, gamma=0.0)

    @classmethod
    def from_config(cls, cfg):
        return {}

    @classmethod
    def needs_class_frequencies(cls, cfg) -> bool:
        """There is no α."""
        return False


@CLS_LOSS_REGISTRY.register()
class FocalLossStar(_AlphaLoss):
    """FL* = −α_t log σ(γ x_t + β) / γ (appendix A, table 3).

    Args:
        alpha: as of ``SigmoidFocalLoss``.
        gamma: the steepness γ > 0.
        beta: the shift β; the paper's (γ, β) are (2, 1) and (4, 0).

    Raises:
        ValueError, TypeError: they are none of these.
    """

    function = staticmethod(sigmoid_focal_loss_star)
    config_keys: ClassVar = {**SigmoidFocalLoss.config_keys, "beta": "MODEL.FOCAL.CLS_LOSS.BETA"}

    @configurable
    def __init__(self, *, alpha: float | Sequence[float] = 0.25, gamma: float = 2.0, beta: float = 0.0):
        super().__init__(alpha, gamma=gamma, beta=beta)

    @classmethod
    def from_config(cls, cfg):
        return {
            "alpha": alpha_from_config(cfg),
            "gamma": cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA,
            "beta": cfg.MODEL.FOCAL.CLS_LOSS.BETA,
        }


@CLS_LOSS_REGISTRY.register()
class HingeLoss(_FunctionLoss):
    """max(0, m − p_t): no loss for what is right with probability m (section 5.1, which found it unstable).

    The paper says of its hinge that it acts on p_t and is 0 above a value of it, no more; this is the simplest such.

    Args:
        margin: m in (0, 1]; all else is a ValueError or TypeError.
    """

    function = staticmethod(sigmoid_hinge_loss)
    config_keys: ClassVar = {"margin": "MODEL.FOCAL.CLS_LOSS.HINGE_MARGIN"}

    @configurable
    def __init__(self, *, margin: float = 0.9):
        super().__init__(margin=margin)

    @classmethod
    def from_config(cls, cfg):
        return {"margin": cfg.MODEL.FOCAL.CLS_LOSS.HINGE_MARGIN}


@CLS_LOSS_REGISTRY.register()
class QualityFocalLoss(_FunctionLoss):
    """|y − σ|^β times the cross entropy, y a positive's IoU (Li et al., NeurIPS 2020): see ``quality_focal_loss``.

    Args:
        beta: β, 0 or at least 1, all else is a ValueError or TypeError; ``MODEL.RETINANET.FOCAL_LOSS_GAMMA`` in a
            config. There is no α.
    """

    needs_quality = True
    function = staticmethod(quality_focal_loss)
    config_keys: ClassVar = {"beta": "MODEL.RETINANET.FOCAL_LOSS_GAMMA"}

    @configurable
    def __init__(self, *, beta: float = 2.0):
        super().__init__(beta=beta)

    @classmethod
    def from_config(cls, cfg):
        return {"beta": cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA}


@CLS_LOSS_REGISTRY.register()
class VarifocalLoss(_FunctionLoss):
    """Focused negatives, positives that weigh as much as their IoU (Zhang et al., CVPR 2021): see ``varifocal_loss``.

    Args:
        alpha: the weight of the negatives: in a config 1 − ``MODEL.RETINANET.FOCAL_LOSS_ALPHA``, as in the focal loss,
            and 1 where that is −1. .75 in the paper.
        gamma: the focusing parameter γ ≥ 0; 2 in the paper.

    Raises:
        ValueError, TypeError: they are none of these.
    """

    needs_quality = True
    function = staticmethod(varifocal_loss)
    config_keys: ClassVar = {**SigmoidFocalLoss.config_keys, "alpha": "1 - MODEL.RETINANET.FOCAL_LOSS_ALPHA"}

    @configurable
    def __init__(self, *, alpha: float = 0.75, gamma: float = 2.0):
        super().__init__(alpha=alpha, gamma=gamma)

    @classmethod
    def from_config(cls, cfg):
        alpha = checked_alpha(cfg.MODEL.RETINANET.FOCAL_LOSS_ALPHA)
        return {"alpha": 1 - alpha if alpha != -1 else 1.0, "gamma": cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA}
