import re
import sys

import pytest
import torch
from detectron2.config import get_cfg

import focal_plugin
from focal_plugin import (
    ConfigError,
    add_focal_config,
    build_box_loss,
    build_cls_loss,
    build_matcher,
    import_user_modules,
)


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_focal_config(cfg)
    return cfg


@pytest.mark.parametrize(
    "build, key, known",
    [
        (build_cls_loss, "MODEL.FOCAL.CLS_LOSS.NAME", "SigmoidFocalLoss"),
        (build_box_loss, "MODEL.FOCAL.BOX_LOSS.NAME", "GIoUBoxLoss"),
        (build_matcher, "MODEL.FOCAL.MATCHER.NAME", "IgnoreBandMatcher"),
        (focal_plugin.build_bias_init, "MODEL.FOCAL.BIAS_INIT.NAME", "PriorBiasInit"),
        (lambda cfg: focal_plugin.build_dense_head(cfg, []), "MODEL.FOCAL.HEAD.NAME", "FocalRetinaNetHead"),
        (focal_plugin.build_normalizer, "MODEL.FOCAL.NORMALIZER", "num_fg_sync"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(cfg, build, key, known):
    cfg.merge_from_list([key, "Typo"])
    with pytest.raises(ConfigError) as error:
        build(cfg)
    for part in (key, "Typo", known):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "stock, name",
    [("smooth_l1", "SmoothL1BoxLoss"), ("giou", "GIoUBoxLoss"), ("diou", "DIoUBoxLoss"), ("ciou", "CIoUBoxLoss")],
)
def test_the_stock_key_chooses_the_box_loss(cfg, stock, name):
    cfg.MODEL.RETINANET.BBOX_REG_LOSS_TYPE = stock
    assert type(build_box_loss(cfg)).__name__ == name


def test_an_own_name_goes_before_the_stock_key(cfg):
    cfg.MODEL.RETINANET.BBOX_REG_LOSS_TYPE = "giou"
    cfg.MODEL.FOCAL.BOX_LOSS.NAME = "DIoUBoxLoss"
    assert type(build_box_loss(cfg)).__name__ == "DIoUBoxLoss"


def test_an_unknown_stock_box_loss_is_refused(cfg):
    cfg.MODEL.RETINANET.BBOX_REG_LOSS_TYPE = "l2"
    with pytest.raises(ConfigError, match=r"BBOX_REG_LOSS_TYPE is 'l2'; expected one of smooth_l1, giou"):
        build_box_loss(cfg)


def test_a_users_module_brings_its_loss(cfg, tmp_path, monkeypatch):
    (tmp_path / "my_squared_loss.py").write_text(
        "from torch import nn\n"
        "from focal_plugin import CLS_LOSS_REGISTRY, ElementwiseLoss\n"
        "@CLS_LOSS_REGISTRY.register()\n"
        "class SquaredLoss(ElementwiseLoss):\n"
        "    def __init__(self, cfg):\n"
        "        super().__init__()\n"
        "    def elementwise(self, logits, targets):\n"
        "        return (logits.sigmoid() - targets) ** 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    cfg.MODEL.FOCAL.IMPORTS = ["my_squared_loss"]
    cfg.MODEL.FOCAL.CLS_LOSS.NAME = "SquaredLoss"
    try:
        import_user_modules(cfg)
        import_user_modules(cfg)  # a second time is no second registration
        loss = build_cls_loss(cfg)
    finally:
        focal_plugin.CLS_LOSS_REGISTRY._obj_map.pop("SquaredLoss", None)
        sys.modules.pop("my_squared_loss", None)
    targets = focal_plugin.DenseTargets([torch.tensor([[[[0, 2, -1]]]])], 2, [], torch.zeros(1, 4), torch.zeros(1, 4))
    logits = torch.zeros(1, 1, 2, 1, 3)
    assert loss([logits], targets).item() == pytest.approx(4 * 0.25)  # two anchors of two classes; one is ignored


@pytest.mark.parametrize(
    ("base", "method", "value"), [("ElementwiseLoss", "elementwise", 2.5), ("MiniBatchLoss", "choose", 3 * 0.693147)]
)
def test_a_loss_defines_one_method_alone(cfg, base, method, value):
    def elementwise(self, logits, targets):
        return targets + 0.5 + 0 * logits  # one positive and two background anchors

    def choose(self, labels, logits, targets):
        return labels >= 0

    function = {"elementwise": elementwise, "choose": choose}[method]
    component = type("OneMethod", (getattr(focal_plugin, base),), {method: function})
    focal_plugin.CLS_LOSS_REGISTRY.register(component)
    cfg.MODEL.FOCAL.CLS_LOSS.NAME = "OneMethod"
    try:
        loss = build_cls_loss(cfg)
    finally:
        focal_plugin.CLS_LOSS_REGISTRY._obj_map.pop("OneMethod")
    targets = focal_plugin.DenseTargets([torch.tensor([[[[0, 1, 1]]]])], 1, [], torch.zeros(1, 4), torch.zeros(1, 4))
    assert loss([torch.zeros(1, 1, 1, 1, 3, requires_grad=True)], targets).item() == pytest.approx(value)


def test_two_components_of_one_name(cfg, tmp_path, monkeypatch):
    (tmp_path / "my_second_bce.py").write_text(
        "from focal_plugin import CLS_LOSS_REGISTRY\n@CLS_LOSS_REGISTRY.register()\nclass BCELoss: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    cfg.MODEL.FOCAL.IMPORTS = ["my_second_bce"]
    with pytest.raises(ConfigError, match=r"IMPORTS.*'my_second_bce'.*'BCELoss' was already registered.*another name"):
        import_user_modules(cfg)


def test_a_missing_user_module_is_named(cfg):
    cfg.MODEL.FOCAL.IMPORTS = ["no_such_module_of_mine.losses"]
    with pytest.raises(ImportError, match=r"MODEL\.FOCAL\.IMPORTS names 'no_such_module_of_mine\.losses'"):
        import_user_modules(cfg)


def test_an_error_inside_a_users_module_is_not_hidden(cfg, tmp_path, monkeypatch):
    (tmp_path / "my_broken_module.py").write_text("import something_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    cfg.MODEL.FOCAL.IMPORTS = ["my_broken_module"]
    with pytest.raises(ModuleNotFoundError, match="something_that_is_not_installed"):
        import_user_modules(cfg)


@pytest.mark.parametrize("name", ["", ".", ".a", "a.", "a..b", "a b", "a/b.py", 5, True, None, ["os"], {"a": 1}])
def test_an_import_that_is_no_name(name):
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.MODEL.FOCAL.IMPORTS = [name]
    with pytest.raises(ConfigError, match=r"MODEL\.FOCAL\.IMPORTS has .*; expected a dotted name"):
        import_user_modules(cfg)


def needs_an_argument(self, cfg, *, smoothing): ...


def takes_no_config(self, alpha):
    float(alpha)


def refuses(self, cfg):
    raise ConfigError("MODEL.MINE is 3; expected 4.")


@pytest.mark.parametrize(
    ("constructor", "kind", "says"),
    [
        (
            needs_an_argument,
            TypeError,
            r"Mine is built with \(cfg\), .*'smoothing'.* and further arguments defaults; or",
        ),
        (
            takes_no_config,
            TypeError,
            r"^float\(\) argument must be .*In the constructor of \S+CLS_LOSS\.NAME Mine, .*\(cfg\)",
        ),
        (
            refuses,
            ConfigError,
            r"^MODEL.MINE is 3; expected 4\..*In the constructor of MODEL\.FOCAL\.CLS_LOSS\.NAME Mine",
        ),
    ],
)
def test_a_constructor_that_fails(cfg, monkeypatch, constructor, kind, says):
    component = type("Mine", (torch.nn.Module,), {"__init__": constructor})
    monkeypatch.setitem(focal_plugin.CLS_LOSS_REGISTRY._obj_map, "Mine", component)
    cfg.MODEL.FOCAL.CLS_LOSS.NAME = "Mine"
    with pytest.raises(kind) as raised:
        build_cls_loss(cfg)
    text = " ".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    assert re.search(says, text), text
