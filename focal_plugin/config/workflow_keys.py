"""The config keys of what surrounds the model: encoders, data, training, inference and pictures."""

from detectron2.config import CfgNode as CN


def workflow_defaults() -> CN:
    """Return these keys with their defaults, in a node of their own."""
    # docs/generate.py makes the reference page from the comment above each key.
    cfg = CN()
    cfg.MODEL = CN()
    cfg.MODEL.FOCAL = CN()
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

    cfg.MODEL.FOCAL.EMA = CN()
    # The decay of a moving average of the weights (EMA), such as 0.999; after n steps it is at most n / (n + 9). The
    # average is evaluated beside the weights, as `bbox_EMA`, and saved as `model_ema_final.pth`. 0: no average.
    cfg.MODEL.FOCAL.EMA.DECAY = 0.0

    cfg.DATASETS = CN()
    # Data sets to register: `{name: ..., path: ...}` for a folder whose format is found out, or with a `format` (`voc`,
    # `coco`, `yolo` or `csv`) and its files. `focal_plugin.data.formats` has a class for each, which describes its
    # keys. "Your own data" has examples.
    cfg.DATASETS.LOCAL = []
    # Data sets on which each evaluation also computes the losses of training, as `validation/total_loss` and so on. The
    # images are those of evaluation, without augmentations. They may be those of `DATASETS.TEST`. Empty: none.
    cfg.DATASETS.VALIDATION = ()
    cfg.INPUT = CN()
    # Augmentations for training, after the resizing and the flip, as classes and their arguments: Detectron2's, such as
    # `{name: RandomFlip, horizontal: False, vertical: True}`, or `{name: albumentations.GaussianBlur, p: 0.2}`.
    cfg.INPUT.AUGMENTATIONS = []

    cfg.SOLVER = CN()
    # `sgd` or `adamw`. Both read `SOLVER.BASE_LR`, for AdamW around 1e-4, and `SOLVER.WEIGHT_DECAY`, for AdamW around
    # 0.05, with `WEIGHT_DECAY_NORM` and `WEIGHT_DECAY_BIAS`. `MOMENTUM` and `NESTEROV` are of SGD alone.
    cfg.SOLVER.OPTIMIZER = "sgd"
    # What the learning rate of a part is multiplied by, such as `[{backbone: 0.1}, {"backbone.fpn_*": 1.0}]`: names of
    # modules or parameters, with `*` for anything. Of several that fit, the last one counts.
    cfg.SOLVER.LR_FACTORS = []
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

    cfg.TEST = CN()
    # The number by which evaluations are compared, such as `bbox/AP` or `validation/total_loss`: a name in
    # `metrics.json`. The weights of the best evaluation are kept as `model_best.pth`. The least is best of losses, of
    # others the most. Empty: none.
    cfg.TEST.BEST_METRIC = ""
    # End the run after this many evaluations in a row in which `TEST.BEST_METRIC` was not better than before. 0: never.
    cfg.TEST.PATIENCE = 0

    # Where a run is logged beside the screen and `metrics.json`: `tensorboard`, `wandb` (Weights & Biases), `mlflow`.
    cfg.LOGGERS = ["tensorboard"]

    cfg.VIS = CN()
    # Draw `curves.png` and `detections.png` in `OUTPUT_DIR` when a run ends.
    cfg.VIS.ENABLED = False
    # How many images of the first test set `detections.png` shows, each beside its ground truth. 0: no such picture.
    cfg.VIS.NUM_IMAGES = 8
    # `detections.png` shows the detections with at least this score, in [0, 1].
    cfg.VIS.SCORE_THRESH = 0.5
    return cfg
