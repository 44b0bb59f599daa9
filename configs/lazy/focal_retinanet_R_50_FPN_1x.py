"""The R50 1x recipe as a LazyConfig: every component is an object here, none is looked up by name."""

from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config

from focal_plugin import (
    EMANumPositives,
    FocalRetinaNet,
    FocalRetinaNetHead,
    IgnoreBandMatcher,
    PriorBiasInit,
    SigmoidFocalLoss,
    SmoothL1BoxLoss,
)
from focal_plugin.data import FocalDatasetMapper
from focal_plugin.evaluation.evaluator import PageEvaluator

stock = get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
dataloader, lr_multiplier, optimizer, train = stock.dataloader, stock.lr_multiplier, stock.optimizer, stock.train
dataloader.evaluator._target_ = PageEvaluator  # writes evaluation.html too
dataloader.evaluator.output_dir = "${train.output_dir}/inference"
dataloader.train.mapper._target_ = FocalDatasetMapper  # keeps crowds, to ignore the anchors in them

model = L(FocalRetinaNet)(
    backbone=stock.model.backbone,
    head=L(FocalRetinaNetHead)(
        input_shape=stock.model.head.input_shape,
        num_classes="${..num_classes}",
        num_anchors=9,
        conv_dims=[256, 256, 256, 256],
        bias_init=L(PriorBiasInit)(prior_prob=0.01),
    ),
    head_in_features=["p3", "p4", "p5", "p6", "p7"],
    anchor_generator=stock.model.anchor_generator,
    box2box_transform=stock.model.box2box_transform,
    anchor_matcher=L(IgnoreBandMatcher)(thresholds=[0.4, 0.5], labels=[0, -1, 1], low_quality="detectron2"),
    num_classes=80,
    cls_loss=L(SigmoidFocalLoss)(alpha=0.25, gamma=2.0),
    box_loss=L(SmoothL1BoxLoss)(beta=0.0),
    normalizer=L(EMANumPositives)(),
    pixel_mean=stock.model.pixel_mean,
    pixel_std=stock.model.pixel_std,
)
