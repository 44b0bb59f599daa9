"""Pictures with their detections."""

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances

from focal_plugin.deploy import media


@pytest.mark.parametrize(("most", "shape"), [(40_000_000, (300, 400, 3)), (30_000, (150, 200, 3))])
def test_huge_images_are_drawn_smaller(monkeypatch, most, shape):
    monkeypatch.setattr(media, "_MOST_PIXELS", most)
    boxes = torch.tensor([[40.0, 60.0, 200.0, 240.0]])
    found = Instances((300, 400), pred_boxes=Boxes(boxes), scores=torch.ones(1), pred_classes=torch.zeros(1).long())
    drawn = media.draw(np.zeros((300, 400, 3), np.uint8), found, Metadata())
    assert drawn.shape == shape
    changed = (drawn[:, :, :].max(axis=2) > 30).nonzero()
    corners = np.array([changed[1].min(), changed[1].max(), changed[0].max()]) * (300 / shape[0])  # the label is above
    np.testing.assert_allclose(corners, [40, 200, 240], atol=8)
    torch.testing.assert_close(found.pred_boxes.tensor, boxes)  # as it was
