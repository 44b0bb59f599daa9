"""The config keys of the paper's parts. ``add_focal_config`` puts the plugin's keys beside Detectron2's."""

from detectron2.config import CfgNode as CN

from .workflow_keys import workflow_defaults

_OLD_TOP_BLOCK = "MODEL.FOCAL.TIMM.TOP_BLOCK"  # a config with this old name raises an error with the new one


class ConfigError(ValueError):
    """An error in a config or its file. The message names the file or the key, and what to do."""


def add_focal_config(cfg: CN) -> None:
    """Add the plugin's keys with their defaults to ``cfg``, in place.

    Only keys that are missing are added: calling it twice changes nothing, and no key of Detectron2's is touched.
    """
    for defaults in (_paper_defaults(), workflow_defaults()):
        _add_missing(cfg, defaults)
    if not cfg.key_is_renamed(_OLD_TOP_BLOCK):
        cfg.register_renamed_key(_OLD_TOP_BLOCK, "MODEL.FOCAL.TOP_BLOCK")


def _add_missing(cfg: CN, defaults: CN) -> None:
    for key, value in defaults.items():
        if key not in cfg:
            cfg[key] = value
        elif isinstance(value, CN):
            _add_missing(cfg[key], value)


def _paper_defaults() -> CN:
    # docs/generate.py makes the reference page from the comment above each key.
    cfg = CN()
    cfg.MODEL = CN()
    cfg.MODEL.FOCAL = CN()

    # Modules of yours to import before anything is built, as dotted names, so that their components are registered.
    cfg.MODEL.FOCAL.IMPORTS = []

    cfg.MODEL.FOCAL.HEAD = CN()
    # The two subnets: a name in `DENSE_HEAD_REGISTRY`. `MODEL.RETINANET.{NUM_CONVS, NORM, NUM_CLASSES}` shape it.
    cfg.MODEL.FOCAL.HEAD.NAME = "FocalRetinaNetHead"
    # What the levels share of each norm of `MODEL.RETINANET.NORM`: `auto`, as in Detectron2 (everything, except the
    # statistics of BN and SyncBN); `shared` (everything); `per_level` (nothing: each level has its own norm).
    cfg.MODEL.FOCAL.HEAD.NORM_SHARING = "auto"

    cfg.MODEL.FOCAL.CLS_LOSS = CN()
    # The classification loss: a name in `CLS_LOSS_REGISTRY`. Its α and γ are `MODEL.RETINANET.FOCAL_LOSS_ALPHA` and
    # `FOCAL_LOSS_GAMMA`. (QualityFocalLoss: this γ is its β. VarifocalLoss: the α of its negatives is 1 − this α.)
    cfg.MODEL.FOCAL.CLS_LOSS.NAME = "SigmoidFocalLoss"
    # The factor of the classification loss in the total loss.
    cfg.MODEL.FOCAL.CLS_LOSS.WEIGHT = 1.0
    # One α for each class, for the losses that have an α: SigmoidFocalLoss, AlphaBalancedBCELoss and FocalLossStar.
    # Empty: `MODEL.RETINANET.FOCAL_LOSS_ALPHA` for all classes.
    cfg.MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA = []
    # Derive the α of each class from `MODEL.FOCAL.CLASS_FREQUENCIES`: α_k / (1 − α_k) is that of `FOCAL_LOSS_ALPHA`,
    # times (geometric mean of the frequencies / frequency of class k) to this power. 0: the same α for all classes;
    # 1: inverse frequency.
    cfg.MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA_POWER = 0.0
    # β of FocalLossStar, −log σ(γ x_t + β) / γ; its γ is `MODEL.RETINANET.FOCAL_LOSS_GAMMA`.
    cfg.MODEL.FOCAL.CLS_LOSS.BETA = 0.0
    # The margin m of HingeLoss, max(0, m − p_t): the loss is 0 where p_t ≥ m.
    cfg.MODEL.FOCAL.CLS_LOSS.HINGE_MARGIN = 0.9
    cfg.MODEL.FOCAL.CLS_LOSS.OHEM = CN()
    # OHEMLoss: the number of anchors of an image in the mini-batch, the hardest ones after NMS by their loss.
    # (SampledBCELoss reads `MODEL.RPN.BATCH_SIZE_PER_IMAGE` and `MODEL.RPN.POSITIVE_FRACTION`.)
    cfg.MODEL.FOCAL.CLS_LOSS.OHEM.BATCH_SIZE_PER_IMAGE = 512
    # OHEMLoss: an anchor that overlaps a harder one by more than this IoU is dropped.
    cfg.MODEL.FOCAL.CLS_LOSS.OHEM.NMS_THRESH = 0.7
    # OHEMLoss: the share of positives in the mini-batch. 0: not constrained; 0.25: three negatives for each positive.
    cfg.MODEL.FOCAL.CLS_LOSS.OHEM.POSITIVE_FRACTION = 0.0

    # How many boxes each class has, as counts or shares, for the components that need it (ClassFrequencyBiasInit,
    # `CLASS_ALPHA_POWER`). Empty: `load_config` counts them in `DATASETS.TRAIN` if one of these is chosen.
    cfg.MODEL.FOCAL.CLASS_FREQUENCIES = []

    cfg.MODEL.FOCAL.BOX_LOSS = CN()
    # The box loss: a name in `BOX_LOSS_REGISTRY`. Empty: the one that `MODEL.RETINANET.BBOX_REG_LOSS_TYPE` names.
    cfg.MODEL.FOCAL.BOX_LOSS.NAME = ""
    # The factor of the box loss in the total loss.
    cfg.MODEL.FOCAL.BOX_LOSS.WEIGHT = 1.0

    cfg.MODEL.FOCAL.MATCHER = CN()
    # The rule that assigns boxes to anchors: a name in `ANCHOR_MATCHER_REGISTRY`. Its thresholds and labels are
    # `MODEL.RETINANET.IOU_THRESHOLDS` and `IOU_LABELS`.
    cfg.MODEL.FOCAL.MATCHER.NAME = "IgnoreBandMatcher"
    # Which anchors become positive for a box that no anchor overlaps enough: `none`, as in the paper; `detectron1` (its
    # best anchors, if their IoU reaches the lowest threshold); `detectron2` (its best anchors, at any IoU above 0).
    cfg.MODEL.FOCAL.MATCHER.LOW_QUALITY = "detectron2"
    # ATSSMatcher: the number of locations of each level, those nearest to a box's centre, that are its candidates.
    cfg.MODEL.FOCAL.MATCHER.TOPK = 9
    # A background anchor is ignored if at least this share of its area, in (0, 1], lies in one crowd or in another
    # region that the data mark to be ignored. 0: never, as in Detectron2, where such regions are background.
    cfg.MODEL.FOCAL.MATCHER.IGNORE_IOA = 0.5

    cfg.MODEL.FOCAL.BIAS_INIT = CN()
    # The initial value of the classifier's bias: a name in `BIAS_INIT_REGISTRY`. π is `MODEL.RETINANET.PRIOR_PROB`.
    cfg.MODEL.FOCAL.BIAS_INIT.NAME = "PriorBiasInit"

    # What the sums of the losses are divided by: `ema` (Detectron2's running mean of the number of positives),
    # `num_fg` (the paper's: the positives of this batch on this GPU), `num_fg_sync` (of this batch over all GPUs).
    cfg.MODEL.FOCAL.NORMALIZER = "ema"

    # What P6 and P7 are computed from, with the builders of this package, `build_focal_resnet_fpn_backbone` and
    # `build_timm_fpn_backbone`: `c5` as in the paper and Detectron2, the encoder's last feature, or `p5`, the pyramid's
    # last (`c4` or `p4` where `MODEL.FPN.IN_FEATURES` ends a level earlier). Empty: there are no levels above the
    # pyramid. `c5-linear` and `p5-linear` leave out the ReLU between P6 and P7, as MMDetection does.
    cfg.MODEL.FOCAL.TOP_BLOCK = "c5"

    cfg.MODEL.FOCAL.ANCHORS = CN()
    # With `MODEL.ANCHOR_GENERATOR.NAME: OctaveAnchorGenerator`, the number n of anchor sizes per octave. The sizes of a
    # level are the first of its `MODEL.ANCHOR_GENERATOR.SIZES` (in pixels) times 2^(k/n), for k from 0 to n − 1.
    cfg.MODEL.FOCAL.ANCHORS.SCALES_PER_OCTAVE = 3

    # Keep images, features and weights in memory as (N, H, W, C), in which most processors convolve faster.
    cfg.MODEL.FOCAL.CHANNELS_LAST = False
    # On a GPU, record what the backbone and the head compute in a training step as CUDA graphs, from the second batch
    # of a size on, and replay them: a GPU is then not kept waiting by Python. Eight sizes of batches are recorded.
    cfg.MODEL.FOCAL.COMPILE = False

    for section in ("HEAD", "CLS_LOSS", "BOX_LOSS", "MATCHER", "BIAS_INIT"):
        cfg.MODEL.FOCAL[section].ARGS = CN(new_allowed=True)  # a user's own keys
    return cfg
