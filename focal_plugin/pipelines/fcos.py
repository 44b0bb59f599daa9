"""Detectron2's FCOS with any class loss of the registry."""

from collections.abc import Callable

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.backbone import build_backbone
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage, has_event_storage
from fvcore.nn import giou_loss
from torch import Tensor
from torch.nn import functional as F

from ..class_loss import ClassLoss, class_loss
from ..contracts import fill_bias
from ..normalizer import build_normalizer
from ..registry import build_bias_init, build_cls_loss
from .common import components_config, row_targets, rows_as_dense


@META_ARCH_REGISTRY.register()
class FocalFCOS(FCOS):
    """Detectron2's FCOS (Tian et al., ICCV 2019) with any class loss and normaliser.

    With ``SigmoidFocalLoss`` and ``EMANumPositives(initial=300)`` its losses are Detectron2's. Detectron2 has no yacs
    keys for FCOS, so its config is RetinaNet's: ``MODEL.RETINANET.{NUM_CLASSES, IN_FEATURES, NUM_CONVS, NORM,
    SCORE_THRESH_TEST, TOPK_CANDIDATES_TEST, NMS_THRESH_TEST}`` and ``TEST.DETECTIONS_PER_IMAGE``.

    Args:
        cls_loss: an entry of ``CLS_LOSS_REGISTRY``. It sees each level as (N, 1, K, H·W, 1).
        normalizer: called with the batch's number of positives and the device; its result divides all three sums.
        cls_loss_weight: what the class loss is multiplied by.
        kwargs: the other arguments of ``FCOS``; not ``focal_loss_alpha`` and ``focal_loss_gamma``, which belong to
            ``cls_loss``.
    """

    @configurable
    def __init__(
        self,
        *,
        cls_loss: ClassLoss,
        normalizer: Callable[[int, torch.device], Tensor],
        cls_loss_weight: float = 1.0,
        **kwargs,
    ):
        given = sorted({"focal_loss_alpha", "focal_loss_gamma"} & set(kwargs))
        if given:
            raise TypeError(f"FocalFCOS takes no {' and no '.join(given)}: give them to its cls_loss.")
        super().__init__(**kwargs)
        self.cls_loss = cls_loss
        self.loss_observer = None  # as of FocalRetinaNet
        self.normalizer = normalizer
        self.cls_loss_weight = cls_loss_weight

    @classmethod
    def from_config(cls, cfg):
        with components_config(cfg) as own:
            settings = own.MODEL.RETINANET
            backbone = build_backbone(own)
            shapes = backbone.output_shape()
            input_shape = [shapes[name] for name in settings.IN_FEATURES]
            head = FCOSHead(
                input_shape=input_shape,
                num_classes=settings.NUM_CLASSES,
                conv_dims=[input_shape[0].channels] * settings.NUM_CONVS,
                norm=settings.NORM,
            )
            fill_bias(build_bias_init(own), head.cls_score, 1, settings.NUM_CLASSES)
            return {
                "backbone": backbone,
                "head": head,
                "head_in_features": settings.IN_FEATURES,
                "num_classes": settings.NUM_CLASSES,
                "cls_loss": build_cls_loss(own),
                "normalizer": build_normalizer(own),
                "cls_loss_weight": own.MODEL.FOCAL.CLS_LOSS.WEIGHT,
                "test_score_thresh": settings.SCORE_THRESH_TEST,
                "test_topk_candidates": settings.TOPK_CANDIDATES_TEST,
                "test_nms_thresh": settings.NMS_THRESH_TEST,
                "max_detections_per_image": own.TEST.DETECTIONS_PER_IMAGE,
                "pixel_mean": own.MODEL.PIXEL_MEAN,
                "pixel_std": own.MODEL.PIXEL_STD,
            }

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
        pred_centerness: list[Tensor],
    ) -> dict[str, Tensor]:
        """Compute ``loss_fcos_cls``, ``loss_fcos_loc`` and ``loss_fcos_ctr``.

        Args:
            anchors: H·W boxes a level.
            pred_logits, pred_anchor_deltas, pred_centerness: (N, H·W, K), (N, H·W, 4) and (N, H·W, 1) a level.
            gt_labels, gt_boxes: (R,) and (R, 4) an image, from ``label_anchors``.
        """
        sizes = [len(level) for level in anchors]
        targets = row_targets(
            [level.tensor for level in anchors],
            torch.stack(gt_labels).split(sizes, dim=1),
            torch.stack(gt_boxes).split(sizes, dim=1),
            self.num_classes,
        )
        if has_event_storage():  # not in a training loop of the user's own
            get_event_storage().put_scalar("num_pos_anchors", targets.num_positives / len(gt_labels))
        normalizer = self.normalizer(targets.num_positives, pred_logits[0].device)

        deltas = targets.gather([rows_as_dense(level) for level in pred_anchor_deltas]).float()  # (P, 4)
        boxes = self.box2box_transform.apply_deltas(deltas, targets.anchors)  # (P, 4)
        loss_loc = giou_loss(boxes, targets.gt_boxes, reduction="sum")
        centerness = targets.gather([rows_as_dense(level) for level in pred_centerness])  # (P, 1)
        wanted = self.compute_ctrness_targets([Boxes(targets.anchors)], [targets.gt_boxes])  # (1, P)
        loss_ctr = F.binary_cross_entropy_with_logits(centerness.squeeze(1), wanted[0], reduction="sum")
        loss_cls = class_loss(
            self.cls_loss,
            [rows_as_dense(level) for level in pred_logits],
            targets,
            boxes=lambda: boxes,
            scale=self.cls_loss_weight / normalizer,
            observer=self.loss_observer,
        )
        return {
            "loss_fcos_cls": loss_cls,
            "loss_fcos_loc": loss_loc / normalizer,
            "loss_fcos_ctr": loss_ctr / normalizer,
        }
