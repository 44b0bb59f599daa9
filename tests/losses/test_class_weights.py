"""Shares of the classes, and each class's α, listed or from the shares."""

import math

import pytest
import torch
from detectron2.config import get_cfg

from focal_plugin import add_focal_config, build_cls_loss
from focal_plugin.losses.class_weights import alpha_from_config, class_shares, frequency_alpha


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
