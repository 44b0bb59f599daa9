"""The plugin's own config keys. ``add_focal_config`` puts them beside Detectron2's."""

from detectron2.config import CfgNode as CN

_OLD_TOP_BLOCK = "MODEL.FOCAL.TIMM.TOP_BLOCK"  # a config with this old name raises an error with the new one


class ConfigError(ValueError):
    """An error in a config or its file. The message names the file or the key, and what to do."""


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

    cfg.MODEL.FOCAL.TIMM = CN()
    # The encoder of `MODEL.BACKBONE.NAME: build_timm_fpn_backbone`: a name of `timm.list_models()`, with or without a
    # tag of its weights, such as `convnext_tiny.fb_in22k`. `MODEL.FPN.{IN_FEATURES, OUT_CHANNELS, NORM, FUSE_TYPE}`
    # shape the pyramid on it; IN_FEATURES names its features by level, such as `[c3, c4, c5]` for strides 8, 16, 32.
    cfg.MODEL.FOCAL.TIMM.NAME = "resnet18"
    # The weights that the timm encoder starts from. `timm`: timm's own, downloaded. Empty: random ones. Else a file
    # with the weights of a classifier of this architecture: a path, a URL, or `package://<package>/<path in it>` for a
    # file of an installed Python package.
    cfg.MODEL.FOCAL.TIMM.WEIGHTS = "timm"
    # Batch norm of the timm encoder: `FrozenBN` keeps its statistics and scales; `BN` and `SyncBN` train them.
    cfg.MODEL.FOCAL.TIMM.NORM = "FrozenBN"
    # Parameters of the timm encoder that are not trained, as patterns of names such as `["*.conv_dw.weight"]`. They
    # come on top of the first `MODEL.BACKBONE.FREEZE_AT` stages (2: everything up to stride 4).
    cfg.MODEL.FOCAL.TIMM.FREEZE = []

    # Keep images, features and weights in memory as (N, H, W, C), in which most processors convolve faster.
    cfg.MODEL.FOCAL.CHANNELS_LAST = False
    # On a GPU, record what the backbone and the head compute in a training step as CUDA graphs, from the second batch
    # of a size on, and replay them: a GPU is then not kept waiting by Python. Eight sizes of batches are recorded.
    cfg.MODEL.FOCAL.COMPILE = False

    cfg.MODEL.FOCAL.INFERENCE = CN()
    # In evaluation (`--eval-only`), use `deploy.optimize_for_inference` of the model: norms folded into convolutions,
    # channels last, and bfloat16 where it is fast.
    cfg.MODEL.FOCAL.INFERENCE.OPTIMIZE = False
    # As `MODEL.FOCAL.INFERENCE.OPTIMIZE`, and compile the model too: faster still where images have one size or few,
    # after some seconds for each size.
    cfg.MODEL.FOCAL.INFERENCE.COMPILE = False
    # As `MODEL.FOCAL.INFERENCE.OPTIMIZE`, and launch a batch as one CUDA graph, on a GPU alone: faster still for few
    # images at a time. There is a graph for each size of padded batches, made when the size comes for the second time;
    # the 32 sizes used last are kept.
    cfg.MODEL.FOCAL.INFERENCE.CUDA_GRAPHS = False
    # Clip boxes to the image before NMS, as torchvision, MMDetection and Detectron do, instead of after it.
    cfg.MODEL.FOCAL.INFERENCE.CLIP_BEFORE_NMS = False

    cfg.DATASETS = CN()
    # Data sets to register: `{name: ..., path: ...}` for a folder whose format is found out, or with a `format` (`voc`,
    # `coco`, `yolo` or `csv`) and its files. `focal_plugin.data.formats` has a class for each, which describes its
    # keys. "Your own data" has examples.
    cfg.DATASETS.LOCAL = []
    cfg.INPUT = CN()
    # Augmentations for training, after the resizing and the flip, as classes and their arguments: Detectron2's, such as
    # `{name: RandomFlip, horizontal: False, vertical: True}`, or `{name: albumentations.GaussianBlur, p: 0.2}`.
    cfg.INPUT.AUGMENTATIONS = []

    cfg.SOLVER = CN()
    # Compute the images of a step in this many micro-batches, one after another: the same step in less memory. A step
    # still has `SOLVER.IMS_PER_BATCH` images in all, and its losses are normalised as those of one batch.
    cfg.SOLVER.ACCUMULATE = 1
    # How many steps of a run may be skipped because a loss or a gradient is infinite or NaN, in any process; the next
    # one stops the run. (Gradients that overflow in float16 do not count: they lower the loss scale.)
    cfg.SOLVER.MAX_SKIPS = 0
    cfg.SOLVER.AMP = CN()
    # The dtype of `SOLVER.AMP.ENABLED`, which works on CPUs too: `float16` or `bfloat16`. Empty: float16 on a GPU,
    # bfloat16 on a CPU that has instructions for it, and float32 on another.
    cfg.SOLVER.AMP.DTYPE = ""

    cfg.VIS = CN()
    # Draw `curves.png` and `detections.png` in `OUTPUT_DIR` when a run ends.
    cfg.VIS.ENABLED = False
    # How many images of the first test set `detections.png` shows, each beside its ground truth. 0: no such picture.
    cfg.VIS.NUM_IMAGES = 8
    # `detections.png` shows the detections with at least this score, in [0, 1].
    cfg.VIS.SCORE_THRESH = 0.5
    return cfg
