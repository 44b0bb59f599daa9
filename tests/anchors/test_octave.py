import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import build_anchor_generator

from focal_plugin import add_focal_config


def generator(scales, sizes=((32, 40, 50), (64, 80, 100)), name="OctaveAnchorGenerator"):
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.MODEL.ANCHOR_GENERATOR.NAME = name
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [list(level) for level in sizes]
    cfg.MODEL.ANCHOR_GENERATOR.OFFSET = 0.5
    cfg.MODEL.FOCAL.ANCHORS.SCALES_PER_OCTAVE = scales
    return build_anchor_generator(cfg, [ShapeSpec(stride=8), ShapeSpec(stride=16)])


SIZES = {1: [1], 2: [1, 2**0.5], 3: [1, 2 ** (1 / 3), 2 ** (2 / 3)], 4: [1, 2**0.25, 2**0.5, 2**0.75]}


@pytest.mark.parametrize(("scales", "sizes"), SIZES.items())
def test_it_is_detectron2s_with_these_sizes(scales, sizes):
    ours = generator(scales)
    theirs = generator(1, [[s * size for size in sizes] for s in (32, 64)], name="DefaultAnchorGenerator")
    features = [torch.zeros(1, 1, 4, 6), torch.zeros(1, 1, 2, 3)]
    for found, expected in zip(ours(features), theirs(features), strict=True):
        assert len(found) == len(expected) > 0
        torch.testing.assert_close(found.tensor, expected.tensor)


def test_one_range_of_sizes_serves_all_levels():
    """As in Detectron2, where one list of sizes is repeated."""
    assert [len(cell) for cell in generator(2, [[32]]).cell_anchors] == [6, 6]


def test_no_scales():
    with pytest.raises(ValueError, match=r"MODEL\.FOCAL\.ANCHORS\.SCALES_PER_OCTAVE is 0; expected 1 or more"):
        generator(0)
