"""What an evaluation writes: its three files, their numbers, and the page in a browser."""

import csv
import json
import re
import tempfile

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances, pairwise_iou
from PIL import Image

from focal_plugin.evaluation.evaluator import PageEvaluator, write_evaluation
from focal_plugin.evaluation.page import _labels
from focal_plugin.evaluation.report import class_table
from tests.docs.pages import PAGES, blocks
from tests.evaluation.test_numbers import OBJECTS, evaluated, random_case


def written(folder):
    with (folder / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    return json.loads((folder / "evaluation.json").read_text()), rows, (folder / "evaluation.html").read_text()


def test_the_files_agree(tmp_path):
    returned = write_evaluation(str(tmp_path), "pets", random_case(1))
    found, rows, page = written(tmp_path)
    assert found == returned and found["data_set"] == "pets"
    assert [row["class"] for row in rows] == ["all", "class 0", "class 1", "class 2"]
    for row, numbers in zip(rows, [found["overall"], *found["classes"]]):
        for name in ("AP", "AP50", "APl", "objects", "right"):
            assert row[name] == ("" if numbers[name] is None else str(numbers[name]))
            if name.startswith("AP") and numbers[name]:
                assert f"<td>{numbers[name]:.1f}</td>" in page
        best = numbers["best_f1"] or {}
        assert (row["score_thresh"], row["f1"]) == (str(best.get("score_thresh", "")), str(best.get("f1", "")))
        assert row["fp_background"] == str(numbers["false_positives"]["background"])
        assert row["missed_small"] == str(numbers["missed_by_size"]["small"])
    calibration = found["calibration"]
    assert f"{abs(calibration['mean_score'] - calibration['precision']):.3f} too high" in page


def test_names_are_text_and_images_are_small(tmp_path):
    Image.effect_noise((3000, 2000), 90).save(tmp_path / "0.png")
    name = "<script>alert(1)</script>"
    result = evaluated(OBJECTS, [(0, 0, (60, 0, 30, 30), 0.8)], classes=[name, "b & b"])
    write_evaluation(str(tmp_path), name, result, lambda file_name: str(tmp_path / file_name))
    page = written(tmp_path)[2]
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "b &amp; b" in page
    assert page.count("data:image/jpeg;base64,") == 1 and len(page) < 400_000  # noise is the worst there is
    links = re.findall(r"""(?:src|srcset|href|url)\s*[=(]\s*["']?([^"'\s>)]+)""", page)
    assert [link[:16] for link in links] == ["data:image/jpeg;"]


def test_labels_do_not_lie_on_each_other():
    """In a crowd of false positives the best is labelled, and another only where there is room."""
    rng = np.random.default_rng(0)
    boxes = [[*rng.uniform(-5, 200, 2), *rng.uniform(5, 50, 2)] for _ in range(60)]
    detections = [
        {"box": box, "class": i % 2, "score": 1 - i / 100, "error": ("background", None, "class")[i % 3]}
        for i, box in enumerate(boxes)
    ]
    labels = _labels(detections, ["cat", "a dog"], 200)
    assert labels[0]["text"] == "cat: background 1.00" and 3 < len(labels) < 40
    assert {label["text"] for label in labels} <= {
        f"{('cat', 'a dog')[i % 2]}: {('background', '', 'wrong class')[i % 3]} {1 - i / 100:.2f}" for i in range(60)
    }
    plates = [[a["left"], a["base"] - a["size"], a["end"], a["base"]] for a in labels]
    assert pairwise_iou(*[Boxes(torch.tensor(plates))] * 2).triu(1).sum() == 0


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\n broken"])
def test_an_image_that_cannot_be_read(tmp_path, content):
    if content is not None:
        (tmp_path / "0.png").write_bytes(content)
    write_evaluation(str(tmp_path), "pets", evaluated(OBJECTS, []), lambda file_name: str(tmp_path / file_name))
    assert "0.png: 2 missed, 0 false positives; the image cannot be read" in written(tmp_path)[2]


@pytest.mark.parametrize("readable", [True, False])
def test_a_coco_file_without_the_sizes_of_images(tmp_path, readable):
    result = evaluated(OBJECTS, [])
    for key in ("width", "height"):
        del result.cocoGt.imgs[0][key]
    if readable:
        Image.new("RGB", (300, 170)).save(tmp_path / "0.png")
    write_evaluation(str(tmp_path), "pets", result, lambda file_name: str(tmp_path / file_name))
    view = 'viewBox="0 0 300 170"' if readable else 'viewBox="0 0 140.0 140.0"'  # to where the boxes end
    assert view in written(tmp_path)[2]


def test_a_coco_file_without_the_names_of_images(tmp_path):
    result = evaluated(OBJECTS, [])
    del result.cocoGt.imgs[0]["file_name"]
    write_evaluation(str(tmp_path), "pets", result)
    assert "<figcaption>0: 2 missed" in written(tmp_path)[2]


@pytest.mark.parametrize("objects", [[], OBJECTS])
@pytest.mark.parametrize("detections", [[], [(0, 0, (60, 0, 30, 30), 0.8)]])
@pytest.mark.parametrize("classes", [["cat"], ["cat", "dog"], [f"class {k}" for k in range(90)]], ids=len)
def test_empties(tmp_path, objects, detections, classes):
    objects = [(image, min(k, len(classes) - 1), box) for image, k, box in objects]
    write_evaluation(str(tmp_path), "pets", evaluated(objects, detections, classes=classes))
    _, rows, page = written(tmp_path)
    assert len(rows) == 1 + len(classes)
    assert "No detection is right" in page and ("There are no detections" in page) == (not detections)
    assert "None" not in page and "nan" not in page.lower().replace("dominant", "")


def test_the_schema_is_documented():
    found = write_evaluation_of(random_case(1))
    listed = set(re.findall(r"`(\w+)`", PAGES["docs/evaluation.md"]))

    def keys(value):
        if isinstance(value, dict):
            return set(value).union(*map(keys, value.values()))
        return set().union(*map(keys, value)) if isinstance(value, list) else set()

    kinds = set(re.findall(r"^\| (\w+) \| (?:is|has)", PAGES["docs/evaluation.md"], re.MULTILINE))
    assert kinds == set(found["overall"]["false_positives"])
    assert keys(found) - kinds <= listed


def write_evaluation_of(result):
    with tempfile.TemporaryDirectory() as folder:
        return write_evaluation(folder, "pets", result)


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    (code,) = blocks(PAGES["docs/evaluation.md"], "python")
    result = random_case(1)
    (tmp_path / "annotations.json").write_text(json.dumps(result.cocoGt.dataset))
    (tmp_path / "coco_instances_results.json").write_text(json.dumps(result.cocoDt.dataset["annotations"]))
    (tmp_path / "output").mkdir()
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert written(tmp_path / "output")[0]["overall"] == write_evaluation_of(random_case(1))["overall"]


@pytest.mark.parametrize("detects", [True, False])
def test_beside_detectron2s_own_numbers(tmp_path, detects):
    """The evaluator on a data set that is in no JSON file, with detections and without any."""
    path = str(tmp_path / "image.png")
    Image.new("RGB", (80, 60)).save(path)
    boxes = [[0.0, 0.0, 40.0, 40.0], [40.0, 20.0, 70.0, 50.0]]
    annotations = [{"bbox": box, "bbox_mode": 0, "category_id": k} for k, box in enumerate(boxes)]
    record = {"file_name": path, "image_id": "a", "height": 60, "width": 80, "annotations": annotations}
    DatasetCatalog.register("pets", lambda: [record])
    MetadataCatalog.get("pets").thing_classes = ["cat", "dog"]
    try:
        evaluator = PageEvaluator("pets", output_dir=str(tmp_path / "out"), allow_cached_coco=False)
        evaluator.reset()
        instances = Instances((60, 80))
        instances.pred_boxes = Boxes(torch.tensor(boxes[:1] + [[0.0, 0.0, 9.0, 9.0]])[: 2 * detects])
        instances.scores = torch.tensor([0.75, 0.5])[: 2 * detects]
        instances.pred_classes = torch.tensor([0, 1])[: 2 * detects]
        evaluator.process([record], [{"instances": instances}])
        theirs = evaluator.evaluate()["bbox"]
    finally:
        DatasetCatalog.remove("pets")
        MetadataCatalog.remove("pets")
    found, _, page = written(tmp_path / "out")
    if detects:
        for name in ("AP", "AP50", "AP75"):
            assert found["overall"][name] == pytest.approx(theirs[name])
        assert [row["AP"] for row in found["classes"]] == pytest.approx([theirs["AP-cat"], theirs["AP-dog"]])
        assert found["overall"]["best_f1"]["score_thresh"] == 0.75
    else:
        assert (found["overall"]["AP"], found["overall"]["best_f1"]) == (0, None)
    assert "image.png" in page and "cannot be read" not in page


def test_a_run_writes_them(train_net, tmp_path):
    """After a training and by an evaluation alone; the screen ends with the classes and the page."""
    output = tmp_path / "output"
    train_net("SOLVER.MAX_ITER", 1)
    train_net("--eval-only", "MODEL.WEIGHTS", output / "model_final.pth")
    for folder in (output, output / "eval"):
        found, rows, page = written(folder / "inference")
        assert found["worst_images"] and "cannot be read" not in page
        assert found["data_set"] == "shapes_test" and found["images"] == 4
        assert [row["class"] for row in rows] == ["all", "square", "disc"]
        log = (folder / "log.txt").read_text()
        assert "AP by class on shapes_test" in log and re.search(r"\| square +\| +\d+\.\d \|", log)
        assert log.rpartition("Written:\n")[2].count("evaluation.html") == 1


def test_table_of_classes():
    results = {"bbox": {"AP": 1.0, "AP-cat": 2.0, "AP-dog": float("nan")}, "segm": {"AP-cat": 3.0}, "other": 5}
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in class_table(results).splitlines()]
    assert [table[0], *table[2:]] == [["class", "bbox", "segm"], ["cat", "2.0", "3.0"], ["dog", "-", "-"]]
    assert class_table({"bbox": {"AP": 1.0}}) == class_table({}) == ""
    many = class_table({"bbox": {f"AP-{k}": float(k) for k in range(80)}}).splitlines()
    assert len(many) == 22
    assert {float(x) for x in re.findall(r"\d+\.\d", "\n".join(many))} == set(map(float, range(80)))


@pytest.mark.parametrize("classes", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3)), 90])
def test_the_page_in_a_browser(tmp_path, browser, classes):
    """Light and dark, on a screen and on a phone: nothing is wider than the screen, or comes from elsewhere."""
    write_evaluation(str(tmp_path), "a_data_set_with_a_long_name_of_one_word_test", random_case(0, classes=classes))
    page = written(tmp_path)[2]
    colors = set()
    for width, dark in ((390, False), (390, True), (1280, False), (1280, True)):
        probe = """{hinted: [...document.querySelectorAll('.wide')]
                .every(table => /local.*scroll/.test(getComputedStyle(table).backgroundAttachment)),
            lines: document.querySelectorAll('polyline').length,
            small: [...document.querySelectorAll('.plot text')]
                .filter(text => text.getBoundingClientRect().height < 9).length}"""
        found = browser(page, width, dark, probe)
        assert (found["width"], found["requests"], found["small"]) == (width, 0, 0)
        assert found["hinted"]  # a shadow says that a table goes on
        assert found["overflow"] <= 0 and found["lines"] >= min(classes, 2)
        colors.add(found["color"])
    assert colors == {"rgb(255, 255, 255)", "rgb(22, 24, 28)"}
