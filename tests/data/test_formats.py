import json
import logging
import os

import pytest
from detectron2.data import DatasetCatalog

from focal_plugin.data import DataError, register_local_dataset
from focal_plugin.data.formats import FORMATS, find_sets


def load(path, name="found", **keys):
    register_local_dataset({"name": name, "path": str(path), **keys})
    return DatasetCatalog.get(name)


@pytest.fixture
def folders(voc_root, coco_file, yolo_folder, csv_file):
    """One data set of each format: an image with one box from (6, 4) to (18, 12), and one without boxes."""
    voc_root.image("a", [("cat", (7, 5, 18, 12))])
    voc_root.image("b")
    voc_root.split("train", "a", "b")
    coco_file.image(1)
    coco_file.image(2)
    coco_file.box(1, (6, 4, 12, 8))
    coco_file.write()
    yolo_folder.image("a.png", ["0 0.2 0.2 0.2 0.2"])
    yolo_folder.image("b.png", [])
    yolo_folder.describe(names=["cat"])
    csv_file.row("a.png", 6, 4, 18, 12, "cat")
    csv_file.row("b.png", "", "", "", "", "")
    csv_file.write()
    return {"voc": voc_root.root, "coco": coco_file.folder, "yolo": yolo_folder.root, "csv": csv_file.path.parent}


@pytest.mark.parametrize("format", FORMATS)
def test_a_path_alone(folders, format, caplog):
    with caplog.at_level(logging.INFO, "focal_plugin"):
        first, second = load(folders[format])
    (box,) = first["annotations"]
    assert box["bbox"] == pytest.approx([6, 4, 18, 12]) and not second["annotations"]
    (line,) = [record.message for record in caplog.records if "holds" in record.message]
    assert line.startswith(f"Data set 'found': {folders[format]} holds {format}, split ")
    others = [other for other in FORMATS if other != format]
    for other in others:
        with pytest.raises(DataError, match=r"no data set"):
            load(folders[format], name=other, format=other)


@pytest.mark.parametrize(
    ("format", "file"), [("coco", "annotations.json"), ("yolo", "data.yaml"), ("csv", "trees.csv")]
)
def test_the_file_as_path(folders, format, file):
    assert len(load(folders[format] / file)) == 2


def test_relative_paths_and_classes(folders, monkeypatch):
    monkeypatch.chdir(folders["csv"].parent)
    (record, _) = load("csv", classes=["dog", "cat"])
    assert record["annotations"][0]["category_id"] == 1
    monkeypatch.chdir(folders["csv"])
    assert len(load(".", name="here")) == 2


def test_several_splits(folders, voc_root):
    voc_root.split("val", "b")
    (voc_root.root / "ImageSets/Main/cat_train.txt").write_text("a  1\nb -1\n")
    with pytest.raises(DataError) as error:
        load(voc_root.root)
    assert "several data sets: in data set 'found'" in str(error.value)
    assert "holds voc, split train (" in str(error.value) and "; voc, split val (" in str(error.value)
    assert "Name one by format and split" in str(error.value) and "cat_train" not in str(error.value)
    assert len(load(voc_root.root, name="val", split="val")) == 1
    with pytest.raises(DataError, match=r"no such split: .*has no split 'test'\. It holds voc, split train"):
        load(voc_root.root, name="test", split="test")


def test_several_formats(folders, coco_file, csv_file):
    csv_file.path.rename(coco_file.folder / "trees.csv")
    with pytest.raises(DataError, match=r"several data sets: .*coco, split coco .*; csv, split trees"):
        load(coco_file.folder)
    assert len(load(coco_file.folder, name="coco", format="coco")) == 2


def test_nothing(tmp_path):
    with pytest.raises(DataError, match=r"missing file: .*path is .*nowhere"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"no data set: .*holds nothing\. A data set has, for voc: .*coco: .*yolo: .*csv: "
    ):
        load(tmp_path / "empty", name="empty")
    for name, text in {
        "a.csv": "x,y\n1,2\n",
        "b.json": "[1]",
        "c.yaml": "{",
        "d.json": "{",
        "e.csv": "",
        "f.txt": "",
    }.items():
        (tmp_path / "empty" / name).write_text(text)
    with pytest.raises(DataError, match=r"no data set: .*holds a\.csv, b\.json, c\.yaml"):
        load(tmp_path / "empty", name="other")


@pytest.mark.parametrize(
    ("json_file", "images", "split"),
    [
        ("annotations.json", "images", "root"),
        ("annotations.json", ".", "root"),
        ("annotations/instances_train2017.json", "train2017", "instances_train2017"),
        ("annotations/instances_train2017.json", "images/train2017", "instances_train2017"),
        ("annotations/train.json", "images", "train"),
        ("my_train.json", "my_train", "my_train"),
        ("train/annotations.json", "train/images", "train"),
        ("annotations/annotations.json", "annotations/images", "annotations"),
        ("train/_annotations.coco.json", "train", "train"),  # Roboflow's
    ],
)
def test_layouts_of_coco(tmp_path, save_image, json_file, images, split):
    root = tmp_path / "root"
    save_image(root / images / 'ä".png', (60, 40))
    content = {
        "images": [{"id": 1, "file_name": 'ä".png'}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [],
    }
    (root / json_file).parent.mkdir(exist_ok=True)
    (root / json_file).write_text(json.dumps(content))
    (root / "captions.json").write_text('{"images": [], "annotations": []}')
    (found,) = find_sets(str(root))
    assert (found.format, found.split) == ("coco", split)
    assert len(load(root)) == 1
    assert len(load(root / json_file, name="file")) == 1


def test_layouts_of_yolo(yolo_folder):
    yolo_folder.image("a.png", ["0 .5 .5 .5 .5"])
    yolo_folder.image("b.png", ["0 .5 .5 .5 .5"], split="val")
    root = yolo_folder.root
    assert [found.split for found in find_sets(str(root))] == ["train", "val"]
    (root / "classes.txt").write_text("cat")
    assert [record["image_id"] for record in load(root, split="val")] == ["b.png"]
    yolo_folder.describe(train="images/train", val="images/val")
    assert [(found.split, *found.keys) for found in find_sets(str(root))] == [
        ("train", "data", "split"),
        ("val", "data", "split"),
    ]


def test_a_coco_file_with_a_byte_order_mark(folders):
    path = folders["coco"] / "annotations.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load(folders["coco"])) == 2


def test_a_yolo_folder_without_splits(tmp_path, save_image):
    save_image(tmp_path / "images" / "a.png", (60, 40))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 .5 .5 .5 .5")
    assert len(load(tmp_path, classes=["cat"])) == 1


def test_a_csv_file_with_a_folder_of_images(tmp_path, save_image):
    save_image(tmp_path / "images" / "a.png", (60, 40))
    (tmp_path / "all.csv").write_text("image_path,xmin,ymin,xmax,ymax,label\na.png,1,1,5,5,cat\n")
    assert len(load(tmp_path)) == 1


@pytest.mark.parametrize("name", [r"\\ud800", r"\\u00", "a" * 5000, "../" * 9, r"\\u0000", "\xff"])
def test_names_of_images_that_cannot_be(tmp_path, name):
    """Whatever the first image is called, the file is found, and reading it says what is wrong."""
    text = '{"images": [{"id": 1, "file_name": "NAME"}], "categories": [{"id": 1, "name": "a"}]}'.replace("NAME", name)
    (tmp_path / "a.json").write_bytes(text.encode("latin1"))
    os.mkfifo(tmp_path / "b.json")
    assert [found.format for found in find_sets(str(tmp_path))] == ["coco"]
    with pytest.raises(DataError):
        load(tmp_path)
