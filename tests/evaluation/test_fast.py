"""The metric in C++ has pycocotools' numbers."""

import json

import numpy as np
import pytest
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from pycocotools.coco import COCO

from focal_plugin.evaluation import fast
from focal_plugin.evaluation.numbers import measure
from tests.evaluation.made_up import made_up

pytest.importorskip("faster_coco_eval", reason="needs faster-coco-eval")


def evaluated(make, truth, found, limit):
    coco_eval = make(truth, truth.loadRes([dict(one) for one in found]), "bbox")
    coco_eval.params.maxDets = [1, 10, limit]
    coco_eval.evaluate()
    coco_eval.accumulate()
    coco_eval.summarize()
    return coco_eval


def page_numbers(coco_eval):
    return json.loads(json.dumps(measure(coco_eval)), parse_float=lambda text: round(float(text), 6))


@pytest.mark.parametrize(
    ("images", "detections", "classes", "limit", "ids"),
    [
        (30, 40, 1, 20, "numbers"),
        (5, 300, 3, 250, "numbers"),
        (40, 1, 80, 100, "numbers"),
        (20, 40, 5, 100, "texts"),
        (20, 40, 5, 100, "huge"),
        (20, 40, 5, 100, "first 0"),
    ],
)
def test_all_numbers_are_equal(images, detections, classes, limit, ids, capsys):
    """With crowds, equal scores, boxes of every size, classes and images without objects, and limits that cut."""
    content, found = made_up(images, detections, classes)
    if ids in ("texts", "huge"):
        change = {"texts": lambda number: f"{number:03}.png", "huge": lambda number: 2**60 + number}[ids]
        for image in content["images"]:
            image["id"] = change(image["id"])
        for one in (*content["annotations"], *found):
            one["image_id"] = change(one["image_id"])
    for one in content["annotations"]:
        one["id"] -= ids == "first 0"  # pycocotools takes this object for one that is never found
    truth = COCO()
    truth.dataset = content
    truth.createIndex()
    ours = evaluated(fast.coco_eval, truth, found, limit)
    shown = capsys.readouterr().out.splitlines()
    stock = evaluated(COCOevalMaxDets, truth, found, limit)
    assert type(ours) is fast.FastBoxEval
    expected = capsys.readouterr().out.splitlines()
    assert [line for line in shown if "IoU=" in line] == [line for line in expected if "IoU=" in line]
    np.testing.assert_allclose(ours.stats, stock.stats, rtol=0, atol=1e-6)
    for name in ("precision", "recall", "scores"):
        np.testing.assert_allclose(ours.eval[name], stock.eval[name], rtol=0, atol=1e-6)
    assert (stock.stats > 0).sum() > 6
    assert page_numbers(ours) == page_numbers(stock)


@pytest.mark.parametrize("kind", ["segm", "keypoints"])
def test_masks_and_keypoints_are_pycocotools(kind):
    assert type(fast.coco_eval(None, None, kind)) is COCOevalMaxDets


def test_without_it_pycocotools_computes(monkeypatch):
    monkeypatch.setattr(fast, "COCOeval_faster", None)
    assert type(fast.coco_eval(None, None)) is COCOevalMaxDets
