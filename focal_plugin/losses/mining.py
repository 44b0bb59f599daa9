"""The cross entropy of a few chosen anchors of each image: how detectors balanced the classes before the focal loss.

A hyper-parameter out of range raises a ValueError that names its config key.
"""

from abc import ABC, abstractmethod

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling.sampling import subsample_labels
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from ..registry import CLS_LOSS_REGISTRY
from ..structures import IGNORED, DenseTargets


class MiniBatchLoss(nn.Module, ABC):
    """The cross entropy of a mini-batch of anchors; the other anchors have neither loss nor gradient.

    A subclass defines ``choose``. As with every loss the result is a sum, which the model divides by the number of
    positives. RPN and Fast R-CNN divide by the size of the mini-batch: with 512 anchors and 70 positives an image their
    loss is 7 times smaller. To get theirs, set ``MODEL.FOCAL.CLS_LOSS.WEIGHT`` accordingly.
    """

    def __init__(self, cfg: CfgNode | None = None):
        super().__init__()

    @abstractmethod
    def choose(self, labels: Tensor, logits: list[Tensor], targets: DenseTargets) -> Tensor:
        """Choose the anchors of the mini-batch, without gradient.

        Args:
            labels: (N, R) labels: level after level, each image's in (A, H, W) order.
            logits, targets: what ``forward`` was called with.

        Returns:
            (N, R) bool in the same order, True for the anchors of the mini-batch.
        """

    def forward(self, logits: list[Tensor], targets: DenseTargets) -> Tensor:
        """Sum over the chosen anchors and all classes; a float32 scalar. ``logits``: (N, A, K, H, W) views."""
        labels = torch.cat([level.flatten(1) for level in targets.labels], dim=1)  # (N, R)
        with torch.no_grad():
            chosen = self.choose(labels, logits, targets)  # (N, R)
        levels = chosen.split([level[0].numel() for level in targets.labels], dim=1)
        # Only the chosen anchors' logits are read; as with the focal loss, each has K sigmoids.
        indices = [level.flatten().nonzero().squeeze(1) for level in levels]  # L × (S_l,)
        classes = torch.cat([level.flatten()[index] for level, index in zip(targets.labels, indices)])  # (S,)
        return _cross_entropy(targets.gather(logits, indices), classes).sum()


@CLS_LOSS_REGISTRY.register()
class SampledBCELoss(MiniBatchLoss):
    """The cross entropy of anchors drawn at random: RPN's heuristic (Ren et al., NeurIPS 2015), Detectron2's sampling.

    Args:
        batch_size_per_image: at most this many anchors are drawn from an image.
        positive_fraction: at most this fraction of them are positives; negatives fill the rest.
    """

    @configurable
    def __init__(self, *, batch_size_per_image: int = 256, positive_fraction: float = 0.5):
        super().__init__()
        _check_batch("MODEL.RPN", batch_size_per_image, positive_fraction)
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, object]:
        return {
            "batch_size_per_image": cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": cfg.MODEL.RPN.POSITIVE_FRACTION,
        }

    def choose(self, labels: Tensor, logits: list[Tensor], targets: DenseTargets) -> Tensor:
        """Draw positives and negatives at random."""
        chosen = torch.zeros_like(labels, dtype=torch.bool)
        for mask, image in zip(chosen, labels):  # (R,) each
            for drawn in subsample_labels(
                image, self.batch_size_per_image, self.positive_fraction, bg_label=targets.num_classes
            ):
                mask[drawn] = True
        return chosen

    def extra_repr(self) -> str:
        return f"batch_size_per_image={self.batch_size_per_image}, positive_fraction={self.positive_fraction}"


@CLS_LOSS_REGISTRY.register()
class OHEMLoss(MiniBatchLoss):
    """The cross entropy of each image's hardest anchors: online hard example mining (table 1d).

    From "Training Region-based Object Detectors with Online Hard Example Mining" (Shrivastava et al., CVPR 2016).
    An anchor's score is its cross entropy, summed over the classes. Non-maximum suppression by this score, over all
    anchors that are not ignored and regardless of class, drops those that overlap a harder one. The hardest of the rest
    are the mini-batch.

    Args:
        batch_size_per_image: the anchors of an image in the mini-batch; 128, 256 and 512 in the paper.
        nms_thresh: the IoU above which an anchor is dropped; .5 and .7 in the paper.
        positive_fraction: 0 for no constraint. Otherwise the mini-batch has the hardest positives, at most this
            fraction of it, and as many of the hardest negatives as the fraction asks for: at .25 three for each
            positive, as in SSD. An image without positives then has no loss, and NMS runs among positives and among
            negatives separately. (Jointly, as in the paper, whether an easy positive is kept could depend on every
            anchor that is harder.)
    """

    @configurable
    def __init__(self, *, batch_size_per_image: int = 512, nms_thresh: float = 0.7, positive_fraction: float = 0.0):
        super().__init__()
        _check_batch("MODEL.FOCAL.CLS_LOSS.OHEM", batch_size_per_image, positive_fraction)
        if not 0 <= nms_thresh <= 1:
            raise ValueError(f"MODEL.FOCAL.CLS_LOSS.OHEM.NMS_THRESH is {nms_thresh}; expected an IoU in [0, 1].")
        self.batch_size_per_image = batch_size_per_image
        self.nms_thresh = nms_thresh
        self.positive_fraction = positive_fraction

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, object]:
        ohem = cfg.MODEL.FOCAL.CLS_LOSS.OHEM
        return {
            "batch_size_per_image": ohem.BATCH_SIZE_PER_IMAGE,
            "nms_thresh": ohem.NMS_THRESH,
            "positive_fraction": ohem.POSITIVE_FRACTION,
        }

    def choose(self, labels: Tensor, logits: list[Tensor], targets: DenseTargets) -> Tensor:
        """Choose the hardest anchors of each image; a ValueError if ``targets`` have no ``grid``."""
        if targets.grid is None:
            raise ValueError("OHEMLoss compares anchors with each other: give DenseTargets their grid, an Anchors.")
        order = targets.grid.flatten_levels(torch.arange(len(targets.grid), device=labels.device)[None])  # (R,)
        boxes = targets.grid.flat[order]  # (R, 4), in the order of the labels
        scores = _difficulty(logits, targets)  # (N, R)
        size, fraction = self.batch_size_per_image, self.positive_fraction
        chosen = torch.zeros_like(labels, dtype=torch.bool)
        # Unlike the focal loss, this discards easy anchors altogether. In table 1d it is 3.2 AP behind.
        for mask, image, score in zip(chosen, labels, scores):  # (R,) each
            used, negative = image != IGNORED, image == targets.num_classes
            if not fraction:
                mask[self._hardest(used, score, boxes, size)] = True
                continue
            positives = self._hardest(used & ~negative, score, boxes, max(int(size * fraction), 1))
            mask[positives] = True
            mask[self._hardest(negative, score, boxes, round(len(positives) * (1 - fraction) / fraction))] = True
        return chosen

    def _hardest(self, among: Tensor, scores: Tensor, boxes: Tensor, count: int) -> Tensor:
        """Return the indices of the ``count`` hardest anchors after NMS, of those where ``among`` (R,) is True.

        Only a harder anchor drops another. So NMS of the hardest 4·count is enough if ``count`` of them are left;
        otherwise twice as many are tried, and so on.
        """
        candidates = among.nonzero().squeeze(1)
        candidates = candidates[scores[candidates].argsort(descending=True, stable=True)]  # hardest first
        seen = 4 * count
        while True:
            first = candidates[:seen]
            kept = nms(boxes[first].float(), scores[first].float(), self.nms_thresh)  # in descending order
            if len(kept) >= count or seen >= len(candidates):
                return first[kept[:count]]
            seen *= 2

    def extra_repr(self) -> str:
        return (
            f"batch_size_per_image={self.batch_size_per_image}, nms_thresh={self.nms_thresh}, "
            f"positive_fraction={self.positive_fraction}"
        )


def _difficulty(logits: list[Tensor], targets: DenseTargets) -> Tensor:
    """Return each anchor's cross entropy, summed over classes: (N, R), level after level in (A, H, W) order."""
    scores = []
    for level in logits:  # all as if background, which needs no one-hot targets
        scores.append(-F.logsigmoid(-_in_float32(level)).sum(dim=2).flatten())  # (N·A·H·W,)
    classes = torch.cat([labels.flatten()[index] for labels, index in zip(targets.labels, targets.positives)])  # (P,)
    exact = _cross_entropy(targets.gather(logits), classes).split([len(index) for index in targets.positives])
    for level, index, score in zip(scores, targets.positives, exact):  # then the true values of the few positives
        level[index] = score
    n = len(targets.labels[0])
    return torch.cat([level.view(n, -1) for level in scores], dim=1)


def _cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Sum −log p_t (equation 1) over the classes: (S,), for (S, K) logits and (S,) labels in [0, K]."""
    logits = _in_float32(logits)
    onehot = (classes[:, None] == torch.arange(logits.shape[1], device=logits.device)).to(logits.dtype)  # (S, K)
    return F.binary_cross_entropy_with_logits(logits, onehot, reduction="none").sum(dim=1)


def _in_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _check_batch(key: str, batch_size_per_image: int, positive_fraction: float) -> None:
    if batch_size_per_image < 1:
        raise ValueError(f"{key}.BATCH_SIZE_PER_IMAGE is {batch_size_per_image}; expected at least 1.")
    if not 0 <= positive_fraction <= 1:
        raise ValueError(f"{key}.POSITIVE_FRACTION is {positive_fraction}; expected a fraction in [0, 1].")
