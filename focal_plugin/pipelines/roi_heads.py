"""Detectron2's ROI heads with ``FocalBoxPredictor`` where they have ``FastRCNNOutputLayers``."""

from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    FastRCNNOutputLayers,
    Res5ROIHeads,
    StandardROIHeads,
)

from .box_predictor import FocalBoxPredictor, refuse_federated_loss


@ROI_HEADS_REGISTRY.register()
class FocalROIHeads(StandardROIHeads):
    """``StandardROIHeads``, of the FPN and DC5 models, with a ``FocalBoxPredictor``; mask and keypoint heads as there.

    Raises:
        ValueError: the config has no box head, such as those of C4 models, or asks for federated loss.
    """

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        if not cfg.MODEL.ROI_BOX_HEAD.NAME:
            raise ValueError(
                "MODEL.ROI_BOX_HEAD.NAME is empty, and FocalROIHeads needs a box head, such as FastRCNNConvFCHead. "
                "For a C4 model, set MODEL.ROI_HEADS.NAME to FocalRes5ROIHeads."
            )
        refuse_federated_loss(cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS)  # before Detectron2 looks for its class weights
        args = super()._init_box_head(cfg, input_shape)
        args["box_predictor"] = _in_place_of(args["box_predictor"], cfg)
        return args


@ROI_HEADS_REGISTRY.register()
class FocalCascadeROIHeads(CascadeROIHeads):
    """``CascadeROIHeads`` with a ``FocalBoxPredictor`` in each stage, whose scores are averaged as there."""

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        refuse_federated_loss(cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS)  # before Detectron2 looks for its class weights
        args = super()._init_box_head(cfg, input_shape)
        args["box_predictors"] = [_in_place_of(stage, cfg) for stage in args["box_predictors"]]
        return args


@ROI_HEADS_REGISTRY.register()
class FocalRes5ROIHeads(Res5ROIHeads):
    """``Res5ROIHeads``, of the C4 models, with a ``FocalBoxPredictor``."""

    @classmethod
    def from_config(cls, cfg, input_shape):
        refuse_federated_loss(cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS)
        args = super().from_config(cfg, input_shape)
        args["box_predictor"] = _in_place_of(args["box_predictor"], cfg)
        return args


def _in_place_of(stock: FastRCNNOutputLayers, cfg) -> FocalBoxPredictor:
    """Build the predictor of ``cfg`` with the input features and the box transform of ``stock``."""
    shape = ShapeSpec(channels=stock.cls_score.in_features)
    return FocalBoxPredictor(cfg, shape, box2box_transform=stock.box2box_transform)
