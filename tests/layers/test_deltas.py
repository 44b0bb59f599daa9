import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform

from focal_plugin.layers import AnchorDeltas


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0), (0.5, 2.0, 3.0, 7.0)])
@pytest.mark.parametrize("number", [0, 1, 100])
def test_deltas_are_detectron2s_to_the_last_bit(number, weights):
    corner, size = torch.rand(2, 2, number, 2) * 100
    anchors, boxes = torch.cat([corner, corner + size + 1e-3], dim=2)
    assert AnchorDeltas(weights).get_deltas(anchors, boxes).equal(Box2BoxTransform(weights).get_deltas(anchors, boxes))


def test_boxes_come_back():
    anchors, boxes = torch.tensor([[0.0, 0, 8, 16]]), torch.tensor([[4.0, -4, 8, 28]])
    transform = AnchorDeltas((1.0, 1.0, 1.0, 1.0))
    torch.testing.assert_close(transform.apply_deltas(transform.get_deltas(anchors, boxes), anchors), boxes)
