import re

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


NORMS = ["BN", "SyncBN", "GN", "LN", lambda channels: nn.GroupNorm(4, channels)]


@pytest.mark.parametrize("sharing", ["auto", "shared", "per_level"])
@pytest.mark.parametrize("norm", NORMS)
def test_what_the_levels_share_of_a_norm(norm, sharing):
    """By the names: one scale and shift or one for each level, and the same of what batch norm keeps."""
    module = head(norm=norm, norm_sharing=sharing, conv_dims=[32])
    names = [re.sub(r"^cls_subnet\.1\.", "", name) for name in module.state_dict() if name.startswith("cls_subnet.1.")]
    kept = ["running_mean", "running_var", "num_batches_tracked"] if norm in ("BN", "SyncBN") else []
    of_each = [f"{level}.{key}" for level in (0, 1) for key in kept]
    expected = {
        "auto": ["weight", "bias", *of_each],
        "shared": ["weight", "bias", *kept],
        "per_level": [f"{level}.{key}" for level in (0, 1) for key in ["weight", "bias", *kept]],
    }
    assert names == expected[sharing]


@pytest.mark.parametrize("norm", NORMS[2:])
def test_a_norm_of_its_own_for_each_level(norm):
    """Each level's output is that of a head for this level alone with the norms of this level."""
    module = head(norm=norm, norm_sharing="per_level", conv_dims=[32, 32])
    state = {name: torch.randn_like(value) for name, value in module.state_dict().items()}
    module.load_state_dict(state)
    features = [torch.rand(2, 8, 5, 7), torch.rand(2, 8, 3, 3)]
    outputs = [module(features) for _ in range(2)]  # the second time as the first
    for level, x in enumerate(features):
        alone = head(levels=1, norm=norm, norm_sharing="shared", conv_dims=[32, 32])
        names = {re.sub(rf"(subnet\.\d+)\.{level}\.", r"\1.", name): name for name in state}
        alone.load_state_dict({name: state[names[name]] for name in alone.state_dict()})
        (logits,), (deltas,) = alone([x])
        for found in outputs:
            torch.testing.assert_close(found[0][level], logits)
            torch.testing.assert_close(found[1][level], deltas)


@pytest.mark.parametrize("sharing", ["shared", "per_level"])
def test_statistics_that_are_shared_or_not(sharing):
    module = head(norm="BN", norm_sharing=sharing, conv_dims=[4]).train()
    module([torch.zeros(2, 8, 4, 4), torch.full((2, 8, 2, 2), 1000.0)])
    norm = module.cls_subnet[1]
    if sharing == "shared":
        assert norm.num_batches_tracked == 2
    else:
        assert [one.num_batches_tracked.item() for one in norm] == [1, 1]
        assert norm[1].running_mean.abs().mean() > 100 * norm[0].running_mean.abs().mean()


def test_sharing_is_one_of_three_and_comes_from_the_config():
    with pytest.raises(ValueError, match=r"MODEL\.FOCAL\.HEAD\.NORM_SHARING \(norm_sharing\) is 'all'"):
        head(norm="GN", norm_sharing="all")
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.MODEL.RETINANET.NORM = "GN"
    cfg.MODEL.FOCAL.HEAD.NORM_SHARING = "per_level"
    module = FocalRetinaNetHead(cfg, [ShapeSpec(channels=64, stride=8 << level) for level in range(5)])
    assert len(module.bbox_subnet[1]) == 5


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
