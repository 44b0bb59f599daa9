import json

import pytest
import yaml
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader

from focal_plugin import add_focal_config
from focal_plugin.data import DataError, register_local_dataset, register_local_datasets

VOC = {"name": "mine", "format": "voc", "root": "somewhere", "split": "train"}
COCO = {"name": "mine", "format": "coco", "json": "a.json", "images": "imgs"}


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_focal_config(cfg)
    return cfg


@pytest.mark.parametrize("entry", [VOC, COCO])
def test_registering_reads_nothing(cfg, entry):
    cfg.DATASETS.LOCAL = [entry]
    register_local_datasets(cfg)
    assert "mine" in DatasetCatalog
    assert MetadataCatalog.get("mine").evaluator_type == "coco"
    with pytest.raises(DataError, match=r"missing file: in data set 'mine': (json|root) is .*, which does not exist"):
        DatasetCatalog.get("mine")


def test_from_yaml(cfg, tmp_path):
    (tmp_path / "a.yaml").write_text(
        "DATASETS:\n  LOCAL:\n"
        "  - {name: one, format: voc, root: r, split: train, on_error: skip}\n"
        "  - {name: two, format: coco, json: a.json, images: imgs/, classes: [a, b]}\n"
    )
    cfg.merge_from_file(str(tmp_path / "a.yaml"))
    register_local_datasets(cfg)
    assert {"one", "two"} <= set(DatasetCatalog)


@pytest.mark.parametrize("container", [list, tuple])
def test_from_the_command_line(cfg, container):
    cfg.merge_from_list(["DATASETS.LOCAL", repr(container([VOC, {**COCO, "name": "other", "classes": ("a", "b")}]))])
    register_local_datasets(cfg)
    assert {"mine", "other"} <= set(DatasetCatalog)


def test_dumped_config_is_read_back(cfg):
    cfg.DATASETS.LOCAL = [VOC, {**COCO, "name": "other", "classes": ["a"]}]
    assert yaml.safe_load(cfg.dump())["DATASETS"]["LOCAL"] == cfg.DATASETS.LOCAL


def test_same_entry_twice(cfg):
    cfg.DATASETS.LOCAL = [COCO, dict(COCO)]
    register_local_datasets(cfg)
    first = DatasetCatalog["mine"]
    register_local_datasets(cfg)
    assert DatasetCatalog["mine"] is first


@pytest.mark.parametrize("other", [{**COCO, "images": "elsewhere"}, {**COCO, "on_error": "skip"}, VOC])
def test_same_name_for_another_entry(cfg, other):
    register_local_dataset(COCO)
    cfg.DATASETS.LOCAL = [other]
    with pytest.raises(ValueError, match=r"DATASETS\.LOCAL\[0\]: 'mine' is registered already as CocoSet"):
        register_local_datasets(cfg)


def test_name_of_a_builtin_data_set():
    with pytest.raises(ValueError, match="'coco_2017_train' is taken"):
        register_local_dataset({**COCO, "name": "coco_2017_train"})


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("mine", "'mine'; expected keys and values with a format of voc, coco, yolo, csv"),
        ({"name": "mine"}, "format None; expected keys and values with a format of voc, coco, yolo, csv"),
        (
            {**COCO, "format": "yolov8"},
            "format 'yolov8'; expected keys and values with a format of voc, coco, yolo, csv,",
        ),
        ({**COCO, "format": ["coco"]}, "format ['coco']"),
        ({**COCO, "format": {}}, "format {}"),
        ({"name": "mine", "path": "a", "format": "yolov8"}, "format 'yolov8'; expected"),
        ({"name": "mine", "path": "a", "json": "b"}, "unknown key json. A path to search takes name (needed), path"),
        ({"name": "mine", "format": "csv"}, "missing key csv. Format csv takes"),
        (
            {"name": "mine", "format": "yolo"},
            "takes data, split and perhaps root, or images and perhaps labels; found neither",
        ),
        ({"name": "mine", "format": "yolo", "data": "a"}, "found data"),
        ({"name": "mine", "format": "yolo", "data": "a", "split": "val", "images": "b"}, "found data, images, split"),
        ({**COCO, "roots": "a"}, "unknown key roots. Format coco takes name (needed), json (needed), images (needed)"),
        ({**COCO, 5: "a"}, "unknown key 5"),
        ({"name": "mine", "format": "voc", "root": "a"}, "missing key split. Format voc takes"),
        ({**COCO, "difficult": "keep"}, "unknown key difficult"),
        ({**VOC, "difficult": "drop"}, "difficult is 'drop'; expected one of keep, ignore"),
        ({**VOC, "on_error": "warn"}, "on_error is 'warn'; expected one of raise, skip"),
        ({**VOC, "on_error": []}, "on_error is []; expected one of raise, skip"),
        ({**VOC, "split": 2012}, "split is 2012; expected text"),
        ({**VOC, "name": ""}, "name is ''; expected text"),
        ({**VOC, "root": None}, "root is None; expected text"),
        ({**VOC, "classes": "cat"}, "classes is 'cat'; expected a list"),
        ({**VOC, "classes": []}, "classes is []; expected a list"),
        ({**VOC, "classes": [1, 2]}, "classes is [1, 2]; expected a list"),
        ({**VOC, "classes": ["a", "a"]}, "expected a list of different names"),
    ],
)
def test_malformed_entry(cfg, entry, says):
    cfg.DATASETS.LOCAL = [{**COCO, "name": "fine"}, entry]
    with pytest.raises(ValueError) as error:
        register_local_datasets(cfg)
    assert str(error.value).startswith("DATASETS.LOCAL[1]") and says in str(error.value)
    assert "mine" not in DatasetCatalog


@pytest.mark.parametrize(
    "words",
    [{"root": ["x" * 9000]}, {"classes": ["x" * 9000, 1]}, {"format": "x" * 9000}, {"on_error": "x" * 9000}]
    + [{str(number): "x" for number in range(9000)}],
)
def test_messages_have_an_end(cfg, words):
    cfg.DATASETS.LOCAL = [{**VOC, **words}]
    with pytest.raises(ValueError, match=r"DATASETS.LOCAL\[0\].*\.\.\.") as error:
        register_local_datasets(cfg)
    assert len(str(error.value)) < 500


def test_files_are_read_once(coco_file):
    coco_file.image(1)
    coco_file.box(1)
    first = coco_file.load()
    (coco_file.folder / "annotations.json").unlink()
    first[0]["annotations"].clear()  # what a caller does to its copy stays there
    assert len(DatasetCatalog.get("local")[0]["annotations"]) == 1


def test_relative_paths(coco_file, tmp_path, monkeypatch):
    coco_file.image(1)
    coco_file.box(1)
    coco_file.write()
    monkeypatch.chdir(tmp_path)
    register_local_dataset({"name": "x", "format": "coco", "json": "coco/annotations.json", "images": "coco/images"})
    assert DatasetCatalog.get("x")[0]["file_name"] == "coco/images/1.png"


def test_detectron2_datasets_stands_for_datasets(voc_root, tmp_path, monkeypatch):
    voc_root.image("a", [("cat", (1, 1, 9, 9))])
    voc_root.split("train", "a")
    monkeypatch.chdir(voc_root.root)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_local_dataset({"name": "x", "format": "voc", "root": "datasets/voc", "split": "train"})
    assert DatasetCatalog.get("x")[0]["file_name"] == str(voc_root.root / "JPEGImages" / "a.jpg")


def test_detectron2_datasets_gives_way_to_what_is_there(voc_root, tmp_path, monkeypatch):
    voc_root.image("a", [("cat", (1, 1, 9, 9))])
    voc_root.split("train", "a")
    voc_root.root.parent.joinpath("datasets").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", "/not/there")
    register_local_dataset({"name": "x", "format": "voc", "root": "datasets/voc", "split": "train"})
    assert DatasetCatalog.get("x")[0]["file_name"] == "datasets/voc/JPEGImages/a.jpg"


def test_detectron2_trains_on_it(cfg, coco_file):
    for image_id in (1, 2, 3):
        coco_file.image(image_id)
    coco_file.box(1)
    coco_file.box(2, iscrowd=1)
    coco_file.write()
    paths = {"json": str(coco_file.folder / "annotations.json"), "images": str(coco_file.folder / "images")}
    cfg.merge_from_list(["DATASETS.LOCAL", repr([{"name": "mine", "format": "coco", **paths}])])
    cfg.merge_from_list(["DATASETS.TRAIN", "('mine',)", "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "1"])
    register_local_datasets(cfg)
    (sample,) = next(iter(build_detection_train_loader(cfg)))
    assert sample["image_id"] == 1  # images 2 and 3 have nothing to train on
    assert len(sample["instances"]) == 1


def test_json_round_trip_of_records(coco_file):
    coco_file.image(1)
    coco_file.box(1)
    assert json.loads(json.dumps(coco_file.load()))[0]["annotations"][0]["bbox"] == [5, 5, 15, 15]
