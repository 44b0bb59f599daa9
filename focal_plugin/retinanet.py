"""RetinaNet whose loss, matcher, head, bias init and normaliser are chosen by name."""

import inspect
import math
from collections.abc import Callable, Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import batched_nms
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.backbone import Backbone, build_backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .contracts import check_box_loss, check_cls_loss, check_head, check_match
from .layers.frozen_norm import fold_frozen_norms
from .matchers.ignore_regions import ignore_covered
from .normalizer import build_normalizer
from .registry import build_box_loss, build_cls_loss, build_dense_head, build_matcher, import_user_modules
from .structures import NEGATIVE, Anchors, DenseTargets, unravel


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
        ignore_ioa: a background anchor is ignored if so much of its area, in (0, 1], lies in a box of ``ignore_boxes``
            (see ``forward``); 0, none is.
        test_score_thresh: detections with a score of at most this are dropped.
        test_topk_candidates: how many of the best (anchor, class) pairs of a level go on to NMS.
        test_nms_thresh: boxes of one class that overlap a better one by more than this IoU are dropped.
        max_detections_per_image: how many of the best detections an image keeps.
        clip_before_nms: whether NMS sees boxes cut at the image's border, or, as in Detectron2, as they were predicted.
        pixel_mean, pixel_std: one number a channel, in the order of ``INPUT.FORMAT``; see ``DenseDetector``.

    Raises:
        ValueError: ``ignore_ioa`` is not in [0, 1].
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
        self.head_takes_targets = "targets" in inspect.signature(head.forward).parameters
        self.anchor_generator = anchor_generator
        self.box2box_transform = box2box_transform
        self.anchor_matcher = anchor_matcher
        self.matcher_seen = False  # it has matched boxes, and the numbers of the first were right
        self.num_classes = num_classes

        self.cls_loss = cls_loss
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

        fold_frozen_norms(self)  # the same model in fewer passes over its activations

    @classmethod
    def from_config(cls, cfg):
        if "FOCAL" not in cfg.MODEL:
            raise KeyError("The config has no MODEL.FOCAL: call focal_plugin.add_focal_config(cfg) after get_cfg().")
        import_user_modules(cfg)
        backbone = build_backbone(cfg)
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
            "box2box_transform": Box2BoxTransform(weights=cfg.MODEL.RETINANET.BBOX_REG_WEIGHTS),
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

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """As ``DenseDetector.forward``: losses by name in training, else a dict with ``instances`` for each image.

        In training, an image may have ``ignore_boxes`` beside its ``instances``: the ``Boxes`` of crowds and other
        regions that are neither object nor background.
        """
        if not self.training:
            return super().forward(batched_inputs)
        assert "instances" in batched_inputs[0], "The images have no `instances`, the ground truth of training."
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        features = [features[name] for name in self.head_in_features]
        targets = self.label_batch(features, batched_inputs)
        outputs = self.head(features, targets) if self.head_takes_targets else self.head(features)
        check_head(self.head, outputs, targets, sparse=self.head_takes_targets)
        logits, deltas = outputs
        return self.losses(logits, deltas if self.head_takes_targets else targets.gather(deltas), targets)

    def label_batch(self, features: list[Tensor], batched_inputs: list[dict]) -> DenseTargets:
        """What each anchor of a batch should predict. ``features``: one (N, C, H, W) map a level."""
        anchors = Anchors.from_generator(self.anchor_generator, features)
        gt_instances = [image["instances"].to(self.device) for image in batched_inputs]
        return self.label_anchors(anchors, gt_instances, [image.get("ignore_boxes") for image in batched_inputs])

    @torch.no_grad()
    def label_anchors(
        self, anchors: Anchors, gt_instances: list[Instances], ignore_boxes: Sequence[Boxes | None] = ()
    ) -> DenseTargets:
        """What each anchor of each image should predict.

        Args:
            anchors: R anchors.
            gt_instances: of each image, with ``gt_boxes`` and ``gt_classes``.
            ignore_boxes: of each image, or None where it has none; empty, no image has any.
        """
        matches = []
        for instances in gt_instances:
            match = self.anchor_matcher(anchors, instances)
            check_match(self.anchor_matcher, match, anchors, instances, values=not self.matcher_seen)
            self.matcher_seen |= len(instances) > 0
            matched, labels = match
            # As in Detectron2, an image without boxes is background, whatever IOU_LABELS begin with.
            matches.append((matched, labels if len(instances) else torch.full_like(labels, NEGATIVE)))
        for image, regions in enumerate(ignore_boxes):
            if regions is not None and self.ignore_ioa > 0:
                matched, labels = matches[image]
                matches[image] = matched, ignore_covered(labels, anchors, regions.to(labels.device), self.ignore_ioa)
        return DenseTargets.from_matches(anchors, matches, gt_instances, self.num_classes)

    def losses(self, logits: list[Tensor], deltas: Tensor, targets: DenseTargets) -> dict[str, Tensor]:
        """``loss_cls`` and ``loss_box_reg``, scalars, normalised and weighted.

        Args:
            logits: one (N, A·K, H, W) tensor a level.
            deltas: (P, 4), the positives'.
            targets: what each anchor should predict.
        """
        if has_event_storage():  # not in a training loop of the user's own
            get_event_storage().put_scalar("num_pos_anchors", targets.num_positives / len(targets.labels[0]))
        normalizer = self.normalizer(targets.num_positives, logits[0].device)
        views = [x.view(len(x), -1, self.num_classes, *x.shape[-2:]) for x in logits]  # L × (N, A, K, H, W)
        if getattr(self.cls_loss, "needs_quality", False):
            boxes = self.box2box_transform.apply_deltas(deltas.detach(), targets.anchors)  # (P, 4)
            targets = targets.with_quality(boxes)
        loss_cls = self.cls_loss(views, targets)
        check_cls_loss(self.cls_loss, loss_cls, logits, targets)
        loss_box_reg = self.box_loss(deltas, targets.anchors, targets.gt_boxes, self.box2box_transform)
        check_box_loss(self.box_loss, loss_box_reg, deltas, targets)
        return {
            "loss_cls": loss_cls * (self.cls_loss_weight / normalizer),
            "loss_box_reg": loss_box_reg.sum() * (self.box_loss_weight / normalizer),
        }

    def forward_inference(self, images: ImageList, features: list[Tensor], predictions) -> list[Instances]:
        """The detections of each image, in the coordinates of the network's input (section 4.1).

        The best of each level, of all images at once, decoded together; then NMS class by class, which waits for a GPU.
        """
        anchors = [level.tensor for level in self.anchor_generator(features)]  # L × (H·W·A, 4)
        levels = [self._best_of_level(*level) for level in zip(*predictions, anchors)]
        logits, classes, deltas, anchors = (torch.cat(parts, dim=1) for parts in zip(*levels))  # (N, C, ...)
        boxes = self.box2box_transform.apply_deltas(deltas.flatten(0, 1), anchors.flatten(0, 1)).view_as(anchors)
        wanted = (logits.sigmoid() > self.test_score_thresh) & (logits > -math.inf)  # (N, C)
        return [
            self._suppress(size, boxes[i, wanted[i]], logits[i, wanted[i]].sigmoid(), classes[i, wanted[i]])
            for i, size in enumerate(images.image_sizes)
        ]

    def _best_of_level(self, logits: Tensor, deltas: Tensor, anchors: Tensor) -> tuple[Tensor, ...]:
        """Each image's C best (anchor, class) pairs of a level, best first.

        Args:
            logits: (N, A·K, H, W). deltas: (N, A·4, H, W). anchors: (H·W·A, 4).

        Returns:
            logits (N, C), −∞ where an image has fewer; classes (N, C); deltas and anchors (N, C, 4).
        """
        n, _, h, w = logits.shape
        logits = logits.view(n, -1, self.num_classes, h, w)  # (N, A, K, H, W)
        a = logits.shape[1]
        # Either order is that of the memory in one of the two formats, where flattening copies nothing.
        channels_last = logits.stride(2) == 1
        if channels_last:
            logits = logits.permute(0, 3, 4, 1, 2)  # (N, H, W, A, K)
        # A threshold on the logits spares the sigmoid of the rest. Its margin is for rounding, bfloat16's too: the
        # scores decide.
        floor = _logit(self.test_score_thresh) - 0.1
        values, places = _top(logits.flatten(1), self.test_topk_candidates, floor)  # (N, C)
        if channels_last:
            y, x, anchor, cls = unravel(places, (h, w, a, self.num_classes))
        else:
            anchor, cls, y, x = unravel(places, (a, self.num_classes, h, w))
        image = torch.arange(n, device=places.device)[:, None]  # (N, 1)
        deltas = deltas.view(n, a, 4, h, w)[image, anchor, :, y, x]  # (N, C, 4)
        return values, cls, deltas, anchors[(y * w + x) * a + anchor]

    def _suppress(self, size: tuple[int, int], boxes: Tensor, scores: Tensor, classes: Tensor) -> Instances:
        """An image's detections among its (C, 4) boxes, (C,) scores and (C,) classes."""
        boxes = Boxes(boxes)
        if self.clip_before_nms:
            boxes.clip(size)
        keep = batched_nms(boxes.tensor, scores, classes, self.test_nms_thresh)[: self.max_detections_per_image]
        return Instances(size, pred_boxes=boxes[keep], scores=scores[keep], pred_classes=classes[keep])


def _top(values: Tensor, count: int, floor: float) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of each row of (N, M) ``values``, in descending order, and their places: (N, C) both.

    Values up to ``floor`` may be missing. A row with fewer than C is filled up with −∞.
    """
    # Picking out what is above the floor would wait for a GPU, and leave its number in a trace.
    if values.is_cuda or torch.jit.is_tracing():
        size = values.shape[1]  # a tensor while PyTorch traces
        best, places = values.topk(size.clamp(max=count) if isinstance(size, Tensor) else min(count, size))
        return best.float(), places
    rows = []
    for row in values:  # a CPU is slow to order millions of values
        places = (row > floor).nonzero().squeeze(1)
        best, order = row[places].float().topk(min(count, len(places)))
        rows.append((best, places[order]))
    best, places = zip(*rows)
    return pad_sequence(best, batch_first=True, padding_value=-math.inf), pad_sequence(places, batch_first=True)


def _logit(probability: float) -> float:
    """log(p / (1 − p)), also at 0 and 1."""
    if probability <= 0:
        return -math.inf
    return math.inf if probability >= 1 else math.log(probability / (1 - probability))
