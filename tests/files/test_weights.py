"""What is said of weights that are not there, or of another model."""

import pytest
import torch
from torch import nn

from focal_plugin.files.weights import compare, missing_file


def test_a_file_that_is_there_or_a_url(tmp_path):
    path = tmp_path / "a.pth"
    path.touch()
    for name in (str(path), f"{path}?matching_heuristics=True", "https://example.org/a.pth", "detectron2://a.pkl"):
        assert missing_file("MODEL.WEIGHTS", name) == ""


@pytest.mark.parametrize("name", ["nowhere.pth", "nowhere.pth?matching_heuristics=True", "folder", ""])
def test_no_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert missing_file("--weights", name, "a path") == (
        f"--weights is {name}, which is no file (current folder: {tmp_path}). Expected a path."
    )


def test_the_differences_are_those_of_load_state_dict():
    """PyTorch's own names of what is missing and unexpected, and its error for another shape."""
    found, model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    fit = compare(found.state_dict(), model.state_dict())
    assert fit.other_shapes == [("0.weight", (3, 2), (3, 4)), ("1.weight", (3,), (3, 3))]
    same = {name: value for name, value in found.state_dict().items() if name not in ("0.weight", "1.weight")}
    theirs = model.load_state_dict(same, strict=False)
    assert fit.unexpected == theirs.unexpected_keys
    assert fit.missing + ["0.weight", "1.weight"] == theirs.missing_keys
    assert fit.problems() == [
        "0.weight is (3, 2), expected (3, 4)",
        "1.weight is (3,), expected (3, 3)",
        "1.running_mean is of no part of the model",
        "1.running_var is of no part of the model",
    ]


def test_what_only_training_reads_is_no_problem():
    weights = {"normalizer.mean": torch.ones(()), "norm.num_batches_tracked": torch.zeros(())}
    assert compare(weights, {}).problems() == compare({}, weights).problems() == []
    assert compare({}, {"head.weight": torch.ones(2)}).problems() == ["head.weight is missing"]
