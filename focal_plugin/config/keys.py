"""The plugin's own config keys. ``add_focal_config`` puts them beside Detectron2's."""

from detectron2.config import CfgNode as CN

_OLD_TOP_BLOCK = "MODEL.FOCAL.TIMM.TOP_BLOCK"  # a config with it says what it is called now


class ConfigError(ValueError):
    """A config, or a file of one, that cannot be used. The message names the file or the key, and what to do."""


def add_focal_config(cfg: CN) -> None:
    """Add the plugin's keys with their defaults to ``cfg``, in place.

    Only keys that are missing are added: calling it twice changes nothing, and no key of Detectron2's is touched.
    """
    _add_missing(cfg, _defaults())
    if not cfg.key_is_renamed(_OLD_TOP_BLOCK):
        cfg.register_renamed_key(_OLD_TOP_BLOCK, "MODEL.FOCAL.TOP_BLOCK")


def _add_missing(cfg: CN, defaults: CN) -> None:
    for key, value in defaults.items():
        if key not in cfg:
            cfg[key] = value
        elif isinstance(value, CN):
            _add_missing(cfg[key], value)


def _defaults() -> CN:
    cfg = CN()
    cfg.MODEL = CN()
    cfg.MODEL.FOCAL = CN()

    # Modules of yours to import before anything is built, as dotted names; components they register are then known.
    cfg.MODEL.FOCAL.IMPORTS = []

    # The two subnets. A name in DENSE_HEAD_REGISTRY; MODEL.RETINANET.{NUM_CONVS, NORM, NUM_CLASSES} shape it.
    cfg.MODEL.FOCAL.HEAD = CN()
    cfg.MODEL.FOCAL.HEAD.NAME = "FocalRetinaNetHead"
    # What of MODEL.RETINANET.NORM the levels share: "auto" (as in Detectron2: all, but for the statistics of BN and
    # SyncBN), "shared" (all), "per_level" (nothing: each has its own norm).
    cfg.MODEL.FOCAL.HEAD.NORM_SHARING = "auto"

    # The classification loss, and its weight. A name in CLS_LOSS_REGISTRY; α and γ are those of MODEL.RETINANET,
    # FOCAL_LOSS_{ALPHA, GAMMA}. (QualityFocalLoss: β is this γ; VarifocalLoss: the α of negatives is 1 − this.)
    cfg.MODEL.FOCAL.CLS_LOSS = CN()
    cfg.MODEL.FOCAL.CLS_LOSS.NAME = "SigmoidFocalLoss"
    cfg.MODEL.FOCAL.CLS_LOSS.WEIGHT = 1.0
    # An α for each class, in place of FOCAL_LOSS_ALPHA, for the losses that have one: SigmoidFocalLoss,
    # AlphaBalancedBCELoss and FocalLossStar.
    cfg.MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA = []
    # Or derived from CLASS_FREQUENCIES: α_k / (1 − α_k) is that of FOCAL_LOSS_ALPHA, times (mean frequency / frequency
    # of class k) to this power. 0: the same for all classes; 1: inverse frequency.
    cfg.MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA_POWER = 0.0
    # β of FocalLossStar, −log σ(γ x_t + β) / γ.
    cfg.MODEL.FOCAL.CLS_LOSS.BETA = 0.0
    # HingeLoss is max(0, this − p_t).
    cfg.MODEL.FOCAL.CLS_LOSS.HINGE_MARGIN = 0.9
    # OHEMLoss: so many of an image's hardest anchors, after NMS by their loss; a POSITIVE_FRACTION of 0 lets them be
    # what they are, .25 enforces three negatives for each positive. (SampledBCELoss reads MODEL.RPN's
    # BATCH_SIZE_PER_IMAGE and POSITIVE_FRACTION.)
    cfg.MODEL.FOCAL.CLS_LOSS.OHEM = CN()
    cfg.MODEL.FOCAL.CLS_LOSS.OHEM.BATCH_SIZE_PER_IMAGE = 512
    cfg.MODEL.FOCAL.CLS_LOSS.OHEM.NMS_THRESH = 0.7
    cfg.MODEL.FOCAL.CLS_LOSS.OHEM.POSITIVE_FRACTION = 0.0

    # How many boxes each class has, as counts or shares, for the components that want to know (ClassFrequencyBiasInit,
    # CLASS_ALPHA_POWER). Empty, load_config counts them in DATASETS.TRAIN if one of these is chosen.
    cfg.MODEL.FOCAL.CLASS_FREQUENCIES = []

    # The box loss, and its weight. A name in BOX_LOSS_REGISTRY; empty, MODEL.RETINANET.BBOX_REG_LOSS_TYPE chooses it.
    cfg.MODEL.FOCAL.BOX_LOSS = CN()
    cfg.MODEL.FOCAL.BOX_LOSS.NAME = ""
    cfg.MODEL.FOCAL.BOX_LOSS.WEIGHT = 1.0

    # The rule that assigns boxes to anchors. A name in ANCHOR_MATCHER_REGISTRY; the thresholds and labels are
    # MODEL.RETINANET.IOU_{THRESHOLDS, LABELS}.
    cfg.MODEL.FOCAL.MATCHER = CN()
    cfg.MODEL.FOCAL.MATCHER.NAME = "IgnoreBandMatcher"
    # What a box gets that no anchor overlaps enough: "none" (the paper: nothing), "detectron1" (its best anchors, if
    # their IoU reaches the lowest threshold), "detectron2" (its best anchors at any IoU above 0).
    cfg.MODEL.FOCAL.MATCHER.LOW_QUALITY = "detectron2"
    # ATSSMatcher: how many locations of each level, those nearest to a box's centre, are its candidates.
    cfg.MODEL.FOCAL.MATCHER.TOPK = 9
    # With any of them: a background anchor is ignored if this share of its area lies in one crowd or other region that
    # the data mark to be ignored. 0: never, as in Detectron2, where such regions are background.
    cfg.MODEL.FOCAL.MATCHER.IGNORE_IOA = 0.5

    # How the classifier's bias starts. A name in BIAS_INIT_REGISTRY; π is MODEL.RETINANET.PRIOR_PROB.
    cfg.MODEL.FOCAL.BIAS_INIT = CN()
    cfg.MODEL.FOCAL.BIAS_INIT.NAME = "PriorBiasInit"

    # What the loss sums are divided by: "ema" (Detectron2's running mean of the number of positives), "num_fg" (the
    # paper's: the positives of this batch on this GPU), "num_fg_sync" (of this batch over all GPUs).
    cfg.MODEL.FOCAL.NORMALIZER = "ema"

    # What P6 and P7 are made from, with the builders of this package, build_focal_resnet_fpn_backbone and
    # build_timm_fpn_backbone: "c5" as in the paper and Detectron2, the encoder's last feature, or "p5", the pyramid's
    # last ("c4" or "p4" where MODEL.FPN.IN_FEATURES ends a level earlier); "" for no levels above the pyramid. With
    # "-linear" behind it, as in "c5-linear", there is no ReLU between P6 and P7: MMDetection's.
    cfg.MODEL.FOCAL.TOP_BLOCK = "c5"

    # OctaveAnchorGenerator: the first of each level's ANCHOR_GENERATOR.SIZES and so many scales an octave from there.
    cfg.MODEL.FOCAL.ANCHORS = CN()
    cfg.MODEL.FOCAL.ANCHORS.SCALES_PER_OCTAVE = 3

    # The encoder of BACKBONE.NAME build_timm_fpn_backbone. MODEL.FPN.{IN_FEATURES, OUT_CHANNELS, NORM, FUSE_TYPE} shape
    # the pyramid on it; IN_FEATURES names features by level, such as [c3, c4, c5] for those of stride 8, 16 and 32.
    cfg.MODEL.FOCAL.TIMM = CN()
    # A name of timm.list_models(), with or without a tag of its weights: resnet18, convnext_tiny.fb_in22k, ...
    cfg.MODEL.FOCAL.TIMM.NAME = "resnet18"
    # "timm": timm's own weights, downloaded; "": random ones; else a file of the weights of a classifier of this
    # architecture: a path, a URL, or package://<package>/<path in it> for a file of an installed Python package.
    cfg.MODEL.FOCAL.TIMM.WEIGHTS = "timm"
    # Batch norm: "FrozenBN" keeps the statistics and scales that come with the weights; "BN" and "SyncBN" train it.
    cfg.MODEL.FOCAL.TIMM.NORM = "FrozenBN"
    # What else is not trained, besides the first BACKBONE.FREEZE_AT stages (2: all up to stride 4): patterns of
    # parameter names, such as ["*.conv_dw.weight"].
    cfg.MODEL.FOCAL.TIMM.FREEZE = []

    # Keep images and features in memory as (N, H, W, C), the order in which most processors convolve fastest.
    cfg.MODEL.FOCAL.CHANNELS_LAST = False

    # With --eval-only, evaluate deploy.optimize_for_inference of the model: norms folded, bfloat16 where it is fast.
    cfg.MODEL.FOCAL.INFERENCE = CN()
    cfg.MODEL.FOCAL.INFERENCE.OPTIMIZE = False
    # The same, and compiled: faster still where images have one size or few, after some seconds for each size.
    cfg.MODEL.FOCAL.INFERENCE.COMPILE = False
    # Cut boxes at the image's border before NMS, as torchvision, MMDetection and Detectron do, not after it.
    cfg.MODEL.FOCAL.INFERENCE.CLIP_BEFORE_NMS = False

    cfg.DATASETS = CN()
    # Data sets to register: {name: ..., format: voc, root: ..., split: ...} or {name: ..., format: coco, json: ...,
    # images: ...}. data.voc.VocSet and data.coco.CocoSet describe these keys and the rest (classes, on_error, ...).
    cfg.DATASETS.LOCAL = []
    cfg.INPUT = CN()
    # More augmentations for training, after the resizing and the flip: classes of detectron2.data.transforms with their
    # arguments, such as {name: RandomFlip, horizontal: False, vertical: True}.
    cfg.INPUT.AUGMENTATIONS = []

    cfg.SOLVER = CN()
    # Compute the images of a step in this many parts, one after another: the same step in less memory. Still
    # SOLVER.IMS_PER_BATCH images a step in all, and the losses are divided by what the normaliser makes of all of them.
    cfg.SOLVER.ACCUMULATE = 1
    # How many steps of a run may be skipped because a loss or a gradient is infinite or NaN, in any process; the next
    # one stops the run. 0: the first one does. (float16's gradients that overflow are no such steps: their scale is
    # lowered.)
    cfg.SOLVER.MAX_SKIPS = 0
    # What SOLVER.AMP.ENABLED computes in: "float16" or "bfloat16"; empty, float16 on a GPU, bfloat16 on a CPU that has
    # instructions for it, and float32 on another.
    cfg.SOLVER.AMP = CN()
    cfg.SOLVER.AMP.DTYPE = ""

    # Pictures of the run in OUTPUT_DIR when it ends: curves.png, and detections.png with this many images of the first
    # test set beside their ground truth (0: no such picture), and all detections of at least this score.
    cfg.VIS = CN()
    cfg.VIS.ENABLED = False
    cfg.VIS.NUM_IMAGES = 8
    cfg.VIS.SCORE_THRESH = 0.5
    return cfg
