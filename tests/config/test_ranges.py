"""A number that a key may not have is an error with the key, the number and what was expected, wherever it is read."""

import functools
import math

import pytest
from detectron2.config import CfgNode, get_cfg

from focal_plugin import add_focal_config
from focal_plugin.analysis.checks.case import ERROR, Case
from focal_plugin.analysis.doctor import CHECKS, examine
from focal_plugin.config import ConfigError
from focal_plugin.config.explain import flatten
from focal_plugin.config.load import _ZOO, build_model, load_config, prepare
from focal_plugin.config.ranges import RANGES, check_ranges
from focal_plugin.files.safe_yaml import merge_from_file

ZOO = sorted(_ZOO.rglob("*.yaml"))
NAN, INF = math.nan, math.inf
BAD = {
    "SOLVER.IMS_PER_BATCH": [0, -2],
    "SOLVER.MAX_ITER": [0, -1],
    "SOLVER.BASE_LR": [-0.1, NAN, INF],
    "SOLVER.MOMENTUM": [-0.1, 1.0, 2.0, NAN],
    "SOLVER.WEIGHT_DECAY": [-1e-4, NAN, INF],
    "SOLVER.WEIGHT_DECAY_BIAS": [-1.0, NAN],
    "SOLVER.GAMMA": [-0.1, NAN],
    "SOLVER.STEPS": [(-1,), (5, -5)],
    "SOLVER.WARMUP_ITERS": [-1],
    "SOLVER.WARMUP_FACTOR": [-0.5, 2.0, NAN],
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": [0.0, -1.0, NAN],
    "SOLVER.MAX_SKIPS": [-1],
    "SOLVER.OPTIMIZER": ["adam", "", None],
    "SOLVER.LR_FACTORS": [
        ["backbone"],
        [{"backbone": -1.0}],
        [{"backbone": "a"}],
        [{"backbone": True}],
        [{}],
        [{1: 1.0}],
    ],
    "SOLVER.ACCUMULATE": [0, -1],
    "SOLVER.CHECKPOINT_PERIOD": [0],
    "INPUT.MIN_SIZE_TRAIN": [(), (-1,), (640, -640)],
    "INPUT.MIN_SIZE_TEST": [-1],
    "INPUT.MAX_SIZE_TRAIN": [0, -5],
    "INPUT.MAX_SIZE_TEST": [0],
    "DATALOADER.NUM_WORKERS": [-1],
    "TEST.DETECTIONS_PER_IMAGE": [0, -1],
    "TEST.EVAL_PERIOD": [-1],
    "MODEL.PIXEL_MEAN": [[1.0, 2.0], [], [NAN, 0.0, 0.0], [1.0] * 4],
    "MODEL.PIXEL_STD": [[1.0, 1.0, 0.0], [1.0, 1.0, -1.0], [1.0], [NAN] * 3],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[[32, 0]], [[-32.0]], [[NAN]], [[INF]], [], [[]], [["a"]]],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[[0.0]], [[0.5, -1.0]], [[NAN]], []],
    "MODEL.RETINANET.NUM_CONVS": [-1],
    "MODEL.RETINANET.NUM_CLASSES": [0, -1],
    "MODEL.RETINANET.PRIOR_PROB": [0.0, 1.0, NAN],
    "MODEL.RETINANET.SCORE_THRESH_TEST": [-0.1, 1.5, NAN],
    "MODEL.RETINANET.NMS_THRESH_TEST": [-0.1, 50.0, NAN],
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": [0],
    "MODEL.RETINANET.IOU_THRESHOLDS": [[0.4, 1.5], [-0.1, 0.5], []],
    "MODEL.RETINANET.FOCAL_LOSS_GAMMA": [-1.0, NAN, INF],
    "MODEL.RETINANET.FOCAL_LOSS_ALPHA": [2.0, -0.5, NAN],
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": [-1.0, NAN],
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": [(1.0, 1.0), (1.0, 1.0, 1.0, 0.0)],
    "MODEL.FOCAL.CLS_LOSS.WEIGHT": [-1.0, NAN, INF],
    "MODEL.FOCAL.BOX_LOSS.WEIGHT": [-1.0, NAN],
    "MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA": [[0.5, 2.0]],
    "MODEL.FOCAL.CLS_LOSS.HINGE_MARGIN": [0.0, 1.5],
    "MODEL.FOCAL.CLS_LOSS.OHEM.NMS_THRESH": [-0.1, 70.0],
    "MODEL.FOCAL.MATCHER.IGNORE_IOA": [-0.1, 1.1],
    "MODEL.FOCAL.MATCHER.TOPK": [0],
    "MODEL.FOCAL.ANCHORS.SCALES_PER_OCTAVE": [0],
    "MODEL.FOCAL.EMA.DECAY": [-0.1, 1.0, NAN],
    "VIS.SCORE_THRESH": [-0.1, 1.1],
    "VIS.NUM_IMAGES": [-1],
}


def with_value(key, value):
    cfg = get_cfg()
    add_focal_config(cfg)
    *path, leaf = key.split(".")
    functools.reduce(CfgNode.__getitem__, path, cfg)[leaf] = value
    return cfg


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values], ids=str)
def test_bad_numbers(key, value):
    with pytest.raises(ConfigError) as error:
        prepare(with_value(key, value))
    message = str(error.value)
    assert message.startswith(f"{key} is {value!r}; expected ") and "\n" not in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.MOMENTUM", 0.0),
        ("SOLVER.BASE_LR", 0.0),
        ("SOLVER.STEPS", ()),
        ("SOLVER.LR_FACTORS", [{"backbone": 0, "head": 2.5}, {"*.bias": 1}]),
        ("SOLVER.WEIGHT_DECAY_BIAS", None),
        ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", INF),
        ("INPUT.MIN_SIZE_TEST", 0),
        ("INPUT.MIN_SIZE_TRAIN", (0,)),
        ("MODEL.RETINANET.FOCAL_LOSS_ALPHA", -1),
        ("MODEL.RETINANET.NMS_THRESH_TEST", 1.0),
        ("MODEL.RETINANET.SCORE_THRESH_TEST", 0),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64, 80.5]]),
    ],
)
def test_numbers_at_the_edge(key, value):
    check_ranges(with_value(key, value))


def test_channels():
    grey = with_value("INPUT.FORMAT", "L")
    with pytest.raises(ConfigError, match=r"expected 1 values, one for each channel of INPUT\.FORMAT L"):
        check_ranges(grey)
    grey.MODEL.PIXEL_MEAN, grey.MODEL.PIXEL_STD = [100.0], [1.0]
    check_ranges(grey)
    own = with_value("INPUT.FORMAT", "BGRN")  # of a mapper of the user's
    own.MODEL.PIXEL_MEAN, own.MODEL.PIXEL_STD = [100.0] * 4, [1.0] * 4
    check_ranges(own)


@pytest.mark.parametrize("path", ZOO, ids=lambda path: path.stem)
def test_detectron2s_configs(path):
    cfg = get_cfg()
    add_focal_config(cfg)
    merge_from_file(cfg, str(path))
    check_ranges(cfg)


def test_the_table_has_keys_that_exist():
    cfg = get_cfg()
    add_focal_config(cfg)
    assert set(RANGES) <= set(flatten(cfg))


def test_the_table_has_all_numbers_of_our_own_keys():
    cfg = get_cfg()
    stock = set(flatten(cfg))
    add_focal_config(cfg)
    numbers = {key for key, value in flatten(cfg).items() if type(value) in (int, float)} - stock
    assert numbers <= set(RANGES)


def test_in_training_and_builders(train_net, tiny_config):
    with pytest.raises(ConfigError, match=r"SOLVER\.MOMENTUM is 2\.0"):
        train_net("SOLVER.MOMENTUM", 2.0)
    with pytest.raises(ConfigError, match=r"MODEL\.RETINANET\.NUM_CONVS is -1"):
        load_config(tiny_config, ["MODEL.RETINANET.NUM_CONVS", -1])
    cfg = load_config(tiny_config, ["MODEL.DEVICE", "cpu"])
    cfg.MODEL.RETINANET.NUM_CONVS = -1  # after it was loaded
    with pytest.raises(ConfigError, match=r"MODEL\.RETINANET\.NUM_CONVS is -1"):
        build_model(cfg)


def test_in_the_doctor(tiny_config):
    checks = [check for check in CHECKS if check.name == "config"]
    ((_, finding),) = examine(Case(tiny_config, ["SOLVER.BASE_LR", "-1.0"]), checks)
    assert finding.level == ERROR and "SOLVER.BASE_LR is -1.0" in finding.text
