"""Shares of the classes, when and how boxes are counted, and each class's α, listed or from the shares."""

import json
import logging
import math
from argparse import Namespace

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from focal_plugin import BIAS_INIT_REGISTRY, add_focal_config, build_cls_loss
from focal_plugin.config.load import load_config
from focal_plugin.engine import start_run
from focal_plugin.losses.class_weights import (
    alpha_from_config,
    class_shares,
    count_boxes,
    frequency_alpha,
    needs_class_frequencies,
)

BY_FREQUENCY = ["MODEL.FOCAL.BIAS_INIT.NAME", "ClassFrequencyBiasInit"]


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.MODEL.RETINANET.NUM_CLASSES = 3
    return cfg


@pytest.mark.parametrize("alpha", [0.01, 0.25, 0.75])
@pytest.mark.parametrize("power", [-1, 0.5, 1, 2])
def test_weights_go_as_a_power_of_the_frequency(alpha, power):
    shares = [0.7, 0.2, 0.09, 0.01]
    found = frequency_alpha(alpha, shares, power)
    odds = [a / (1 - a) for a in found]
    for odd, share in zip(odds, shares):
        assert odd / odds[0] == pytest.approx((shares[0] / share) ** power)
    assert math.prod(odds) ** (1 / 4) == pytest.approx(alpha / (1 - alpha))
    assert all(0 < a < 1 for a in found)


def test_by_hand():
    # the geometric mean of .8 and .2 is .4: odds of 1/3 halved and doubled
    assert frequency_alpha(0.25, [0.8, 0.2], 1) == pytest.approx([1 / 7, 2 / 5])


@pytest.mark.parametrize("shares, power", [([0.25] * 4, 1), ([0.7, 0.3], 0), ([1.0], 1)])
def test_nothing_to_balance(shares, power):
    assert frequency_alpha(0.25, shares, power) == pytest.approx([0.25] * len(shares))


@pytest.mark.parametrize("alpha", [-1, 0, 1])
def test_an_alpha_without_odds_is_refused(alpha):
    with pytest.raises(ValueError, match=r"FOCAL_LOSS_ALPHA is .*between 0 and 1"):
        frequency_alpha(alpha, [0.5, 0.5], 1)
    with pytest.raises(ValueError, match="CLASS_ALPHA_POWER is inf"):
        frequency_alpha(0.5, [0.5, 0.5], math.inf)


def test_a_config_has_one_alpha_by_default(cfg):
    cfg.MODEL.FOCAL.CLASS_FREQUENCIES = [8, 1, 1]  # alone, they change nothing
    assert alpha_from_config(cfg) == 0.25


def test_a_list(cfg):
    cfg.MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA = [0.1, 0.2, 0.3]
    assert alpha_from_config(cfg) == [0.1, 0.2, 0.3]
    cfg.MODEL.RETINANET.NUM_CLASSES = 2
    with pytest.raises(ValueError, match=r"CLS_LOSS\.CLASS_ALPHA has 3 numbers and .*NUM_CLASSES is 2"):
        alpha_from_config(cfg)


@pytest.mark.parametrize("name", ["SigmoidFocalLoss", "AlphaBalancedBCELoss", "FocalLossStar"])
def test_from_frequencies(cfg, name):
    cfg.MODEL.FOCAL.CLS_LOSS.NAME = name
    cfg.MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA_POWER = 1.0
    with pytest.raises(ValueError, match=r"MODEL\.FOCAL\.CLASS_FREQUENCIES is empty"):
        build_cls_loss(cfg)
    cfg.MODEL.FOCAL.CLASS_FREQUENCIES = [16, 4, 1]  # a geometric mean of 4
    torch.testing.assert_close(build_cls_loss(cfg).alpha, torch.tensor([1 / 13, 1 / 4, 4 / 7]))
    cfg.MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA = [0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match=r"CLASS_ALPHA lists .*CLASS_ALPHA_POWER"):
        build_cls_loss(cfg)


# Shares


def shares_of(counts, num_classes=3):
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.MODEL.RETINANET.NUM_CLASSES = num_classes
    cfg.MODEL.FOCAL.CLASS_FREQUENCIES = counts
    return class_shares(cfg)


@pytest.mark.parametrize(
    "counts, shares",
    [
        ([60, 30, 10], [0.6, 0.3, 0.1]),
        ([0.6, 0.3, 0.1], [0.6, 0.3, 0.1]),
        ([6, 3, 0], [0.5, 0.25, 0.25]),  # a class without boxes is as rare as the rarest
        ([0, 0, 5], [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_shares(counts, shares):
    assert shares_of(counts) == pytest.approx(shares)


@pytest.mark.parametrize(
    "counts, message",
    [
        ([], r"CLASS_FREQUENCIES is empty.*DATASETS\.TRAIN"),
        ([1, 2], r"CLASS_FREQUENCIES has 2 numbers and MODEL\.RETINANET\.NUM_CLASSES is 3"),
        ([1, -1, 2], "numbers ≥ 0"),
        ([0, 0, 0], "at least one of them above 0"),
        ([1, 2, float("nan")], "finite"),
        ([1, 2, float("inf")], "finite"),
    ],
)
def test_what_are_no_frequencies(counts, message):
    with pytest.raises(ValueError, match=message):
        shares_of(counts)


def boxes_in(*paths):
    """The boxes of each class in COCO files of the tiny config."""
    categories = [a["category_id"] for path in paths for a in json.loads(path.read_text())["annotations"]]
    return [categories.count(1), categories.count(2)]


def test_counted_in_the_training_set(tiny_config, tmp_path):
    cfg = load_config(tiny_config, BY_FREQUENCY)
    assert boxes_in(tmp_path / "shapes_train.json") == cfg.MODEL.FOCAL.CLASS_FREQUENCIES
    build_model(cfg)


def test_counted_in_all_training_sets(tiny_config, tmp_path):
    sets = ("shapes_train", "shapes_test")
    cfg = load_config(tiny_config, [*BY_FREQUENCY, "DATASETS.TRAIN", sets])
    expected = boxes_in(*(tmp_path / f"{name}.json" for name in sets))
    assert expected[0] != expected[1]
    assert expected == cfg.MODEL.FOCAL.CLASS_FREQUENCIES
    assert count_boxes(sets, 3) == [*expected, 0]


def test_crowds_and_unannotated_images_do_not_count():
    records = [
        {"annotations": [{"category_id": 1}, {"category_id": 1, "iscrowd": 1}, {"category_id": 0, "iscrowd": 0}]},
        {"annotations": []},
        {},
    ]
    DatasetCatalog.register("of_this_test", lambda: records)
    try:
        assert count_boxes(["of_this_test"], 1) == [1, 1]  # more classes than said: the check of the classes tells
    finally:
        DatasetCatalog.remove("of_this_test")


@pytest.mark.parametrize(
    "opts",
    [
        [],
        ["MODEL.FOCAL.CLS_LOSS.NAME", "BCELoss", "MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA_POWER", 1.0],
        [*BY_FREQUENCY, "DATASETS.TRAIN", ()],
        [*BY_FREQUENCY, "DATASETS.TRAIN", ("not_registered",)],  # said by the check of the data sets
        ["MODEL.FOCAL.CLS_LOSS.NAME", "NotRegistered"],
    ],
)
def test_not_counted(tiny_config, monkeypatch, opts):
    monkeypatch.setattr(DatasetCatalog, "get", None)
    assert load_config(tiny_config, opts).MODEL.FOCAL.CLASS_FREQUENCIES == []


def test_what_is_given_stays(tiny_config, monkeypatch):
    monkeypatch.setattr(DatasetCatalog, "get", None)
    cfg = load_config(tiny_config, [*BY_FREQUENCY, "MODEL.FOCAL.CLASS_FREQUENCIES", [0.9, 0.1]])
    assert cfg.MODEL.FOCAL.CLASS_FREQUENCIES == [0.9, 0.1]


@pytest.mark.parametrize("name", ["SigmoidFocalLoss", "AlphaBalancedBCELoss", "FocalLossStar"])
def test_counted_for_an_alpha_from_them(tiny_config, tmp_path, name):
    opts = ["MODEL.FOCAL.CLS_LOSS.NAME", name, "MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA_POWER", 0.5]
    assert boxes_in(tmp_path / "shapes_train.json") == load_config(tiny_config, opts).MODEL.FOCAL.CLASS_FREQUENCIES


def test_a_users_component_may_ask(tiny_config, tmp_path, monkeypatch):
    (tmp_path / "my_bias_init.py").write_text(
        "from focal_plugin import BIAS_INIT_REGISTRY\n"
        "@BIAS_INIT_REGISTRY.register()\n"
        "class MyBiasInit:\n"
        "    @classmethod\n"
        "    def needs_class_frequencies(cls, cfg):\n"
        "        return True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(BIAS_INIT_REGISTRY, "_obj_map", dict(BIAS_INIT_REGISTRY._obj_map))
    opts = ["MODEL.FOCAL.IMPORTS", ["my_bias_init"], "MODEL.FOCAL.BIAS_INIT.NAME", "MyBiasInit"]
    cfg = load_config(tiny_config, opts)
    assert needs_class_frequencies(cfg)
    assert boxes_in(tmp_path / "shapes_train.json") == cfg.MODEL.FOCAL.CLASS_FREQUENCIES


def test_a_run_says_and_keeps_them(tiny_config, tmp_path, caplog):
    cfg = load_config(tiny_config, BY_FREQUENCY)
    cfg.freeze()
    logger = logging.getLogger("focal_plugin.engine.setup")
    logger.addHandler(caplog.handler)
    try:
        start_run(cfg, Namespace(config_file=tiny_config, eval_only=False))
    finally:
        logger.removeHandler(caplog.handler)
    counts = boxes_in(tmp_path / "shapes_train.json")
    (line,) = {r.getMessage() for r in caplog.records if r.getMessage().startswith("Frequencies")}
    assert str(counts) in line
    dumped = yaml.safe_load((tmp_path / "output" / "config.yaml").read_text())
    assert dumped["MODEL"]["FOCAL"]["CLASS_FREQUENCIES"] == counts
