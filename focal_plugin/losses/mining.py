"""The cross entropy of a few chosen anchors of each image: what dense detectors did before the focal loss."""

from abc import ABC, abstractmethod

import torch
from detectron2.config import configurable
from detectron2.modeling.sampling import subsample_labels
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from ..registry import CLS_LOSS_REGISTRY
from ..structures import IGNORED, DenseTargets


class MiniBatchLoss(nn.Module, ABC):
    """The cross entropy of a mini-batch of anchors; the rest has neither loss nor gradient.

    A subclass defines ``choose``. As with every loss the result is a sum, which the model divides by its normaliser,
    the number of positives: a positive weighs as much as under the other losses, and images add up to the same whether
    they are computed together or in parts. RPN and Fast R-CNN divide by the size of the mini-batch instead, which for
    512 anchors and 70 positives an image makes a loss 7 times smaller; ``MODEL.FOCAL.CLS_LOSS.WEIGHT`` does that here.
    """

    @abstractmethod
    def choose(self, labels: Tensor, logits: list[Tensor], targets: DenseTargets) -> Tensor:
        """The anchors of the mini-batch.

        Args:
            labels: (N, R) labels: level after level, each image's in (A, H, W) order.
            logits, targets: what ``forward`` was called with. There is no gradient here.

        Returns:
            (N, R) bool in the same order, True for the chosen.
        """

    def forward(self, logits: list[Tensor], targets: DenseTargets) -> Tensor:
        """The sum over the chosen anchors and all classes, a float32 scalar. ``logits``: (N, A, K, H, W) views."""
        labels = torch.cat([level.flatten(1) for level in targets.labels], dim=1)  # (N, R)
        with torch.no_grad():
            chosen = self.choose(labels, logits, targets)  # (N, R)
        levels = chosen.split([level[0].numel() for level in targets.labels], dim=1)
        places = [level.flatten().nonzero().squeeze(1) for level in levels]  # L × (S_l,)
        classes = torch.cat([level.flatten()[place] for level, place in zip(targets.labels, places)])  # (S,)
        return _cross_entropy(targets.gather(logits, places), classes).sum()


def _cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """−log p_t summed over the classes, (S,), of (S, K) logits and (S,) classes, K for background."""
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    onehot = (classes[:, None] == torch.arange(logits.shape[1], device=logits.device)).to(logits.dtype)  # (S, K)
    return F.binary_cross_entropy_with_logits(logits, onehot, reduction="none").sum(dim=1)


@CLS_LOSS_REGISTRY.register()
class SampledBCELoss(MiniBatchLoss):
    """The cross entropy of anchors drawn at random: RPN's heuristic (Ren et al., NeurIPS 2015), Detectron2's sampling.

    Args:
        batch_size_per_image: how many anchors an image has in the mini-batch, if it has as many that are not ignored.
        positive_fraction: of these at most so many positives; negatives take the places that are left.

    Raises:
        ValueError: batch_size_per_image is below 1, or positive_fraction not in [0, 1].
    """

    @configurable
    def __init__(self, *, batch_size_per_image: int = 256, positive_fraction: float = 0.5):
        super().__init__()
        _check_batch("MODEL.RPN", batch_size_per_image, positive_fraction)
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction

    @classmethod
    def from_config(cls, cfg):
        return {
            "batch_size_per_image": cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": cfg.MODEL.RPN.POSITIVE_FRACTION,
        }

    def choose(self, labels: Tensor, logits: list[Tensor], targets: DenseTargets) -> Tensor:
        """Positives and negatives at random."""
        chosen = torch.zeros_like(labels, dtype=torch.bool)
        for mine, codes in zip(chosen, labels):
            for drawn in subsample_labels(
                codes, self.batch_size_per_image, self.positive_fraction, bg_label=targets.num_classes
            ):
                mine[drawn] = True
        return chosen

    def extra_repr(self) -> str:
        return f"batch_size_per_image={self.batch_size_per_image}, positive_fraction={self.positive_fraction}"


@CLS_LOSS_REGISTRY.register()
class OHEMLoss(MiniBatchLoss):
    """The cross entropy of each image's hardest anchors: online hard example mining (table 1d).

    From "Training Region-based Object Detectors with Online Hard Example Mining" (Shrivastava et al., CVPR 2016).
    Anchors are scored by their cross entropy, summed over the classes. Non-maximum suppression by that score, over all
    anchors that are not ignored and whatever their class, drops those that overlap a harder one; of the rest the
    hardest are the mini-batch.

    Args:
        batch_size_per_image: how many anchors an image has in the mini-batch; 128, 256 and 512 in the paper.
        nms_thresh: the IoU above which an anchor is dropped; .5 and .7 in the paper.
        positive_fraction: 0 for no constraint. Else a mini-batch is made of at most this fraction of positives, the
            hardest, and as many negatives, the hardest, as the fraction asks for: at .25, 3 for each positive, as in
            SSD. An image without positives then has no loss. NMS is then among positives and among negatives: across
            them, as in the paper, whether an easy positive is left could hang on all the anchors harder than it.

    Raises:
        ValueError: batch_size_per_image is below 1, or one of the others not in [0, 1].
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
    def from_config(cls, cfg):
        ohem = cfg.MODEL.FOCAL.CLS_LOSS.OHEM
        return {
            "batch_size_per_image": ohem.BATCH_SIZE_PER_IMAGE,
            "nms_thresh": ohem.NMS_THRESH,
            "positive_fraction": ohem.POSITIVE_FRACTION,
        }

    def choose(self, labels: Tensor, logits: list[Tensor], targets: DenseTargets) -> Tensor:
        """The hardest anchors of each image.

        Raises:
            ValueError: ``targets`` have no ``grid``.
        """
        if targets.grid is None:
            raise ValueError("OHEMLoss compares anchors with each other: give DenseTargets their grid, an Anchors.")
        boxes = torch.cat(
            [
                level.view(h, w, a, 4).permute(2, 0, 1, 3).reshape(-1, 4)  # (A·H·W, 4), the order of the labels
                for level, (_, a, h, w) in zip(targets.grid.boxes, (level.shape for level in targets.labels))
            ]
        )  # (R, 4)
        scores = _difficulty(logits, targets)  # (N, R)
        size, fraction = self.batch_size_per_image, self.positive_fraction
        chosen = torch.zeros_like(labels, dtype=torch.bool)
        for mine, codes, score in zip(chosen, labels, scores):
            used, negative = codes != IGNORED, codes == targets.num_classes
            if not fraction:
                mine[self._hardest(used, score, boxes, size)] = True
                continue
            positives = self._hardest(used & ~negative, score, boxes, max(int(size * fraction), 1))
            mine[positives] = True
            mine[self._hardest(negative, score, boxes, round(len(positives) * (1 - fraction) / fraction))] = True
        return chosen

    def _hardest(self, among: Tensor, scores: Tensor, boxes: Tensor, count: int) -> Tensor:
        """The indices of the ``count`` hardest anchors that NMS leaves, of those where the (R,) mask ``among`` is True.

        NMS looks at the first anchors only, and at twice as many until enough are left: an anchor is dropped by what
        stands before it, so the first of a sequence fare as they do in the whole.
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
    """Each anchor's cross entropy, summed over the classes: (N, R), level after level in (A, H, W) order."""
    scores = []
    for level in logits:
        level = level.float() if level.dtype in (torch.float16, torch.bfloat16) else level
        scores.append(-F.logsigmoid(-level).sum(dim=2).flatten())  # as background, (N·A·H·W,)
    rows = targets.gather(logits)  # (P, K)
    classes = torch.cat([labels.flatten()[places] for labels, places in zip(targets.labels, targets.positives)])
    harder = _cross_entropy(rows, classes).split([len(places) for places in targets.positives])
    for level, places, score in zip(scores, targets.positives, harder):
        level[places] = score
    n = len(targets.labels[0])
    return torch.cat([level.view(n, -1) for level in scores], dim=1)


def _check_batch(key: str, batch_size_per_image: int, positive_fraction: float) -> None:
    if batch_size_per_image < 1:
        raise ValueError(f"{key}.BATCH_SIZE_PER_IMAGE is {batch_size_per_image}; expected at least 1.")
    if not 0 <= positive_fraction <= 1:
        raise ValueError(f"{key}.POSITIVE_FRACTION is {positive_fraction}; expected a fraction in [0, 1].")
