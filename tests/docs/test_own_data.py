"""What the page on data prints is read as it says."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from focal_plugin import add_focal_config
from focal_plugin.__main__ import main as focal
from focal_plugin.config.load import build_model, load_config
from focal_plugin.data import check_num_classes, register_local_datasets
from focal_plugin.data.__main__ import build_parser
from focal_plugin.engine import Trainer
from focal_plugin.engine.rng import seeded
from tests.data.conftest import CocoFile, VocRoot
from tests.docs.pages import PAGES, blocks, commands, section

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


def test_the_commands_on_data(tmp_path, monkeypatch, capsys):
    """As printed, one after another."""
    monkeypatch.chdir(tmp_path)
    write_yolo(tmp_path / "trees")
    rows = ["image_path,xmin,ymin,xmax,ymax,label"]
    for number in range(10):
        save_image(tmp_path / f"site{number // 2}_{number}.png")
        rows.append(f"site{number // 2}_{number}.png,10,10,30,30,oak")
    (tmp_path / "trees.csv").write_text("\n".join(rows))
    for words in commands(section(PAGE, "Commands on data")):
        assert focal(words[1:], "focal") == 0, capsys.readouterr().err
    assert (tmp_path / "sheet.png").is_file() and (tmp_path / "trees_yolo/data.yaml").is_file()


def test_the_commands_and_flags_of_the_table():
    (subparsers,) = [action for action in build_parser()._actions if action.choices]
    rows = re.findall(r"^\| `(\w+) (?:IN(?: OUT)?|PCBDATA)` \|(.*)", section(PAGE, "Commands on data"), re.M)
    assert {name for name, _ in rows} == set(subparsers.choices)
    common = {"--help", "--format", "--images", "--split", "--classes", "--difficult", "--on-error", "--force"}
    for name, text in rows:
        flags = {o for a in subparsers.choices[name]._actions for o in a.option_strings if o.startswith("--")}
        assert set(re.findall(r"--[\w-]+", text)) == flags - common


@pytest.fixture
def my_set(tiny_config, tmp_path, monkeypatch):
    """The config of a run on ``my_set``, as the page says."""
    (code,) = blocks(section(PAGE, "Data from your own code"), "python")
    (words,) = commands(section(PAGE, "Data from your own code"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("my_data.py").write_text(code)
    save_image(Path("a.jpg"))

    def load(*more):
        changes = ["DATASETS.TEST", "()", "MODEL.RETINANET.NUM_CLASSES", "1", "SOLVER.IMS_PER_BATCH", "1", *more]
        return load_config(tiny_config, [*words[words.index("MODEL.FOCAL.IMPORTS") :], *changes])

    yield load
    sys.modules.pop("my_data", None)
    if "my_set" in DatasetCatalog:
        DatasetCatalog.remove("my_set")
        MetadataCatalog.remove("my_set")


def test_data_from_own_code(my_set):
    cfg = my_set()
    check_num_classes(cfg)
    (sample,) = next(iter(Trainer.build_train_loader(cfg)))
    scale = sample["image"].shape[1] / 100
    box = sample["instances"].gt_boxes.tensor[0] / scale
    assert (box[2] - box[0], box[1]) == (pytest.approx(20), pytest.approx(10))


def test_own_code_trains_from_the_command_line(my_set, tiny_config, loggers, capsys):
    my_set()
    words = ["MODEL.FOCAL.IMPORTS", "['my_data']", "DATASETS.TRAIN", "('my_set',)", "DATASETS.TEST", "()"]
    words += ["MODEL.RETINANET.NUM_CLASSES", "1", "SOLVER.IMS_PER_BATCH", "1", "SOLVER.MAX_ITER", "2"]
    assert focal(["train", "--config-file", tiny_config, *words], "focal") == 0, capsys.readouterr().err


def test_augmentations(tiny_config):
    pytest.importorskip("albumentations", reason="needs pip install -e .[augment]")
    (text,) = blocks(section(PAGE, "Augmentations"), "yaml")
    entries = yaml.safe_load(text)["INPUT"]["AUGMENTATIONS"]
    cfg = load_config(tiny_config, ["INPUT.AUGMENTATIONS", repr(entries)])

    def images():
        with seeded(1):
            batches = iter(Trainer.build_train_loader(cfg))
            return [sample["image"].numpy().tobytes() for _ in range(3) for sample in next(batches)]

    assert images() == images()


def test_repeat_factors(tiny_config, tmp_path):
    """Of ten images one has the rare class: with a threshold of 0.4 it is shown √(0.4 / 0.1) = 2 times an epoch."""
    (text,) = blocks(section(PAGE, "Rare classes"), "yaml")
    keys = yaml.safe_load(text)["DATALOADER"]
    assert set(keys) == {"SAMPLER_TRAIN", "REPEAT_THRESHOLD"}
    coco = CocoFile(tmp_path / "rare")
    coco.content["categories"].append({"id": 2, "name": "dog"})
    for number in range(1, 11):
        coco.image(number)
        coco.box(number)
    coco.box(10, category_id=2)
    entry = {"name": "rare", "format": "coco", "json": str(coco.write()), "images": str(coco.folder / "images")}
    words = [
        "DATASETS.LOCAL",
        repr([entry]),
        "DATASETS.TRAIN",
        "('rare',)",
        "DATASETS.TEST",
        "()",
        "SOLVER.IMS_PER_BATCH",
        "1",
    ]
    words += ["DATALOADER.SAMPLER_TRAIN", keys["SAMPLER_TRAIN"], "DATALOADER.REPEAT_THRESHOLD", "0.4"]
    try:
        cfg = load_config(tiny_config, words)
        batches = iter(Trainer.build_train_loader(cfg))
        shown = [next(batches)[0]["image_id"] for _ in range(2 * 11)]  # two epochs
        assert {number: shown.count(number) for number in range(1, 11)} == {**dict.fromkeys(range(1, 10), 2), 10: 4}
    finally:
        DatasetCatalog.remove("rare")
        MetadataCatalog.remove("rare")


@pytest.mark.parametrize("freeze_at", [0, 2, 5])
def test_freezing(tiny_config, freeze_at):
    (text,) = blocks(section(PAGE, "Few images"), "yaml")
    assert yaml.safe_load(text) == {"MODEL": {"BACKBONE": {"FREEZE_AT": 5}}}
    model = build_model(load_config(tiny_config, ["MODEL.BACKBONE.FREEZE_AT", str(freeze_at), "MODEL.DEVICE", "cpu"]))
    encoder = model.backbone.bottom_up
    for number, stage in enumerate([encoder.stem, *encoder.stages], start=1):
        assert all(p.requires_grad == (number > freeze_at) for p in stage.parameters()), number
    trained = [p for n, p in model.named_parameters() if "bottom_up" not in n]
    assert all(p.requires_grad for p in trained) and isinstance(trained[0], torch.Tensor)
