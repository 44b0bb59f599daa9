"""RetinaNet whose loss, matcher, head, bias init and normaliser are chosen by name."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.backbone import Backbone, build_backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from .anchors.cache import cached_anchors
from .class_loss import ClassLoss, class_loss
from .contracts import check_box_loss, check_head
from .inference import best_of_level, suppress
from .kernels import padded
from .kernels.batch_images import batch_images
from .kernels.conv_relu import fuse_blocks
from .kernels.targets import dense_targets
from .layers import AnchorDeltas, fold_frozen_norms
from .matchers.batch import Matcher, match_images
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
        ignore_ioa: a background anchor is ignored if at least this share of its area, in (0, 1], lies in one of the
            ``ignore_boxes`` (see ``forward``); 0 ignores none. Other numbers are a ValueError.
        test_score_thresh: detections with a score of at most this are dropped; .05 in the paper.
        test_topk_candidates: NMS gets at most this many (anchor, class) pairs of a level; 1,000 in the paper.
        test_nms_thresh: boxes that overlap a better one of their class by more than this IoU are dropped.
        max_detections_per_image: at most this many detections of an image are kept, the best ones.
        clip_before_nms: clip boxes to the image before NMS, and not only after it as Detectron2 does.
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
        box2box_transform: Box2BoxTransform,
        anchor_matcher: Matcher,
        num_classes: int,
        cls_loss: ClassLoss,
        box_loss: Callable[..., Tensor],
        normalizer: Callable[[int, torch.device], Tensor],
        cls_loss_weight: float = 1.0,
        box_loss_weight: float = 1.0,
        ignore_ioa: float = 0.5,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.5,
        max_detections_per_image: int = 100,
        clip_before_nms: bool = False,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        super().__init__(backbone, head, list(head_in_features), pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.anchor_generator = anchor_generator
        self.box2box_transform = box2box_transform
        self.anchor_matcher = anchor_matcher
        # By the size of the images, (H, W) of each level's features; see predict.
        self.feature_sizes: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        self.compiled: Callable[[Tensor], tuple[list[Tensor], list[Tensor]]] | None = None  # see engine.graphs
        self.matcher_seen = False  # whether the matcher has matched boxes, and its values were checked then
        self.num_classes = num_classes

        self.cls_loss = cls_loss
        self.loss_observer = None  # called in training with the class loss's arguments and sum, see class_loss
        self.box_loss = box_loss
        self.normalizer = normalizer
        self.cls_loss_weight = cls_loss_weight
        self.box_loss_weight = box_loss_weight
        if not 0 <= ignore_ioa <= 1:
            raise ValueError(
                f"MODEL.FOCAL.MATCHER.IGNORE_IOA (ignore_ioa) is {ignore_ioa}; expected a share of an anchor's area in "
                "(0, 1], or 0 to train on crowds as background."
            )
        self.ignore_ioa = ignore_ioa

        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self.clip_before_nms = clip_before_nms

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        import_user_modules(cfg)
        # The same network in fewer passes over its activations.
        backbone: Any = fuse_blocks(fold_frozen_norms(build_backbone(cfg)))
        shapes = backbone.output_shape()
        if unknown := [name for name in cfg.MODEL.RETINANET.IN_FEATURES if name not in shapes]:
            raise ValueError(
                f"MODEL.RETINANET.IN_FEATURES has {', '.join(unknown)}, which MODEL.BACKBONE.NAME "
                f"{cfg.MODEL.BACKBONE.NAME} does not give; it gives {', '.join(shapes)}."
            )
        input_shape = [shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
        return {
            "backbone": backbone,
            "head": build_dense_head(cfg, input_shape),
            "head_in_features": cfg.MODEL.RETINANET.IN_FEATURES,
            "anchor_generator": build_anchor_generator(cfg, input_shape),
            "box2box_transform": AnchorDeltas(weights=cfg.MODEL.RETINANET.BBOX_REG_WEIGHTS),
            "anchor_matcher": build_matcher(cfg),
            "num_classes": cfg.MODEL.RETINANET.NUM_CLASSES,
            "cls_loss": build_cls_loss(cfg),
            "box_loss": build_box_loss(cfg),
            "normalizer": build_normalizer(cfg),
            "cls_loss_weight": cfg.MODEL.FOCAL.CLS_LOSS.WEIGHT,
            "box_loss_weight": cfg.MODEL.FOCAL.BOX_LOSS.WEIGHT,
            "ignore_ioa": cfg.MODEL.FOCAL.MATCHER.IGNORE_IOA,
            "test_score_thresh": cfg.MODEL.RETINANET.SCORE_THRESH_TEST,
            "test_topk_candidates": cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": cfg.MODEL.RETINANET.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "clip_before_nms": cfg.MODEL.FOCAL.INFERENCE.CLIP_BEFORE_NMS,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    preprocess_image = batch_images  # the same numbers as Detectron2's

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """As ``DenseDetector.forward``: losses by name in training, else a dict with ``instances`` for each image.

        In training, an image may have ``ignore_boxes`` beside its ``instances``: the ``Boxes`` of crowds and other
        regions that are neither object nor background.
        """
        if not self.training:
            # On a GPU, detections are read once, when they are complete.
            on_gpu = padded.is_usable(self, FocalRetinaNet)
            return padded.forward(self, batched_inputs) if on_gpu else super().forward(batched_inputs)
        assert "instances" in batched_inputs[0], "The images have no `instances`, the ground truth of training."
        return self.losses(*self.predict(batched_inputs))

    def predict(self, batched_inputs: list[dict[str, Any]]) -> tuple[list[Tensor], Tensor, DenseTargets]:
        """Compute the logits, deltas and targets of a batch: the arguments of ``losses``.

        Returns:
            logits: one (N, A·K, H, W) tensor a level.
            deltas: (P, 4), of the positives alone, in the order of ``targets.gt_boxes``.
            targets: the class of each anchor and the box of each positive.
        """
        images = self.preprocess_image(batched_inputs)
        size = tuple(images.tensor.shape[-2:])
        # Targets depend only on the features' sizes, which are known once a batch of this size was seen. They are then
        # made before the backbone: matching synchronises, and after it the host would wait for the whole forward pass.
        targets = None
        if size in self.feature_sizes:
            maps = [images.tensor.new_empty(1, 0, *s) for s in self.feature_sizes[size]]
            targets = self.label_batch(maps, batched_inputs)
            if self.compiled is not None:
                logits, deltas_of_all = self.compiled(images.tensor)
                return logits, targets.gather(deltas_of_all), targets
        features = self.features(images.tensor)
        sizes = [tuple(level.shape[-2:]) for level in features]
        if targets is None or sizes != self.feature_sizes[size]:
            self.feature_sizes[size] = sizes
            targets = self.label_batch(features, batched_inputs)
        # Only positives have a box loss (section 4), so a head may compute their deltas and no others.
        takes_targets = getattr(self.head, "takes_targets", False)
        outputs = self.head(features, targets) if takes_targets else self.head(features)
        shapes, positives = [level.shape for level in targets.labels], targets.num_positives if takes_targets else None
        check_head(self.head, outputs, shapes, self.num_classes, positives)
        logits, deltas = outputs
        return logits, deltas if takes_targets else targets.gather(deltas), targets

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the head's inputs, one (N, C, H, W) map a level, for normalised (N, 3, H, W) images."""
        features = self.backbone(images)
        return [features[name] for name in self.head_in_features]

    def label_batch(self, features: list[Tensor], batched_inputs: list[dict[str, Any]]) -> DenseTargets:
        """Return the targets of a batch. ``features``: one (N, C, H, W) map a level; only their sizes matter."""
        anchors = cached_anchors(self.anchor_generator, features)
        gt_instances = [image["instances"] for image in batched_inputs]
        return self.label_anchors(anchors, gt_instances, [image.get("ignore_boxes") for image in batched_inputs])

    @torch.no_grad()
    def label_anchors(
        self, anchors: Anchors, gt_instances: list[Instances], ignore_boxes: Sequence[Boxes | None] = ()
    ) -> DenseTargets:
        """Match the anchors with the boxes of each image, and return the targets of the batch.

        Args:
            anchors: R anchors.
            gt_instances: one ``Instances`` an image, with ``gt_boxes`` and ``gt_classes``.
            ignore_boxes: one ``Boxes`` an image, or None where it has none; empty if no image has any.
        """
        check = not self.matcher_seen
        matches = match_images(
            self.anchor_matcher, anchors, gt_instances, ignore_boxes, min_ioa=self.ignore_ioa, check_values=check
        )
        self.matcher_seen |= any(map(len, gt_instances))
        return dense_targets(anchors, matches, gt_instances, self.num_classes)

    def losses(self, logits: list[Tensor], deltas: Tensor, targets: DenseTargets) -> dict[str, Tensor]:
        """Compute ``loss_cls`` and ``loss_box_reg``, scalars, normalised and weighted (section 4.1).

        Args:
            logits: one (N, A·K, H, W) tensor a level.
            deltas: (P, 4), the positives'.
            targets: the class of each anchor and the box of each positive.
        """
        if has_event_storage():  # not in a training loop of the user's own
            get_event_storage().put_scalar("num_pos_anchors", targets.num_positives / len(targets.labels[0]))
        # One divisor for both sums, so that their ratio does not depend on how many anchors an image has.
        normalizer = self.normalizer(targets.num_positives, logits[0].device)
        loss_cls = class_loss(
            self.cls_loss,
            self.by_class(logits),
            targets,
            boxes=lambda: self.decode(deltas, targets),
            scale=self.cls_loss_weight / normalizer,
            observer=self.loss_observer,
        )
        loss_box_reg = self.box_loss(deltas, targets.anchors, targets.gt_boxes, self.box2box_transform)
        check_box_loss(self.box_loss, loss_box_reg, deltas, targets)
        return {"loss_cls": loss_cls, "loss_box_reg": loss_box_reg.sum() * (self.box_loss_weight / normalizer)}

    def by_class(self, logits: list[Tensor]) -> list[Tensor]:
        """Return views (N, A, K, H, W), which a class loss takes, of each level's (N, A·K, H, W) logits."""
        return [level.view(len(level), -1, self.num_classes, *level.shape[-2:]) for level in logits]

    def decode(self, deltas: Tensor, targets: DenseTargets) -> Tensor:
        """Decode the positives' (P, 4) ``deltas`` into boxes, (P, 4)."""
        return self.box2box_transform.apply_deltas(deltas, targets.anchors)

    def forward_inference(self, images: ImageList, features: list[Tensor], predictions: Any) -> list[Instances]:
        """Return each image's detections, in the coordinates of the network's input (section 4.1)."""
        found = zip(images.image_sizes, self.candidates(features, *self.checked(features, predictions)))
        return [suppress(size, *candidates, **self.suppression) for size, candidates in found]

    def detect(self, images: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what ``kernels.padded.detections`` returns, for normalised (N, 3, H, W) images on a GPU."""
        features = self.features(images)
        candidates = self.padded_candidates(features, *self.checked(features, self.head(features)))
        return padded.detections(*candidates, frames, **self.suppression)

    def checked(self, features: list[Tensor], predictions: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Return what the head gave in inference, (logits, deltas), after checking that it is of all anchors."""
        anchors = cached_anchors(self.anchor_generator, features).boxes  # L × (H·W·A, 4)
        sizes = [(len(f), *f.shape[-2:]) for f in features]
        shapes = [(n, len(boxes) // max(h * w, 1), h, w) for boxes, (n, h, w) in zip(anchors, sizes)]
        check_head(self.head, predictions, shapes, self.num_classes)
        return predictions

    @property
    def suppression(self) -> dict[str, Any]:
        """The options of ``suppress``."""
        limits = {"iou_thresh": self.test_nms_thresh, "max_detections": self.max_detections_per_image}
        return limits | {"clip": self.clip_before_nms}

    def candidates(
        self, features: list[Tensor], logits: list[Tensor], deltas: list[Tensor]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """As ``padded_candidates``, without padding: for each image boxes (C, 4), scores (C,) and classes (C,)."""
        boxes, scores, classes = self.padded_candidates(features, logits, deltas)
        return [(b[kept], s[kept], c[kept]) for b, s, c, kept in zip(boxes, scores, classes, scores > -math.inf)]

    def padded_candidates(
        self, features: list[Tensor], logits: list[Tensor], deltas: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decode the candidates for NMS: the best predictions of each level, for all images at once.

        Args:
            features: one (N, C, H, W) map a level.
            logits: (N, A·K, H, W) a level. deltas: (N, A·4, H, W) a level.

        Returns:
            boxes (N, C, 4), scores (N, C) and classes (N, C). Scores are above the threshold, or −∞ for no candidate.
        """
        anchors = cached_anchors(self.anchor_generator, features).boxes  # L × (H·W·A, 4)
        limits: Any = {"count": self.test_topk_candidates, "score_thresh": self.test_score_thresh}
        levels = zip(logits, deltas, anchors)
        best = [best_of_level(*level, num_classes=self.num_classes, **limits) for level in levels]
        values, classes, chosen, at = (torch.cat(parts, dim=1) for parts in zip(*best))  # (N, C, ...)
        boxes = self.box2box_transform.apply_deltas(chosen.flatten(0, 1), at.flatten(0, 1)).view_as(at)  # (N, C, 4)
        # The sigmoid is the score: each class is a detector of its own, and scores of an anchor need not add up to 1.
        scores = values.sigmoid()
        wanted = (scores > self.test_score_thresh) & (values > -math.inf)
        return boxes, scores.masked_fill(~wanted, -math.inf), classes
