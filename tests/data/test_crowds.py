"""What a data set marks to be ignored, from its file to training and to the metric."""

from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from focal_plugin import IGNORED, add_focal_config
from focal_plugin.data import FocalDatasetMapper

ROOT = Path(__file__).parents[2]


def mapped(record):
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (record["height"],), "none"
    return FocalDatasetMapper(cfg, True)(record)


@pytest.mark.parametrize("mark", ["iscrowd", "ignore"])
def test_coco(coco_file, mark):
    coco_file.image(1)
    coco_file.box(1, (5, 5, 10, 10))
    coco_file.box(1, (20, 10, 30, 20), **{mark: 1})
    sample = mapped(coco_file.load()[0])
    assert sample["instances"].gt_boxes.tensor.tolist() == [[5, 5, 15, 15]]
    assert sample["ignore_boxes"].tensor.tolist() == [[20, 10, 50, 30]]


@pytest.mark.parametrize(("difficult", "objects", "regions"), [("keep", 2, 0), ("ignore", 1, 1)])
def test_voc(voc_root, difficult, objects, regions):
    voc_root.image("a", [("cat", (6, 6, 15, 15)), voc_root.object("cat", (21, 11, 50, 30), difficult=1)])
    voc_root.split("train", "a")
    sample = mapped(voc_root.load(difficult=difficult)[0])
    assert len(sample["instances"]) == objects and len(sample.get("ignore_boxes", [])) == regions
    if regions:
        assert sample["ignore_boxes"].tensor.tolist() == [[20, 10, 50, 30]]


@pytest.mark.parametrize("is_kept", [True, False])
def test_from_file_to_targets(coco_file, is_kept):
    """Down to what the model asks of its anchors: nothing in a crowd, but for the key at 0."""
    coco_file.image(1, size=(64, 64))
    coco_file.box(1, (0, 0, 20, 20))
    coco_file.box(1, (24, 24, 40, 40), iscrowd=1)
    sample = mapped(coco_file.load()[0])
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "Base-FocalRetinaNet.yaml"))
    cfg.MODEL.DEVICE, cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = "cpu", 18, 64
    cfg.MODEL.FOCAL.MATCHER.IGNORE_IOA = 0.5 if is_kept else 0.0
    model = build_model(cfg)
    model.losses = lambda logits, deltas, targets: targets
    targets = model.train()([sample])
    assert targets.gt_boxes.unique(dim=0).tolist() == [[0, 0, 20, 20]]
    center = targets.labels[0][0, :, 5, 5]  # the anchors around (40, 40) at stride 8
    assert ((center == IGNORED) if is_kept else (center == model.num_classes)).all()


def test_the_lazy_config_keeps_them():
    mapper = LazyConfig.load(str(ROOT / "configs" / "lazy" / "focal_retinanet_R_50_FPN_1x.py")).dataloader.train.mapper
    assert isinstance(instantiate(mapper), FocalDatasetMapper)


def average_precision(dataset, folder, *detections):
    """AP50 of ``detections``, each (x0, y0, x1, y1, score), in the one image of ``dataset``."""
    (record,) = DatasetCatalog.get(dataset)
    evaluator = COCOEvaluator(dataset, output_dir=str(folder), allow_cached_coco=False)
    evaluator.reset()
    found = Instances((record["height"], record["width"]))
    found.pred_boxes = Boxes([detection[:4] for detection in detections])
    found.scores = torch.tensor([detection[4] for detection in detections])
    found.pred_classes = torch.zeros(len(detections), dtype=torch.int64)
    evaluator.process([{"image_id": record["image_id"]}], [{"instances": found}])
    return evaluator.evaluate()["bbox"]["AP50"]


@pytest.mark.parametrize(("difficult", "expected"), [("keep", 25), ("ignore", 100)])
def test_a_detection_in_a_region_does_not_count(voc_root, tmp_path, difficult, expected):
    """The better detection lies in the difficult object without matching it: one of two, and that after a false one."""
    voc_root.image("a", [("cat", (6, 6, 15, 15)), voc_root.object("cat", (21, 11, 50, 30), difficult=1)])
    voc_root.split("train", "a")
    voc_root.load(difficult=difficult)
    found = average_precision("local", tmp_path, (21, 11, 27, 17, 0.9), (5, 5, 15, 15, 0.8))
    assert found == pytest.approx(expected, abs=0.5)
