"""A config is made ready to run in one way, wherever it comes from."""

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog

from focal_plugin import ConfigError, add_focal_config, load_config, merge_from_file
from focal_plugin.config.load import build_model, prepare
from focal_plugin.deploy.loading import read_config

OPTS = ["MODEL.FOCAL.BIAS_INIT.NAME", "ClassFrequencyBiasInit", "MODEL.DEVICE", "cpu"]


def raw_config(tiny_config):
    cfg = get_cfg()
    add_focal_config(cfg)
    merge_from_file(cfg, tiny_config)
    cfg.merge_from_list(OPTS)
    return cfg


@pytest.mark.parametrize("ready", [lambda cfg: prepare(cfg) or cfg, read_config], ids=["prepare", "Predictor"])
def test_a_config_of_ones_own_is_as_ready_as_one_from_a_file(ready, tiny_config):
    cfg = raw_config(tiny_config)
    assert cfg.MODEL.FOCAL.CLASS_FREQUENCIES == [] and "shapes_train" not in DatasetCatalog
    cfg = ready(cfg)
    assert {"shapes_train", "shapes_test"} <= set(DatasetCatalog)
    assert cfg == load_config(tiny_config, OPTS)
    assert len(cfg.MODEL.FOCAL.CLASS_FREQUENCIES) == 2
    again = cfg.clone()
    prepare(again)
    assert again == cfg


def test_a_config_without_the_keys_is_not_prepared():
    with pytest.raises(ConfigError, match="add_focal_config"):
        prepare(get_cfg())


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("MODEL.META_ARCHITECTURE", "Nope", r"No object named 'Nope' found in 'META_ARCH'"),
        ("MODEL.ANCHOR_GENERATOR.NAME", "Nope", "MODEL.FOCAL.IMPORTS"),
        ("MODEL.RESNETS.DEPTH", 77, "MODEL.FOCAL.IMPORTS"),
        ("MODEL.FPN.NORM", "Nope", "MODEL.FOCAL.IMPORTS"),
    ],
)
def test_a_name_that_detectron2_does_not_know(key, value, problem, tiny_config):
    cfg = load_config(tiny_config, [key, value])
    with pytest.raises(ConfigError, match=rf"^{key} is {value!r}, which Detectron2 does not know .*{problem}"):
        build_model(cfg)
