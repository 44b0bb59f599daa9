"""Coverage equals that of a dense matcher; suggested anchors reach as many boxes as reported."""

import json

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator, build_anchor_generator
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou

from focal_plugin.analysis import coverage as coverage_module
from focal_plugin.analysis.__main__ import main
from focal_plugin.analysis.anchors import kmeans, sizes_by_level, tabulate_coverage
from focal_plugin.analysis.coverage import Coverage, FeatureGrid, Image, measure, read_images
from focal_plugin.config.load import load_config


@pytest.fixture
def cfg(tiny_config):
    return load_config(tiny_config, ["MODEL.DEVICE", "cpu"])


def dense(image, generator, grid, thresholds, low_quality):
    """(G, L) positives of each box by the whole IoU matrix and Detectron2's matcher."""
    anchors = generator(grid.features(image.size))
    iou = pairwise_iou(Boxes(image.boxes), Boxes.cat(anchors))
    matched, labels = Matcher(thresholds, [0, -1, 1], allow_low_quality_matches=low_quality)(iou)
    level = torch.cat([torch.full((len(boxes),), i) for i, boxes in enumerate(anchors)])
    found = torch.zeros(len(image.boxes), len(anchors), dtype=torch.int64)
    for r in (labels == 1).nonzero().flatten():
        found[matched[r], level[r]] += 1
    return found.numpy()


@pytest.mark.parametrize("low_quality", ["detectron2", "none"])
def test_coverage_by_brute_force(cfg, low_quality):
    cfg.MODEL.FOCAL.MATCHER.LOW_QUALITY = low_quality
    grid = FeatureGrid(cfg)
    generator = build_anchor_generator(cfg, grid.shapes)
    rng = np.random.default_rng(0)
    images = []
    for size in ((64, 64), (70, 100), (64, 64)):
        low = rng.uniform(0, 50, (12, 2))
        boxes = np.concatenate([low, low + np.exp(rng.uniform(0.5, 3.5, (12, 2)))], axis=1)
        images.append(Image(size, torch.tensor(boxes, dtype=torch.float32), np.ones(12)))
    images.append(Image((64, 64), torch.zeros(0, 4), np.zeros(0)))
    found = measure(cfg, grid, generator, images)
    expected = [dense(image, generator, grid, [0.4, 0.5], low_quality != "none") for image in images[:3]]
    strict = [dense(image, generator, grid, [0.4, 0.5], False).any(axis=1) for image in images[:3]]
    np.testing.assert_array_equal(found.positives, np.concatenate(expected))
    np.testing.assert_array_equal(found.regular, np.concatenate(strict))
    assert found.regular.any() and not found.regular.all()
    row = found.row()
    assert row["regular (%)"] + row["low quality only (%)"] + row["none (%)"] == pytest.approx(100)
    assert row["low quality only (%)"] > 0 if low_quality == "detectron2" else row["none (%)"] > 0


def test_feature_sizes_are_the_backbones(cfg):
    from detectron2.modeling.backbone import build_backbone

    grid, backbone = FeatureGrid(cfg), build_backbone(cfg).eval()
    for size in ((64, 64), (70, 100), (33, 161)):
        padded = [-(-side // 32) * 32 for side in size]
        with torch.no_grad():
            features = backbone(torch.zeros(1, 3, *padded))
        expected = [features[name].shape[-2:] for name in cfg.MODEL.RETINANET.IN_FEATURES]
        assert [feature.shape[-2:] for feature in grid.features(size)] == expected


def test_an_encoder_that_is_not_loaded_is_not_called_random(tiny_config, caplog):
    opts = ["MODEL.DEVICE", "cpu", "MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 2]
    opts += ["MODEL.FPN.IN_FEATURES", ["c3", "c4", "c5"], "MODEL.FOCAL.TIMM.NAME", "resnet18"]
    for weights, random in (("encoder.pth", False), ("", True)):
        caplog.clear()
        FeatureGrid(load_config(tiny_config, [*opts, "MODEL.FOCAL.TIMM.WEIGHTS", weights]))
        assert ("random weights" in caplog.text) == random


def test_boxes_as_the_network_gets_them(cfg, monkeypatch):
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (50,), 1000
    annotations = [
        {"bbox": [10, 20, 30, 40], "bbox_mode": 1, "category_id": 0},
        {"bbox": [90, 90, 30, 30], "bbox_mode": 1, "category_id": 0},  # clipped to the image
        {"bbox": [0, 0, 9, 9], "bbox_mode": 1, "category_id": 0, "iscrowd": 1},
        {"bbox": [5, 5, 0, 9], "bbox_mode": 1, "category_id": 0},
    ]
    record = {"file_name": "nowhere.png", "width": 200, "height": 100, "annotations": annotations}
    (image,) = read_images(cfg, [record])
    assert image.size == (50, 100)
    assert image.boxes.tolist() == [[5, 10, 20, 30], [45, 45, 60, 50]]
    assert image.areas.tolist() == [1200, 300]
    monkeypatch.setattr(coverage_module, "check_image", lambda path, declared, where: (200, 100))
    del record["width"]
    assert read_images(cfg, [record])[0].size == (50, 100)


@pytest.mark.parametrize(("sizes", "sampling"), [((40, 60), "range"), ((40, 50, 60), "choice")])
def test_resizing(cfg, sizes, sampling):
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING, cfg.INPUT.MAX_SIZE_TRAIN = sizes, sampling, 110
    records = [{"height": 100, "width": 200}] * 300
    sizes = [image.size for image in read_images(cfg, records)]
    expected = {40, 50, 55} if sampling == "choice" else set(range(40, 56))
    assert set(sizes) == {(height, 2 * height) for height in expected}
    assert sizes == [image.size for image in read_images(cfg, records)]
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = (0,), "choice"
    assert read_images(cfg, [{"height": 123, "width": 45}])[0].size == (123, 45)


def test_bands():
    found = Coverage(np.array([[1, 0], [0, 0], [2, 3]]), np.array([True, False, False]))
    tables = tabulate_coverage(found, np.array([1023.0, 1024.0, 9216.0]), np.array([0.2, 1.0, 4.0]), ["p3", "p4"])
    by_size = {row["size"]: row for row in tables["By size"]}
    assert [by_size[name]["boxes"] for name in ("small", "medium", "large")] == [1, 1, 1]
    assert by_size["small"]["regular (%)"] == by_size["medium"]["none (%)"] == 100
    assert by_size["large"]["low quality only (%)"] == 100 and by_size["large"]["positives a box"] == 5
    assert [row["boxes"] for row in tables["By shape"]] == [1, 0, 1, 0, 1]
    assert [row["boxes with a positive there"] for row in tables["By level"]] == [2, 1]
    assert [row["positives"] for row in tables["By level"]] == [3, 3]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_kmeans(count):
    rng = np.random.default_rng(count)
    values = rng.permutation(np.concatenate([rng.normal(i * 100, 1, 40) for i in range(count)]))
    centres = kmeans(values, count)
    expected = [np.sort(values)[40 * i : 40 * (i + 1)].mean() for i in range(count)]
    np.testing.assert_allclose(centres, expected)


def test_kmeans_of_few_values():
    assert kmeans(np.array([2.0]), 3).tolist() == [2, 2, 2]
    assert kmeans(np.array([1.0, 1, 5]), 2).tolist() == [1, 5]


def test_sizes_by_level():
    side = np.array([10.0, 12, 20, 22, 100, 200])
    assert sizes_by_level(side, [8, 16, 32], [[1], [2], [3]], 2.0) == [[pytest.approx(15.2, abs=0.1)], [2], [141.0]]
    # 10, 12, 20, 22 are below 2 · 16; none lies between 32 and 64, where the level's own size stays


def test_command(tiny_config, tmp_path, capsys):
    """Anchors far too large: the suggestion reaches more boxes, and as many as it says."""
    large = [[100.0, 120.0], [200.0, 240.0], [300.0, 350.0], [400.0, 450.0], [500.0, 600.0]]
    opts = ["MODEL.DEVICE", "cpu", "MODEL.ANCHOR_GENERATOR.SIZES", str(large)]
    assert main(["anchors", "--config-file", tiny_config, *opts]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "output" / "analysis"
    content = json.loads((folder / "anchors.json").read_text())
    assert cv2.imread(str(folder / "anchors.png")).std() > 5
    suggestion = content["suggestion"]
    assert suggestion["after"]["regular (%)"] > suggestion["before"]["regular (%)"] == 0
    assert content["tables"]["All boxes"][0] == suggestion["before"]

    pasted = yaml.safe_load(out[out.index("MODEL:") : out.index("Written")])["MODEL"]["ANCHOR_GENERATOR"]
    cfg = load_config(tiny_config, ["MODEL.DEVICE", "cpu"])
    grid = FeatureGrid(cfg)
    generator = DefaultAnchorGenerator(
        sizes=pasted["SIZES"], aspect_ratios=pasted["ASPECT_RATIOS"], strides=[8, 16, 32, 64, 128], offset=0.0
    )
    images = read_images(cfg, DatasetCatalog.get("shapes_train"))
    reached = [dense(image, generator, grid, [0.4, 0.5], False).any(axis=1) for image in images]
    assert 100 * np.concatenate(reached).mean() == pytest.approx(suggestion["after"]["regular (%)"])


def test_nothing_to_gain(tiny_config, capsys, tmp_path):
    dense_sizes = str([[10.0, 12.0, 14.0, 17.0, 20.0, 24.0, 28.0, 32.0]] * 5)
    opts = ["MODEL.DEVICE", "cpu", "MODEL.ANCHOR_GENERATOR.SIZES", dense_sizes]
    assert main(["anchors", "--config-file", tiny_config, *opts]) == 0
    assert "No sizes and ratios" in capsys.readouterr().out
    assert json.loads((tmp_path / "output" / "analysis" / "anchors.json").read_text())["suggestion"] is None


def test_mistakes(tiny_config, capsys):
    assert main(["anchors", "--config-file", tiny_config, "DATASETS.TRAIN", "()"]) == 2
    assert "DATASETS.TRAIN is empty" in capsys.readouterr().err


def test_features_that_the_backbone_does_not_have(tiny_config, capsys):
    """As with the config of another architecture."""
    assert main(["anchors", "--config-file", tiny_config, "MODEL.RETINANET.IN_FEATURES", "['p2', 'p3']"]) == 2
    assert "MODEL.RETINANET.IN_FEATURES names p2; the backbone has p3, p4, p5" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "size"), [("absolute", [32, 32]), ("relative", [0.5, 0.5])])
def test_boxes_have_the_scale_of_crops(cfg, kind, size):
    """Crops of 32 pixels of an image of 64 that become 64 show objects at twice the size of the whole image."""
    records = [{"height": 64, "width": 64, "annotations": [{"bbox": [4, 8, 20, 28], "bbox_mode": 0}]}]
    (whole,) = read_images(cfg, records)
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, kind, size
    (cropped,) = read_images(cfg, records)
    assert whole.size == (64, 64) and cropped.size == (128, 128)
    torch.testing.assert_close(cropped.boxes, 2 * whole.boxes)
