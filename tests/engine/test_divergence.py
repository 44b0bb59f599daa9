"""The account of a loss that is not finite names where it starts."""

import math

import pytest
import torch
from torch import nn

from focal_plugin.engine.divergence import DivergenceReport, find_cause, raise_if_diverged


class Head(nn.Module):
    """Gives what it is told to: logits of 2 anchors and 3 classes, and deltas, at two levels."""

    def __init__(self):
        super().__init__()
        self.logits = [torch.zeros(2, 6, 4, 4), torch.zeros(2, 6, 2, 2)]
        self.deltas = [torch.zeros(2, 8, 4, 4), torch.zeros(2, 8, 2, 2)]

    def forward(self):
        return self.logits, self.deltas


class Detector(nn.Module):
    num_classes = 3

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.head = Head()

    def forward(self, batch):
        self.head()
        raise AssertionError("what comes after the head is not to be computed again")


@pytest.fixture
def batch():
    return [
        {"image": torch.zeros(3, 8, 8), "file_name": "/images/a.png"},
        {"image": torch.zeros(3, 8, 8), "image_id": 7},
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_where_it_starts(batch, bad):
    model = Detector()
    model.head.deltas[0][1, 5, 3, 2] = bad
    assert "deltas: level 0, delta 1 of anchor 1, at (3, 2) of image 1" in find_cause(model, batch, model)
    model.head.logits[1][0, 4, 1, 0] = bad
    assert "logits: level 1, class 1 of anchor 1, at (1, 0) of image 0" in find_cause(model, batch, model)
    batch[0]["image"][0, 0, 0] = bad
    assert "/images/a.png" in find_cause(model, batch, model)
    with torch.no_grad():
        model.weight[1] = bad
    assert "weight" in find_cause(model, batch, model)


def test_in_the_losses(batch):
    model = Detector()
    assert "starts in the losses" in find_cause(model, batch, model)
    assert not model.head._forward_pre_hooks
    assert "starts in the losses" in find_cause(nn.Linear(1, 1), batch, lambda batch: None)  # no head to look at


def test_nothing_is_computed_while_all_is_well(batch):
    assert DivergenceReport.of({"loss_cls": 1.0, "loss_box_reg": 0.0}, None, batch, None) is None


def test_what_is_raised(batch):
    model = Detector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    raise_if_diverged(3, optimizer, [None, None])
    report = DivergenceReport.of({"loss_cls": math.nan, "loss_box_reg": 0.5}, model, batch, model)
    with pytest.raises(FloatingPointError) as error:
        raise_if_diverged(3, optimizer, [None, report])
    for text in ("iteration 3", "learning rate 0.01", "loss_cls nan, loss_box_reg 0.5", "/images/a.png, 7", "BASE_LR"):
        assert text in str(error.value)
