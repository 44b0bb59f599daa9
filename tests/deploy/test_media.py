"""Pictures with their detections."""

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from matplotlib.colors import to_rgb

from focal_plugin.deploy import media
from focal_plugin.evaluation.style import class_color


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


def test_labels_are_a_choice():
    """The more text, the more pixels differ from the boxes alone, which leave the objects as they are."""
    boxes = Boxes(torch.tensor([[40.0, 60.0, 200.0, 240.0], [250.0, 20.0, 262.0, 32.0]]))
    found = Instances((300, 400), pred_boxes=boxes, scores=torch.ones(2), pred_classes=torch.tensor([0, 1]))
    image, metadata = np.full((300, 400, 3), 90, np.uint8), Metadata(thing_classes=["a long name", "another"])
    drawn = {labels: media.draw(image, found, metadata, labels) for labels in media.LABELS}
    np.testing.assert_array_equal(drawn["none"][68:232, 48:192], image[68:232, 48:192])
    changed = {labels: (picture != drawn["none"]).any(axis=2).sum() for labels, picture in drawn.items()}
    assert changed["all"] > 1.5 * changed["score"] > 100


def test_a_class_has_one_colour_in_all_pictures():
    """Also in one where other classes are, or are not."""
    image, box = np.zeros((300, 400, 3), np.uint8), [40.0, 60.0, 200.0, 240.0]
    for k in (0, 3, 17):
        for others in ([], [(k + 1) % 18]):
            boxes = Boxes(torch.tensor([box, *[[300.0, 20.0, 350.0, 70.0]] * len(others)]))
            found = Instances((300, 400), pred_boxes=boxes, scores=torch.ones(len(boxes)))
            found.pred_classes = torch.tensor([k, *others])
            edge = media.draw(image, found, Metadata(), "none")[150, 36:45]
            rgb = np.array(to_rgb(class_color(k)))
            np.testing.assert_allclose(edge[edge.sum(axis=1).argmax()] / max(edge.max(), 1), rgb / rgb.max(), atol=0.05)


def test_scores_are_written_as_everywhere_else(monkeypatch):
    """As 0.82, which --score-thresh takes, and not as 82%."""
    drawn = []
    monkeypatch.setattr(media.Visualizer, "draw_text", lambda self, text, *args, **kwargs: drawn.append(text))
    found = Instances(
        (60, 60), pred_boxes=Boxes(torch.tensor([[5.0, 5, 30, 30]] * 2)), pred_classes=torch.tensor([0, 1])
    )
    found.scores = torch.tensor([0.824, 0.05])
    metadata = Metadata(thing_classes=["big cat", "dog"])
    for labels in ("all", "score", "none"):
        media.draw(np.zeros((60, 60, 3), np.uint8), found, metadata, labels)
    assert sorted(drawn) == sorted(["big cat 0.82", "dog 0.05", "0.82", "0.05"])
