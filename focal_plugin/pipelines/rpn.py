"""Detectron2's region proposal network, with objectness trained on all anchors by any class loss."""

from collections.abc import Callable

import torch
from detectron2.config import configurable
from detectron2.modeling.box_regression import _dense_box_regression_loss
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from ..anchors.cache import cached_anchors
from ..class_loss import ClassLoss, class_loss
from ..contracts import fill_bias
from ..kernels.targets import dense_targets
from ..matchers.batch import Matcher as AnchorMatcher
from ..matchers.batch import match_images
from ..normalizer import build_normalizer
from ..registry import build_bias_init, build_cls_loss, build_matcher
from ..structures import IGNORED, Anchors, DenseTargets
from .common import components_config


@PROPOSAL_GENERATOR_REGISTRY.register()
class FocalRPN(RPN):
    """RPN trained on all anchors and not on a sample: with one class, object, and a loss that copes with the imbalance.

    ``loss_rpn_cls`` is the class loss over all anchors that are not ignored, divided by the normaliser. Parameter names
    and proposals are those of ``RPN``. So is ``loss_rpn_loc``, but summed over all positives; it is still divided by
    ``batch_size_per_image`` times the number of images.

    In a config the matcher's thresholds and labels are ``MODEL.RPN.IOU_{THRESHOLDS, LABELS}``. ``CLASS_ALPHA`` and
    ``CLASS_FREQUENCIES``, which have a number for each class, are for the ROI heads alone.

    Args:
        anchor_matcher: an entry of ``ANCHOR_MATCHER_REGISTRY``.
        cls_loss: an entry of ``CLS_LOSS_REGISTRY``; logits have K = 1.
        normalizer: called with the batch's number of positives and the device.
        bias_init: an entry of ``BIAS_INIT_REGISTRY``, for the head's ``objectness_logits``.
        kwargs: the other arguments of ``RPN``. ``positive_fraction`` is not used.

    Raises:
        TypeError: the matcher is Detectron2's, which takes a matrix of IoU.
        ValueError: the anchors are rotated, or the head has no conv ``objectness_logits``.
    """

    @configurable
    def __init__(
        self,
        *,
        anchor_matcher: AnchorMatcher,
        cls_loss: ClassLoss,
        normalizer: Callable[[int, torch.device], Tensor],
        bias_init: Callable[[torch.nn.Conv2d, int, int], None],
        **kwargs,
    ):
        if isinstance(anchor_matcher, Matcher):
            raise TypeError(
                "FocalRPN calls its anchor_matcher with (Anchors, Instances), and Detectron2's Matcher takes a matrix. "
                "Expected an entry of ANCHOR_MATCHER_REGISTRY, such as IgnoreBandMatcher(thresholds=[0.3, 0.7], "
                "labels=[0, -1, 1])."
            )
        generator = kwargs.get("anchor_generator")
        if getattr(generator, "box_dim", 4) != 4:
            raise ValueError(
                f"MODEL.ANCHOR_GENERATOR.NAME (anchor_generator) is {type(generator).__name__}, whose boxes are "
                "rotated; FocalRPN takes upright ones: use DefaultAnchorGenerator, or Detectron2's RRPN as "
                "MODEL.PROPOSAL_GENERATOR.NAME."
            )
        super().__init__(anchor_matcher=anchor_matcher, **kwargs)
        self.matcher_seen = False  # whether the matcher has matched boxes, and its values were checked then
        self.cls_loss = cls_loss
        self.normalizer = normalizer
        if not hasattr(self.rpn_head, "objectness_logits"):
            raise ValueError(
                f"MODEL.RPN.HEAD_NAME (head) is {type(self.rpn_head).__name__}, which has no `objectness_logits`: "
                "expected a head that calls its objectness conv so, as StandardRPNHead does, for the bias init."
            )
        fill_bias(bias_init, self.rpn_head.objectness_logits, self.rpn_head.objectness_logits.out_channels, 1)

    @classmethod
    def from_config(cls, cfg, input_shape):
        bands = {"IOU_THRESHOLDS": "MODEL.RPN.IOU_THRESHOLDS", "IOU_LABELS": "MODEL.RPN.IOU_LABELS"}
        with components_config(cfg, **bands) as own:
            own.MODEL.RETINANET.NUM_CLASSES = 1
            own.MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA = []
            own.MODEL.FOCAL.CLASS_FREQUENCIES = [1.0]
            components = {
                "anchor_matcher": build_matcher(own),
                "cls_loss": build_cls_loss(own),
                "normalizer": build_normalizer(own),
                "bias_init": build_bias_init(own),
            }
        args = super().from_config(cfg, input_shape)
        args["loss_weight"]["loss_rpn_cls"] *= cfg.MODEL.FOCAL.CLS_LOSS.WEIGHT
        return {**args, **components}

    def forward(
        self, images: ImageList, features: dict[str, Tensor], gt_instances: list[Instances] | None = None
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """As ``RPN.forward``: the proposals of each image, and in training ``loss_rpn_cls`` and ``loss_rpn_loc``."""
        if not self.training:
            return super().forward(images, features, gt_instances)
        assert gt_instances is not None, "FocalRPN needs gt_instances in training."
        maps = [features[name] for name in self.in_features]
        logits, deltas = self.rpn_head(maps)  # L × (N, A, H, W), L × (N, A·4, H, W)
        anchors = cached_anchors(self.anchor_generator, maps)
        objects = [_as_one_class(gt) for gt in gt_instances]
        targets = dense_targets(anchors, self.match(anchors, gt_instances), objects, num_classes=1)
        losses = self.losses_of(logits, targets.gather(deltas), targets)

        boxes = [Boxes(level) for level in anchors.boxes]
        flat_logits = [permute_to_N_HWA_K(level, 1).squeeze(2) for level in logits]  # L × (N, H·W·A)
        flat_deltas = [permute_to_N_HWA_K(level, 4) for level in deltas]  # L × (N, H·W·A, 4)
        return self.predict_proposals(boxes, flat_logits, flat_deltas, images.image_sizes), losses

    @torch.no_grad()
    def match(self, anchors: Anchors, gt_instances: list[Instances]) -> tuple[Tensor, Tensor]:
        """Return the (N, R) box index and the (N, R) label, IGNORED, NEGATIVE or POSITIVE, of each image's anchors."""
        matched, labels = match_images(self.anchor_matcher, anchors, gt_instances, check_values=not self.matcher_seen)
        self.matcher_seen |= any(map(len, gt_instances))
        if self.anchor_boundary_thresh < 0:
            return matched, labels
        boxes = Boxes(anchors.flat)
        inside = [boxes.inside_box(gt.image_size, self.anchor_boundary_thresh) for gt in gt_instances]
        return matched, labels.masked_fill(~torch.stack(inside), IGNORED)

    def losses_of(self, logits: list[Tensor], deltas: Tensor, targets: DenseTargets) -> dict[str, Tensor]:
        """Compute ``loss_rpn_cls`` and ``loss_rpn_loc``, normalised and weighted.

        Args:
            logits: one (N, A, H, W) tensor a level.
            deltas: (P, 4), the positives'.
            targets: with one class, object.
        """
        num_images = len(logits[0])
        num_negatives = sum((level == targets.num_classes).sum() for level in targets.labels)
        storage = get_event_storage()
        storage.put_scalar("rpn/num_pos_anchors", targets.num_positives / num_images)
        storage.put_scalar("rpn/num_neg_anchors", num_negatives / num_images)
        normalizer = self.normalizer(targets.num_positives, logits[0].device)
        loss_cls = class_loss(
            self.cls_loss,
            [level.unsqueeze(2) for level in logits],  # L × (N, A, 1, H, W)
            targets,
            boxes=lambda: self.box2box_transform.apply_deltas(deltas.float(), targets.anchors),
            scale=self.loss_weight.get("loss_rpn_cls", 1.0) / normalizer,
        )
        loss_loc = _dense_box_regression_loss(
            [Boxes(targets.anchors)],
            self.box2box_transform,
            [deltas[None]],
            [targets.gt_boxes],
            torch.ones(1, len(deltas), dtype=torch.bool, device=deltas.device),
            box_reg_loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        scale = self.loss_weight.get("loss_rpn_loc", 1.0) / (self.batch_size_per_image * num_images)
        return {"loss_rpn_cls": loss_cls, "loss_rpn_loc": loss_loc * scale}


def _as_one_class(gt: Instances) -> Instances:
    classes = torch.zeros(len(gt), dtype=torch.int64, device=gt.gt_boxes.device)
    return Instances(gt.image_size, gt_boxes=gt.gt_boxes, gt_classes=classes)
