from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from focal_plugin import add_focal_config
from focal_plugin.data import FocalDatasetMapper, build_augmentations
from focal_plugin.data.records import DataError


def make_cfg(*augmentations):
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (40,), 40
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.merge_from_list(["INPUT.AUGMENTATIONS", repr(list(augmentations))])
    return cfg


@pytest.fixture
def record(tmp_path):
    """An image of one bright box in the upper left."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[4:16, 3:9] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    box = {"bbox": [3, 4, 9, 16], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 0}
    return {"file_name": str(tmp_path / "a.png"), "height": 40, "width": 60, "annotations": [box]}


VFLIP = {"name": "RandomFlip", "prob": 1.0, "horizontal": False, "vertical": True}
TURN = {"name": "RandomRotation", "angle": [90], "sample_style": "choice"}


@pytest.mark.parametrize("is_train", [True, False])
def test_without_the_key_it_is_detectron2s(record, is_train):
    ours, theirs = FocalDatasetMapper(make_cfg(), is_train), DatasetMapper(make_cfg(), is_train)
    assert repr(ours.augmentations) == repr(theirs.augmentations)
    assert (ours(record)["image"] == theirs(record)["image"]).all()


@pytest.mark.parametrize(
    ("augmentations", "shape", "box"),
    [
        ([VFLIP], (40, 60), [3, 24, 9, 36]),
        ([TURN], (60, 40), [4, 51, 16, 57]),  # counter-clockwise: x, y -> y, 60 - x
        ([VFLIP, TURN], (60, 40), [24, 51, 36, 57]),
    ],
)
def test_boxes_follow_the_image(record, augmentations, shape, box):
    sample = FocalDatasetMapper(make_cfg(*augmentations), True)(record)
    assert sample["image"].shape[1:] == shape
    np.testing.assert_allclose(sample["instances"].gt_boxes.tensor[0], box, atol=1e-4)
    ys, xs = np.nonzero(sample["image"][0].numpy() > 127)
    assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == box


@pytest.mark.parametrize("resized", [40, 80])
@pytest.mark.parametrize("augmentations", [[], [VFLIP], [TURN], [VFLIP, TURN]])
def test_crowds_follow_the_image(record, augmentations, resized):
    """The bright box is a crowd, and an object beside it stays one."""
    (crowd,) = record["annotations"]
    crowd["iscrowd"] = 1
    crowd["segmentation"] = [[3, 4, 9, 4, 9, 16]]
    box = {"bbox": [20, 20, 10, 12], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 2, "iscrowd": 0}
    record["annotations"].append(box)
    cfg = make_cfg(*augmentations)
    cfg.INPUT.MIN_SIZE_TRAIN = (resized,)
    sample = FocalDatasetMapper(cfg, True)(record)
    ys, xs = np.nonzero(sample["image"][0].numpy() > 127)
    extent = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    np.testing.assert_allclose(sample["ignore_boxes"].tensor, [extent], atol=0.5)
    expected = DatasetMapper(cfg, True)
    expected.augmentations = FocalDatasetMapper(cfg, True).augmentations
    expected = expected(record)["instances"]
    assert sample["instances"].gt_classes.tolist() == [2]
    assert sample["instances"].gt_boxes.tensor.equal(expected.gt_boxes.tensor)
    assert crowd["bbox"] == [3, 4, 9, 16]  # the record is as it was


def test_crowds_are_clipped_and_cropped_away(record):
    record["annotations"] = [
        {"bbox": bbox, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 1}
        for bbox in ([50, 30, 100, 100], [5, 5, 0, 20])
    ]
    (region,) = FocalDatasetMapper(make_cfg(), True)(record)["ignore_boxes"]
    assert region.tolist() == [50, 30, 60, 40]
    away = FocalDatasetMapper(make_cfg(), True)
    away.augmentations = T.AugmentationList([T.FixedSizeCrop((20, 20), pad=False)])
    record["annotations"] = record["annotations"][1:]
    sample = away(record)
    assert "ignore_boxes" not in sample and len(sample["instances"]) == 0


@pytest.mark.parametrize("is_train", [True, False])
def test_no_key_without_crowds(record, is_train):
    sample = FocalDatasetMapper(make_cfg(), is_train)(record)
    assert "ignore_boxes" not in sample
    del record["annotations"]
    assert "ignore_boxes" not in FocalDatasetMapper(make_cfg(), is_train)(record)


def test_not_in_evaluation(record):
    assert FocalDatasetMapper(make_cfg(TURN), False)(record)["image"].shape[1:] == (40, 60)


def test_user_file_with_yaml(tmp_path):
    cfg = make_cfg()
    text = "INPUT: {AUGMENTATIONS: [{name: RandomBrightness, intensity_min: 0.8, intensity_max: 1.2}]}"
    (tmp_path / "a.yaml").write_text(text)
    cfg.merge_from_file(str(tmp_path / "a.yaml"))
    (augmentation,) = build_augmentations(cfg)
    assert isinstance(augmentation, T.RandomBrightness) and augmentation.intensity_min == 0.8


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"name": "RandomMagic"}, "expected a name of"),
        ({}, "expected a name of"),
        ("RandomFlip", "expected a name of"),
        ({"name": "np"}, "expected a name of"),
        ({"name": "Augmentation"}, "expected a name of"),
        ({"name": "RandomBrightness", "strength": 2}, "RandomBrightness(intensity_min, intensity_max)"),
        ({"name": "RandomFlip", "horizontal": False}, "RandomFlip does not take {'horizontal': False}"),
    ],
)
def test_bad_entry(entry, says):
    with pytest.raises(ValueError, match=r"INPUT\.AUGMENTATIONS\[1\]") as error:
        build_augmentations(make_cfg(VFLIP, entry))
    assert says in str(error.value)


def truncated(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (truncated, "truncated"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "image that does not open"),
        (lambda path: path.write_text("not an image"), "cannot identify"),
        (lambda path: path.write_bytes(b""), "cannot identify"),
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: Image.fromarray(np.full((40, 60), 999, np.uint16)).save(path), "do not fit the 8 bits"),
        (lambda path: Image.fromarray(np.full((40, 60), 9, np.int32)).save(path, format="TIFF"), "mode I"),
        (lambda path: Image.fromarray(np.full((40, 60), 0.5, np.float32)).save(path, format="TIFF"), "mode F"),
        (lambda path: Image.new("1", (20_000, 20_000)).save(path), "decompression bomb"),
    ],
)
def test_an_image_that_cannot_be_read_is_named(record, is_train, spoil, says):
    spoil(Path(record["file_name"]))
    with pytest.raises(DataError, match=says) as error:
        FocalDatasetMapper(make_cfg(), is_train)(record)
    assert record["file_name"] in str(error.value)


@pytest.mark.parametrize("crowd", [0, 1])
@pytest.mark.parametrize("container", [list, tuple, np.array])
def test_boxes_in_whole_pixels_are_scaled_exactly(record, container, crowd):
    """Detectron2 computes the boxes of a resized image in the numbers' own type, and so cut whole ones off."""
    (box,) = record["annotations"]
    box.update(bbox=container([3, 4, 9, 17]), iscrowd=crowd)
    cfg = make_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = (30,)
    sample = FocalDatasetMapper(cfg, True)(record)
    boxes = sample["ignore_boxes"] if crowd else sample["instances"].gt_boxes
    np.testing.assert_allclose(boxes.tensor, [[2.25, 3, 6.75, 12.75]])
    assert list(box["bbox"]) == [3, 4, 9, 17]
    box.update(bbox=container([3, 4, 6, 13]), bbox_mode=BoxMode.XYWH_ABS)
    if container is not np.array:  # which Detectron2 does not convert one by one
        sample = FocalDatasetMapper(cfg, True)(record)
        boxes = sample["ignore_boxes"] if crowd else sample["instances"].gt_boxes
        np.testing.assert_allclose(boxes.tensor, [[2.25, 3, 6.75, 12.75]])
