"""The last layers of Fast R-CNN with a sigmoid for each class and any class loss of the registry."""

import functools
from collections.abc import Callable

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.fast_rcnn import _log_classification_stats
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn import functional as F

from ..class_loss import ClassLoss, class_loss
from ..contracts import fill_bias
from ..normalizer import build_normalizer
from ..registry import build_bias_init, build_cls_loss
from ..structures import DenseTargets
from .common import components_config, row_targets, rows_as_dense


class FocalBoxPredictor(FastRCNNOutputLayers):
    """``FastRCNNOutputLayers`` whose classes are independent: K columns of logits, none for background.

    ``loss_cls`` is the class loss over all sampled proposals, computed image by image and divided by the normaliser.
    ``loss_box_reg``, class-agnostic or for each class, and inference are Detectron2's.

    Args:
        input_shape: of the box head's features.
        num_classes: K.
        cls_loss: an entry of ``CLS_LOSS_REGISTRY``. It sees each image's proposals as one level of (1, 1, K, P, 1).
        normalizer: called with the batch's number of positives and the device.
        bias_init: an entry of ``BIAS_INIT_REGISTRY``, for ``cls_score``.
        kwargs: the other arguments of ``FastRCNNOutputLayers``, without federated loss. ``use_sigmoid_ce`` has no
            effect: scores are always sigmoids, and the loss is ``cls_loss``.

    Raises:
        ValueError: federated loss is asked for.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        cls_loss: ClassLoss,
        normalizer: Callable[[int, torch.device], Tensor],
        bias_init: Callable[[nn.Linear, int, int], None],
        **kwargs,
    ):
        refuse_federated_loss(kwargs.get("use_fed_loss", False))
        super().__init__(input_shape, num_classes=num_classes, **kwargs)
        self.cls_score = nn.Linear(self.cls_score.in_features, num_classes)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        fill_bias(bias_init, self.cls_score, 1, num_classes)
        self.cls_loss = cls_loss
        self.normalizer = normalizer

    @classmethod
    def from_config(cls, cfg, input_shape):
        with components_config(cfg, NUM_CLASSES="MODEL.ROI_HEADS.NUM_CLASSES") as own:
            components = {
                "cls_loss": build_cls_loss(own),
                "normalizer": build_normalizer(own),
                "bias_init": build_bias_init(own),
            }
        args = super().from_config(cfg, input_shape)
        args["loss_weight"]["loss_cls"] = cfg.MODEL.FOCAL.CLS_LOSS.WEIGHT
        return {**args, **components}

    def losses(self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]) -> dict[str, Tensor]:
        """Compute ``loss_cls`` and ``loss_box_reg``, weighted.

        Args:
            predictions: logits (R, K) and deltas (R, 4) or (R, K·4), all images' proposals one after another.
            proposals: each image's, with ``proposal_boxes``, ``gt_classes`` and, if it has ground truth, ``gt_boxes``.
        """
        logits, deltas = predictions
        targets = [self._targets(image) for image in proposals]
        boxes = functools.cache(lambda: self.predict_boxes_for_gt_classes(predictions, proposals))  # N × (P_i, 4)
        normalizer = self.normalizer(sum(image.num_positives for image in targets), logits.device)
        scale = self.loss_weight.get("loss_cls", 1.0) / normalizer
        loss_cls = logits[:0].float().sum()  # 0, with a gradient even if no image has proposals
        for i, (rows, image) in enumerate(zip(logits.split([len(image) for image in proposals]), targets)):
            if len(rows):
                loss_cls = loss_cls + class_loss(
                    self.cls_loss,
                    [rows_as_dense(rows[None])],
                    image,
                    boxes=lambda i=i, image=image: boxes()[i][image.positives[0]],
                    scale=scale,
                )

        gt_classes = _cat([image.gt_classes for image in proposals], logits.new_zeros(0, dtype=torch.int64))
        # As background counts a proposal whose scores are all below .5: a logit of 0.
        _log_classification_stats(F.pad(logits.detach(), (0, 1)), gt_classes)
        no_boxes = deltas.new_zeros(0, 4)
        proposal_boxes = _cat([image.proposal_boxes.tensor for image in proposals], no_boxes)
        gt_boxes = _cat([_gt_boxes(image) for image in proposals], no_boxes)
        loss_box_reg = self.box_reg_loss(proposal_boxes, gt_boxes, deltas, gt_classes)
        return {"loss_cls": loss_cls, "loss_box_reg": loss_box_reg * self.loss_weight.get("loss_box_reg", 1.0)}

    def _targets(self, proposals: Instances) -> DenseTargets:
        boxes, labels = proposals.proposal_boxes.tensor, proposals.gt_classes
        return row_targets([boxes], [labels[None]], [_gt_boxes(proposals)[None]], self.num_classes)

    def predict_probs(self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]) -> tuple[Tensor, ...]:
        """Return each image's (P_i, K + 1) scores. The last column, background in Detectron2, is 0."""
        scores = F.pad(predictions[0].sigmoid(), (0, 1))
        return scores.split([len(image) for image in proposals])


def refuse_federated_loss(asked_for: bool) -> None:
    """Raise a ValueError if the config asks for federated loss."""
    if asked_for:
        raise ValueError(
            "MODEL.ROI_BOX_HEAD.USE_FED_LOSS (use_fed_loss) is True, and the loss of MODEL.FOCAL.CLS_LOSS.NAME is over "
            "all classes: set it to False, or use Detectron2's own ROI heads."
        )


def _gt_boxes(proposals: Instances) -> Tensor:
    """Return the (P, 4) matched boxes; without ground truth the proposals, which are then all background."""
    return (proposals.gt_boxes if proposals.has("gt_boxes") else proposals.proposal_boxes).tensor


def _cat(tensors: list[Tensor], empty: Tensor) -> Tensor:
    return torch.cat(tensors) if tensors else empty
