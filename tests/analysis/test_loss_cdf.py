"""The curves are those of sorted losses, and come out of a checkpoint by the command line."""

import csv

import cv2
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from focal_plugin.analysis.__main__ import main
from focal_plugin.analysis.loss_cdf import WrongnessHistogram, add_image
from focal_plugin.config import ConfigError
from focal_plugin.config.load import load_config
from focal_plugin.losses.functional import sigmoid_focal_loss
from focal_plugin.structures import DenseTargets


def histogram(wrongness):
    counted = WrongnessHistogram()
    for part in np.array_split(wrongness, 3):
        counted.add(torch.tensor(part))
    return counted


def sorted_losses(wrongness, gamma):
    """The negatives' focal losses, easiest first, as in fvcore's formula in float64."""
    p = 1 / (1 + np.exp(-np.asarray(wrongness, dtype=np.float64)))
    return np.sort(-(p**gamma) * np.log1p(-p))


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2, 5])
def test_the_distribution_of_known_losses(gamma):
    wrongness = np.random.default_rng(0).normal(-3, 2, 4000)
    losses = sorted_losses(wrongness, gamma)
    expected = np.cumsum(losses) / losses.sum()
    counted = histogram(wrongness)
    fractions = np.arange(1, 4001) / 4000
    np.testing.assert_allclose(counted.cumulative_loss(gamma, fractions), expected, atol=(1 + gamma) / 2048)
    for share in (0.01, 0.1, 0.2):
        hardest = losses[round(4000 * (1 - share)) :].sum() / losses.sum()
        assert counted.hardest(gamma, share) == pytest.approx(hardest, abs=(1 + gamma) / 2048)
    assert len(counted) == 4000 and counted.beyond == 0


def test_by_hand():
    """Losses of .1, .2 and .7 in all, each a third of the examples."""
    wrongness = np.log(np.expm1([0.1, 0.2, 0.7]))  # softplus⁻¹: γ = 0
    np.testing.assert_allclose(
        histogram(wrongness).cumulative_loss(0, [0, 1 / 3, 0.5, 2 / 3, 1]), [0, 0.1, 0.2, 0.3, 1], atol=1e-3
    )


def test_equal_losses_make_a_straight_line():
    np.testing.assert_allclose(histogram(np.full(50, -2.0)).cumulative_loss(2, [0.25, 0.5]), [0.25, 0.5], atol=1e-12)


def test_extremes():
    counted = histogram(np.array([-1e4, -np.inf, -70.0, 70.0, np.inf, 0.0]))
    assert counted.beyond == 5
    for gamma in (0, 2, 20):
        shares = counted.cumulative_loss(gamma, [0, 0.5, 1])
        assert np.isfinite(shares).all() and shares[0] == 0 and shares[-1] == pytest.approx(1)
    assert np.isnan(WrongnessHistogram().cumulative_loss(2, [0.5])).all()
    with pytest.raises(ConfigError, match="NaN"):
        counted.add(torch.tensor([float("nan")]))


def test_examples_of_an_image():
    """Each (anchor, class) pair that is not ignored, with −x for a positive."""
    logits = [torch.randn(1, 2, 3, 4, 5), torch.randn(1, 2, 3, 2, 2)]
    labels = [torch.randint(-1, 4, (1, 2, 4, 5)), torch.randint(-1, 4, (1, 2, 2, 2))]
    empty = torch.zeros(0, 4)
    found = {"positive": WrongnessHistogram(), "negative": WrongnessHistogram()}
    add_image(found, logits, DenseTargets(labels, 3, [torch.zeros(0, dtype=torch.int64)] * 2, empty, empty))
    expected = {"positive": [], "negative": []}
    for level, level_labels in zip(logits, labels):
        for a, y, x in np.ndindex(*level_labels[0].shape):
            for k in range(3) if level_labels[0, a, y, x] != -1 else []:
                value = level[0, a, k, y, x].item()
                positive = level_labels[0, a, y, x] == k
                expected["positive" if positive else "negative"].append(-value if positive else value)
    for kind, values in expected.items():
        np.testing.assert_array_equal(found[kind].counts, histogram(np.float32(values)).counts)


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    model = build_model(load_config(tiny_config, ["MODEL.DEVICE", "cpu"]))
    with torch.no_grad():
        model.head.cls_score.weight.normal_(std=0.5)
    DetectionCheckpointer(model, str(tmp_path)).save("trained")
    return str(tmp_path / "trained.pth")


def test_command(tiny_config, checkpoint, tmp_path, capsys):
    words = [
        "loss-cdf",
        "--config-file",
        tiny_config,
        "--weights",
        checkpoint,
        "--gamma",
        "0",
        "2",
        "--num-images",
        "3",
    ]
    assert main([*words, "MODEL.DEVICE", "cpu"]) == 0
    assert "hardest 1% (%)" in capsys.readouterr().out
    folder = tmp_path / "output" / "analysis"
    assert cv2.imread(str(folder / "loss_cdf_test.png")).std() > 5
    with (folder / "loss_cdf_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 1001
    by_key = {(row["examples"], float(row["gamma"]), float(row["fraction"])): row for row in rows}
    focused, plain = (float(by_key["negative", gamma, 0.9]["hardest_share"]) for gamma in (2, 0))
    assert 0.1 < plain < focused <= 1
    assert float(by_key["positive", 0, 0.99]["hardest_fraction"]) == pytest.approx(0.01)

    before = (folder / "loss_cdf_test.csv").read_bytes()
    assert main([*words, "--split", "train", "--output", str(folder), "MODEL.DEVICE", "cpu"]) == 0
    assert main([*words, "MODEL.DEVICE", "cpu"]) == 0  # nothing is overwritten
    assert (folder / "loss_cdf_test.csv").read_bytes() == before
    assert (folder / "loss_cdf_test-2.png").exists() and (folder / "loss_cdf_train.csv").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "No weights"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["--weights", "CHECKPOINT", "--gamma", "-1"], "--gamma"),
        (["--weights", "CHECKPOINT", "--num-images", "-1"], "--num-images"),
        (["--weights", "CHECKPOINT", "DATASETS.TEST", "()"], "DATASETS.TEST"),
        (["--weights", "CHECKPOINT", "DATASETS.TEST", "('other',)"], "other"),
        (["--weights", "CHECKPOINT", "MODEL.META_ARCHITECTURE", "RetinaNet"], "MODEL.META_ARCHITECTURE"),
    ],
)
def test_mistakes(tiny_config, checkpoint, capsys, words, message):
    words = [checkpoint if word == "CHECKPOINT" else word for word in words]
    assert main(["loss-cdf", "--config-file", tiny_config, *words]) == 2
    assert message in capsys.readouterr().err


def test_the_functional_loss_agrees():
    """That wrongness is all that counts: the package's own loss on positives and negatives."""
    x = torch.linspace(-8, 8, 33, dtype=torch.float64)
    for gamma in (0.0, 0.5, 2.0):
        positive = sigmoid_focal_loss(x, torch.ones_like(x), gamma=gamma).sort().values
        negative = sigmoid_focal_loss(x, torch.zeros_like(x), gamma=gamma).sort().values
        np.testing.assert_allclose(positive, sorted_losses(-x.numpy(), gamma))
        np.testing.assert_allclose(negative, sorted_losses(x.numpy(), gamma))
