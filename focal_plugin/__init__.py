"""RetinaNet and the focal loss for Detectron2, each part of the paper a component chosen by name."""

from . import _detectron2  # first: it tells what to do where Detectron2 is missing  # noqa: F401
from .anchors import Detectron1AnchorGenerator, OctaveAnchorGenerator, TorchvisionAnchorGenerator
from .backbones import TimmEncoder, build_focal_resnet_fpn_backbone, build_pyramid, build_timm_fpn_backbone
from .config import ConfigError, add_focal_config
from .config.explain import merge_from_list
from .config.load import find_config, load_config
from .files.safe_yaml import merge_from_file
from .heads import ClassFrequencyBiasInit, FocalRetinaNetHead, PriorBiasInit, ZeroBiasInit
from .losses import (
    AlphaBalancedBCELoss,
    BCELoss,
    CIoUBoxLoss,
    DIoUBoxLoss,
    ElementwiseLoss,
    FocalLossStar,
    GIoUBoxLoss,
    HingeLoss,
    MiniBatchLoss,
    OHEMLoss,
    QualityFocalLoss,
    SampledBCELoss,
    SigmoidFocalLoss,
    SmoothL1BoxLoss,
    VarifocalLoss,
)
from .matchers import ATSSMatcher, IgnoreBandMatcher
from .normalizer import EMANumPositives, NumPositives, build_normalizer
from .pipelines import FocalBoxPredictor, FocalCascadeROIHeads, FocalFCOS, FocalRes5ROIHeads, FocalROIHeads, FocalRPN
from .registry import (
    ANCHOR_MATCHER_REGISTRY,
    BIAS_INIT_REGISTRY,
    BOX_LOSS_REGISTRY,
    CLS_LOSS_REGISTRY,
    DENSE_HEAD_REGISTRY,
    build_bias_init,
    build_box_loss,
    build_cls_loss,
    build_dense_head,
    build_matcher,
    import_user_modules,
)
from .retinanet import FocalRetinaNet
from .structures import IGNORED, NEGATIVE, POSITIVE, Anchors, DenseTargets

__version__ = "0.1.0"

__all__ = [
    "ANCHOR_MATCHER_REGISTRY",
    "BIAS_INIT_REGISTRY",
    "BOX_LOSS_REGISTRY",
    "CLS_LOSS_REGISTRY",
    "DENSE_HEAD_REGISTRY",
    "IGNORED",
    "NEGATIVE",
    "POSITIVE",
    "ATSSMatcher",
    "AlphaBalancedBCELoss",
    "Anchors",
    "BCELoss",
    "CIoUBoxLoss",
    "ClassFrequencyBiasInit",
    "ConfigError",
    "DIoUBoxLoss",
    "DenseTargets",
    "Detectron1AnchorGenerator",
    "EMANumPositives",
    "ElementwiseLoss",
    "FocalBoxPredictor",
    "FocalCascadeROIHeads",
    "FocalFCOS",
    "FocalLossStar",
    "FocalROIHeads",
    "FocalRPN",
    "FocalRes5ROIHeads",
    "FocalRetinaNet",
    "FocalRetinaNetHead",
    "GIoUBoxLoss",
    "HingeLoss",
    "IgnoreBandMatcher",
    "MiniBatchLoss",
    "NumPositives",
    "OHEMLoss",
    "OctaveAnchorGenerator",
    "PriorBiasInit",
    "QualityFocalLoss",
    "SampledBCELoss",
    "SigmoidFocalLoss",
    "SmoothL1BoxLoss",
    "TimmEncoder",
    "TorchvisionAnchorGenerator",
    "VarifocalLoss",
    "ZeroBiasInit",
    "add_focal_config",
    "build_bias_init",
    "build_box_loss",
    "build_cls_loss",
    "build_dense_head",
    "build_focal_resnet_fpn_backbone",
    "build_matcher",
    "build_normalizer",
    "build_pyramid",
    "build_timm_fpn_backbone",
    "find_config",
    "import_user_modules",
    "load_config",
    "merge_from_file",
    "merge_from_list",
]
