"""RetinaNet whose loss, matcher, head, bias init and normaliser are chosen by name."""

import inspect
import math
from collections.abc import Callable, Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import batched_nms, cat
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.backbone import Backbone, build_backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from .frozen_norm import fold_frozen_norms
from .normalizer import build_normalizer
from .registry import build_box_loss, build_cls_loss, build_dense_head, build_matcher, import_user_modules
from .structures import Anchors, DenseTargets


@META_ARCH_REGISTRY.register()
class FocalRetinaNet(DenseDetector):
    """RetinaNet, a drop-in for Detectron2's: by default the same parameters, losses and detections at less cost.

    Args:
        backbone: a Detectron2 backbone; ResNet-FPN with P6 and P7 in the paper.
        head: an entry of ``DENSE_HEAD_REGISTRY``, or any head of Detectron2's for ``RetinaNet``.
        head_in_features: the names of the backbone's features that the head sees, finest first.
        anchor_generator: one of Detectron2's; nine anchors a location in the paper.
        box2box_transform: how four deltas turn an anchor into a box.
        anchor_matcher: an entry of ``ANCHOR_MATCHER_REGISTRY``.
        num_classes: K foreground classes. Background is class K in targets and has no channel.
        cls_loss: an entry of ``CLS_LOSS_REGISTRY``.
        box_loss: an entry of ``BOX_LOSS_REGISTRY``.
        normalizer: called with the batch's number of positives and the device; both sums are divided by its result.
        cls_loss_weight, box_loss_weight: what the two losses are multiplied by.
        test_score_thresh: detections with a score of at most this are dropped.
        test_topk_candidates: how many of the best (anchor, class) pairs of a level go on to NMS.
        test_nms_thresh: boxes of one class that overlap a better one by more than this IoU are dropped.
        max_detections_per_image: how many of the best detections an image keeps.
        pixel_mean, pixel_std: one number a channel, in the order of ``INPUT.FORMAT``; see ``DenseDetector``.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: Sequence[str],
        anchor_generator: nn.Module,
        box2box_transform,
        anchor_matcher: Callable[[Anchors, Instances], tuple[Tensor, Tensor]],
        num_classes: int,
        cls_loss: Callable[[list[Tensor], DenseTargets], Tensor],
        box_loss: Callable[..., Tensor],
        normalizer: Callable[[int, torch.device], Tensor],
        cls_loss_weight: float = 1.0,
        box_loss_weight: float = 1.0,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.5,
        max_detections_per_image: int = 100,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        super().__init__(backbone, head, list(head_in_features), pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.head_takes_targets = "targets" in inspect.signature(head.forward).parameters
        self.anchor_generator = anchor_generator
        self.box2box_transform = box2box_transform
        self.anchor_matcher = anchor_matcher
        self.num_classes = num_classes

        self.cls_loss = cls_loss
        self.box_loss = box_loss
        self.normalizer = normalizer
        self.cls_loss_weight = cls_loss_weight
        self.box_loss_weight = box_loss_weight

        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image

        fold_frozen_norms(self)  # the same model in fewer passes over its activations

    @classmethod
    def from_config(cls, cfg):
        if "FOCAL" not in cfg.MODEL:
            raise KeyError("The config has no MODEL.FOCAL: call focal_plugin.add_focal_config(cfg) after get_cfg().")
        import_user_modules(cfg)
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        input_shape = [shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
        return {
            "backbone": backbone,
            "head": build_dense_head(cfg, input_shape),
            "head_in_features": cfg.MODEL.RETINANET.IN_FEATURES,
            "anchor_generator": build_anchor_generator(cfg, input_shape),
            "box2box_transform": Box2BoxTransform(weights=cfg.MODEL.RETINANET.BBOX_REG_WEIGHTS),
            "anchor_matcher": build_matcher(cfg),
            "num_classes": cfg.MODEL.RETINANET.NUM_CLASSES,
            "cls_loss": build_cls_loss(cfg),
            "box_loss": build_box_loss(cfg),
            "normalizer": build_normalizer(cfg),
            "cls_loss_weight": cfg.MODEL.FOCAL.CLS_LOSS.WEIGHT,
            "box_loss_weight": cfg.MODEL.FOCAL.BOX_LOSS.WEIGHT,
            "test_score_thresh": cfg.MODEL.RETINANET.SCORE_THRESH_TEST,
            "test_topk_candidates": cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": cfg.MODEL.RETINANET.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """As ``DenseDetector.forward``: losses by name in training, else a dict with ``instances`` for each image."""
        if not (self.training and self.head_takes_targets):
            return super().forward(batched_inputs)
        assert "instances" in batched_inputs[0], "The images have no `instances`, the ground truth of training."
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        features = [features[name] for name in self.head_in_features]
        gt_instances = [image["instances"].to(self.device) for image in batched_inputs]
        targets = self.label_anchors(Anchors.from_generator(self.anchor_generator, features), gt_instances)
        return self.losses(*self.head(features, targets), targets)

    def forward_training(
        self, images: ImageList, features: list[Tensor], predictions, gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        """The losses of a batch from its features and the ``(logits, deltas)`` of a head that takes no targets."""
        logits, deltas = predictions
        targets = self.label_anchors(Anchors.from_generator(self.anchor_generator, features), gt_instances)
        return self.losses(logits, targets.gather(deltas), targets)

    @torch.no_grad()
    def label_anchors(self, anchors: Anchors, gt_instances: list[Instances]) -> DenseTargets:
        """What each anchor of each image should predict. ``gt_instances`` have ``gt_boxes`` and ``gt_classes``."""
        matches = [self.anchor_matcher(anchors, instances) for instances in gt_instances]
        return DenseTargets.from_matches(anchors, matches, gt_instances, self.num_classes)

    def losses(self, logits: list[Tensor], deltas: Tensor, targets: DenseTargets) -> dict[str, Tensor]:
        """``loss_cls`` and ``loss_box_reg``, scalars, normalised and weighted.

        Args:
            logits: one (N, A·K, H, W) tensor a level.
            deltas: (P, 4), the positives'.
            targets: what each anchor should predict.
        """
        get_event_storage().put_scalar("num_pos_anchors", targets.num_positives / len(targets.labels[0]))
        normalizer = self.normalizer(targets.num_positives, logits[0].device)
        views = [x.view(len(x), -1, self.num_classes, *x.shape[-2:]) for x in logits]  # L × (N, A, K, H, W)
        if getattr(self.cls_loss, "needs_quality", False):
            boxes = self.box2box_transform.apply_deltas(deltas.detach(), targets.anchors)  # (P, 4)
            targets = targets.with_quality(boxes)
        loss_cls = self.cls_loss(views, targets)
        loss_box_reg = self.box_loss(deltas, targets.anchors, targets.gt_boxes, self.box2box_transform).sum()
        return {
            "loss_cls": loss_cls * (self.cls_loss_weight / normalizer),
            "loss_box_reg": loss_box_reg * (self.box_loss_weight / normalizer),
        }

    def forward_inference(self, images: ImageList, features: list[Tensor], predictions) -> list[Instances]:
        """The detections of each image, in the coordinates of the network's input."""
        logits, deltas = predictions
        anchors = [level.tensor for level in self.anchor_generator(features)]  # L × (H·W·A, 4)
        return [
            self._detect([x[i] for x in logits], [x[i] for x in deltas], anchors, image_size)
            for i, image_size in enumerate(images.image_sizes)
        ]

    def _detect(
        self, logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], image_size: tuple[int, int]
    ) -> Instances:
        """One image's detections: the best of each level, decoded and merged, then NMS class by class (section 4.1)."""
        levels = [self._best_of_level(*level) for level in zip(logits, deltas, anchors)]
        boxes, scores, classes = (cat(parts) for parts in zip(*levels))
        keep = batched_nms(boxes, scores, classes, self.test_nms_thresh)[: self.max_detections_per_image]
        return Instances(image_size, pred_boxes=Boxes(boxes[keep]), scores=scores[keep], pred_classes=classes[keep])

    def _best_of_level(self, logits: Tensor, deltas: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (C, 4), scores (C,) and classes (C,) of a level's best (anchor, class) pairs, best first.

        Args:
            logits: (A·K, H, W). deltas: (A·4, H, W). anchors: (H·W·A, 4).
        """
        logits = logits.view(-1, self.num_classes, *logits.shape[-2:])  # (A, K, H, W)
        # A threshold on the logits spares the sigmoid of the rest. Its margin is for rounding, bfloat16's too: the
        # scores decide below.
        candidates = (logits > _logit(self.test_score_thresh) - 0.1).nonzero()  # (C, 4)
        anchor, cls, y, x = candidates.unbind(dim=1)
        values, order = logits[anchor, cls, y, x].float().topk(min(len(candidates), self.test_topk_candidates))
        scores = values.sigmoid()
        order = order[scores > self.test_score_thresh]
        scores = scores[: len(order)]  # they are in descending order
        anchor, cls, y, x = candidates[order].unbind(dim=1)

        num_anchors, _, height, width = logits.shape
        deltas = deltas.view(num_anchors, 4, height, width)[anchor, :, y, x]  # (C, 4)
        boxes = self.box2box_transform.apply_deltas(deltas, anchors[(y * width + x) * num_anchors + anchor])
        return boxes, scores, cls


def _logit(probability: float) -> float:
    """log(p / (1 − p)), also at 0 and 1."""
    if probability <= 0:
        return -math.inf
    return math.inf if probability >= 1 else math.log(probability / (1 - probability))
