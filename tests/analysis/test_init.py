"""The first step's loss: closed forms by hand, what is flagged and what passes."""

import json
import math

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from focal_plugin import SigmoidFocalLoss, SmoothL1BoxLoss
from focal_plugin.analysis.__main__ import main
from focal_plugin.analysis.common import read_config
from focal_plugin.analysis.init import find_problems, first_step
from focal_plugin.config.load import load_config


def step_of(tiny_config, *opts):
    return first_step(load_config(tiny_config, ["MODEL.DEVICE", "cpu", *opts]))


def by_hand(step, prior, alpha, gamma):
    """A positive anchor has one positive and K − 1 negative classes, a background anchor K negative ones."""
    weight_1, weight_0 = (1, 1) if alpha == -1 else (alpha, 1 - alpha)
    of_positive = -weight_1 * (1 - prior) ** gamma * math.log(prior)
    of_negative = -weight_0 * prior**gamma * math.log(1 - prior)
    elements = (step.num_anchors - step.num_ignored) * step.num_classes
    positives = step.num_positives
    background = (step.num_anchors - step.num_ignored - positives) * step.num_classes * of_negative
    total = positives * of_positive + (elements - positives) * of_negative
    return total / positives, background / total


@pytest.mark.parametrize("prior", [0.01, 0.1, 0.5])
@pytest.mark.parametrize(
    ("name", "alpha", "gamma"),
    [
        ("SigmoidFocalLoss", 0.25, 2.0),
        ("SigmoidFocalLoss", -1, 0.5),
        ("AlphaBalancedBCELoss", 0.75, 0.0),
        ("BCELoss", -1, 0.0),
    ],
)
def test_closed_forms(tiny_config, name, alpha, gamma, prior):
    opts = ["MODEL.RETINANET.FOCAL_LOSS_ALPHA", float(alpha), "MODEL.RETINANET.FOCAL_LOSS_GAMMA", gamma]
    step = step_of(tiny_config, "MODEL.FOCAL.CLS_LOSS.NAME", name, "MODEL.RETINANET.PRIOR_PROB", prior, *opts)
    assert step.num_positives > 0
    total, share = by_hand(step, prior, alpha, gamma)
    assert step.expected == pytest.approx(total, rel=1e-4)
    assert step.textbook == pytest.approx(total, rel=1e-6)
    assert step.background_share == pytest.approx(share, rel=1e-4, abs=1e-6)  # a difference of float32 sums
    assert step.at_papers_prior == pytest.approx(by_hand(step, 0.01, alpha, gamma)[0], rel=1e-4)
    assert step.observed == pytest.approx(total, rel=0.25)
    assert step.prior == pytest.approx(prior)
    assert prior > 0.01 or find_problems(step, 0.25) == []


def test_a_hinge_by_hand(tiny_config):
    """No formula is known for it; the margin is .9: a background class has no loss while π is below .1."""
    step = step_of(tiny_config, "MODEL.FOCAL.CLS_LOSS.NAME", "HingeLoss")
    assert step.textbook is None
    assert step.expected == pytest.approx(0.89, rel=1e-4)  # .9 − .01, of each positive
    assert step.background_share == pytest.approx(0, abs=1e-6)  # a difference of float32 sums


@pytest.mark.parametrize("name", ["FocalLossStar", "OHEMLoss", "SampledBCELoss", "QualityFocalLoss", "VarifocalLoss"])
def test_every_kind_of_loss(tiny_config, name):
    step = step_of(tiny_config, "MODEL.FOCAL.CLS_LOSS.NAME", name)
    assert math.isfinite(step.expected) and step.observed == pytest.approx(step.expected, rel=0.25)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_box_loss_that_is_not_finite(tiny_config, monkeypatch, bad):
    forward = SmoothL1BoxLoss.forward
    monkeypatch.setattr(SmoothL1BoxLoss, "forward", lambda self, *args: forward(self, *args) + bad)
    (problem,) = find_problems(step_of(tiny_config), 0.25)
    assert problem.startswith(f"loss_box_reg is {bad}: look at MODEL.FOCAL.BOX_LOSS")


def test_a_loss_that_is_no_number(tiny_config, monkeypatch):
    forward = SigmoidFocalLoss.forward
    monkeypatch.setattr(SigmoidFocalLoss, "forward", lambda self, *args: forward(self, *args).repeat(3))
    with pytest.raises(TypeError, match=r"The class loss SigmoidFocalLoss gave .* \(3,\); expected one number"):
        step_of(tiny_config)


def test_more_classes(tiny_config, monkeypatch):
    monkeypatch.setattr("focal_plugin.analysis.init.check_num_classes", lambda cfg: None)
    step = step_of(tiny_config, "MODEL.RETINANET.NUM_CLASSES", 80)
    assert step.num_classes == 80
    assert step.expected == pytest.approx(by_hand(step, 0.01, 0.25, 2)[0], rel=1e-4)


def run(tiny_config, *words):
    return main(["init", "--config-file", tiny_config, *words, "MODEL.DEVICE", "cpu"])


def test_the_papers_prior_passes(tiny_config, tmp_path, capsys):
    assert run(tiny_config) == 0
    out = capsys.readouterr().out
    assert "as expected" in out and "prior 0.01" in out
    content = json.loads((tmp_path / "output" / "analysis" / "init.json").read_text())
    assert content["problems"] == [] and content["expected"] > 0


@pytest.mark.parametrize(
    "opts",
    [
        ["MODEL.RETINANET.PRIOR_PROB", "0.5"],
        ["MODEL.FOCAL.BIAS_INIT.NAME", "ZeroBiasInit"],
        ["MODEL.RETINANET.PRIOR_PROB", "0.5", "MODEL.FOCAL.CLS_LOSS.NAME", "BCELoss"],
    ],
)
def test_a_prior_of_a_half_is_flagged(tiny_config, tmp_path, capsys, opts):
    assert main(["init", "--config-file", tiny_config, "MODEL.DEVICE", "cpu", *opts]) == 1
    out = capsys.readouterr().out
    assert "WRONG: At the prior of 0.5" in out and "times that at a prior of 0.01" in out and "PriorBiasInit" in out
    content = json.loads((tmp_path / "output" / "analysis" / "init.json").read_text())
    assert content["background_share"] > 0.9 and len(content["problems"]) == 1


def test_a_trained_classifier_is_not_the_first_step(tiny_config, tmp_path, capsys):
    model = build_model(load_config(tiny_config, ["MODEL.DEVICE", "cpu"]))
    torch.nn.init.constant_(model.head.cls_score.bias, -2.0)
    DetectionCheckpointer(model, str(tmp_path)).save("trained")
    assert run(tiny_config, "--weights", str(tmp_path / "trained.pth")) == 1
    assert "MODEL.WEIGHTS holds a trained classifier" in capsys.readouterr().out


def test_logits_that_leave_the_bias(tiny_config, tmp_path, capsys):
    model = build_model(load_config(tiny_config, ["MODEL.DEVICE", "cpu"]))
    torch.nn.init.normal_(model.head.cls_score.weight, std=20.0)
    DetectionCheckpointer(model, str(tmp_path)).save("wild")
    assert run(tiny_config, "--weights", str(tmp_path / "wild.pth")) == 1
    assert "The logits differ from the bias by" in capsys.readouterr().out


def test_not_finite(tiny_config, capsys):
    assert run(tiny_config, "MODEL.PIXEL_STD", "[1e-45, 1e-45, 1e-45]") == 1
    assert "not" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
        (["DATASETS.TRAIN", "('other',)"], "'other'"),
        (["--tolerance", "0"], "--tolerance"),
        (["MODEL.META_ARCHITECTURE", "RetinaNet"], "MODEL.META_ARCHITECTURE"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_mistakes(tiny_config, capsys, words, message):
    assert run(tiny_config, *words) == 2
    assert message in capsys.readouterr().err


def test_data_that_are_not_there(tiny_config, tmp_path, capsys):
    (tmp_path / "shapes_train.json").unlink()
    assert run(tiny_config) == 2
    assert "shapes_train.json" in capsys.readouterr().err


def test_weights_of_the_command_line_win(tiny_config):
    class Args:
        config_file, opts, weights = tiny_config, ["MODEL.WEIGHTS", "a.pth"], "b.pth"

    assert read_config(Args).MODEL.WEIGHTS == "b.pth"
