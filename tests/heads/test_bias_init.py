import pytest
import torch
from detectron2.config import get_cfg
from torch import nn

from focal_plugin import ClassFrequencyBiasInit, PriorBiasInit, ZeroBiasInit, add_focal_config, build_bias_init


@pytest.mark.parametrize("prior_prob", [1e-4, 0.01, 0.5, 0.99])
def test_every_class_starts_at_the_prior(prior_prob):
    conv = nn.Conv2d(4, 6, 3)
    PriorBiasInit(prior_prob=prior_prob)(conv, num_anchors=2, num_classes=3)
    torch.testing.assert_close(conv.bias.detach().sigmoid(), torch.full((6,), prior_prob))


def test_the_papers_prior_is_minus_log_99():
    conv = nn.Conv2d(1, 1, 1)
    PriorBiasInit()(conv, 1, 1)
    assert conv.bias.item() == pytest.approx(-4.59511985)


@pytest.mark.parametrize("prior_prob", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_a_prior_must_be_a_probability(prior_prob):
    with pytest.raises(ValueError, match=r"MODEL\.RETINANET\.PRIOR_PROB"):
        PriorBiasInit(prior_prob=prior_prob)


def test_zero_is_a_half():
    conv = nn.Conv2d(4, 6, 3)
    ZeroBiasInit()(conv, num_anchors=2, num_classes=3)
    assert (conv.bias == 0).all() and (conv.bias.sigmoid() == 0.5).all()


@pytest.mark.parametrize("prior_prob", [1e-4, 0.01, 0.5])
@pytest.mark.parametrize("shares", [[1.0], [0.5, 0.3, 0.2], [0.999, 0.0005, 0.0005], [0.1] * 10])
def test_each_class_starts_at_its_part_of_the_prior(prior_prob, shares):
    conv = nn.Conv2d(4, 2 * len(shares), 3)
    ClassFrequencyBiasInit(prior_prob=prior_prob, shares=shares)(conv, 2, len(shares))
    found = conv.bias.detach().double().sigmoid().view(2, -1)  # channel a·K + k
    expected = prior_prob * torch.tensor(shares, dtype=torch.float64)
    torch.testing.assert_close(found, expected.expand(2, -1), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.sum(dim=1), torch.full((2,), prior_prob, dtype=torch.float64), rtol=1e-5, atol=0)
    assert conv.bias.requires_grad


def test_equal_shares_are_the_prior_over_the_number_of_classes():
    ours, plain = nn.Conv2d(1, 8, 1), nn.Conv2d(1, 8, 1)
    ClassFrequencyBiasInit(prior_prob=0.04, shares=[0.25] * 4)(ours, 2, 4)
    PriorBiasInit(prior_prob=0.01)(plain, 2, 4)
    torch.testing.assert_close(ours.bias, plain.bias)


@pytest.mark.parametrize("shares", [[], [0.5, 0.6], [1.0, 0.0], [1.5, -0.5], [float("nan"), 1.0]])
def test_shares_must_be_shares(shares):
    with pytest.raises(ValueError, match="shares are"):
        ClassFrequencyBiasInit(shares=shares)


def test_a_share_for_each_class():
    with pytest.raises(ValueError, match="3 classes and 2 shares"):
        ClassFrequencyBiasInit(shares=[0.5, 0.5])(nn.Conv2d(1, 3, 1), 1, 3)
    with pytest.raises(ValueError, match=r"MODEL\.RETINANET\.PRIOR_PROB"):
        ClassFrequencyBiasInit(prior_prob=0.0, shares=[1.0])


def test_from_a_config():
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.MODEL.RETINANET.NUM_CLASSES = 3
    cfg.MODEL.FOCAL.BIAS_INIT.NAME = "ClassFrequencyBiasInit"
    with pytest.raises(ValueError, match=r"MODEL\.FOCAL\.CLASS_FREQUENCIES is empty"):
        build_bias_init(cfg)
    cfg.MODEL.FOCAL.CLASS_FREQUENCIES = [70, 20, 10]
    conv = nn.Conv2d(1, 3, 1)
    build_bias_init(cfg)(conv, 1, 3)
    torch.testing.assert_close(conv.bias.detach().sigmoid(), torch.tensor([0.007, 0.002, 0.001]))
    cfg.MODEL.FOCAL.BIAS_INIT.NAME = "ZeroBiasInit"
    assert isinstance(build_bias_init(cfg), ZeroBiasInit)
