"""What is planted, and what counts as found."""

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from detectron2.structures import Boxes, Instances


@pytest.fixture
def label_errors(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import label_errors

    return label_errors


def records(num_images=20):
    """Images of 300×200 with ten labels of 20×20 each, some at the edges, and a crowd."""
    made = []
    for number in range(num_images):
        labels = [
            {"bbox": [28.0 * i, 18.0 * i, 28.0 * i + 20, 18.0 * i + 20], "category_id": i % 3, "iscrowd": 0}
            for i in range(10)
        ]
        labels.append({"bbox": [0.0, 100.0, 50.0, 200.0], "category_id": 0, "iscrowd": 1})
        made.append({"file_name": f"{number}.png", "width": 300, "height": 200, "annotations": labels})
    return made


@pytest.mark.parametrize("classes", [1, 3])
def test_what_is_planted(label_errors, classes):
    before, after, again = records(), records(), records()
    planted = label_errors.plant(after, classes, seed=1)
    assert Counter(p["kind"] for p in planted) == {"missing": 20, "box": 10} | ({"class": 10} if classes > 1 else {})
    label_errors.plant(again, classes, seed=1)
    assert after == again != before
    assert sum(len(record["annotations"]) for record in after) == 220 - 20
    assert all(record["annotations"][-1] == old["annotations"][-1] for record, old in zip(after, before))  # crowds
    for mistake in planted:
        true, given = mistake["true"], mistake["given"]
        if mistake["kind"] == "class":
            assert given["category_id"] != true["category_id"] and given["bbox"] == true["bbox"]
        if mistake["kind"] == "box":
            assert (
                0.6**2 / (2 - 0.6**2) - 1e-6 <= label_errors.iou(given["bbox"], true["bbox"]) <= 0.8**2 / (2 - 0.8**2)
            )
            x0, y0, x1, y1 = given["bbox"]
            assert 0 <= x0 < x1 <= 300 and 0 <= y0 < y1 <= 200 and x1 - x0 == pytest.approx(20)


def test_what_is_found(label_errors):
    made = records()
    mistakes = label_errors.plant(made, 3, seed=1)
    planted = label_errors.Planted(mistakes)
    assert [planted.count(kind) for kind in label_errors.KINDS] == [20, 10, 10]
    for i, mistake in enumerate(mistakes):
        true, name = mistake["true"], mistake["file_name"]
        if mistake["kind"] == "missing":
            near = [v + 2 for v in true["bbox"]]
            assert planted.removed_at(name, near, true["category_id"]) == i
            assert planted.removed_at(name, near, true["category_id"] + 1) is None
            assert planted.removed_at(name, [v + 15 for v in near], true["category_id"]) is None
        else:
            assert planted.of_label(mistake["kind"], mistake["given"]) == i
            assert planted.of_label(mistake["kind"], copy.copy(mistake["given"])) is None
    assert label_errors.hits([3, None, 3, 4, 5], 4) == 2


def test_plain_confidence(label_errors):
    """A detection on no label, by its score; a label by its best detection, 0 without one."""
    labels = [{"bbox": [0, 0, 20, 20], "category_id": k, "iscrowd": 0} for k in (0, 1)]
    record = {"file_name": "a", "width": 99, "height": 99, "annotations": labels}
    removed = {"kind": "missing", "file_name": "a", "true": {"bbox": [50, 50, 70, 70], "category_id": 2}, "given": None}
    swapped = {"kind": "class", "file_name": "a", "true": {}, "given": labels[1]}
    boxes = torch.tensor([[50.0, 50, 70, 70], [0, 0, 20, 20], [0, 0, 20, 18]])
    found = Instances((99, 99), pred_boxes=Boxes(boxes), pred_classes=torch.tensor([2, 0, 0]))
    found.scores = torch.tensor([0.75, 0.25, 0.5])
    rows = list(label_errors.plain_confidence(found, record, label_errors.Planted([removed, swapped])))
    assert rows == [
        ("missing", 0.75, 0),
        *[("class", -0.5, None), ("box", -0.5, None), ("class", 0.0, 1), ("box", 0.0, None)],
    ]
