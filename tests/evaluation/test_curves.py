"""metrics.json is read in the order of the steps, whatever the restarts, and drawn."""

import json
import re

import cv2
import pytest

from focal_plugin.evaluation.curves import read_metrics, save_curves


@pytest.fixture
def write(tmp_path):
    def write(*lines):
        path = tmp_path / "metrics.json"
        path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
        return str(path)

    return write


def step(iteration, loss):
    return {"iteration": iteration, "total_loss": loss, "loss_cls": loss / 2, "loss_box_reg": loss / 2, "lr": 0.01}


def test_series_in_order(write):
    path = write(step(0, 4.0), step(19, 2.0), {"iteration": 20, "bbox/AP": 7.5}, step(39, 1.0))
    series = read_metrics(path)
    assert series["total_loss"] == ([0, 19, 39], [4.0, 2.0, 1.0])
    assert series["bbox/AP"] == ([20], [7.5])


@pytest.mark.parametrize(
    ("again", "iterations", "losses"),
    [
        ([step(39, 7.0), step(59, 6.0)], [19, 39, 59], [3.0, 7.0, 6.0]),  # resumed from a checkpoint of before 39
        ([step(19, 9.0)], [19], [9.0]),  # started again
    ],
)
def test_what_is_done_again_replaces_what_was_there(write, again, iterations, losses):
    path = write(step(19, 3.0), step(39, 2.0), step(59, 1.0), *again)
    assert read_metrics(path)["total_loss"] == (iterations, losses)


def test_a_line_that_was_cut_off(write):
    assert read_metrics(write(step(19, 3.0), '{"iteration": 39, "tot'))["total_loss"] == ([19], [3.0])


@pytest.mark.parametrize("line", [{"total_loss": 1.0}, {"iteration": "9"}, [], 7])
def test_a_line_of_something_else(write, line):
    path = write(step(19, 3.0), line)
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: ") + ".*iteration"):
        read_metrics(path)


@pytest.mark.parametrize(
    ("metrics", "panels"),
    [({}, 2), ({"bbox/AP": 1.0, "bbox/AP50": 2.0}, 3), ({"a/bbox/AP": float("nan"), "b/bbox/AP": 3.0}, 3)],
    ids=["no evaluation", "one set", "two sets"],
)
def test_a_panel_each(write, tmp_path, metrics, panels):
    path = write(step(0, 4.0), step(19, 2.0), {"iteration": 20, **metrics})
    save_curves(str(tmp_path / "curves.png"), path)
    height, width, _ = cv2.imread(str(tmp_path / "curves.png")).shape
    assert round(width / height / (4.4 / 3.4)) == panels


def test_an_empty_file(write, tmp_path):
    save_curves(str(tmp_path / "curves.png"), write())
    assert cv2.imread(str(tmp_path / "curves.png")) is not None
