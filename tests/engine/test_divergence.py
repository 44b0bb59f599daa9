"""The account of a loss or gradient that is not finite names where it starts."""

import json
import math
import os
import shlex
from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, Instances
from torch import nn

from focal_plugin.engine.divergence import (
    Divergence,
    DivergenceReport,
    find_cause,
    find_cause_in_gradients,
    recorded_divergence,
)


class Head(nn.Module):
    """Gives what it is told to: logits of 2 anchors and 3 classes, and deltas, at two levels."""

    def __init__(self):
        super().__init__()
        self.logits = [torch.zeros(2, 6, 4, 4), torch.zeros(2, 6, 2, 2)]
        self.deltas = [torch.zeros(2, 8, 4, 4), torch.zeros(2, 8, 2, 2)]

    def forward(self, features):
        return self.logits, self.deltas


class Dense(DenseDetector):
    """A dense detector of Detectron2's without a network: its head needs no features."""

    num_classes = 3
    pixel_mean = torch.zeros(1)  # where the model's device is read
    head_in_features = ()

    def __init__(self):
        nn.Module.__init__(self)
        self.backbone = lambda images: {}

    def preprocess_image(self, batch):
        return SimpleNamespace(tensor=None)


class Detector(Dense):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.head = Head()

    def forward_training(self, *args):
        raise AssertionError("what comes after the head is not to be computed again")


@pytest.fixture
def batch():
    return [
        {"image": torch.zeros(3, 8, 8), "file_name": "/images/a.png", "instances": Instances((8, 8))},
        {
            "image": torch.zeros(3, 8, 8),
            "image_id": 7,
            "instances": Instances((8, 8), gt_boxes=Boxes(torch.ones(1, 4))),
        },
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_where_it_starts(batch, bad):
    model = Detector()
    model.head.deltas[0][1, 5, 3, 2] = bad
    assert "deltas: level 0, delta 1 of anchor 1, at (3, 2) of 7" in find_cause(model, [batch])
    model.head.logits[1][0, 4, 1, 0] = bad
    assert "logits: level 1, class 1 of anchor 1, at (1, 0) of /images/a.png" in find_cause(model, [batch])
    batch[1]["instances"].gt_boxes.tensor[0, 2] = bad
    assert find_cause(model, [batch[:1], batch[1:]]) == "A box of 7 is not finite."
    batch[0]["image"][0, 0, 0] = bad
    assert find_cause(model, [batch]) == "A pixel of /images/a.png is not finite."
    with torch.no_grad():
        model.weight[1] = bad
    assert "The weight weight is not finite" in find_cause(model, [batch])


def test_nothing_before_the_losses(batch):
    model = Detector()
    assert find_cause(model, [batch]) == ""
    assert find_cause(nn.Linear(1, 1), [batch]) == ""  # no head to look at


class Root(Dense):
    """A detector whose class loss is the sum of the square roots of 6-channel logits: of 0 its gradient is infinite."""

    def __init__(self, zero=None):
        super().__init__()
        self.head = Levels(zero)
        self.scale = nn.Parameter(torch.ones(()))
        self.factor = 0.0

    def forward_training(self, images, features, outputs, gt_instances):
        loss_box_reg = (self.scale * self.factor).sqrt()
        return {"loss_cls": sum(level.sqrt().sum() for level in outputs[0]), "loss_box_reg": loss_box_reg}


class Levels(nn.Module):
    """Logits of 4 at two levels, but for one that is 0."""

    def __init__(self, zero):
        super().__init__()
        self.bias = nn.Parameter(torch.full((6,), 4.0))
        self.zero = zero

    def forward(self, features):
        logits = [self.bias.view(1, 6, 1, 1) * torch.ones(2, 6, 3, 3) for _ in range(2)]
        if self.zero is not None:
            level, where = self.zero
            mask = torch.ones(2, 6, 3, 3)
            mask[where] = 0
            logits[level] = logits[level] * mask
        return logits, None


def test_in_the_gradients(batch):
    found = find_cause_in_gradients(Root(zero=(1, (0, 5, 2, 1))), [batch], 1.0)
    assert "gradient by the head's logits: level 1, class 2 of anchor 1, at (2, 1) of /images/a.png" in found
    assert "the gradient of the weight scale is not finite" in find_cause_in_gradients(Root(), [batch], 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_in_a_loss_on_finite_outputs(batch, bad):
    """Whatever the weights are called that its gradient reaches first."""
    model = Root()
    model.factor = bad
    found = find_cause_in_gradients(model, [batch], 1.0)
    assert found == "It starts in loss_box_reg: weights, images, boxes and the head's outputs are finite."


class OneLoss(nn.Linear):
    """A model that is no dense detector and returns a tensor."""

    def forward(self, batch):
        return self.weight.sum()


def test_not_in_the_gradients(batch):
    assert "it starts in the losses" in find_cause_in_gradients(OneLoss(1, 1), [batch], 1.0)


def test_what_is_raised(tmp_path):
    images = ["/images/a.png", "7"]
    report = DivergenceReport(1, {"loss_cls": math.nan, "loss_box_reg": 0.5}, images, "It starts here.", "/out/b.pth")
    error = Divergence(3, 0.01, [report])
    assert isinstance(error, FloatingPointError)
    for text in ("Loss", "iteration 3", "learning rate 0.01", "loss_cls nan, loss_box_reg 0.5", "/images/a.png, 7"):
        assert text in str(error)
    assert "python -m focal_plugin replay /out/b.pth" in str(error) and "BASE_LR" in str(error)
    assert "A gradient became" in str(Divergence(3, 0.01, [DivergenceReport(0, {"loss_cls": 0.5}, images, "")]))
    error.save(str(tmp_path / "diverged.json"))
    saved = json.loads((tmp_path / "diverged.json").read_text())
    assert saved["iteration"] == 3 and saved["losses"] == {"loss_cls": "nan", "loss_box_reg": 0.5}
    assert saved["images"] == images and saved["cause"] == "It starts here."


def test_what_is_left_behind(tmp_path):
    (tmp_path / "diverged.json").write_text("of an earlier attempt")
    report = DivergenceReport(0, {"loss_cls": math.nan, "loss_box_reg": 0.5}, ["/images/a.png"], "It starts there.")
    with recorded_divergence(str(tmp_path)):
        assert not (tmp_path / "diverged.json").exists()
    with pytest.raises(Divergence), recorded_divergence(str(tmp_path)):
        raise Divergence(3, 0.01, [report])
    record = json.loads((tmp_path / "diverged.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert (record["iteration"], record["learning_rate"], record["cause"]) == (3, 0.01, "It starts there.")
    assert record["losses"] == {"loss_cls": "nan", "loss_box_reg": 0.5}


class Killed(BaseException):
    """The process ends here."""


def test_the_record_is_whole_or_not_there(tmp_path, monkeypatch):
    def killed(*args):
        raise Killed

    monkeypatch.setattr(os, "replace", killed)
    error = Divergence(3, 0.01, [DivergenceReport(0, {"loss_cls": math.nan}, ["a.png"], "")])
    with pytest.raises(Killed):
        error.save(str(tmp_path / "diverged.json"))
    assert not (tmp_path / "diverged.json").exists()


def test_a_record_that_cannot_be_written_does_not_hide_what_happened(tmp_path, caplog):
    with pytest.raises(Divergence), recorded_divergence(str(tmp_path / "gone")):
        raise Divergence(3, 0.01, [DivergenceReport(0, {"loss_cls": math.nan}, ["a.png"], "")])
    assert "diverged.json could not be written" in caplog.text


def test_the_command_for_a_folder_with_spaces():
    report = DivergenceReport(0, {"loss_cls": math.nan}, ["a.png"], "", "/my runs/b.pth")
    (line,) = [line for line in str(Divergence(3, 0.01, [report])).splitlines() if " replay " in line]
    assert shlex.split(line)[-1] == "/my runs/b.pth"
