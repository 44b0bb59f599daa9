"""Pascal VOC's metric: Detectron2's numbers, and the page of the same detections."""

import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import register_pascal_voc
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image

from focal_plugin.evaluation.voc import VOCEvaluator

# (class, whether difficult, XYXY with pixels counted from 1)
OBJECTS = {
    "000001": [("cat", 0, (1, 1, 40, 40)), ("dog", 1, (41, 21, 70, 50)), ("dog", 0, (1, 41, 30, 60))],
    "000002": [("cat", 1, (11, 11, 50, 50))],
    "000003": [],
}
# XYXY in pixels counted from 0
RIGHT = [("000001", 0, (0, 0, 40, 40), 0.9), ("000001", 1, (0, 40, 30, 60), 0.8)]
DIFFICULT = [("000001", 1, (40, 20, 70, 50), 0.95), ("000002", 0, (10, 10, 50, 50), 0.7)]
WRONG = [("000003", 0, (5, 5, 30, 30), 0.99)]


@pytest.fixture
def voc(tmp_path):
    """A registered data set, and a function that gives an evaluator some detections and returns its results."""
    root = tmp_path / "voc"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Main/test.txt").write_text("\n".join(OBJECTS))
    for name, objects in OBJECTS.items():
        Image.new("RGB", (80, 60)).save(root / "JPEGImages" / f"{name}.jpg")
        xml = "<size><width>80</width><height>60</height><depth>3</depth></size>"
        for label, difficult, box in objects:
            sides = "".join(f"<{side}>{x}</{side}>" for side, x in zip(("xmin", "ymin", "xmax", "ymax"), box))
            xml += f"<object><name>{label}</name><pose>Left</pose><truncated>0</truncated>"
            xml += f"<difficult>{difficult}</difficult><bndbox>{sides}</bndbox></object>"
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{xml}</annotation>")
    register_pascal_voc("voc_pets", str(root), "test", 2007, ["cat", "dog"])

    def evaluate(evaluator, detections):
        evaluator.reset()
        for image_id in OBJECTS:
            found = [(k, box, score) for image, k, box, score in detections if image == image_id]
            instances = Instances((60, 80))
            instances.pred_boxes = Boxes(torch.tensor([box for _, box, _ in found]).reshape(-1, 4).float())
            instances.scores = torch.tensor([score for *_, score in found])
            instances.pred_classes = torch.tensor([k for k, *_ in found], dtype=torch.int64)
            evaluator.process([{"image_id": image_id}], [{"instances": instances}])
        return evaluator.evaluate()

    yield evaluate
    DatasetCatalog.remove("voc_pets")
    MetadataCatalog.remove("voc_pets")


@pytest.mark.parametrize("detections", [RIGHT, RIGHT + DIFFICULT + WRONG, DIFFICULT, []], ids=len)
def test_results_are_detectron2s(voc, tmp_path, detections):
    expected = voc(PascalVOCDetectionEvaluator("voc_pets"), detections)
    found = voc(VOCEvaluator("voc_pets", str(tmp_path / "out")), detections)
    assert found == expected


@pytest.mark.parametrize(
    ("detections", "right", "background"), [(RIGHT, 2, 0), (RIGHT + DIFFICULT, 2, 0), (RIGHT + DIFFICULT + WRONG, 2, 1)]
)
def test_difficult_objects_do_not_count(voc, tmp_path, detections, right, background):
    """Neither finding nor missing them, as in VOC's metric."""
    voc(VOCEvaluator("voc_pets", str(tmp_path / "out")), detections)
    page = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [row["objects"] for row in page["classes"]] == [1, 1]
    assert page["overall"]["right"] == right
    assert page["overall"]["false_positives"]["background"] == background
    assert page["overall"]["AP50"] == pytest.approx(100 if not background else 75)
    html = (tmp_path / "out" / "evaluation.html").read_text()
    assert "voc_pets" in html and "cannot be read" not in html
