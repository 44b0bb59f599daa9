"""The report of a run lists the files that this run has written; no detections differ from unknown ones."""

import logging
import os

import pytest

from focal_plugin.evaluation.report import has_found_nothing, log_report, note_start, written_files


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json").replace("_png", ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def names(folder):
    return {os.path.relpath(path, folder) for path in written_files(str(folder))}


def test_the_files_of_this_run_and_not_of_the_one_before_it(tmp_path):
    """Two runs of one process in one folder, as in a notebook."""
    note_start(str(tmp_path))
    write(tmp_path, metrics_json="1", curves_png="2", detections_png="3")
    assert names(tmp_path) == {"metrics.json", "curves.png", "detections.png"}
    note_start(str(tmp_path))
    assert names(tmp_path) == set()
    write(tmp_path, metrics_json="1 and more", inference__coco_instances_results_json="[]")
    os.replace(tmp_path / "curves.png", tmp_path / "curves.bak")
    write(tmp_path, curves_png="2")  # the same content, a new file
    assert names(tmp_path) == {"metrics.json", "curves.png", "inference/coco_instances_results.json"}


def test_train_net(train_net, tmp_path):
    """A training, and in the same process an evaluation, which writes to a folder in the training's."""
    output = tmp_path / "output"

    def last_report(folder):
        lines = (folder / "log.txt").read_text().rpartition("Written:\n")[2].splitlines()
        return {os.path.relpath(line.split()[0], folder) for line in lines if line.startswith("  ")}

    train_net("SOLVER.MAX_ITER", 1)
    written = {"inference/evaluation.html", "inference/coco_instances_results.json", "config.yaml", "log.txt"}
    trained = {"model_final.pth", "metrics.json"}
    assert written | trained <= last_report(output)
    train_net("--eval-only", "MODEL.WEIGHTS", output / "model_final.pth")
    assert written == last_report(output / "eval")


@pytest.mark.parametrize("hours", [-5, 5])
def test_the_clock_of_a_file_server_is_another(tmp_path, hours):
    write(tmp_path, metrics_json="1", curves_png="2")
    note_start(str(tmp_path))
    write(tmp_path, metrics_json="another")
    time = (tmp_path / "metrics.json").stat().st_mtime + 3600 * hours
    os.utime(tmp_path / "metrics.json", (time, time))
    assert names(tmp_path) == {"metrics.json"}


def test_a_report_ends_the_run(tmp_path, caplog):
    """The note of a start is for one report: the next run has a new one."""
    caplog.set_level(logging.INFO)
    write(tmp_path, curves_png="of before")
    note_start(str(tmp_path))
    write(tmp_path, metrics_json="1")
    note_start(str(tmp_path), again=False)  # by a part of the same run
    log_report(str(tmp_path), {"mine": {"bbox": {"AP": 12.3}}})
    assert "12.3" in caplog.text and "metrics.json" in caplog.text and "curves.png" not in caplog.text
    caplog.clear()
    note_start(str(tmp_path), again=False)
    write(tmp_path, curves_png="2")
    log_report(str(tmp_path), {})
    assert "curves.png" in caplog.text and "metrics.json" not in caplog.text


@pytest.mark.parametrize(
    ("text", "nothing"),
    [
        ("[]", True),
        ("[ ]\n", True),
        ("[\n]", True),
        ('[{"image_id": 0}]', False),
        ("7 ", False),
        ("{}", False),
        ("[ ", False),  # cut off, by a full disk
        ("", False),
        (None, False),
    ],
)
@pytest.mark.parametrize("kind", ["coco", "lvis"])
@pytest.mark.parametrize("dataset", ["", "shapes_test"])
def test_no_detections(tmp_path, text, nothing, kind, dataset):
    folder = tmp_path / "inference" / dataset
    folder.mkdir(parents=True)
    if text is not None:
        (folder / f"{kind}_instances_results.json").write_text(text)
    assert has_found_nothing(tmp_path, dataset) == nothing
