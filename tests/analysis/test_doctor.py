"""Each check passes for a correct run, and names the mistake and the key to change for a wrong one."""

import json
import logging
import os
import re
import runpy
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from PIL import Image

from focal_plugin import CLS_LOSS_REGISTRY, BCELoss
from focal_plugin.analysis.__main__ import main
from focal_plugin.analysis.checks import cost, schedule, settings
from focal_plugin.analysis.checks.case import ERROR, OK, SKIPPED, WARNING, Case, Check
from focal_plugin.analysis.doctor import CHECKS, examine
from focal_plugin.config import load
from focal_plugin.config.load import load_config
from focal_plugin.engine import AtomicCheckpointer, StepTrainer, Trainer
from focal_plugin.engine.changes import plain_config
from tests.docs.pages import PAGES, section

ROOT = Path(__file__).parents[2]
FINE = {
    "MODEL.DEVICE": "cpu",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RETINANET.IN_FEATURES": "['p3', 'p4']",
    "MODEL.ANCHOR_GENERATOR.SIZES": "[[12.0, 14.0, 16.0, 18.0, 20.0], [20.0, 22.0, 25.0, 28.0, 32.0]]",
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
}


def options(*opts):
    """``FINE`` with other values, as words of a command line."""
    values = FINE | dict(zip(opts[::2], opts[1::2], strict=True))
    return [str(word) for pair in values.items() for word in pair]


@pytest.fixture
def find(tiny_config):
    """Run one check and return (level, text) of each finding."""

    def find(name, *opts, **kwargs):
        (check,) = [check for check in CHECKS if check.name == name]
        found = [finding for _, finding in examine(Case(tiny_config, options(*opts), **kwargs), [check])]
        assert found
        return [(finding.level, finding.text) for finding in found]

    return find


@pytest.fixture
def edit_data(tmp_path):
    """Change the content of the training set's JSON file."""

    def edit(change, name="shapes_train"):
        path = tmp_path / f"{name}.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


@pytest.fixture
def edit_config(tiny_config):
    """Change the entry of a data set in ``DATASETS.LOCAL``."""

    def edit(name, **keys):
        path = Path(tiny_config)
        content = yaml.safe_load(path.read_text())
        for entry in content["DATASETS"]["LOCAL"]:
            if entry["name"] == name:
                entry.update(keys)
        path.write_text(yaml.safe_dump(content))

    return edit


@pytest.fixture
def own_set(tiny_config):
    """Register a data set of other boxes on the images of the tiny one; names it for DATASETS.TRAIN."""
    load_config(tiny_config, ["MODEL.DEVICE", "cpu"])

    def register(*annotations, classes=("square", "disc")):
        records = DatasetCatalog.get("shapes_train")
        defaults = {"bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0}
        records[0]["annotations"] += [{**defaults, **annotation} for annotation in annotations]
        DatasetCatalog.register("own", lambda: records)
        MetadataCatalog.get("own").thing_classes = list(classes)
        return ["DATASETS.TRAIN", "('own',)", "DATASETS.TEST", "()"]

    yield register
    for catalog in (DatasetCatalog, MetadataCatalog):
        if "own" in catalog.list() if hasattr(catalog, "list") else "own" in catalog:
            catalog.remove("own")


def test_nothing_is_wrong_with_a_run_that_is_right(tiny_config, tmp_path, capsys):
    assert main(["doctor", "--config-file", tiny_config, *options()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [OK] * len(CHECKS), lines
    assert [line[9:27].strip() for line in lines[:-1]] == [check.name for check in CHECKS]
    assert lines[-1].startswith(f"{len(CHECKS)} ok, in ")
    assert not (tmp_path / "output").exists()


# Settings


@pytest.mark.parametrize(
    ("opts", "says"),
    [
        (["MODEL.FOCAL.NO_SUCH_KEY", 1], "MODEL.FOCAL.NO_SUCH_KEY"),
        (["MODEL.FOCAL.IMPORTS", "['no_such_module']"], "MODEL.FOCAL.IMPORTS names 'no_such_module'"),
        (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER"),
        (["DATASETS.LOCAL", "[{'name': 'a', 'format': 'b'}]"], "DATASETS.LOCAL[0]"),
    ],
)
def test_config(find, opts, says):
    ((level, text),) = find("config", *opts)
    assert level == ERROR and says in text


def test_the_keys_of_a_component_are_shown(find, monkeypatch):
    def loss(cfg, *, gamma_neg=4.0, tau=1):
        return BCELoss()

    monkeypatch.setattr(CLS_LOSS_REGISTRY, "_obj_map", CLS_LOSS_REGISTRY._obj_map | {"Mine": loss})
    own = ["MODEL.FOCAL.CLS_LOSS.NAME", "Mine", "MODEL.FOCAL.CLS_LOSS.ARGS.GAMMA_NEG"]
    ((level, text),) = find("config", *own, 2)
    assert level == OK and text.endswith("; MODEL.FOCAL.CLS_LOSS.ARGS.GAMMA_NEG 2.0; MODEL.FOCAL.CLS_LOSS.ARGS.TAU 1")
    ((level, text),) = find("config", *own, "big")
    assert (
        level == ERROR and "MODEL.FOCAL.CLS_LOSS.ARGS.GAMMA_NEG is 'big' (str); expected a value of type float" in text
    )


def test_learning_rate(find):
    unclipped = ["SOLVER.CLIP_GRADIENTS.ENABLED", False]
    rate, start = find("learning rate", "SOLVER.BASE_LR", 0.01, *unclipped)
    assert rate[0] == start[0] == WARNING
    assert "SOLVER.BASE_LR 0.00125," in rate[1] and "SOLVER.WARMUP_ITERS is 1 " in start[1]
    assert find("learning rate", *unclipped)[0][0] == OK


@pytest.mark.parametrize(
    ("opts", "says"),
    [
        (["SOLVER.BASE_LR", 5.0], "4,000 times what linear scaling gives for IMS_PER_BATCH 2: training diverges"),
        (["SOLVER.BASE_LR", 0.0], "SOLVER.BASE_LR is 0, 0 times what linear scaling gives"),
        (
            ["SOLVER.BASE_LR", 1e-7],
            "1/12,500 of what linear scaling gives for IMS_PER_BATCH 2: next to nothing is learnt",
        ),
        (["SOLVER.OPTIMIZER", "adamw", "SOLVER.BASE_LR", 1e-8], "Set it near 3.53553e-05"),
        (["SOLVER.OPTIMIZER", "adamw", "SOLVER.BASE_LR", 0.02], "566 times what square-root scaling (AdamW) gives"),
        (["SOLVER.WARMUP_ITERS", 1000], "never reaches BASE_LR. Set WARMUP_ITERS 0 or less"),
        (["SOLVER.STEPS", "(3, 30)", "SOLVER.MAX_ITER", 9], "SOLVER.STEPS (30,) come after the run's end"),
        (["SOLVER.MAX_ITER", 180_000], "60,000 epochs of 6 images, as for a larger set. Set SOLVER.MAX_ITER near 500"),
        (
            ["SOLVER.MAX_ITER", 4000, "SOLVER.IMS_PER_BATCH", 2],
            "epochs of 6 images, as for a larger set. Set SOLVER.MAX_ITER near 500",
        ),
        (["SOLVER.MAX_ITER", 2], "0.667 epochs: not all 6 images are seen. Set SOLVER.MAX_ITER near 500"),
    ],
)
def test_schedule(find, opts, says):
    """Though gradients are clipped."""
    ((level, text),) = find("schedule", *opts)
    assert level == WARNING and says in text


@pytest.mark.parametrize(
    "opts",
    [
        ["SOLVER.BASE_LR", 0.1],
        ["SOLVER.BASE_LR", 2e-5],
        ["SOLVER.OPTIMIZER", "adamw", "SOLVER.BASE_LR", 1e-4],
        ["SOLVER.WARMUP_ITERS", 3],
        ["SOLVER.STEPS", "(2, 3)"],
        ["SOLVER.STEPS", "(30,)", "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"],
        ["SOLVER.MAX_ITER", 3000],
        ["SOLVER.MAX_ITER", 3],
    ],
)
def test_schedules_that_may_be_meant(find, opts):
    ((level, text),) = find("schedule", *opts)
    assert level == OK and "epochs" in text


WARNED_OF = re.findall(
    r"^\| `([A-Z_.]+ .*)` \| (.*) \|$", section(PAGES["docs/own_data.md"], "What it says of a schedule"), re.M
)


@pytest.mark.parametrize(("words", "text"), WARNED_OF)
def test_the_schedules_of_the_page(words, text):
    case = Case("quickstart/trees.yaml", [*shlex.split(words), "DATASETS.LOCAL", "[]"])
    case.used_records = [{}] * 61
    found = [finding for check in (schedule.check_schedule, schedule.check_sizes) for finding in check(case)]
    assert [finding.text for finding in found if finding.level == WARNING] == [text]


def test_the_page_has_each_kind():
    assert len(WARNED_OF) == 6


@pytest.mark.parametrize(
    ("train", "test", "expected"), [(240, 800, WARNING), (800, 240, WARNING), (64, 100, OK), (64, 0, OK)]
)
def test_sizes(find, train, test, expected):
    ((level, text),) = find("sizes", "INPUT.MIN_SIZE_TRAIN", f"({train},)", "INPUT.MIN_SIZE_TEST", test)
    assert level == expected and str(test) in text


def test_sizes_of_crops(find):
    """A crop of 64 pixels that is not resized has the scale of a whole image that is not, however large."""
    crop = ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", "[64, 64]"]
    ((level, text),) = find("sizes", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", 640, *crop)
    assert level == OK and "INPUT.CROP" in text


def test_clipping(find):
    unclipped = ["SOLVER.CLIP_GRADIENTS.ENABLED", False]
    ((level, text),) = find("gradient clipping", *unclipped)
    assert level == WARNING and "SOLVER.CLIP_GRADIENTS.ENABLED True" in text
    assert find("gradient clipping", *unclipped, weights="a.pth")[0][0] == OK
    timm = ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone"]
    assert find("gradient clipping", *unclipped, *timm)[0][0] == OK
    assert find("gradient clipping", *unclipped, *timm, "MODEL.FOCAL.TIMM.WEIGHTS", "")[0][0] == WARNING


def test_a_data_set_of_detectron2_that_is_not_there(find):
    (finding,) = find("test data", "DATASETS.TEST", ("coco_2017_val",))
    assert finding[0] == ERROR and "DETECTRON2_DATASETS" in finding[1] and "DATASETS.LOCAL" in finding[1]


def test_unread_keys(find):
    found = find("unread keys", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.3, "MODEL.ROI_HEADS.NUM_CLASSES", 2)
    ((level, text),) = found  # the classes are 2 where it counts
    assert level == WARNING and "MODEL.RETINANET.SCORE_THRESH_TEST" in text
    stock = ["MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"]
    ((level, text),) = find("unread keys", "MODEL.FOCAL.TOP_BLOCK", "p5", *stock)
    assert level == WARNING and "build_focal_resnet_fpn_backbone" in text
    assert [level for level, _ in find("unread keys", *stock)] == [OK]


@pytest.fixture
def earlier_run(tiny_config, tmp_path):
    """The folder of a run of this config, with other values."""

    def write(*opts, config=True, recorded=True):
        folder, cfg = tmp_path / "output", load_config(tiny_config, options(*opts))
        folder.mkdir(exist_ok=True)
        (folder / "last_checkpoint").write_text("model_0000001.pth")
        content = {"iteration": 1, **({"config": plain_config(cfg)} if recorded else {})}
        torch.save(content, folder / "model_0000001.pth")
        if config:
            (folder / "config.yaml").write_text(cfg.dump())

    return write


def test_output_folder(find, earlier_run):
    assert "no earlier run" in find("output folder")[0][1]
    assert find("output folder", resume=True)[0][0] == WARNING

    earlier_run()
    ((level, text),) = find("output folder")
    assert level == ERROR and "--resume" in text and "model_0000001.pth" in text
    assert find("output folder", resume=True)[0][0] == OK

    earlier_run("SOLVER.BASE_LR", 0.5, "MODEL.RETINANET.NUM_CLASSES", 7)
    assert find("output folder")[0][0] == ERROR
    ((level, text),) = find("output folder", resume=True)
    assert level == WARNING and "SOLVER.BASE_LR 0.5 → 0.001" in text


def test_resuming_is_checked(find, earlier_run, tmp_path):
    """As training does: by the checkpoint's own config, its steps, and whether it is whole."""
    earlier_run()
    ((level, text),) = find("output folder", "SEED", 5, resume=True)
    assert level == ERROR and "SEED 1 → 5" in text
    ((level, text),) = find("output folder", "SOLVER.MAX_ITER", 1, resume=True)
    assert level == ERROR and "has 2 steps, and SOLVER.MAX_ITER is 1" in text
    (tmp_path / "output/last_checkpoint").unlink()
    assert find("output folder", resume=True)[0][0] == OK
    earlier_run("SOLVER.BASE_LR", 0.5, recorded=False)  # of Detectron2
    ((level, text),) = find("output folder", resume=True)
    assert level == WARNING and "SOLVER.BASE_LR 0.5 → 0.001" in text
    (tmp_path / "output/model_0000001.pth").write_bytes(b"PK")
    ((level, text),) = find("output folder", resume=True)
    assert level == ERROR and "no checkpoint in" in text


@pytest.fixture
def trained(tiny_config, tmp_path):
    """A checkpoint of the tiny run, which cannot go on with every config; its weights are none of MODEL.WEIGHTS."""
    cfg = load_config(tiny_config, options())
    model = build_model(cfg)
    trainer = StepTrainer(model, [], Trainer.build_optimizer(cfg, model))
    checkpointer = AtomicCheckpointer(model, str(tmp_path / "output"))
    (tmp_path / "output").mkdir()
    checkpointer.config = plain_config(cfg)
    checkpointer.save("model_0000001", iteration=1, trainer={"iteration": 1, "_trainer": trainer.state_dict()})


@pytest.mark.parametrize(
    ("opts", "level", "says"),
    [
        ([], OK, "take the state of"),
        (["SOLVER.MOMENTUM", 0.5, "MODEL.WEIGHTS", "gone.pth"], OK, "take the state of"),
        (["MODEL.FPN.OUT_CHANNELS", 8], ERROR, "model_0000001.pth is of another model: "),
        (["SOLVER.OPTIMIZER", "adamw"], ERROR, "another kind of optimizer"),
        (["SOLVER.BIAS_LR_FACTOR", 2.0], ERROR, "its trainer: "),
    ],
)
def test_what_cannot_go_on_is_said_beforehand(find, trained, opts, level, says):
    assert [found for found, _ in find("weights", *opts, resume=True)] == [level]
    assert says in find("weights", *opts, resume=True)[0][1]
    assert find("first loss", *opts, resume=True)[0][0] == SKIPPED
    assert find("gradient clipping", *opts, "SOLVER.CLIP_GRADIENTS.ENABLED", False, resume=True)[0][0] == OK


def test_a_folder_in_use(find, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "holder", lambda folder: "process 7 on node3")
    ((level, text), *_) = find("output folder")
    assert level == ERROR and "process 7 on node3 trains there" in text


def test_the_seed_that_an_earlier_run_drew_is_no_difference(find, earlier_run):
    earlier_run("SEED", 77)
    assert [level for level, _ in find("output folder", "SEED", -1, resume=True)] == [OK]
    assert [level for level, _ in find("output folder", "SEED", 78, resume=True)] == [ERROR]


def test_a_default_output_folder_gets_a_number(find, earlier_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    earlier_run()
    assert find("output folder", "OUTPUT_DIR", "./output") == [(OK, "OUTPUT_DIR ./output-2: no earlier run")]


def test_evaluations(find):
    level, text = find("evaluations")[0]
    assert (level, text.startswith("at the end, ")) == (OK, True)
    assert find("evaluations", "TEST.EVAL_PERIOD", 40)[0][1].startswith("every 40 steps, ")
    for opts, found in {
        ("TEST.BEST_METRIC", "AP"): "'AP'; expected a name that metrics.json will have, such as bbox/AP",
        ("TEST.PATIENCE", 3): "TEST.BEST_METRIC is empty",
        ("LOGGERS", "['wandbb']"): "has 'wandbb'; expected some of tensorboard, wandb, mlflow",
    }.items():
        ((level, text),) = find("evaluations", *opts)
        assert level == ERROR and found in text
    ((_, text), _) = find("test data", "DATASETS.VALIDATION", "('shapes_test',)")
    assert "4 images for losses" in text


# Data


def test_training_data(find, edit_data, tmp_path):
    ((level, text),) = find("training data", "DATASETS.TRAIN", "()")
    assert level == ERROR and "DATASETS.TRAIN is empty" in text
    ((level, text),) = find("training data", "DATASETS.TRAIN", "('nowhere',)")
    assert level == ERROR and "'nowhere'" in text
    (tmp_path / "shapes_train.json").unlink()
    ((level, text),) = find("training data")
    assert level == ERROR and "shapes_train.json" in text


def test_no_boxes(find, edit_data):
    edit_data(lambda content: content["annotations"].clear())
    ((level, text),) = find("training data")
    assert level == ERROR and "6 images, 0 boxes" in text


def test_left_out(find, edit_data, tiny_config, tmp_path):
    edit_data(lambda content: content["annotations"][0].update(bbox=[3, 3, 0, 9]))
    ((level, text),) = find("training data")
    assert level == ERROR and "box of no size" in text
    for name in ("shapes_train", "shapes_test"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    entries = [
        {"name": name, "format": "coco", "json": str(tmp_path / f"{name}.json"), "images": str(tmp_path / name)}
        | {"on_error": "skip"}
        for name in ("shapes_train", "shapes_test")
    ]
    ((level, text),) = find("training data", "DATASETS.LOCAL", entries)
    assert level == OK and "1 × box of no size" in text


def test_test_data(find, tmp_path):
    ((level, text),) = find("test data", "DATASETS.TEST", "()")
    assert level == OK and "nothing is evaluated" in text
    (tmp_path / "shapes_test.json").unlink()
    ((level, text),) = find("test data")
    assert level == ERROR and "shapes_test.json" in text


def test_classes(find):
    ((level, text),) = find("classes", "MODEL.RETINANET.NUM_CLASSES", 80)
    assert level == ERROR and "Set MODEL.RETINANET.NUM_CLASSES to 2" in text
    ((level, text),) = find("classes", "MODEL.META_ARCHITECTURE", "NoSuchModel")
    assert level == ERROR and "NoSuchModel" in text


def test_images_a_class(find):
    ((level, text),) = find("classes")
    boxes = {k: set() for k in range(2)}
    for record in DatasetCatalog.get("shapes_train"):
        for annotation in record["annotations"]:
            boxes[annotation["category_id"]].add(record["image_id"])
    listed = ", ".join(f"{name} in {len(boxes[k])} images" for k, name in enumerate(["square", "disc"]))
    assert level == OK and text.endswith(listed)


def test_background_counted_from_one(find, own_set):
    ((level, text),) = find("classes", *own_set({"bbox": [3, 3, 20, 20], "category_id": 2}))
    assert level == ERROR and "1 boxes have category_id 2; expected 0 to 1" in text and "background" in text


@pytest.mark.parametrize("name", ["background", "__background__", "BG"])
def test_background_as_a_class(find, own_set, name):
    opts = own_set(classes=["square", "disc", name])
    ((level, text),) = find("classes", *opts, "MODEL.RETINANET.NUM_CLASSES", 3)
    assert level == WARNING and repr(name) in text


def test_a_class_without_boxes(find, edit_data):
    for name in ("shapes_train", "shapes_test"):
        edit_data(lambda content: content["categories"].append({"id": 3, "name": "star"}), name)
    ((level, text),) = find("classes", "MODEL.RETINANET.NUM_CLASSES", 3)
    assert level == WARNING and "class star" in text


@pytest.mark.parametrize(
    ("annotation", "level", "says"),
    [
        ({"bbox": [3, 3, 0, 20]}, WARNING, "no area"),
        ({"bbox": [30, 30, 20, 20], "bbox_mode": BoxMode.XYXY_ABS}, WARNING, "no area"),
        ({"bbox": [30, 30, 40, 10]}, WARNING, "outside"),
        ({"bbox": [-3, 30, 10, 10]}, WARNING, "outside"),
        ({"bbox": [30, 30, 34.5, 10]}, OK, "all"),  # half a pixel
        ({"bbox": [float("nan"), 3, 10, 20]}, ERROR, "not finite"),
    ],
)
def test_boxes(find, own_set, annotation, level, says):
    found, text = find("boxes", *own_set(annotation))[0]
    assert found == level and says in text
    assert level == OK or "0.png" in text


def test_repeated_boxes(find, edit_data):
    edit_data(lambda content: content["annotations"].append({**content["annotations"][0], "id": 1000}))
    ((level, text),) = find("boxes")
    assert level == WARNING and text.startswith("1 of ") and "repeat another (same image, box and class)" in text
    assert "0.png" in text


def test_empty_images(find, edit_data):
    def crowd_only(content):
        for annotation in content["annotations"]:
            annotation["iscrowd"] |= annotation["image_id"] == 1

    def blank(content):
        content["images"] += [{**content["images"][0], "id": 100 + i} for i in range(60)]

    assert find("empty images")[0] == (OK, "none of 6")
    edit_data(crowd_only)
    DatasetCatalog["shapes_train"].__dict__.pop("_records", None)
    ((level, text),) = find("empty images")
    assert level == WARNING and "1 of 6 (16.7 %)" in text and "FILTER_EMPTY_ANNOTATIONS" in text
    ((level, text),) = find("empty images", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
    assert level == OK and "trained on" in text


def test_crowds(find, edit_data):
    edit_data(lambda content: content["annotations"][0].update(iscrowd=1))
    ((level, text),) = find("crowds")
    assert level == OK and text.startswith("1 of ")
    ((level, text),) = find("crowds", "MODEL.FOCAL.MATCHER.IGNORE_IOA", 0.0)
    assert level == WARNING and "MODEL.FOCAL.MATCHER.IGNORE_IOA is 0" in text
    ((level, text),) = find("crowds", "MODEL.META_ARCHITECTURE", "RetinaNet")
    assert level == WARNING and "FocalRetinaNet" in text


@pytest.mark.parametrize("iscrowd", [None, "0", 2, float("nan")])
def test_crowds_of_own_records(find, own_set, iscrowd):
    ((level, text),) = find("crowds", *own_set({"bbox": [3, 3, 20, 20], "iscrowd": iscrowd}))
    assert level == ERROR and f"iscrowd {iscrowd!r}; expected 0 or 1" in text and "0.png" in text


# Images


def truncate(path):
    path.write_bytes(path.read_bytes()[:2000])


def test_images_are_decoded(find):
    ((level, text),) = find("images")
    assert level == OK and text == "all 6 training images and all 4 test images are decoded"
    ((level, text),) = find("images", num_images=3)
    assert level == OK and text == "3 of 6 training images and 3 of 4 test images, evenly spread, are decoded"
    ((level, text),) = find("images", "DATASETS.TEST", "()", num_images=0)
    assert level == OK and text == "all 6 training images are decoded"


@pytest.mark.parametrize("name", ["shapes_train", "shapes_test"])
@pytest.mark.parametrize(("on_error", "expected"), [("raise", ERROR), ("skip", WARNING)])
def test_images_that_open_and_cannot_be_decoded(find, edit_config, tmp_path, name, on_error, expected):
    for number in (1, 3):
        truncate(tmp_path / name / f"{number}.png")
    edit_config(name, on_error=on_error)
    ((level, text),) = find("images")
    assert level == expected and "2 " in text and f"{name}/1.png" in text
    assert ("left out" in text or "take their places" in text) == (on_error == "skip")


def test_the_rest_of_the_doctor_passes_by_images_that_are_skipped(tiny_config, edit_config, tmp_path):
    truncate(tmp_path / "shapes_train" / "1.png")
    edit_config("shapes_train", on_error="skip")
    found = {check.name: finding.level for check, finding in examine(Case(tiny_config, options()))}
    assert {name for name, level in found.items() if level != OK} == {"images"}


def test_images_of_several_frames(find, tmp_path):
    first = Image.open(tmp_path / "shapes_train" / "2.png")
    first.load()
    first.save(tmp_path / "shapes_train" / "2.png", save_all=True, append_images=[first.rotate(90)])
    ((level, text),) = find("images")
    assert level == WARNING and "1 of the decoded images has several frames" in text and "2.png" in text


# Anchors

FAR_TOO_LARGE = ["MODEL.ANCHOR_GENERATOR.SIZES", "[[300.0], [600.0]]"]


def test_boxes_without_anchors(find):
    ((level, text),) = find("anchors", *FAR_TOO_LARGE, "MODEL.FOCAL.MATCHER.LOW_QUALITY", "none")
    assert level == WARNING and "(100.0 %)" in text and "get no anchor" in text
    level, text = find("anchors", *FAR_TOO_LARGE)[-1]  # besides the boxes whose best anchors go to a better one
    assert level == WARNING and "only by the low-quality rule" in text and "MODEL.ANCHOR_GENERATOR" in text


def test_not_a_dense_model(find):
    opts = ["MODEL.META_ARCHITECTURE", "ProposalNetwork"]
    for name in ("anchors", "positives", "first loss"):
        assert find(name, *opts)[0][0] == SKIPPED


def test_no_positives(find):
    ((level, text),) = find("positives", *FAR_TOO_LARGE, "MODEL.FOCAL.MATCHER.LOW_QUALITY", "none")
    assert level == ERROR and "loss_box_reg stays 0" in text


def test_a_level_without_positives(find):
    ((level, text),) = find("positives", "MODEL.ANCHOR_GENERATOR.SIZES", "[[10.0, 20.0], [600.0, 700.0]]")
    assert level == WARNING and "p4 never has any" in text and "p3 " in text
    assert "from MODEL.RETINANET.IN_FEATURES and its sizes from MODEL.ANCHOR_GENERATOR.SIZES" in text


def test_levels_without_positives(find):
    opts = ["MODEL.ANCHOR_GENERATOR.SIZES", "[[10.0, 20.0], [600.0, 700.0], [800.0, 900.0]]"]
    ((level, text),) = find("positives", *opts, "MODEL.RETINANET.IN_FEATURES", "['p3', 'p4', 'p5']")
    assert level == WARNING and "p4, p5 never have any" in text


# Model


@pytest.mark.parametrize(
    ("opts", "says"),
    [
        (["MODEL.FOCAL.CLS_LOSS.NAME", "FocalLos"], "MODEL.FOCAL.CLS_LOSS.NAME is 'FocalLos'"),
        (["MODEL.META_ARCHITECTURE", "NoSuchModel"], "NoSuchModel"),
        (["INPUT.AUGMENTATIONS", "[{'name': 'RandomMagic'}]"], "INPUT.AUGMENTATIONS[0]"),
        (["SOLVER.LR_SCHEDULER_NAME", "NoSuchSchedule"], "NoSuchSchedule"),
        (["MODEL.FOCAL.MATCHER.IGNORE_IOA", 2.0], "MODEL.FOCAL.MATCHER.IGNORE_IOA"),
    ],
)
def test_components(find, opts, says):
    ((level, text),) = find("components", *opts)
    assert level == ERROR and says in text


def save_weights(tiny_config, folder, change=lambda model: None, *opts):
    model = build_model(load_config(tiny_config, options(*opts)))
    change(model)
    DetectionCheckpointer(model, str(folder)).save("weights")
    return str(folder / "weights.pth")


def test_weights(find, tiny_config, tmp_path):
    path = save_weights(tiny_config, tmp_path)
    ((level, text),) = find("weights", weights=path)
    assert level == OK and "(100.0 %)" in text
    ((level, text),) = find("weights", weights=str(tmp_path / "nowhere.pth"))
    assert level == ERROR and "nowhere.pth, which is no file" in text


def test_weights_of_another_number_of_classes(find, tiny_config, tmp_path, caplog):
    path = save_weights(tiny_config, tmp_path, lambda model: None, "MODEL.RETINANET.NUM_CLASSES", 7)
    ((level, text),) = find("weights", weights=path)
    assert level == WARNING and "for 7 classes" in text and "NUM_CLASSES is 2" in text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]  # tests before may log more


def test_weights_of_other_widths(find, tiny_config, tmp_path):
    path = save_weights(tiny_config, tmp_path, lambda model: None, "MODEL.FPN.OUT_CHANNELS", 8)
    ((level, text),) = find("weights", weights=path)
    assert level == WARNING and "other shapes" in text and "backbone.fpn" in text


def test_weights_of_another_model(find, tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "other.pth")
    ((level, text),) = find("weights", weights=str(tmp_path / "other.pth"))
    assert level == ERROR and "nothing is loaded" in text


def test_weights_that_are_none(find, tmp_path):
    (tmp_path / "broken.pth").write_bytes(b"nothing of the sort")
    assert find("weights", weights=str(tmp_path / "broken.pth"))[0][0] == ERROR


def test_random_and_frozen(find, tiny_config, tmp_path):
    ((level, text),) = find("weights", "MODEL.BACKBONE.FREEZE_AT", 2)
    assert level == WARNING and "never trained" in text and "backbone.bottom_up.stem" in text

    def only_the_head(model):
        del model.backbone

    path = save_weights(tiny_config, tmp_path, only_the_head)
    assert find("weights", "MODEL.BACKBONE.FREEZE_AT", 2, weights=path)[0][0] == WARNING
    assert find("weights", weights=path)[0][0] == OK


@pytest.fixture
def equal_images(edit_data):
    """One box in the middle of each image, where a flip leaves it: every batch has the same targets."""

    def centre(content):
        images = [image["id"] for image in content["images"]]
        box = {"category_id": 1, "bbox": [24, 24, 16, 16], "area": 256, "iscrowd": 0}
        content["annotations"] = [{"id": i, "image_id": image, **box} for i, image in enumerate(images, 1)]
        content["annotations"][0]["category_id"] = 2

    edit_data(centre)


@pytest.mark.parametrize("seed", [1, 5])
def test_first_loss(find, equal_images, seed):
    ((level, text),) = find("first loss", "SEED", seed, "MODEL.RETINANET.PRIOR_PROB", 0.5)
    assert level == ERROR and "PRIOR_PROB 0.01" in text and "starts at 13 times" in text
    ((level, text),) = find("first loss", "SEED", seed)
    assert level == OK and "by its closed form" in text


def test_anchors_of_a_model_without_any(find):
    """FCOS has a point a location: what the config says of anchors and their matcher is not read."""
    for name in ("anchors", "positives"):
        ((level, text),) = find(name, "MODEL.META_ARCHITECTURE", "FocalFCOS")
        assert level == SKIPPED and text == "FocalFCOS is no RetinaNet"


def test_first_loss_of_other_models(find, tiny_config, tmp_path):
    path = save_weights(tiny_config, tmp_path, lambda model: model.head.cls_score.bias.data.fill_(-2.0))
    ((level, text),) = find("first loss", weights=path)
    assert level == OK and "trained classifier" in text
    assert find("first loss", "MODEL.META_ARCHITECTURE", "RetinaNet")[0][0] == SKIPPED


# The images of a step


@pytest.mark.parametrize(
    ("opts", "gpus", "says"),
    [
        (["SOLVER.ACCUMULATE", 3], 1, "SOLVER.ACCUMULATE is 3; expected 1 to 2, the images a process has"),
        (["SOLVER.ACCUMULATE", 2], 2, "SOLVER.ACCUMULATE is 2; expected 1 to 1, the images a process has"),
        ([], 4, "SOLVER.IMS_PER_BATCH is 2; expected a multiple of 4, the number of processes"),
        (["SOLVER.IMS_PER_BATCH", 8, "SOLVER.REFERENCE_WORLD_SIZE", 4], 1, ""),
        (["SOLVER.IMS_PER_BATCH", 8, "SOLVER.REFERENCE_WORLD_SIZE", 4, "SOLVER.ACCUMULATE", 3], 1, "expected 1 to 2"),
    ],
)
def test_the_images_of_a_step_are_divided(find, opts, gpus, says):
    ((level, text),) = find("learning rate", *opts, num_gpus=gpus)
    assert says in text and (level == ERROR) == bool(says), text


def test_losses_on_data_without_ground_truth(find):
    DatasetCatalog.register("no_truth", lambda: [{"file_name": "a.png", "image_id": 0}])
    try:
        ((level, text),) = find("test data", "DATASETS.VALIDATION", "('no_truth',)")
    finally:
        DatasetCatalog.remove("no_truth")
    assert level == ERROR and "a.png has no annotations" in text


def test_the_number_of_gpus_scales_the_schedule(find):
    opts = ["SOLVER.IMS_PER_BATCH", 8, "SOLVER.REFERENCE_WORLD_SIZE", 4, "SOLVER.MAX_ITER", 12]
    assert find("schedule", *opts) == [(OK, "48 steps of 2 images, 16 epochs")]


# Time and memory


def test_time_and_memory(find, monkeypatch):
    """Of real steps; the numbers are those of a stopwatch and of the process."""
    kept, start = [], time.perf_counter()
    step = cost.StepTrainer.run_step
    monkeypatch.setattr(cost.StepTrainer, "run_step", lambda self: (kept.append(self), step(self)))
    opts = ["SOLVER.MAX_ITER", 7200, "SOLVER.IMS_PER_BATCH", 4, "MODEL.FOCAL.EMA.DECAY", 0.5]
    ((level, text),) = find("time and memory", *opts)
    took = time.perf_counter() - start
    number = r"~([\d.]+)"
    found = re.fullmatch(
        rf"estimate: {number} s and {number} GB a step on the CPU, from one of 2 images; {number} (s|min|h) for 7,200 "
        r"steps, without evaluations",
        text,
    )
    assert level == OK and found, text
    seconds, memory, total = map(float, found.groups()[:3])
    assert 0 < seconds < 4 * took and 0.1 < memory < 50  # of this process
    total *= {"s": 1, "min": 60, "h": 3600}[found[4]]
    assert total == pytest.approx(seconds * 7200, rel=0.1)
    assert len(kept) == 2 and kept[0] is kept[1] and kept[0].average.updates == 2
    assert {group["lr"] for group in kept[0].optimizer.param_groups} == {0.0}


def test_a_step_that_takes_long_on_a_cpu_is_not_measured_again(find, monkeypatch):
    monkeypatch.setattr(cost, "_LONG", 0.0)
    ((level, text),) = find("time and memory")
    assert level == OK and ", from one of 1 image; " in text


def test_memory_is_of_as_many_images_as_asked_for(tiny_config, monkeypatch):
    """Gradients and momentum are there once, whatever the number of images."""
    peaks = iter([1000, 1000 + 3 * 2**30])
    monkeypatch.setattr(cost, "_peak", lambda on_gpu: next(peaks))
    monkeypatch.setattr(cost, "_start_of_peak", cost._peak)
    cfg = load_config(tiny_config, options("SOLVER.IMS_PER_BATCH", 16, "MODEL.BACKBONE.FREEZE_AT", 5))
    found = cost.measure(cfg, "cpu", 8)
    weights = [p for p in build_model(cfg).parameters() if p.requires_grad]
    kept = sum(2 * p.nbytes for p in weights)
    assert found.images == 2
    assert found.memory == pytest.approx(1000 + kept + 4 * (3 * 2**30 - kept), rel=1e-3)


@pytest.mark.parametrize(
    ("opts", "cost_of", "micro", "level", "says"),
    [
        # 2 s for two images, and 0.25 s for loading one: of 16 images 16 s, and 4 s divided by the workers.
        (
            ["DATALOADER.NUM_WORKERS", 2],
            {},
            16,
            OK,
            "~16 s and ~2 GB a step on the CPU, from one of 2 images; ~19 days",
        ),
        (["SOLVER.ACCUMULATE", 4], {}, 4, OK, "~20 s and ~2 GB a step"),
        (["SOLVER.IMS_PER_BATCH", 2], {}, 2, OK, "~2.5 s and ~2 GB a step on the CPU, from one of 2 images; ~69 h for"),
        (["SOLVER.IMS_PER_BATCH", 1], {"images": 1}, 1, OK, "~2.2 s and ~2 GB a step on the CPU, from one of 1 image;"),
        ([], {"memory": 2**60}, 16, WARNING, "Set SOLVER.ACCUMULATE 2 or more, or smaller images or batches"),
        (["SOLVER.ACCUMULATE", 2], {"memory": 2**60}, 8, WARNING, "Set SOLVER.ACCUMULATE 4 or more"),
        (["DATALOADER.NUM_WORKERS", 1], {"loading": 2.0}, 16, OK, "~32 s and ~2 GB a step"),
        (["DATALOADER.NUM_WORKERS", 1], {"loading": 2.0}, 16, OK, "more DATALOADER.NUM_WORKERS than 1 may help"),
    ],
)
def test_estimates(find, monkeypatch, opts, cost_of, micro, level, says):
    asked = []

    def measure(cfg, device, images):
        asked.append(images)
        return cost.Cost(**{"images": 2, "seconds": 2.0, "loading": 0.25, "memory": 2**31, **cost_of})

    monkeypatch.setattr(cost, "measure", measure)
    defaults = {"SOLVER.IMS_PER_BATCH": 16, "DATALOADER.NUM_WORKERS": 0, "SOLVER.MAX_ITER": 100_000}
    defaults |= dict(zip(opts[::2], opts[1::2]))
    ((found, text),) = find("time and memory", *[word for pair in defaults.items() for word in pair])
    assert (found, asked) == (level, [micro]) and text.startswith("estimate: ") and says in text, text


def test_a_gpu_is_asked_for_the_whole_batch_of_one_gpu(find, monkeypatch):
    asked = []

    def measure(cfg, *numbers):
        asked.append(numbers)
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(cost, "measure", measure)
    monkeypatch.setattr(load, "usable_device", lambda device, *_: device)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))
    opts = ["SOLVER.IMS_PER_BATCH", 16, "MODEL.DEVICE", "cuda"]
    ((level, text),) = find("time and memory", *opts, num_gpus=2)
    assert level == ERROR and text.startswith("8 images at a time need more than the 80 GB of the GPU. Set SOLVER.ACC")
    assert asked == [("cuda", 8)]


def test_what_would_make_a_gpu_faster(find, monkeypatch):
    monkeypatch.setattr(cost, "measure", lambda *_: cost.Cost(images=2, seconds=2.0, loading=0.25, memory=2**31))
    monkeypatch.setattr(load, "usable_device", lambda device, *_: device)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))
    ((level, text),) = find("time and memory", "MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", True)
    assert level == OK and text.endswith("steps are faster with MODEL.FOCAL.CHANNELS_LAST True")


@pytest.mark.gpu
def test_time_and_memory_on_a_gpu(find):
    ((level, text),) = find("time and memory", "MODEL.DEVICE", "cuda", "MODEL.FOCAL.COMPILE", True)
    assert level == OK and "GB a step on the GPU, from one of 2 images" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.25 s"), (9.96, "10 s"), (89, "89 s"), (90, "1.5 min"), (5399, "90 min"), (12_240, "3.4 h")]
    + [(300_000, "3.5 days"), (51e6, "590 days")],
)
def test_durations(seconds, text):
    assert cost.duration(seconds) == text


# All of them


def test_what_cannot_be_checked_is_skipped(tiny_config, tmp_path, capsys):
    (tmp_path / "shapes_train.json").unlink()
    assert main(["doctor", "--config-file", tiny_config, *options()]) == 1
    levels = {line[9:27].strip(): line.split()[0] for line in capsys.readouterr().out.splitlines()[:-1]}
    assert levels["training data"] == ERROR
    assert {name for name, level in levels.items() if level == SKIPPED} == {
        *("schedule", "images", "classes", "boxes", "empty images", "crowds", "anchors", "positives", "first loss"),
        "time and memory",
    }
    assert levels["components"] == levels["weights"] == levels["learning rate"] == OK


def test_a_config_that_cannot_be_read(tiny_config, capsys):
    assert main(["doctor", "--config-file", tiny_config, "NO.SUCH.KEY", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(ERROR) and "NO.SUCH.KEY" in lines[0]
    assert len(lines) == 2 and lines[1].startswith("1 error, in")  # no line for what could not be checked


def test_a_warning_is_no_error(tiny_config, capsys):
    opts = options("MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.1)
    assert main(["doctor", "--config-file", tiny_config, *opts]) == 0
    assert "1 warning, " in capsys.readouterr().out


def test_every_check_needs_earlier_ones():
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert all(set(check.needs) <= set(names[:i]) for i, check in enumerate(CHECKS))


def test_a_check_that_breaks_stops_no_other(tiny_config):
    def breaks(case):
        raise RuntimeError("out of paper")

    (_, broken), (_, fine) = examine(Case(tiny_config, options()), [Check("a", breaks), CHECKS[0]])
    line = breaks.__code__.co_firstlineno + 1
    assert (broken.level, broken.text) == (
        ERROR,
        f"RuntimeError: out of paper ({os.path.relpath(__file__)}, line {line})",
    )
    assert fine.level == OK


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--config-file", "a.py"], "a.py: a LazyConfig"), (["--config-file", "", "--num-images", "-1"], "--num-images")],
)
def test_mistakes(capsys, words, message):
    assert main(["doctor", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("opts", "code"), [([], 0), (["MODEL.RETINANET.NUM_CLASSES", 3], 1)])
def test_train_net(tiny_config, monkeypatch, capsys, opts, code):
    words = ["train_net.py", "--doctor", "--config-file", tiny_config, *options(*opts)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "train_net.py"), run_name="__main__")
    assert end.value.code == code
    assert "first loss" in capsys.readouterr().out
