"""Runs of different labels are never in one table."""

import functools
import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from focal_plugin import ConfigError
from focal_plugin.ablation.data import check_data, notes_of_data, read_data
from focal_plugin.ablation.rows import find_base, find_tables
from focal_plugin.ablation.runs import plan


@pytest.fixture(autouse=True)
def no_sets_of_other_tests():
    forget()
    yield
    forget()


def forget():
    for name in ("shapes_train", "shapes_test"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


@pytest.fixture
def runs(rows, tiny_config, tmp_path):
    """Three runs, of which the first two have begun, with the labels that are there."""
    found = plan(find_tables([str(rows.folder)])[0].rows, find_base(tiny_config), [], 1, tmp_path / "table")
    notes = notes_of_data(read_again(found))
    for run in found[:2]:
        run.prepare()
        (run.folder / "job.json").write_text(json.dumps([{"data": notes}]))
    return found


def read_again(runs):
    """Read the data sets as a new process does."""
    forget()
    return read_data(runs)


def change(content, how):
    boxes = content["annotations"]
    if how == "a box moved":
        boxes[0]["bbox"][0] += 1
    if how == "another class":
        boxes[0]["category_id"] = next(c["id"] for c in content["categories"] if c["id"] != boxes[0]["category_id"])
    if how == "a box more":
        boxes.append({**boxes[0], "id": 1 + max(box["id"] for box in boxes)})
    if how == "an image less":
        gone = content["images"].pop()
        content["annotations"] = [box for box in boxes if box["image_id"] != gone["id"]]


@pytest.mark.parametrize("how", ["a box moved", "another class", "a box more", "an image less"])
def test_other_labels_are_never_mixed_in(runs, tmp_path, how):
    before = read_again(runs)
    check_data(runs, before)
    path = tmp_path / "shapes_train.json"
    content = json.loads(path.read_text())
    change(content, how)
    path.write_text(json.dumps(content))
    found = read_again(runs)
    with pytest.raises(ConfigError) as error:
        check_data(runs, found)
    text = str(error.value)
    assert "hold runs of other data, which are not overwritten. Delete them or choose another --output." in text
    assert f"shapes_train was {before['shapes_train']} and is now {found['shapes_train']}:" in text
    assert "shapes_test" not in text and [str(run.folder) in text for run in runs] == [True, True, False]
    assert (found["shapes_train"].images == 5) == (how == "an image less")
    check_data(runs, None)  # what was run may be reported

    # Not a table whose runs have different labels.
    (runs[2].folder).mkdir(parents=True)
    (runs[2].folder / "job.json").write_text(json.dumps([{}, {"data": notes_of_data(found)}]))
    with pytest.raises(ConfigError, match=r"other data(.|\n)*gamma_2"):
        check_data(runs, None)


def test_a_set_that_was_moved_and_its_images_are_the_same(runs, tmp_path):
    found = read_again(runs)
    path = tmp_path / "shapes_train.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content, indent=3))  # another spelling
    assert read_again(runs) == found
    moved = {}
    for name in ("shapes_train", "shapes_test"):
        moved[name] = [
            {**each, "file_name": f"else/{each['file_name'].rpartition('/')[2]}"} for each in DatasetCatalog[name]()
        ]
        DatasetCatalog.remove(name)
        DatasetCatalog.register(name, functools.partial(moved.get, name))
    for run in runs:
        run.cfg.DATASETS.LOCAL = []
    assert read_data(runs) == found


def test_runs_of_a_version_that_did_not_note_it(runs, tmp_path):
    for run in runs[:2]:
        (run.folder / "job.json").write_text("[{}]")
    path = tmp_path / "shapes_test.json"
    content = json.loads(path.read_text())
    change(content, "a box moved")
    path.write_text(json.dumps(content))
    check_data(runs, read_again(runs))


def test_a_table_notes_its_labels(ablation, tmp_path, capfd):
    table = tmp_path / "table"
    assert ablation() == 0
    (attempt,) = json.loads((table / "gamma_0/seed1/job.json").read_text())
    text = attempt["data"]["shapes_train"]
    assert f"Training set: shapes_train ({text})" in (table / "report.md").read_text()
    path = tmp_path / "shapes_test.json"
    content = json.loads(path.read_text())
    change(content, "a box moved")
    path.write_text(json.dumps(content))
    forget()
    assert ablation("--seeds", 2) == 1
    assert "shapes_test was " in capfd.readouterr().err
    assert ablation("--report-only") == 0
