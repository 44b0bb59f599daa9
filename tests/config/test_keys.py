import pytest
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from focal_plugin import ConfigError, add_focal_config
from focal_plugin.config.explain import flatten


def test_detectron2s_keys_stay_as_they_are():
    stock, ours = get_cfg(), get_cfg()
    add_focal_config(ours)
    ours = flatten(ours)
    for key, value in flatten(stock).items():
        assert ours[key] == value, key


def test_adding_twice_changes_nothing():
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.MODEL.FOCAL.MATCHER.LOW_QUALITY = "none"
    before = cfg.dump()
    add_focal_config(cfg)
    assert cfg.dump() == before


def test_two_configs_share_no_value():
    first, second = get_cfg(), get_cfg()
    add_focal_config(first)
    add_focal_config(second)
    first.MODEL.FOCAL.IMPORTS.append("mine")
    assert second.MODEL.FOCAL.IMPORTS == []


def test_a_config_without_the_keys_is_told_what_to_call():
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "FocalRetinaNet"
    with pytest.raises(ConfigError, match="add_focal_config"):
        build_model(cfg)


def test_a_key_of_old_names_its_successor():
    cfg = get_cfg()
    add_focal_config(cfg)
    with pytest.raises(KeyError, match=r"renamed to MODEL\.FOCAL\.TOP_BLOCK"):
        cfg.merge_from_list(["MODEL.FOCAL.TIMM.TOP_BLOCK", "p5"])
