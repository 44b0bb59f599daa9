"""Detectron2's Mask R-CNN R50-FPN 1x with focal losses, as a LazyConfig."""

from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config

from focal_plugin import (
    EMANumPositives,
    FocalBoxPredictor,
    FocalRPN,
    IgnoreBandMatcher,
    PriorBiasInit,
    SigmoidFocalLoss,
)
from focal_plugin.evaluation.evaluator import PageEvaluator

stock = get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
dataloader, lr_multiplier, optimizer, train = stock.dataloader, stock.lr_multiplier, stock.optimizer, stock.train
dataloader.evaluator._target_ = PageEvaluator  # writes evaluation.html too
dataloader.evaluator.output_dir = "${train.output_dir}/inference"
optimizer.lr = 0.01

model = stock.model
for part, target in ((model.proposal_generator, FocalRPN), (model.roi_heads.box_predictor, FocalBoxPredictor)):
    part._target_ = target
    part.cls_loss = L(SigmoidFocalLoss)(alpha=0.25, gamma=2.0)
    part.normalizer = L(EMANumPositives)()
    part.bias_init = L(PriorBiasInit)(prior_prob=0.01)
model.proposal_generator.anchor_matcher = L(IgnoreBandMatcher)(thresholds=[0.3, 0.7], labels=[0, -1, 1])
