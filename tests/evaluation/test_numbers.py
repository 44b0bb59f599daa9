"""The numbers of an evaluation, against pycocotools, and by hand and by brute force on small cases."""

import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from focal_plugin.evaluation.numbers import KINDS, best_f1, calibration, confusion, match, measure, pair


def evaluated(objects, detections, num_images=1, classes=("cat", "dog")):
    """An accumulated COCOeval. Objects are (image, class, box[, is crowd]), detections (image, class, box, score)."""
    gt, dt = COCO(), COCO()
    gt.dataset = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 200} for i in range(num_images)],
        "categories": [{"id": 10 * (k + 1), "name": name} for k, name in enumerate(classes)],
        "annotations": [
            {"id": n, "image_id": image, "category_id": 10 * (k + 1), "bbox": list(box), "area": box[2] * box[3]}
            | {"iscrowd": int(any(crowd))}
            for n, (image, k, box, *crowd) in enumerate(objects, 1)
        ],
    }
    dt.dataset = gt.dataset | {
        "annotations": [
            {"id": n, "image_id": image, "category_id": 10 * (k + 1), "bbox": list(box), "area": box[2] * box[3]}
            | {"iscrowd": 0, "score": score}
            for n, (image, k, box, score) in enumerate(detections, 1)
        ]
    }
    with contextlib.redirect_stdout(io.StringIO()):
        gt.createIndex()
        dt.createIndex()
        result = COCOeval(gt, dt, "bbox")
        result.evaluate()
        result.accumulate()
        result.summarize()
    return result


def random_case(seed, num_images=5, classes=3):
    """Objects, crowds among them, and detections near and away from them, with scores that often tie."""
    rng = np.random.default_rng(seed)
    objects, detections = [], []
    for image in range(num_images):
        for _ in range(rng.integers(0, 7)):
            box = [*rng.integers(0, 100, 2), *rng.integers(5, 110, 2)]
            objects.append((image, int(rng.integers(classes)), [float(v) for v in box], rng.random() < 0.15))
            for _ in range(rng.integers(0, 4)):
                moved = [float(v) for v in np.maximum(box + rng.integers(-12, 13, 4), 1)]
                k = objects[-1][1] if rng.random() < 0.8 else int(rng.integers(classes))
                detections.append((image, k, moved, float(rng.integers(1, 20) / 20)))
    return evaluated(objects, detections, num_images, [f"class {k}" for k in range(classes)])


def iou(a, b):
    width = max(0, min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]))
    height = max(0, min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]))
    return width * height / (a[2] * a[3] + b[2] * b[3] - width * height)


@pytest.mark.parametrize("seed", range(20))
def test_pairs_are_those_of_pycocotools(seed):
    result = random_case(seed)
    for k, category in enumerate(result.params.catIds):
        everything = [e for e in result.evalImgs if e and e["aRng"] == result.params.areaRng[0]]
        theirs = {e["image_id"]: e for e in everything if e["category_id"] == category}
        for p in pair(result):
            ours = list(zip(p.scores[p.classes == k], p.right[p.classes == k]))
            e = theirs.get(p.image["id"])
            kept = [] if e is None else np.flatnonzero(~e["dtIgnore"][0])
            assert ours == [(e["dtScores"][d], e["dtMatches"][0, d] > 0) for d in kept]
            found = 0 if e is None else ((e["gtMatches"][0] > 0) & (e["gtIgnore"] == 0)).sum()
            assert (~p.missed(0.0))[p.object_classes == k].sum() == found


@pytest.mark.parametrize("seed", range(5))
def test_ap_is_that_of_pycocotools(seed):
    result = random_case(seed)
    found = measure(result)
    for name, expected in zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), result.stats):
        assert found["overall"][name] == (pytest.approx(100 * expected, abs=1e-9) if expected >= 0 else None)
    for k, row in enumerate(found["classes"]):
        one = COCOeval(result.cocoGt, result.cocoDt, "bbox")
        one.params.catIds = [result.params.catIds[k]]
        with contextlib.redirect_stdout(io.StringIO()):
            one.evaluate()
            one.accumulate()
            one.summarize()
        for name, expected in zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), one.stats):
            assert row[name] == (pytest.approx(100 * expected, abs=1e-9) if expected >= 0 else None)
        if row["curve"]:
            assert 100 * np.mean(row["curve"]) == pytest.approx(row["AP50"], abs=0.01)
    json.dumps(found, allow_nan=False)


def test_match_takes_the_best_free_object():
    overlaps = np.array([[0.6, 0.9, 0.0], [0.55, 0.8, 0.0], [0.7, 0.8, 0.4], [0.0, 0.0, 0.5]])
    assert match(overlaps).tolist() == [1, 0, -1, 2]
    assert match(np.array([[0.7, 0.7]])).tolist() == [1]  # of equal ones the last, as pycocotools does
    for shape in ((0, 3), (3, 0), (0, 0)):
        assert match(np.zeros(shape)).tolist() == [-1] * shape[0]


@pytest.mark.parametrize("seed", range(20))
def test_best_f1_by_trying_all_thresholds(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 30))
    scores, right = rng.integers(1, 10, count) / 10, rng.random(count) < 0.5
    num_objects = int(right.sum() + rng.integers(0, 9))
    tried = []
    for t in sorted(set(scores), reverse=True):
        kept = scores >= t
        true = (kept & right).sum()
        if true:
            precision, recall = true / kept.sum(), true / num_objects
            tried.append((2 * precision * recall / (precision + recall), t, precision, recall))
    found = best_f1(scores, right, num_objects)
    if not tried:
        assert found is None
        return
    highest = max(f1 for f1, *_ in tried)
    _, t, precision, recall = next(one for one in tried if one[0] > highest - 1e-12)
    assert found["f1"] == pytest.approx(highest)
    assert (found["score_thresh"], found["precision"], found["recall"]) == pytest.approx((t, precision, recall))


def test_calibration_by_hand():
    scores = np.array([0.95, 0.91, 0.15, 0.1, 0.19, 1.0])
    right = np.array([True, False, True, False, False, True])
    found = calibration(scores, right)
    high, low = found["bins"][9], found["bins"][1]
    assert (high["detections"], low["detections"]) == (3, 3)
    assert high["mean_score"] == pytest.approx(2.86 / 3) and high["precision"] == pytest.approx(2 / 3)
    assert low["mean_score"] == pytest.approx(0.44 / 3) and low["precision"] == pytest.approx(1 / 3)
    assert found["ece"] == pytest.approx((abs(2.86 - 2) + abs(0.44 - 1)) / 6)
    assert (found["mean_score"], found["precision"]) == pytest.approx((3.3 / 6, 0.5))
    assert [b["detections"] for b in found["bins"]] == [0, 3, 0, 0, 0, 0, 0, 0, 0, 3]


def test_perfect_scores_have_no_calibration_error():
    scores = np.repeat([0.25, 0.75], 40)
    right = np.concatenate([np.arange(40) < 10, np.arange(40) < 30])
    assert calibration(scores, right)["ece"] == pytest.approx(0)


# An object of class 0 in the corner and one of class 1 far from it.
OBJECTS = [(0, 0, (0, 0, 40, 40)), (0, 1, (100, 100, 40, 40))]


@pytest.mark.parametrize(
    ("detection", "kind"),
    [
        ((0, 0, (1, 1, 40, 40), 0.8), "duplicate"),
        ((0, 1, (0, 0, 40, 38), 0.8), "class"),
        ((0, 0, (15, 15, 40, 40), 0.8), "localisation"),
        ((0, 1, (15, 15, 40, 40), 0.8), "background"),
        ((0, 0, (60, 0, 30, 30), 0.8), "background"),
        ((0, 0, (100, 101, 40, 40), 0.8), "class"),
    ],
)
def test_kinds_of_false_positives(detection, kind):
    found = measure(evaluated(OBJECTS, [(0, 0, (0, 0, 40, 40), 0.9), (0, 1, (100, 100, 40, 40), 0.8), detection]))
    assert found["score_thresh"] == 0.8 and found["overall"]["right"] == 2
    assert found["overall"]["false_positives"] == {name: int(name == kind) for name in KINDS}
    assert found["classes"][detection[1]]["false_positives"][kind] == 1
    (worst,) = found["worst_images"]
    assert [d["error"] for d in worst["detections"]].count(kind) == 1
    assert (worst["missed"], worst["false_positives"], worst["file_name"]) == (0, 1, "0.png")


def test_confusion_by_hand():
    detections = [
        (0, 0, (0, 0, 40, 40), 0.9),  # right
        (0, 1, (0, 0, 40, 40), 0.8),  # of a found object: background
        (0, 0, (100, 100, 40, 40), 0.7),  # of a missed object of class 1
        (0, 0, (100, 102, 40, 40), 0.6),  # which is taken: background
        (0, 1, (60, 0, 20, 20), 0.5),  # background
        (1, 1, (0, 0, 40, 40), 0.1),  # right, but its score is too low at 0.4
    ]
    result = evaluated([*OBJECTS, (1, 1, (0, 0, 40, 40))], detections, num_images=2)
    assert confusion(pair(result), 2, 0.4).tolist() == [[1, 0, 0], [1, 0, 1], [1, 2, 0]]
    assert confusion(pair(result), 2, 0.0).tolist() == [[1, 0, 0], [1, 1, 0], [1, 2, 0]]
    assert confusion(pair(result), 2, 1.0).tolist() == [[0, 0, 1], [0, 0, 2], [0, 0, 0]]


@pytest.mark.parametrize("seed", range(20))
def test_all_numbers_add_up(seed):
    """Errors from brute-force loops, in place of arrays."""
    result = random_case(seed)
    found = measure(result)
    t, counts = found["score_thresh"], np.array(found["confusion"])
    expected = dict.fromkeys(KINDS, 0)
    for p in pair(result):
        for d, (box, k, score) in enumerate(zip(p.boxes, p.classes, p.scores)):
            if score < t or p.matched[d] >= 0:
                continue
            own = max((iou(box, o) for o, c in zip(p.objects, p.object_classes) if c == k), default=0)
            other = max((iou(box, o) for o, c in zip(p.objects, p.object_classes) if c != k), default=0)
            kind = "duplicate" if own >= 0.5 else "class" if other >= 0.5 else "localisation" if own >= 0.1 else ""
            expected[kind or "background"] += 1
    overall = found["overall"]
    assert overall["false_positives"] == expected
    for key in ("objects", "detections", "right"):
        assert overall[key] == sum(row[key] for row in found["classes"])
    assert counts.trace() == overall["right"]
    assert counts[:-1].sum(axis=1).tolist() == [row["objects"] for row in found["classes"]]
    shown = [row["right"] + sum(row["false_positives"].values()) for row in found["classes"]]
    assert counts[:, :-1].sum(axis=0).tolist() == shown
    missed = sum(overall["missed_by_size"].values())
    assert missed == overall["objects"] - overall["right"]
    if overall["best_f1"]:
        assert overall["best_f1"]["recall"] == pytest.approx(overall["right"] / overall["objects"])
        assert overall["best_f1"]["precision"] == pytest.approx(overall["right"] / sum(shown))


def test_misses_by_size():
    boxes = [(0, 0, 31, 31), (50, 0, 32, 32), (0, 100, 90, 90), (100, 60, 96, 96)]
    result = evaluated([(0, 0, box) for box in boxes], [(0, 0, boxes[0], 0.9), (0, 0, boxes[3], 0.8)], classes=["cat"])
    found = measure(result)["overall"]
    assert found["objects_by_size"] == {"small": 1, "medium": 2, "large": 1}
    assert found["missed_by_size"] == {"small": 0, "medium": 2, "large": 0}


def test_regions_to_ignore_hold_neither_objects_nor_errors():
    crowd = (0, 0, (0, 0, 100, 100), True)
    inside, other = (0, 0, (10, 10, 20, 20), 0.9), (0, 1, (10, 10, 20, 20), 0.9)
    alone = measure(evaluated([crowd], [inside, inside]))
    assert (alone["overall"]["objects"], alone["overall"]["detections"], alone["worst_images"]) == (0, 0, [])
    found = measure(evaluated([crowd, (0, 0, (150, 150, 40, 40))], [inside, (0, 0, (150, 150, 40, 40), 0.5), other]))
    assert found["score_thresh"] == 0.5 and found["overall"]["objects"] == 1
    assert found["overall"]["false_positives"]["background"] == 1  # of the class that the region is not of
    assert found["classes"][0]["false_positives"]["background"] == 0


@pytest.mark.parametrize("classes", [["cat"], ["cat", "dog"]])
@pytest.mark.parametrize("objects", [[], OBJECTS[:1]])
@pytest.mark.parametrize("detections", [[], [(0, 0, (0, 0, 40, 40), 0.5)]])
def test_empties(objects, detections, classes):
    found = measure(evaluated(objects, detections, classes=classes))
    json.dumps(found, allow_nan=False)
    overall = found["overall"]
    assert (overall["objects"], overall["detections"]) == (len(objects), len(detections))
    assert overall["AP"] == (pytest.approx(100 * len(detections)) if objects else None)
    assert (overall["best_f1"] is None) == (not objects or not detections)
    assert (found["calibration"]["ece"] is None) == (not detections)
    assert np.array(found["confusion"]).sum() == max(len(objects), len(detections))
    assert found["classes"][-1]["curve"] is None or classes == ["cat"]


def test_no_images():
    assert measure(evaluated([], [], num_images=0))["images"] == 0
