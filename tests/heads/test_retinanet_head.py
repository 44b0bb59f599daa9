import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import CycleBatchNormList, ShapeSpec
from torch import nn

from focal_plugin import FocalRetinaNetHead, PriorBiasInit, add_focal_config


def head(levels=2, norm="", **kwargs):
    arguments = {
        "input_shape": [ShapeSpec(channels=8, stride=8 << level) for level in range(levels)],
        "num_classes": 3,
        "num_anchors": 2,
        "conv_dims": [16, 16],
        "norm": norm,
        "bias_init": PriorBiasInit(prior_prob=0.01),
    }
    return FocalRetinaNetHead(**arguments | kwargs)


@pytest.mark.parametrize("norm", ["", "GN", "BN", lambda channels: nn.GroupNorm(4, channels)])
@pytest.mark.parametrize("num_classes, conv_dims", [(3, [32, 32]), (1, []), (80, [32])])
def test_output_shapes(norm, num_classes, conv_dims):
    features = [torch.rand(2, 8, 5, 7), torch.rand(2, 8, 1, 1)]
    logits, deltas = head(norm=norm, num_classes=num_classes, conv_dims=conv_dims).eval()(features)
    assert [x.shape for x in logits] == [(2, 2 * num_classes, 5, 7), (2, 2 * num_classes, 1, 1)]
    assert [x.shape for x in deltas] == [(2, 8, 5, 7), (2, 8, 1, 1)]


def test_the_start_is_the_papers():
    module = head(num_classes=80, conv_dims=[256, 256], num_anchors=9)
    convs = [conv for conv in module.modules() if isinstance(conv, nn.Conv2d)]
    assert len(convs) == 6
    for conv in convs:
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert conv is module.cls_score or not conv.bias.any()
    torch.testing.assert_close(module.cls_score.bias.detach().sigmoid(), torch.full((720,), 0.01))


def test_batch_norm_keeps_statistics_of_each_level():
    module = head(norm="BN").train()
    norms = [layer for layer in module.cls_subnet if isinstance(layer, CycleBatchNormList)]
    assert len(norms) == 2
    module([torch.zeros(2, 8, 4, 4), torch.full((2, 8, 2, 2), 1000.0)])
    coarse, fine = norms[0][1].running_mean.abs().mean(), norms[0][0].running_mean.abs().mean()
    assert coarse > 100 * fine


def test_the_levels_share_their_weights():
    x = torch.rand(1, 8, 4, 4)
    logits, deltas = head()([x, x])
    assert logits[0].equal(logits[1])
    assert deltas[0].equal(deltas[1])


def test_a_missing_level_is_refused():
    with pytest.raises(ValueError, match="built for 2 levels and was given 1"):
        head()([torch.rand(1, 8, 4, 4)])


def test_levels_must_have_as_many_anchors():
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64, 80]]
    with pytest.raises(ValueError, match=r"MODEL\.ANCHOR_GENERATOR gives \[3, 6\] anchors"):
        FocalRetinaNetHead(cfg, [ShapeSpec(channels=8, stride=8), ShapeSpec(channels=8, stride=16)])
