"""Anchors of other projects against those projects."""

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import _default_anchorgen

from focal_plugin import Anchors, Detectron1AnchorGenerator, TorchvisionAnchorGenerator

STRIDES = [8, 16, 32, 64, 128]


def features_of(height, width):
    """Empty maps as a pyramid has them over images of this size: two levels above the third, each half, rounded up."""
    sizes = [(height // s, width // s) for s in (8, 16, 32)]
    for _ in range(2):
        sizes.append(tuple((n + 1) // 2 for n in sizes[-1]))
    return [torch.zeros(1, 1, *size) for size in sizes]


@pytest.mark.parametrize("height, width", [(256, 384), (800, 1344), (32, 32), (96, 160), (1344, 800)])
def test_torchvision(height, width):
    reference = _default_anchorgen()
    ours = TorchvisionAnchorGenerator(
        sizes=reference.sizes, aspect_ratios=reference.aspect_ratios, strides=STRIDES, offset=0.0
    )
    features = features_of(height, width)
    images = ImageList(torch.zeros(1, 3, height, width), [(height, width)])
    (expected,) = reference(images, features)
    expected = expected.view(-1, 3, 3, 4).transpose(1, 2).reshape(-1, 4)  # ratios outside → sizes outside
    found = ours(features)
    assert [len(level) for level in found] == [9 * f[0, 0].numel() for f in features]
    assert torch.equal(torch.cat([level.tensor for level in found]), expected)
    assert ours.num_anchors == [9] * 5
    assert not ours.state_dict()


def test_torchvision_with_one_list_for_all_levels():
    reference = AnchorGenerator(((20, 31),) * 2, ((0.3, 1.7, 4.0),) * 2)
    ours = TorchvisionAnchorGenerator(sizes=[[20, 31]], aspect_ratios=[0.3, 1.7, 4.0], strides=[8, 16])
    for shapes, expected in zip(ours.shapes, reference.cell_anchors, strict=True):
        assert torch.equal(shapes, expected.view(3, 2, 4).transpose(0, 1).reshape(-1, 4))


def test_torchvisions_are_matched_one_by_one():
    """Their locations are not a stride apart, so a matcher must not look for them on a grid."""
    generator = TorchvisionAnchorGenerator(sizes=[[32]], aspect_ratios=[[1.0]], strides=STRIDES)
    assert Anchors.from_generator(generator, features_of(96, 160)).strides is None


def test_detectron1():
    """The anchors of stride 16 that Detectron's generate_anchors.py lists, counting pixels from 1, ends included."""
    listed = [[-83, -39, 100, 56], [-55, -55, 72, 72], [-35, -79, 52, 96]]  # of size 128
    listed += [[-175, -87, 192, 104], [-119, -119, 136, 136], [-79, -167, 96, 184]]  # of size 256
    listed += [[-359, -183, 376, 200], [-247, -247, 264, 264], [-167, -343, 184, 360]]  # of size 512
    ours = Detectron1AnchorGenerator(sizes=[[128, 256, 512]], aspect_ratios=[[0.5, 1.0, 2.0]], strides=[16])
    (found,) = ours([torch.zeros(1, 1, 1, 2)])
    expected = torch.tensor(listed) - torch.tensor([1, 1, 0, 0])
    assert torch.equal(found.tensor[:9], expected.float())
    assert torch.equal(found.tensor[9:], expected + torch.tensor([16.0, 0, 16, 0]))


@pytest.mark.parametrize("kind, offset", [(TorchvisionAnchorGenerator, 0.5), (Detectron1AnchorGenerator, 0.0)])
def test_no_other_offset(kind, offset):
    with pytest.raises(ValueError, match=r"MODEL\.ANCHOR_GENERATOR\.OFFSET"):
        kind(sizes=[[32]], aspect_ratios=[[1.0]], strides=[8], offset=offset)


@pytest.mark.parametrize(
    "sizes, aspect_ratios", [([[8], [16], [32]], [1.0]), ([8], [[1.0], [1.0], [1.0]]), ([], [1.0]), ([8], [[]])]
)
def test_lists_for_other_features_are_refused(sizes, aspect_ratios):
    with pytest.raises(ValueError, match=r"MODEL\.ANCHOR_GENERATOR has .* its 2 features; expected"):
        TorchvisionAnchorGenerator(sizes=sizes, aspect_ratios=aspect_ratios, strides=[8, 16])
