"""Advice is given for the mistake, names what to set, and is silent for configs that are right."""

import pytest
from detectron2.config import get_cfg

from focal_plugin import add_focal_config
from focal_plugin.config.load import load_config
from focal_plugin.engine import advise
from focal_plugin.engine.advice import faster


def config(*opts):
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", "FocalRetinaNet", *opts])
    return cfg


@pytest.mark.parametrize("schedule", ["R_50_FPN_1x", "R_50_FPN_3x", "R_101_FPN_3x"])
def test_the_zoo_needs_no_advice(schedule):
    assert advise(load_config(f"COCO-Detection/retinanet_{schedule}.yaml")) == []


@pytest.mark.parametrize(
    ("images", "scaled", "longer"), [(8, "0.005", "2"), (2, "0.00125", "8"), (1, "0.000625", "16")]
)
def test_the_learning_rate_of_a_larger_batch(images, scaled, longer):
    (message,) = advise(config("SOLVER.BASE_LR", 0.01, "SOLVER.IMS_PER_BATCH", images))
    assert f"SOLVER.BASE_LR 0.01 is {longer} times" in message
    assert f"SOLVER.BASE_LR {scaled}," in message and f"take {longer} times" in message


@pytest.mark.parametrize(("rate", "times"), [(0.005, 4), (0.1, 80)])
def test_any_rate_far_above_linear_scaling(rate, times):
    (message,) = advise(config("SOLVER.BASE_LR", rate, "SOLVER.IMS_PER_BATCH", 2))
    assert f"is {times} times" in message and "SOLVER.BASE_LR 0.00125," in message


@pytest.mark.parametrize(("rate", "times"), [(0.02, "200"), (0.01, "100"), (0.005, "50")])
@pytest.mark.parametrize("clipped", [True, False])
def test_a_rate_of_sgd_for_adamw(rate, times, clipped):
    opts = ["SOLVER.OPTIMIZER", "adamw", "SOLVER.IMS_PER_BATCH", 16, "SOLVER.CLIP_GRADIENTS.ENABLED", clipped]
    (message,) = advise(config(*opts, "SOLVER.BASE_LR", rate))
    assert f"SOLVER.BASE_LR {rate:g} is {times} times" in message and "Set SOLVER.BASE_LR 0.0001," in message


def test_keys_of_sgd_for_adamw():
    opts = ["SOLVER.BASE_LR", 1e-4, "SOLVER.MOMENTUM", 0.95, "SOLVER.NESTEROV", True]
    assert advise(config(*opts)) == []
    messages = advise(config(*opts, "SOLVER.OPTIMIZER", "adamw"))
    assert [message.split()[0] for message in messages] == ["SOLVER.MOMENTUM", "SOLVER.NESTEROV"]


@pytest.mark.parametrize(
    ("opts", "count"), [([], 1), (["SOLVER.WARMUP_ITERS", 100], 0), (["SOLVER.BASE_LR", 0.009], 0)]
)
def test_a_start_at_the_whole_rate(opts, count):
    start = ["SOLVER.BASE_LR", 0.01, "SOLVER.IMS_PER_BATCH", 16, "SOLVER.WARMUP_ITERS", 10]
    messages = advise(config(*start, *opts))
    assert len(messages) == count and all("SOLVER.WARMUP_ITERS 1000" in message for message in messages)
    assert advise(config(*start, "SOLVER.CLIP_GRADIENTS.ENABLED", True)) == []


@pytest.mark.parametrize(
    "opts",
    [
        ["SOLVER.BASE_LR", 0.01, "SOLVER.IMS_PER_BATCH", 16],
        ["SOLVER.BASE_LR", 0.00125, "SOLVER.IMS_PER_BATCH", 2],
        ["SOLVER.BASE_LR", 0.01, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.CLIP_GRADIENTS.ENABLED", True],
        ["SOLVER.BASE_LR", 1e-4, "SOLVER.IMS_PER_BATCH", 16, "SOLVER.OPTIMIZER", "adamw"],
        ["SOLVER.BASE_LR", 1e-3, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.OPTIMIZER", "adamw"],
    ],
    ids=["the reference", "scaled", "clipped", "the reference of AdamW", "AdamW from random weights"],
)
def test_a_learning_rate_that_is_meant(opts):
    assert advise(config(*opts)) == []


@pytest.mark.parametrize(
    ("opts", "is_told"),
    [
        ([], True),
        (["MODEL.FOCAL.CHANNELS_LAST", True], False),
        (["MODEL.DEVICE", "cpu"], False),
        (["MODEL.DEVICE", "cuda:1"], True),
        (["SOLVER.AMP.ENABLED", False], False),
        (["MODEL.META_ARCHITECTURE", "RetinaNet"], False),
    ],
)
def test_the_memory_layout_of_a_gpu(opts, is_told):
    cfg = config("MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", True, "MODEL.META_ARCHITECTURE", "FocalRetinaNet", *opts)
    assert ["CHANNELS_LAST True" in message for message in faster(cfg)] == [True] * is_told


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("NUM_CLASSES", 3),
        ("SCORE_THRESH_TEST", 0.3),
        ("NMS_THRESH_TEST", 0.6),
        ("IOU_THRESHOLDS", [0.3]),
        ("IOU_LABELS", [0, 0]),
    ],
)
def test_keys_of_two_stage_models(key, value):
    (message,) = advise(config(f"MODEL.ROI_HEADS.{key}", value))
    assert f"MODEL.ROI_HEADS.{key}" in message and f"MODEL.RETINANET.{key}" in message
    # Harmless where the key that counts says the same, and right where the model does read it.
    assert advise(config(f"MODEL.ROI_HEADS.{key}", value, f"MODEL.RETINANET.{key}", value)) == []
    assert advise(config(f"MODEL.ROI_HEADS.{key}", value, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN")) == []


@pytest.mark.parametrize("source", ["p5", "c5-linear", ""])
def test_a_top_block_that_the_backbone_does_not_read(source):
    stock = ["MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"]
    (message,) = advise(config("MODEL.FOCAL.TOP_BLOCK", source, *stock))
    assert f"MODEL.FOCAL.TOP_BLOCK is set to {source!r}" in message and "build_focal_resnet_fpn_backbone" in message
    for builder in ("build_focal_resnet_fpn_backbone", "build_timm_fpn_backbone", "build_my_own_backbone"):
        assert advise(config("MODEL.FOCAL.TOP_BLOCK", source, "MODEL.BACKBONE.NAME", builder)) == []
    assert advise(config("MODEL.FOCAL.TOP_BLOCK", "c5", *stock)) == []


def test_a_depth_that_timm_does_not_read():
    timm = ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.FOCAL.TIMM.NAME", "resnet18"]
    (message,) = advise(config("MODEL.RESNETS.DEPTH", 101, *timm))
    assert "MODEL.RESNETS.DEPTH is set to 101" in message and "resnet18" in message
    assert advise(config(*timm)) == [] and advise(config("MODEL.RESNETS.DEPTH", 101)) == []


def test_advice_changes_nothing():
    cfg = config("SOLVER.BASE_LR", 0.01, "SOLVER.IMS_PER_BATCH", 2, "MODEL.ROI_HEADS.NUM_CLASSES", 3)
    before = cfg.dump()
    assert len(advise(cfg)) == 2
    assert cfg.dump() == before
