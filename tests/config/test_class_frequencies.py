"""When and how the boxes of each class are counted."""

import json
import logging
from argparse import Namespace

import pytest
import yaml
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from focal_plugin import BIAS_INIT_REGISTRY
from focal_plugin.config.class_frequencies import count_boxes, needs_class_frequencies
from focal_plugin.config.load import load_config
from focal_plugin.engine import start_run

BY_FREQUENCY = ["MODEL.FOCAL.BIAS_INIT.NAME", "ClassFrequencyBiasInit"]


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
