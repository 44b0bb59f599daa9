"""Planted mistakes are what ranks highest for a model that sees the truth, and its files can be read."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from pycocotools.coco import COCO
from torch import nn

from focal_plugin import FocalRetinaNet
from focal_plugin.analysis.__main__ import main
from focal_plugin.analysis.hardest import table
from focal_plugin.analysis.labels import folds
from focal_plugin.analysis.labels.folds import cut
from focal_plugin.analysis.labels.judge import Judge, _without_label
from focal_plugin.analysis.labels.page import rows, to_coco, to_html
from focal_plugin.analysis.labels.suggestions import KINDS, Ranking, Suggestion
from focal_plugin.anchors.cache import cached_anchors
from focal_plugin.config import ConfigError
from focal_plugin.config.load import load_config
from focal_plugin.data import DataError
from focal_plugin.data.coco import CocoSet
from focal_plugin.data.records import Checker
from focal_plugin.losses.functional import sigmoid_focal_loss
from tests.small_retinanet import small_config

STRIDES, SIZE, LOGIT = (8, 16, 32, 64, 128), 256, 4.0


class Numbered(nn.Module):
    """A backbone whose features are the number of the image, which its pixels are."""

    size_divisibility, padding_constraints = 0, {}

    def forward(self, images):
        number = images.mean(dim=(1, 2, 3), keepdim=True)
        return {f"p{i}": number.expand(len(images), 1, SIZE // s, SIZE // s) for i, s in enumerate(STRIDES)}


class Perfect(nn.Module):
    """A head that sees the true boxes of the images by their numbers: anchors matched to them, and nothing else."""

    def __init__(self):
        super().__init__()
        self.truth, self.model = {}, []

    def forward(self, features):
        (model,) = self.model
        (boxes, classes) = self.truth[round(float(features[0][0, 0, 0, 0]))]
        truth = Instances((SIZE, SIZE), gt_boxes=Boxes(boxes), gt_classes=classes)
        targets = model.label_anchors(cached_anchors(model.anchor_generator, features), [truth])
        logits, deltas = [], []
        start = 0
        for labels, at in zip(targets.labels, targets.positives):
            _, a, h, w = labels.shape
            x = torch.full((a * h * w, model.num_classes), -LOGIT)
            d = torch.zeros(a * h * w, 4)
            chosen = slice(start, start + len(at))
            x[at, labels.flatten()[at]] = LOGIT
            d[at] = model.box2box_transform.get_deltas(targets.anchors[chosen], targets.gt_boxes[chosen])
            logits.append(x.view(a, h, w, -1).permute(0, 3, 1, 2).reshape(1, -1, h, w))
            deltas.append(d.view(a, h, w, 4).permute(0, 3, 1, 2).reshape(1, -1, h, w))
            start += len(at)
        return logits, deltas


def perfect_judge(classes):
    cfg = small_config()
    cfg.MODEL.RETINANET.NUM_CLASSES = classes
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [0.0] * 3, [1.0] * 3
    cfg.INPUT.MIN_SIZE_TEST = SIZE
    parts = FocalRetinaNet.from_config(cfg) | {
        "backbone": Numbered(),
        "head": Perfect(),
        "head_in_features": [f"p{i}" for i in range(5)],
    }
    model = FocalRetinaNet(**parts)
    model.head.model = [model]
    return Judge(model, cfg)


@pytest.fixture(scope="module")
def judges():
    return {classes: perfect_judge(classes) for classes in (1, 3, 90)}


def objects(rng, count=9):
    """Boxes of 40 to 60 pixels in the cells of a grid of 3×3, (count, 4)."""
    cells = rng.permutation(9)[:count]
    corners = np.stack([cells % 3, cells // 3], axis=1) * 85 + rng.uniform(2, 20, (count, 2))
    return np.concatenate([corners, corners + rng.uniform(40, 60, (count, 2))], axis=1)


def annotation(box, k, **more):
    return {"bbox": list(map(float, box)), "bbox_mode": BoxMode.XYXY_ABS, "category_id": int(k), "iscrowd": 0, **more}


ABOUT = {
    "data_set": "x",
    "judge": "y",
    "of": "2 images",
    "share": 0.5,
    "agreed": "They do.",
    "score_thresh": 0.9,
    "suggestions": "hardest_test.json",
}


class Planted:
    """Images with objects that a judge sees as they are, and labels with mistakes in them."""

    def __init__(self, folder, judge, num_images=3, seed=0, scale=1):
        self.judge, self.records, self.planted = judge, [], {kind: set() for kind in KINDS}
        classes, rng = judge.model.num_classes, np.random.default_rng(seed)
        for number in range(1, num_images + 1):
            path = folder / f"{number}.png"
            Image.new("RGB", (SIZE * scale, SIZE * scale), (number,) * 3).save(path)
            boxes, kinds = objects(rng), rng.integers(classes, size=9)
            # The last cell has no object; the first four objects have mistakes, as far as there are classes.
            judge.model.head.truth[number] = torch.tensor(boxes[:8]).float(), torch.tensor(kinds[:8])
            labels = [annotation(box * scale, k) for box, k in zip(boxes, kinds)]
            name = str(path)
            self.planted["missing"].add((name, tuple(np.round(boxes[0] * scale))))
            if classes > 1:
                labels[1]["category_id"] = int(kinds[1] + 1) % classes
                self.planted["class"].add((name, 0))
            side = (boxes[2, 2] - boxes[2, 0]) * scale
            labels[2]["bbox"][0] += 0.15 * side
            labels[2]["bbox"][2] += 0.15 * side
            self.planted["box"].add((name, 1))
            self.planted["extra"].add((name, 7))
            size = {"width": SIZE * scale, "height": SIZE * scale}
            self.records.append({"file_name": name, "image_id": number, **size, "annotations": labels[1:]})

    def best(self, top):
        ranking = Ranking(top)
        for record in self.records:
            ranking.add(self.judge(record))
        return ranking, ranking.best()


def what(suggestion):
    if suggestion.kind == "missing":
        return suggestion.record["file_name"], tuple(np.round(suggestion.predicted_box))
    return suggestion.record["file_name"], suggestion.label


@pytest.mark.parametrize(("classes", "scale"), [(1, 1), (3, 2), (90, 1)])
def test_the_best_are_the_planted_ones(tmp_path, judges, classes, scale):
    planted = Planted(tmp_path, judges[classes], scale=scale)
    ranking, best = planted.best(top=3)
    for kind in KINDS:
        assert {what(s) for s in best[kind]} == planted.planted[kind], kind
    assert (ranking.images, ranking.labels, ranking.unjudged) == (3, 24, 0)
    truth = {record["file_name"]: judges[classes].model.head.truth[i + 1] for i, record in enumerate(planted.records)}
    for s in [*best["class"], *best["box"]]:
        boxes, kinds = truth[s.record["file_name"]]
        number = 1 if s.kind == "class" else 2
        assert s.accepted[1] == kinds[number]
        np.testing.assert_allclose(s.accepted[0], scale * boxes[number], atol=0.02)
        assert s.score == pytest.approx(1 / (1 + np.exp(-LOGIT)))
    for s in best["box"]:
        assert s.iou == pytest.approx(0.85 / 1.15, abs=1e-3)


def test_the_values_by_hand(tmp_path, judges):
    """A missing object has an anchor of logit 4, and all positives of a swapped label prefer the other class."""
    _, best = Planted(tmp_path, judges[3], num_images=1).best(top=1)
    negative, positive = (
        float(sigmoid_focal_loss(torch.tensor(LOGIT), torch.tensor(float(target)), 0.25, 2)) for target in (0, 1)
    )
    unseen = float(sigmoid_focal_loss(torch.tensor(-LOGIT), torch.tensor(1.0), 0.25, 2))
    easy = float(sigmoid_focal_loss(torch.tensor(-LOGIT), torch.tensor(0.0), 0.25, 2))
    assert best["missing"][0].value == pytest.approx(negative, rel=1e-4)
    assert best["class"][0].value == pytest.approx(negative + unseen - positive - easy, rel=1e-4)
    assert best["extra"][0].value == pytest.approx(unseen + 2 * easy, rel=1e-4)
    assert 0 < best["box"][0].value < 1 - 0.85 / 1.15 + 0.01


def test_correct_labels_are_no_suggestions_of_missing_objects_or_of_other_classes(tmp_path, judges):
    planted = Planted(tmp_path, judges[3], num_images=1)
    boxes, kinds = judges[3].model.head.truth[1]
    planted.records[0]["annotations"] = [annotation(box, k) for box, k in zip(boxes, kinds)]
    verdict = planted.judge(planted.records[0])
    assert {s.kind for s in verdict.suggestions} == {"box"}
    assert max(s.value for s in verdict.suggestions) < 1e-3


@pytest.mark.parametrize("mark", ["iscrowd", "around"])
def test_crowds_are_left_out(tmp_path, judges, mark):
    """An object in a crowd is no missing one, and a crowd is no label, whatever comes before it in the list."""
    planted = Planted(tmp_path, judges[3], num_images=1)
    record = planted.records[0]
    (missing,) = judges[3].model.head.truth[1][0][:1]
    grow = torch.tensor([-5, -5, 5, 5]) if mark == "around" else 0
    record["annotations"].insert(0, annotation(missing + grow, 0, iscrowd=1))
    _, best = planted.best(top=9)
    assert best["missing"] == []
    assert what(best["class"][0])[1] == 1 and what(best["extra"][0])[1] == 8  # places count the crowd
    assert 0 not in {s.label for found in best.values() for s in found}


def test_images_without_labels_and_without_objects(tmp_path, judges):
    planted = Planted(tmp_path, judges[3], num_images=2)
    head = judges[3].model.head
    planted.records[0]["annotations"] = []
    head.truth[2] = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    planted.records[1] |= {"annotations": []}
    del planted.records[1]["width"], planted.records[1]["height"]
    ranking, best = planted.best(top=20)
    assert {kind: len(found) for kind, found in best.items()} == {"missing": 8, "class": 0, "box": 0, "extra": 0}
    assert ranking.labels == 0
    head.truth[1] = head.truth[2]
    _, best = planted.best(top=20)
    assert not any(best.values())
    page = to_html(best, ["a", "b", "c"], ABOUT)
    assert "Nothing speaks against the labels" in page and "None" not in page
    assert json.loads(to_coco([], ["a"]))["annotations"] == [] == rows([], ["a"])


def test_a_label_without_size_is_left_out_and_the_places_stay(tmp_path, judges):
    planted = Planted(tmp_path, judges[3], num_images=1)
    planted.records[0]["annotations"].insert(0, annotation((10, 10, 10, 30), 0))
    _, best = planted.best(top=1)
    assert [best[kind][0].label for kind in ("class", "box", "extra")] == [1, 2, 8]


def test_a_label_is_shown_once(tmp_path, judges):
    _, best = Planted(tmp_path, judges[3]).best(top=50)
    labels = [what(s) for kind in KINDS[1:] for s in best[kind]]
    assert len(labels) == len(set(labels)) == 24


def test_only_the_best_are_kept_on_the_way(tmp_path, judges):
    planted = Planted(tmp_path, judges[1], num_images=1)
    verdict, few, many = planted.judge(planted.records[0]), Ranking(1), Ranking(1000)
    for _ in range(50):
        few.add(verdict)
        many.add(verdict)
    assert max(map(len, few._pool.values())) <= 2
    for kind in KINDS:
        assert [s.value for s in few.best()[kind]] == [s.value for s in many.best()[kind][:1]]


def test_logits_that_are_nan(tmp_path, judges, monkeypatch):
    planted = Planted(tmp_path, judges[1], num_images=1)
    monkeypatch.setattr("tests.analysis.test_hardest.LOGIT", float("nan"))
    with pytest.raises(ConfigError, match="NaN"):
        planted.judge(planted.records[0])


@pytest.mark.parametrize("classes", [1, 3, 90])
def test_the_coco_file_is_read_back(tmp_path, judges, classes):
    """By pycocotools and by DATASETS.LOCAL: the boxes as they would be if accepted; what has no object is ignored."""
    _, best = Planted(tmp_path, judges[classes], scale=2).best(top=3)
    shown = [s for found in best.values() for s in found]
    names = [f"class {k}" for k in range(classes)]
    path = tmp_path / "suggestions.json"
    path.write_text(to_coco(shown, names))
    coco = COCO(str(path))
    assert len(coco.getAnnIds()) == len(shown) and len(coco.getCatIds()) == classes
    for s, a in zip(shown, coco.loadAnns(coco.getAnnIds())):
        x, y, w, h = a["bbox"]
        np.testing.assert_allclose((x, y, x + w, y + h), s.accepted[0])
        assert names[s.accepted[1]] == coco.loadCats(a["category_id"])[0]["name"]
        assert (a["suggestion"], a["value"], a["replaces"] is None) == (s.kind, s.value, s.kind == "missing")
    records, _ = CocoSet("read_back", str(path), coco.dataset["info"]["images"]).load(Checker("read_back"))
    boxes = [a for record in records for a in record["annotations"]]
    assert sum(a["iscrowd"] for a in boxes) == len(best["extra"]) and len(boxes) == len(shown)
    assert {record["file_name"] for record in records} == {str(tmp_path / f"{i}.png") for i in (1, 2, 3)}


@pytest.mark.parametrize(("classes", "width", "dark"), [(1, 1280, False), (90, 390, True)])
def test_the_page_in_a_browser(tmp_path, judges, browser, classes, width, dark):
    """Light and dark, on a screen and on a phone: nothing is wider than the screen, or comes from elsewhere."""
    _, best = Planted(tmp_path, judges[classes], num_images=2).best(top=3)
    names = [f"<b>a_class_with_a_long_name_of_one_word_{k}" for k in range(classes)]
    page = to_html(best, names, ABOUT | {"data_set": "a" * 60})
    number = sum(map(len, best.values()))
    assert "<b>a_class" not in page and page.count("data:image/jpeg") == number
    probe = "{shown: [...document.querySelectorAll('figure')].filter(f => f.offsetWidth > 100).length}"
    found = browser(page, width, dark, probe)
    assert (found["width"], found["requests"], found["shown"]) == (width, 0, number)
    assert found["overflow"] <= 0
    assert found["color"] == ("rgb(22, 24, 28)" if dark else "rgb(255, 255, 255)")


def test_an_image_that_is_gone(tmp_path, judges):
    planted = Planted(tmp_path, judges[1], num_images=1)
    _, best = planted.best(top=1)
    Path(planted.records[0]["file_name"]).unlink()
    page = to_html(best, ["a"], ABOUT)
    assert page.count("it cannot be read") == 3
    with pytest.raises(DataError, match=r"1\.png"):
        planted.best(top=1)


def test_parts_are_the_same_in_every_call_and_keep_groups():
    records = [{"file_name": f"{i // 3}/{i}.png"} for i in range(18)]
    parts = cut(records, 3, by=r"(\d+)/")
    assert parts == cut(records, 3, by=r"(\d+)/")
    assert sorted(r["file_name"] for part in parts for r in part) == sorted(r["file_name"] for r in records)
    groups = [{r["file_name"].split("/")[0] for r in part} for part in parts]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 6
    below = [{"file_name": f"/shots/all/site{i // 2}_{i}.png"} for i in range(6)]  # as `focal data split` takes it
    assert sorted(len(part) for part in cut(below, 3, by=r"^(site\d+)_")) == [2, 2, 2]
    assert list(map(len, cut(records, 4))) in ([5, 5, 4, 4], [4, 5, 4, 5], [5, 4, 5, 4], [4, 4, 5, 5])
    with pytest.raises(ConfigError, match="--folds is 1"):
        cut(records, 1)
    with pytest.raises(DataError, match="too few groups"):
        cut(records, 19)


def test_names_of_classes_that_look_like_numbers():
    found = [Suggestion("missing", 1.0, 1.0, {}, (0, 0, 9, 9), k, 0.5) for k in (0, 0, 2)]
    lines = table({kind: [] for kind in KINDS} | {"missing": found}, ["007", "unused", "1e5"]).splitlines()[2:]
    assert [[cell.strip() for cell in line.split("|")[1:3]] for line in lines] == [["007", "2"], ["1e5", "1"]]
    assert table({kind: [] for kind in KINDS}, ["007"]) == ""


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    model = build_model(load_config(tiny_config, ["MODEL.DEVICE", "cpu"]))
    with torch.no_grad():
        model.head.cls_score.weight.normal_(std=0.5)
    DetectionCheckpointer(model, str(tmp_path)).save("trained")
    return str(tmp_path / "trained.pth")


def test_command(tiny_config, checkpoint, tmp_path, capsys):
    words = ["hardest", "--config-file", tiny_config, "--weights", checkpoint, "--top", "5", "--num-images", "3"]
    assert main([*words, "MODEL.DEVICE", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "3 images of DATASETS.TEST" in printed and "finds none of the labels" in printed and "first" not in printed
    folder = tmp_path / "output" / "analysis"
    with (folder / "hardest_test.csv").open() as file:
        table = list(csv.DictReader(file))
    assert {row["kind"] for row in table} <= set(KINDS) and len(table) >= 5
    assert len(COCO(str(folder / "hardest_test.json")).getAnnIds()) == len(table)
    assert (folder / "hardest_test.html").read_text().count("<figure") == len(table)
    assert main([*words, "MODEL.DEVICE", "cpu"]) == 0  # nothing is overwritten
    assert (folder / "hardest_test-2.html").exists()


@pytest.mark.slow
def test_folds_train_resume_and_refuse_other_labels(tiny_config, tmp_path, capsys, loggers, monkeypatch):
    """Each image is judged by the model that has not seen it; a second start trains nothing."""
    seen, judged, train, judge = [], [], folds._train, Judge.__call__

    def noted_train(cfg, records):
        seen.append({record["file_name"] for record in records})
        train(cfg, records)

    def noted_judge(self, record):
        judged.append(record["file_name"])
        return judge(self, record)

    monkeypatch.setattr(folds, "_train", noted_train)
    monkeypatch.setattr(Judge, "__call__", noted_judge)
    words = ["hardest", "--config-file", tiny_config, "--folds", "2", "--top", "5", "MODEL.DEVICE", "cpu"]
    words += ["SOLVER.MAX_ITER", "2", "TEST.BEST_METRIC", "bbox/AP", "TEST.PATIENCE", "1", "TEST.EVAL_PERIOD", "1"]
    assert main(words) == 0
    assert len(seen) == 2 and not seen[0] & seen[1] and set(judged) == seen[0] | seen[1] and len(judged) == 6
    assert set(judged[:3]) == seen[1]  # the first model judges what the second is trained on
    printed = capsys.readouterr().out
    assert (
        "Model 1 of 2 learns from 3 images to judge 3 others." in printed and "; time left for the models: 0" in printed
    )

    second = tmp_path / "output" / "analysis" / "hardest_2_folds" / "2_of_2"
    (second / "model_final.pth").unlink()
    (second / "last_checkpoint").unlink()
    assert main(words) == 0
    assert len(seen) == 3 and seen[2] == seen[1]

    assert main([*words, "SOLVER.BASE_LR", "0.1"]) == 2
    assert "SOLVER.BASE_LR 0.001 → 0.1" in capsys.readouterr().err
    labels = tmp_path / "shapes_train.json"
    content = json.loads(labels.read_text())
    content["annotations"].pop()
    labels.write_text(json.dumps(content))
    DatasetCatalog.remove("shapes_train")
    MetadataCatalog.remove("shapes_train")
    assert main(words) == 2
    assert "labels have changed" in capsys.readouterr().err and len(seen) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "No weights"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["--folds", "1"], "--folds is 1"),
        (["--folds", "7"], "too few groups"),
        (["--folds", "2", "--split", "test"], "leave out --weights and --split test"),
        (["--folds", "2", "--weights", "a.pth"], "leave out --weights"),
        (["--folds", "2", "--by", "["], "no regular expression"),
        (["--by", "(.*)_", "--weights", "a.pth"], "give --folds too"),
        (["--top", "0", "--folds", "2"], "--top is 0"),
        (["--folds", "2", "DATASETS.TRAIN", "()"], "DATASETS.TRAIN"),
        (["--folds", "2", "MODEL.RETINANET.NUM_CLASSES", "5"], "MODEL.RETINANET.NUM_CLASSES is 5"),
        (["--folds", "2", "MODEL.META_ARCHITECTURE", "RetinaNet"], "MODEL.META_ARCHITECTURE"),
    ],
)
def test_mistakes(tiny_config, capsys, words, message):
    assert main(["hardest", "--config-file", tiny_config, *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and "learns from" not in printed.out


def test_the_other_labels_of_a_crop_are_drawn(tmp_path, judges):
    """Whether an object has a label is seen on its picture alone; the label that a suggestion changes is dashed."""
    planted = Planted(tmp_path, judges[3], num_images=1)
    _, best = planted.best(top=2)
    page = to_html(best, ["a", "b", "c"], ABOUT)
    assert "focal data correct IN OUT --suggestions hardest_test.json --accept NUMBERS" in page
    figures = page.split("<figure id=")[1:]
    shown = [s for found in best.values() for s in found]
    assert len(figures) == len(shown)
    for s, figure in zip(shown, figures):
        x, y, w, h = map(int, re.search(r'viewBox="(\d+) (\d+) (\d+) (\d+)"', figure).groups())
        corners = [label["bbox"] for label in planted.records[0]["annotations"]]
        meets = [x0 < x + w and y0 < y + h and x1 > x and y1 > y for x0, y0, x1, y1 in corners]
        if s.label is not None:
            meets[s.label] = False
        assert figure.count('class="other"') == sum(meets)
        assert figure.count('class="label"') == (s.label is not None)


@pytest.mark.parametrize("scores", [(0.99, 0.2), (0.6, 0.55)])
def test_what_a_label_should_be_is_not_missing_too(scores):
    """A moved label, with which a weak detection agrees: the good detection is where the label belongs, no more."""
    truth, label = [40.0, 40, 80, 80], [52.0, 52, 92, 92]  # IoU 0.32
    between = [49.0, 49, 89, 89]  # IoU 0.75 with the label
    found, given = Instances((120, 120)), Instances((120, 120))
    found.pred_boxes, found.scores = Boxes(torch.tensor([truth, between])), torch.tensor(scores)
    found.pred_classes = torch.tensor([0, 0])
    given.gt_boxes, given.gt_classes = Boxes(torch.tensor([label])), torch.tensor([0])
    assert _without_label(found, given, Boxes(torch.zeros(0, 4)), None).tolist() == [True, False]
    assert _without_label(found, given, Boxes(torch.tensor([truth])), None).tolist() == [False, False]


def test_how_well_labels_and_detections_agree(tmp_path, judges):
    """By hand: of 8 labels one is of another class, one is where nothing is, and an eighth object has no label."""
    ranking, _ = Planted(tmp_path, judges[3]).best(top=5)
    found = ranking.agreement()
    assert (found["recall"], found["precision"]) == (pytest.approx(6 / 8), pytest.approx(6 / 8))


def test_agreement_leaves_out_what_is_in_crowds(tmp_path, judges):
    planted = Planted(tmp_path, judges[3], num_images=1)
    planted.records[0]["annotations"].append(annotation((0, 0, SIZE, SIZE), 0, iscrowd=1))
    ranking, _ = planted.best(top=5)
    assert ranking.agreement()["precision"] == 1


def test_what_is_surest_is_marked(tmp_path, judges):
    _, best = Planted(tmp_path, judges[3]).best(top=5)
    surest = sum(s.is_sure(ABOUT["score_thresh"]) for kind in best.values() for s in kind)
    page = to_html(best, "abc", ABOUT)
    assert page.count("●</span>") == surest and 0 < surest < page.count("<figure ")
    assert "●" not in to_html(best, "abc", ABOUT | {"score_thresh": float("inf")})
