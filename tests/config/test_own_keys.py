"""A user's component declares keys of its own: the keyword-only arguments of what is built with the config."""

import copy
import pickle

import pytest
from detectron2.config import LazyConfig, configurable, get_cfg, instantiate
from torch import nn

import focal_plugin
from focal_plugin import (
    ConfigError,
    ElementwiseLoss,
    SigmoidFocalLoss,
    add_focal_config,
    build_cls_loss,
    merge_from_list,
)
from focal_plugin.ablation.rows import as_yaml, compose, find_tables
from focal_plugin.config.arguments import check_arguments
from focal_plugin.config.explain import flatten
from focal_plugin.config.load import build_model, load_config
from focal_plugin.files.safe_yaml import merge_from_file

KINDS = {"HEAD": "DENSE_HEAD", "CLS_LOSS": "CLS_LOSS", "BOX_LOSS": "BOX_LOSS"}
KINDS |= {"MATCHER": "ANCHOR_MATCHER", "BIAS_INIT": "BIAS_INIT"}
BUILD = {"HEAD": lambda cfg: focal_plugin.build_dense_head(cfg, []), "CLS_LOSS": build_cls_loss}
BUILD |= {"BOX_LOSS": focal_plugin.build_box_loss, "MATCHER": focal_plugin.build_matcher}
BUILD |= {"BIAS_INIT": focal_plugin.build_bias_init}


class Mine(nn.Module):
    def __init__(self, cfg, input_shape=(), *, gamma_neg=4.0, steps=3, norm="BN", sizes=(1, 2), clip=True, top=None):
        super().__init__()
        self.values = {"gamma_neg": gamma_neg, "steps": steps, "norm": norm, "sizes": sizes, "clip": clip, "top": top}


DEFAULTS = {"GAMMA_NEG": 4.0, "STEPS": 3, "NORM": "BN", "SIZES": (1, 2), "CLIP": True, "TOP": None}


class Configured(SigmoidFocalLoss):
    @configurable
    def __init__(self, *, gamma_neg, **kwargs):
        super().__init__(**kwargs)
        self.gamma_neg = gamma_neg

    @classmethod
    def from_config(cls, cfg, *, gamma_neg=4.0):
        return {**super().from_config(cfg), "gamma_neg": gamma_neg}


class OnAShippedOne(ElementwiseLoss):
    def __init__(self, cfg=None, *, gamma_neg=4.0):
        super().__init__(gamma_neg=gamma_neg)

    def elementwise(self, logits, targets):
        return logits * self.gamma_neg


def a_function(cfg, *, gamma_neg=4.0):
    return OnAShippedOne(gamma_neg=gamma_neg)


@pytest.fixture
def name(monkeypatch):
    """Register a component in all registries, or others of its name; for this test."""

    def register(component=Mine):
        for kind in KINDS.values():
            registry = getattr(focal_plugin, f"{kind}_REGISTRY")
            monkeypatch.setattr(registry, "_obj_map", registry._obj_map | {"Mine": component})
        return "Mine"

    return register


def words(section, **values):
    pairs = [(f"MODEL.FOCAL.{section}.NAME", "Mine")]
    pairs += [(f"MODEL.FOCAL.{section}.ARGS.{key}", str(value)) for key, value in values.items()]
    return [word for pair in pairs for word in pair]


@pytest.mark.parametrize("section", KINDS)
def test_from_a_command_line_to_the_component(name, section):
    name()
    cfg = load_config("", words(section, GAMMA_NEG=2, SIZES="[5]", CLIP=False))
    expected = DEFAULTS | {"GAMMA_NEG": 2.0, "SIZES": (5,), "CLIP": False}
    assert dict(cfg.MODEL.FOCAL[section].ARGS) == expected
    assert isinstance(cfg.MODEL.FOCAL[section].ARGS.GAMMA_NEG, float)
    assert BUILD[section](cfg).values == {key.lower(): value for key, value in expected.items()}


@pytest.mark.parametrize("component", [Configured, OnAShippedOne, a_function])
def test_ways_to_declare_them(name, component):
    name(component)
    assert build_cls_loss(load_config("", words("CLS_LOSS"))).gamma_neg == 4
    assert build_cls_loss(load_config("", words("CLS_LOSS", GAMMA_NEG=2))).gamma_neg == 2


def test_from_a_file_and_again_from_the_saved_one(name, tmp_path):
    name()
    (tmp_path / "my.yaml").write_text(
        "MODEL: {FOCAL: {CLS_LOSS: {NAME: Mine, ARGS: {GAMMA_NEG: 2, TOP: [p3]}}, BOX_LOSS: {ARGS: {}}}}"
    )
    cfg = load_config(str(tmp_path / "my.yaml"))
    assert dict(cfg.MODEL.FOCAL.CLS_LOSS.ARGS) == DEFAULTS | {"GAMMA_NEG": 2.0, "TOP": ["p3"]}
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = load_config(str(tmp_path / "config.yaml"))
    assert flatten(again.MODEL.FOCAL) == flatten(cfg.MODEL.FOCAL)
    assert "GAMMA_NEG: 2.0" in cfg.dump()
    assert build_cls_loss(again).values["sizes"] == (1, 2)  # YAML has lists alone


def test_in_a_program_of_ones_own(name, tmp_path):
    """Nothing but the builder looks at the keys."""
    name()
    (tmp_path / "my.yaml").write_text("VERSION: 2\nMODEL: {FOCAL: {CLS_LOSS: {NAME: Mine, ARGS: {STEPS: 7}}}}")
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.merge_from_file(str(tmp_path / "my.yaml"))
    merge_from_list(cfg, ["MODEL.FOCAL.CLS_LOSS.ARGS.GAMMA_NEG", "2"])
    cfg.freeze()
    values = build_cls_loss(cfg).values
    assert (values["steps"], values["gamma_neg"], values["norm"]) == (7, 2, "BN")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.FOCAL.CLS_LOSS.ARGS.GAMA_NEG = 2.0
    with pytest.raises(ConfigError, match=r"ARGS\.GAMA_NEG"):
        build_model(cfg)
    with pytest.raises(
        TypeError, match=r"CLS_LOSS\.NAME Mine is built with \(cfg, .*gama_neg\), which it does not take"
    ):
        build_cls_loss(cfg)


def test_swept_by_an_ablation(name, tmp_path):
    name()
    for gamma in (1, 2):
        text = f"MODEL: {{FOCAL: {{CLS_LOSS: {{NAME: Mine, ARGS: {{GAMMA_NEG: {gamma}}}}}}}}}"
        (tmp_path / f"gamma_{gamma}.yaml").write_text(text)
    (table,) = find_tables([str(tmp_path)])
    for gamma, row in zip((1, 2), table.rows):
        cfg = compose(row, None, ["MODEL.FOCAL.CLS_LOSS.ARGS.STEPS", "5"])
        (tmp_path / "composed.yaml").write_text(as_yaml(cfg))
        again = get_cfg()
        add_focal_config(again)
        merge_from_file(again, str(tmp_path / "composed.yaml"))
        for config in (cfg, again):
            values = build_cls_loss(config).values
            assert (values["gamma_neg"], values["steps"]) == (gamma, 5)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("GAMA_NEG", "2", "Mine has no such key. It has GAMMA_NEG, STEPS, NORM, SIZES, CLIP, TOP"),
        ("gamma_neg", "2", "Mine has no such key. It has GAMMA_NEG"),
        ("INPUT_SHAPE", "2", "Mine has no such key"),
        ("GAMMA_NEG", "big", "'big' (str); expected a value of type float"),
        ("GAMMA_NEG", "True", "True (bool); expected a value of type float"),
        ("STEPS", "2.5", "2.5 (float); expected a value of type int"),
        ("STEPS", "True", "True (bool); expected a value of type int"),
        ("CLIP", "1", "1 (int); expected a value of type bool"),
        ("SIZES", "5", "5 (int); expected a value of type tuple"),
        ("NORM", "5", "5 (int); expected a value of type str"),
    ],
)
def test_mistakes_are_told_when_the_config_is_loaded(name, key, value, says):
    name()
    with pytest.raises(ConfigError) as error:
        load_config("", words("CLS_LOSS", **{key: value}))
    assert f"MODEL.FOCAL.CLS_LOSS.ARGS.{key}" in str(error.value) and says in str(error.value)


def test_a_section_in_place_of_a_value(name, tmp_path):
    name()
    with pytest.raises(ConfigError, match=r"CLS_LOSS\.ARGS\.STEPS is .*; expected text, a number or a list"):
        load_config("", words("CLS_LOSS", STEPS="{'A': 1}"))
    (tmp_path / "my.yaml").write_text("MODEL: {FOCAL: {CLS_LOSS: {NAME: Mine, ARGS: {STEPS: {A: 1}}}}}")
    with pytest.raises(ConfigError, match=r"^MODEL\.FOCAL\.CLS_LOSS\.ARGS\.STEPS is .*; expected a value of type int"):
        load_config(str(tmp_path / "my.yaml"))
    (tmp_path / "my.yaml").write_text("MODEL: {FOCAL: {CLS_LOSS: {NAME: Mine, ARGS: 5}}}")
    with pytest.raises(ConfigError, match=r"MODEL\.FOCAL\.CLS_LOSS\.ARGS is 5 \(int\); expected keys"):
        load_config(str(tmp_path / "my.yaml"))


@pytest.mark.parametrize("section", KINDS)
def test_shipped_components_have_none(section):
    """The box loss too, whose name may be empty."""
    with pytest.raises(ConfigError, match=rf"{section}\.ARGS\.GAMMA: \w+ has no such key. It has none"):
        load_config("", [f"MODEL.FOCAL.{section}.ARGS.GAMMA", "2"])
    assert dict(load_config().MODEL.FOCAL[section].ARGS) == {}


def test_none_stands_for_the_default(name, tmp_path):
    """So that a command line can choose another component than the one whose keys are in a file."""
    name(OnAShippedOne)
    path = str(tmp_path / "my.yaml")
    (tmp_path / "my.yaml").write_text("VERSION: 2\nMODEL: {FOCAL: {CLS_LOSS: {NAME: Mine, ARGS: {GAMMA_NEG: 2.0}}}}")
    none = ["MODEL.FOCAL.CLS_LOSS.ARGS.GAMMA_NEG", "None"]
    assert load_config(path, none).MODEL.FOCAL.CLS_LOSS.ARGS.GAMMA_NEG == 4.0
    stock = ["MODEL.FOCAL.CLS_LOSS.NAME", "BCELoss"]
    with pytest.raises(ConfigError, match=r"BCELoss has no such key\. It has none.*None"):
        load_config(path, stock)
    assert dict(load_config(path, [*stock, *none]).MODEL.FOCAL.CLS_LOSS.ARGS) == {}


def test_a_component_that_is_not_known_is_told_by_its_builder():
    cfg = load_config("", words("CLS_LOSS", GAMMA_NEG=2))
    with pytest.raises(ConfigError, match=r"MODEL\.FOCAL\.CLS_LOSS\.NAME is 'Mine', which is not registered"):
        build_cls_loss(cfg)


def test_what_no_config_holds_is_no_key(name):
    class Other(nn.Module):
        def __init__(self, cfg, *, norm=nn.BatchNorm2d, gamma=1.0, **rest):
            super().__init__()
            self.norm, self.rest = norm, rest

    name(Other)
    cfg = load_config("", words("CLS_LOSS"))
    assert dict(cfg.MODEL.FOCAL.CLS_LOSS.ARGS) == {"GAMMA": 1.0}
    loss = build_cls_loss(cfg)
    assert (loss.norm, loss.rest) == (nn.BatchNorm2d, {})


def test_the_default_of_a_component_is_no_value_of_a_config(name):
    class Lists(nn.Module):
        def __init__(self, cfg, *, sizes=[1]):  # noqa: B006
            super().__init__()
            self.sizes = sizes

    name(Lists)
    load_config("", words("CLS_LOSS")).MODEL.FOCAL.CLS_LOSS.ARGS.SIZES.append(2)
    assert load_config("", words("CLS_LOSS")).MODEL.FOCAL.CLS_LOSS.ARGS.SIZES == [1]


LAZY = """
from detectron2.config import LazyCall as L
from focal_plugin import SigmoidFocalLoss
model = dict(cls_loss=L(SigmoidFocalLoss)(gamma=4), parts=[L(SigmoidFocalLoss)()])
"""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("cls_loss.gama=2", r"cls_loss\.gama: SigmoidFocalLoss has no such argument\. Near it: gamma\.$"),
        ("cls_loss.gamma=big", r"cls_loss\.gamma is 'big'; expected a number, such as its default 2\.0"),
        ("parts.0.x=2", r"parts\[0\]\.x: SigmoidFocalLoss has no such argument\. It has alpha, gamma\.$"),
    ],
)
def test_in_a_lazyconfig_they_are_arguments(change, says, tmp_path):
    (tmp_path / "my.py").write_text(LAZY)
    cfg = LazyConfig.apply_overrides(LazyConfig.load(str(tmp_path / "my.py")), ["model.cls_loss.gamma=2"])
    check_arguments(cfg.model, "model")
    assert instantiate(cfg.model.cls_loss).gamma == 2
    with pytest.raises(ConfigError, match=rf"^model\.{says}"):
        check_arguments(LazyConfig.apply_overrides(cfg, [f"model.{change}"]).model, "model")


def test_a_config_with_them_is_copied_and_sent():
    cfg = get_cfg()
    add_focal_config(cfg)
    args = cfg.MODEL.FOCAL.CLS_LOSS.ARGS
    with pytest.raises(AttributeError):
        _ = args.GAMMA_NEG  # not set
    args.GAMMA_NEG = 2.0
    for twin in (cfg.clone(), copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg))):
        assert dict(twin.MODEL.FOCAL.CLS_LOSS.ARGS) == {"GAMMA_NEG": 2.0}
        merge_from_list(twin, ["MODEL.FOCAL.CLS_LOSS.ARGS.GAMMA_NEG", "3", "MODEL.FOCAL.HEAD.ARGS.A", "x"])
        assert dict(twin.MODEL.FOCAL.HEAD.ARGS) == {"A": "x"}
    assert args.GAMMA_NEG == 2 and dict(cfg.MODEL.FOCAL.HEAD.ARGS) == {}
