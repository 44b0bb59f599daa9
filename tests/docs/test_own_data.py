"""What the page on data prints is read as it says."""

import pytest
import yaml
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from focal_plugin import add_focal_config
from focal_plugin.data import register_local_datasets
from tests.data.conftest import CocoFile, VocRoot
from tests.docs.pages import PAGES, blocks, section

PAGE = PAGES["docs/own_data.md"]


@pytest.fixture
def register(tmp_path, monkeypatch):
    """Register the entries of a block of YAML, with ``tmp_path`` as the current folder."""
    monkeypatch.chdir(tmp_path)
    before = set(DatasetCatalog), set(MetadataCatalog)

    def register(text):
        cfg = get_cfg()
        add_focal_config(cfg)
        cfg.DATASETS.LOCAL = yaml.safe_load(text)["DATASETS"]["LOCAL"]
        register_local_datasets(cfg)
        return [entry["name"] for entry in cfg.DATASETS.LOCAL]

    yield register
    for catalog, names in zip((DatasetCatalog, MetadataCatalog), before):
        for name in set(catalog) - names:
            catalog.remove(name)


def save_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (100, 100)).save(path)


def write_yolo(root):
    """As in the page's section on formats."""
    (text,), (lines,) = blocks(section(PAGE, "Formats"), "yaml"), blocks(section(PAGE, "Formats"), "text")
    for split in ("train", "val"):
        save_image(root / "images" / split / "a.jpg")
        (root / "labels" / split).mkdir(parents=True)
        (root / "labels" / split / "a.txt").write_text(lines)
    (root / "data.yaml").write_text(text)


def test_a_path_is_enough(register, tmp_path):
    write_yolo(tmp_path / "trees")
    names = register(blocks(PAGE, "yaml")[0])
    assert names == ["mine_train", "mine_test"]
    for name, split in zip(names, ("train", "val")):
        (record,) = DatasetCatalog.get(name)
        assert record["file_name"] == f"trees/images/{split}/a.jpg"
        assert [box["bbox"] for box in record["annotations"]] == [
            pytest.approx([40, 35, 60, 65]),
            pytest.approx([10, 10, 40, 60]),
        ]
    assert MetadataCatalog.get("mine_test").thing_classes == ["oak", "ash", "elm"]


def test_the_formats(register, tmp_path):
    coco = CocoFile(tmp_path)
    coco.image(1)
    coco.box(1)
    coco.write().rename(tmp_path / "train.json")
    (tmp_path / "images").rename(tmp_path / "imgs")
    voc = VocRoot(tmp_path / "VOCdevkit/mine")
    voc.image("a", [("cat", (1, 1, 9, 9))])
    voc.split("train", "a")
    write_yolo(tmp_path / "trees")
    write_yolo(tmp_path / "shots")
    (rows,) = blocks(section(PAGE, "Formats"), "csv")
    (tmp_path / "trees.csv").write_text(rows)
    save_image(tmp_path / "imgs" / "a.jpg")
    save_image(tmp_path / "imgs" / "b.jpg")
    counts = {
        name: [len(record["annotations"]) for record in DatasetCatalog.get(name)]
        for name in register(blocks(PAGE, "yaml")[1])
    }
    assert counts == {"of_coco": [1], "of_voc": [1], "of_yolo": [2], "of_folders": [2, 2], "of_csv": [2, 0]}
    assert MetadataCatalog.get("of_csv").thing_classes == ["elm", "oak"]
