import pytest
import torch
from torch import nn

from focal_plugin import PriorBiasInit


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
