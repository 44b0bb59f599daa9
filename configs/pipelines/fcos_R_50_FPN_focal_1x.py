"""Detectron2's FCOS R50-FPN 1x, its class loss an object of its own, as a LazyConfig."""

from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config

from focal_plugin import EMANumPositives, FocalFCOS, SigmoidFocalLoss
from focal_plugin.evaluation.evaluator import PageEvaluator

stock = get_config("COCO-Detection/fcos_R_50_FPN_1x.py")
dataloader, lr_multiplier, optimizer, train = stock.dataloader, stock.lr_multiplier, stock.optimizer, stock.train
dataloader.evaluator._target_ = PageEvaluator  # writes evaluation.html too
dataloader.evaluator.output_dir = "${train.output_dir}/inference"

model = stock.model
model._target_ = FocalFCOS
model.cls_loss = L(SigmoidFocalLoss)(alpha=model.pop("focal_loss_alpha"), gamma=model.pop("focal_loss_gamma"))
model.normalizer = L(EMANumPositives)(initial=300.0)
