import csv
import filecmp
import json
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from focal_plugin.data import DataError, register_local_dataset
from focal_plugin.data.writers import LAYOUTS, flat_names, write_dataset

CLASSES = ["Tree, old", "<bush> & ä", "unused"]


def box(x0, y0, x1, y1, category=0, crowd=0):
    return {"bbox": [x0, y0, x1, y1], "bbox_mode": BoxMode.XYXY_ABS, "category_id": category, "iscrowd": crowd}


@pytest.fixture
def splits(tmp_path):
    """Two splits: a whole box and a broken one, an image without boxes, and a name that is there twice."""
    splits = {
        "train": [("one/a b.png", [box(0, 0, 60, 40), box(3.25, 4.125, 7.7, 9.1, 1)]), ("one/b.jpg", [])],
        "val": [("two/b.jpg", [box(1 / 3, 2 / 3, 10 / 3, 20.0, 1)])],
    }
    made = {}
    for number, (split, images) in enumerate(splits.items()):
        made[split] = []
        for name, boxes in images:
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (60, 40), (number, 0, 0)).save(path)
            made[split].append(
                {"file_name": str(path), "image_id": name, "width": 60, "height": 40, "annotations": boxes}
            )
    return made


def read(folder, split, name=None, **keys):
    name = name or f"{folder}/{split}"
    register_local_dataset({"name": name, "path": str(folder), "split": split, **keys})
    return DatasetCatalog.get(name)


@pytest.mark.parametrize("format", LAYOUTS)
def test_what_is_written_is_read_back(splits, tmp_path, format):
    folder = tmp_path / "out"
    folder.mkdir()
    assert not write_dataset(folder, format, splits, CLASSES)
    for split, records in splits.items():
        found = read(folder, split, classes=CLASSES)
        assert len(found) == len(records)
        for ours, theirs in zip(found, records):
            assert filecmp.cmp(ours["file_name"], theirs["file_name"], shallow=False)
            assert [b["category_id"] for b in ours["annotations"]] == [b["category_id"] for b in theirs["annotations"]]
            np.testing.assert_allclose(
                [b["bbox"] for b in ours["annotations"]], [b["bbox"] for b in theirs["annotations"]], atol=1e-6
            )
    if format in ("coco", "yolo"):
        read(folder, "train", "own")
        assert MetadataCatalog.get("own").thing_classes == CLASSES


@pytest.mark.parametrize("format", LAYOUTS)
def test_crowds(splits, tmp_path, format):
    splits["train"][0]["annotations"][1]["iscrowd"] = 1
    (tmp_path / "out").mkdir()
    left_out = write_dataset(tmp_path / "out", format, splits, CLASSES)
    keys = {"format": "voc", "root": str(tmp_path / "out"), "difficult": "ignore"} if format == "voc" else {}
    if keys:
        register_local_dataset({"name": "x", "split": "train", "classes": CLASSES, **keys})
        record = DatasetCatalog.get("x")[0]
    else:
        record = read(tmp_path / "out", "train", classes=CLASSES)[0]
    crowds = [b["iscrowd"] for b in record["annotations"]]
    assert (left_out, crowds) == (({}, [0, 1]) if format in ("voc", "coco") else ({"crowds": 1}, [0]))


def test_the_files_of_coco(splits, tmp_path):
    write_dataset(tmp_path, "coco", splits, CLASSES)
    coco = COCO(str(tmp_path / "train/annotations.json"))
    assert [(image["id"], image["file_name"]) for image in coco.dataset["images"]] == [
        (1, "one_a b.png"),
        (2, "one_b.jpg"),
    ]
    first, second = coco.loadAnns(coco.getAnnIds(1))
    assert (first["bbox"], first["area"], first["category_id"]) == ([0, 0, 60, 40], 2400, 1)
    assert second["bbox"] == pytest.approx([3.25, 4.125, 4.45, 4.975]) and second["category_id"] == 2


def test_the_files_of_voc(splits, tmp_path):
    write_dataset(tmp_path, "voc", splits, CLASSES)
    assert (tmp_path / "ImageSets/Main/train.txt").read_text() == "one_a b\none_b\n"
    root = ElementTree.parse(tmp_path / "Annotations/one_a b.xml").getroot()
    first, second = root.findall("object")
    assert [corner.text for corner in first.find("bndbox")] == ["1", "1", "60", "40"]  # whole pixels as whole numbers
    assert [corner.text for corner in second.find("bndbox")] == ["4.25", "5.125", "7.7", "9.1"]
    assert second.findtext("name") == "<bush> & ä" and root.findtext("size/width") == "60"


def test_the_files_of_yolo(splits, tmp_path):
    write_dataset(tmp_path, "yolo", splits, CLASSES)
    content = yaml.safe_load((tmp_path / "data.yaml").read_text())
    assert content == {"train": "images/train", "val": "images/val", "names": dict(enumerate(CLASSES))}
    lines = (tmp_path / "labels/train/one_a b.txt").read_text().splitlines()
    assert lines[0] == "0 0.5 0.5 1 1"
    assert [float(word) for word in lines[1].split()] == pytest.approx(
        [1, 5.475 / 60, 6.6125 / 40, 4.45 / 60, 4.975 / 40]
    )
    assert (tmp_path / "labels/train/one_b.txt").read_text() == ""


def test_the_files_of_csv(splits, tmp_path):
    write_dataset(tmp_path, "csv", splits, CLASSES)
    with open(tmp_path / "train.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["image_path", "xmin", "ymin", "xmax", "ymax", "label"],
            ["images/one_a b.png", "0", "0", "60", "40", "Tree, old"],
            ["images/one_a b.png", "3.25", "4.125", "7.7", "9.1", "<bush> & ä"],
            ["images/one_b.jpg", "0", "0", "0", "0", "Tree, old"],
        ]


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["whole"], ["train"]),
        (["instances_val2017"], ["val"]),
        (["instances_train2017", "instances_val2017"], ["train", "val"]),
        (["train", "val", "test"], ["train", "val", "test"]),
    ],
)
def test_names_of_yolos_splits(splits, tmp_path, names, keys):
    write_dataset(tmp_path, "yolo", dict.fromkeys(names, splits["train"]), CLASSES)
    assert list(yaml.safe_load((tmp_path / "data.yaml").read_text()))[:-1] == keys


@pytest.mark.parametrize("names", [["a", "b"], ["train1", "train2"], ["train", "other"], ["train_val", "test"]])
def test_splits_that_yolo_does_not_have(splits, tmp_path, names):
    with pytest.raises(DataError, match="splits that YOLO does not have: found " + ", ".join(names)):
        write_dataset(tmp_path, "yolo", dict.fromkeys(names, splits["train"]), CLASSES)
    assert not list(tmp_path.glob("images"))


def test_an_image_in_two_splits(splits, tmp_path):
    (record, _) = splits["train"]
    (tmp_path / "out").mkdir()
    write_dataset(tmp_path / "out", "voc", {"train": [record], "all": [record]}, CLASSES)
    assert len(list((tmp_path / "out/JPEGImages").iterdir())) == 1
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"image with other boxes in another split: .*VOC has one file an image"):
        write_dataset(tmp_path / "other", "voc", {"a": [record], "b": [{**record, "annotations": []}]}, CLASSES)


@pytest.mark.parametrize("format", LAYOUTS)
def test_an_image_listed_twice_in_a_split(splits, tmp_path, format):
    """COCO tells its entries apart by ids; elsewhere the boxes of one would be lost, or doubled."""
    (record, other) = splits["train"]
    twice = {"train": [record, other, {**record, "annotations": [box(1, 1, 9, 9, 1)]}]}
    if format == "coco":
        write_dataset(tmp_path, format, twice, CLASSES)
        coco = COCO(str(tmp_path / "train/annotations.json"))
        assert [len(coco.getAnnIds(i)) for i in coco.getImgIds()] == [2, 0, 1]
        return
    with pytest.raises(DataError, match=rf"image listed twice: .*a b\.png, in split 'train'; format {format} has one"):
        write_dataset(tmp_path, format, twice, CLASSES)
    assert not list(tmp_path.rglob("*.txt")) and not list(tmp_path.rglob("*.csv"))


@pytest.mark.parametrize("format", LAYOUTS)
def test_boxes_below_a_pixel_and_names_like_vocs_lists_of_a_class(splits, tmp_path, format):
    """VOC counts the last pixel in: one pixel is from 5 to 5, and half a pixel ends before it begins."""
    path = tmp_path / "photo 1.png"
    Image.new("RGB", (60, 40)).save(path)
    sides = [(4, 4, 5, 9), (4, 4, 4.5, 4.25), (59.5, 39.5, 60, 40)]
    record = {**splits["train"][0], "file_name": str(path), "annotations": [box(*four) for four in sides]}
    (tmp_path / "out").mkdir()
    write_dataset(tmp_path / "out", format, {"train": [record]}, CLASSES)
    (found,) = read(tmp_path / "out", "train", classes=CLASSES)
    np.testing.assert_allclose([b["bbox"] for b in found["annotations"]], sides, atol=1e-6)


@given(st.lists(st.sampled_from(["a", "B", "b", "a_b", "1_a", "c"]), min_size=1, max_size=3), st.data())
def test_flat_names(parts, data):
    paths = [
        "/".join(["in", *data.draw(st.permutations(parts)), stem + ending])
        for stem, ending in data.draw(
            st.lists(st.tuples(st.sampled_from(["a", "A", "b_a"]), st.sampled_from([".jpg", ".png"])), min_size=1)
        )
    ]
    names = flat_names(paths)
    assert set(names) == set(paths)
    assert len({name.rpartition(".")[0].lower() for name in names.values()}) == len(names)
    assert all("/" not in name and name.endswith(path[-4:]) for path, name in names.items())


def test_flat_names_are_short_where_they_can_be():
    assert flat_names(["x/a.jpg", "x/y/b.jpg", "x/a.jpg"]) == {"x/a.jpg": "a.jpg", "x/y/b.jpg": "b.jpg"}
    assert flat_names(["x/a.jpg", "x/y/a.jpg"]) == {"x/a.jpg": "a.jpg", "x/y/a.jpg": "y_a.jpg"}
    assert flat_names(["x/a.jpg", "x/a.png"]) == {"x/a.jpg": "1_a.jpg", "x/a.png": "2_a.png"}
    assert json.dumps(flat_names([])) == "{}"
