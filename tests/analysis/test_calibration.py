"""The temperature is the one that made the scores, and comes out of a run's folder by the command line."""

import json

import numpy as np
import pytest

from focal_plugin.analysis.__main__ import main
from focal_plugin.analysis.calibration import at_temperature, best_temperature, measure
from focal_plugin.config import ConfigError


def drawn(temperature, count=40_000, seed=0):
    """Scores σ(x) of detections that are right with probability σ(x/T)."""
    generator = np.random.default_rng(seed)
    x = generator.normal(0.3, 1.5, count)
    return 1 / (1 + np.exp(-x)), generator.random(count) < 1 / (1 + np.exp(-x / temperature))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_that_made_the_scores(temperature):
    scores, right = drawn(temperature)
    assert best_temperature(scores, right) == pytest.approx(temperature, rel=0.05)


def test_it_has_the_least_log_loss():
    scores, right = drawn(2.5, count=300)

    def log_loss(temperature):
        p = 1 / (1 + np.exp(-np.log(scores / (1 - scores)) / temperature))
        return -np.log(np.where(right, p, 1 - p)).mean()

    grid = np.geomspace(0.2, 20, 2001)
    assert best_temperature(scores, right) == pytest.approx(grid[np.argmin([log_loss(t) for t in grid])], rel=0.005)


def test_a_temperature_keeps_the_order_and_the_ends_finite():
    scores = np.array([0.0, 0.2, 0.5, 0.9, 1.0])
    turned = at_temperature(scores, 3.0)
    assert (np.diff(turned) > 0).all() and np.isfinite(turned).all() and turned[2] == 0.5


def test_numbers_are_of_the_images_that_the_temperature_has_not_seen():
    (a, right_a), (b, right_b) = drawn(3.0, seed=1), drawn(3.0, seed=2)
    numbers = measure([a[:20_000], b[:20_000], a[20_000:], b[20_000:]], [right_a[:20_000], right_b[:20_000]] * 2)
    assert numbers["before"]["mean_score"] == pytest.approx(b.mean())
    exact = measure([a, b], [right_a, right_b])
    assert exact["temperature"] == best_temperature(a, right_a)
    assert exact["after"]["ece"] < 0.02 < exact["before"]["ece"]
    assert exact["after"]["log_loss"] < exact["before"]["log_loss"]


@pytest.mark.parametrize("right", [[], [True, True], [False, False]])
def test_all_right_or_all_wrong(right):
    half = np.linspace(0.2, 0.8, len(right))
    with pytest.raises(ConfigError, match="needs right and wrong ones"):
        measure([half, half], [np.array(right, dtype=bool)] * 2)


@pytest.fixture
def run(tmp_path, tiny_config):
    """The folder of a run whose detections are the objects, half of them moved away, at two scores."""
    folder = tmp_path / "tiny"
    (folder / "inference").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"_BASE_: {tiny_config}\nOUTPUT_DIR: {folder}\nDATASETS:\n  TEST: ('mine',)\n")
    box = [10.0, 10.0, 20.0, 20.0]
    images = [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 64} for i in range(8)]
    objects = [{"id": i + 1, "image_id": i, "category_id": 1, "bbox": box, "area": 400, "iscrowd": 0} for i in range(8)]
    truth = {"info": {}, "images": images, "annotations": objects, "categories": [{"id": 1, "name": "dot"}]}
    (folder / "inference/mine_coco_format.json").write_text(json.dumps(truth))
    found = [{"image_id": i, "category_id": 1, "bbox": box, "score": 0.9} for i in range(8)]
    found += [{"image_id": i, "category_id": 1, "bbox": [40, 40, 9, 9], "score": 0.8} for i in range(8)]
    (folder / "inference/coco_instances_results.json").write_text(json.dumps(found))
    return folder


def test_by_the_command_line(run, capsys):
    assert main(["calibration", "--runs", str(run), f"other={run}"]) == 0
    out = capsys.readouterr().out
    assert "| tiny" in out and "| other" in out
    numbers = json.loads((run / "analysis/calibration.json").read_text())["tiny"]
    assert numbers["before"]["detections"] == 8 and numbers["before"]["precision"] == 0.5
    assert numbers["before"]["mean_score"] == pytest.approx(0.85)
    assert numbers["before"]["ece"] == pytest.approx((0.1 + 0.8) / 2)  # by hand
    assert (run / "analysis/calibration.png").stat().st_size > 5000


def test_a_run_whose_name_is_a_number(run, capsys):
    assert main(["calibration", "--runs", f"007={run}"]) == 0
    assert "| 007 " in capsys.readouterr().out


def test_what_a_folder_lacks(run, tmp_path, capsys):
    assert main(["calibration", "--runs", str(run), str(run)]) == 2
    assert "two have the same name" in capsys.readouterr().err
    assert main(["calibration", "--runs", str(run), "DATASETS.TEST", "()"]) == 2
    assert f"--runs {run}: DATASETS.TEST is empty" in capsys.readouterr().err
    (run / "inference/coco_instances_results.json").write_text("[]")
    assert main(["calibration", "--runs", str(run)]) == 2
    assert "Of 0 detections" in capsys.readouterr().err
    for name in ("coco_instances_results.json", "mine_coco_format.json"):  # of a run that was killed as it wrote
        whole = (run / "inference" / name).read_text()
        (run / "inference" / name).write_text('[{"image_id": 0, "cat')
        assert main(["calibration", "--runs", str(run)]) == 2
        assert f"--runs {run}: no JSON in " in (err := capsys.readouterr().err) and name in err
        (run / "inference" / name).write_text(whole)
    (run / "inference/coco_instances_results.json").unlink()
    assert main(["calibration", "--runs", str(run)]) == 2
    assert "coco_instances_results.json is not there" in capsys.readouterr().err
    assert main(["calibration", "--runs", str(tmp_path)]) == 2
    assert "there is no config.yaml" in capsys.readouterr().err
