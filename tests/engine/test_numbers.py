"""Runs whose numbers stop being finite, and images of every kind."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from focal_plugin.config import ConfigError
from focal_plugin.data import FocalDatasetMapper
from focal_plugin.engine import StepTrainer, divergence, replay
from focal_plugin.engine.batch_file import load_batch, save_batch
from tests.engine.same import final, metrics

NO_TEST = ["DATASETS.TEST", "()"]


@pytest.fixture
def spoilt(monkeypatch):
    """Pixels of two images of the training set are NaN."""
    read = FocalDatasetMapper.__call__

    def spoil(mapper, record):
        sample = read(mapper, record)
        if sample["file_name"].endswith(("/1.png", "/4.png")):
            sample["image"] = sample["image"].float()
            sample["image"][1, 20, 30] = math.nan
        return sample

    monkeypatch.setattr(FocalDatasetMapper, "__call__", spoil)


def test_what_a_diverged_run_leaves(train_net, tmp_path, capsys):
    words = ["SOLVER.BASE_LR", 1e6, "SOLVER.WARMUP_ITERS", 0, "SOLVER.MAX_ITER", 50, "OUTPUT_DIR", tmp_path, *NO_TEST]
    with pytest.raises(FloatingPointError) as error:
        train_net(*words)
    (report,) = error.value.reports
    record = json.loads((tmp_path / "diverged.json").read_text())
    assert record["batch_file"] == report.batch_file and record["images"] == report.images
    assert [image["file_name"] for image in load_batch(report.batch_file)["batch"]] == report.images
    assert f"python -m focal_plugin replay {report.batch_file}" in str(error.value)

    losses, gradient, cause = replay.replay(report.batch_file)
    assert losses == pytest.approx(report.losses, nan_ok=True)
    assert cause == report.cause and "starts in" in cause
    assert not math.isfinite(gradient) or not all(map(math.isfinite, losses.values()))


@pytest.mark.parametrize("kind", ["YAML", "LazyConfig"])
def test_a_run_that_fails_in_its_last_step_is_not_evaluated(train_net, lazy_config, tmp_path, monkeypatch, kind):
    def fail(trainer, batch):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(StepTrainer, "forward_backward", fail)
    words = ["SOLVER.MAX_ITER", 1] if kind == "YAML" else ["train.max_iter=1"]
    with pytest.raises(RuntimeError, match="out of memory"):
        train_net(*words, **({} if kind == "YAML" else {"config": lazy_config}))
    assert not list((tmp_path / "output").rglob("coco_instances_results.json"))


@pytest.mark.slow
def test_the_line_that_computes_it_again(train_net, tmp_path, spoilt):
    with pytest.raises(FloatingPointError) as error:
        train_net("OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 6, *NO_TEST)
    (line,) = re.findall(r"python (-m .*)", str(error.value))
    run = subprocess.run([sys.executable, *line.split()], capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "loss_cls: nan" in run.stdout and "A pixel of" in run.stdout


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([], marks=pytest.mark.slow),
        ["SOLVER.ACCUMULATE", 2, "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16"],
    ],
)
def test_steps_are_skipped_and_their_number_kept(train_net, tmp_path, spoilt, words):
    words = [*words, "SOLVER.MAX_SKIPS", 4, "SOLVER.CHECKPOINT_PERIOD", 4, *NO_TEST]
    train_net("OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 6, *words)
    state = final(tmp_path)
    assert all(value.isfinite().all() for value in state["model"].values())
    skips = state["trainer"]["_trainer"]["skips"]
    assert 2 <= skips <= 4  # two images of six, in two rounds of three steps
    assert len(list(tmp_path.glob("diverged_*.pth"))) == min(skips, 3)
    assert not (tmp_path / "diverged.json").exists()
    assert all(math.isfinite(value) for line in metrics(tmp_path) for value in line.values())
    with pytest.raises(FloatingPointError):
        train_net("--resume", "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 99, *words)


def test_few_batches_are_kept_and_that_of_the_end(train_net, tmp_path, monkeypatch):
    """Each has all weights of the model."""
    monkeypatch.setattr(divergence, "_KEPT", 1)
    monkeypatch.setattr(StepTrainer, "forward", lambda *args: {"loss": torch.full((), math.nan, requires_grad=True)})
    with pytest.raises(FloatingPointError):
        train_net("OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 9, "SOLVER.MAX_SKIPS", 3, *NO_TEST)
    assert sorted(path.name[:16] for path in tmp_path.glob("*.pth")) == ["diverged_0000000", "diverged_0000003"]


@pytest.mark.parametrize(
    ("words", "precision", "parts"),
    [
        ([], "bfloat16", 1),
        (["SOLVER.AMP.ENABLED", "False"], "float32", 1),
        (["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16"], "float16", 1),
        (["SOLVER.ACCUMULATE", 2], "bfloat16", 2),
    ],
)
def test_replay_computes_as_it_is_told(train_net, tmp_path, spoilt, monkeypatch, words, precision, parts):
    """In the run's precision and parts, or in those of the command line."""
    amp = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"]
    with pytest.raises(FloatingPointError) as error:
        train_net("OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 6, *amp, *NO_TEST)
    found = []
    forward = StepTrainer.forward

    def noted(trainer, model, batch):
        with trainer.autocast():
            found.append(str((torch.ones(1, 1) @ torch.ones(1, 1)).dtype))
        return forward(trainer, model, batch)

    monkeypatch.setattr(StepTrainer, "forward", noted)
    replay.replay(error.value.reports[0].batch_file, words)
    assert found == [f"torch.{precision}"] * parts


def test_replay_refuses_what_changes_nothing(tmp_path):
    save_batch(str(tmp_path / "batch.pth"), [], nn.Linear(1, 1))
    (tmp_path / "config.yaml").write_text("VERSION: 2\n")
    with pytest.raises(ConfigError, match=r"SOLVER\.BASE_LR, SOLVER\.MAX_ITER: not a part of one step's"):
        replay.replay(
            str(tmp_path / "batch.pth"),
            ["SOLVER.BASE_LR", "1", "SOLVER.AMP.ENABLED", "True"] + ["SOLVER.MAX_ITER", "2"],
        )


def test_a_batch_in_a_file(tmp_path):
    instances = Instances((8, 9), gt_boxes=Boxes(torch.rand(2, 4)), gt_classes=torch.tensor([1, 0]), names=["a", "b"])
    image = {"image": torch.rand(3, 8, 9), "file_name": "a.png", "height": 8, "instances": instances, "what": object()}
    image["ignore_boxes"] = Boxes(torch.rand(1, 4))
    model = nn.Linear(2, 2)
    save_batch(str(tmp_path / "batch.pth"), [image], model, iteration=7)
    content = load_batch(str(tmp_path / "batch.pth"))
    (kept,) = content["batch"]
    assert content["iteration"] == 7 and torch.equal(content["model"]["weight"], model.weight)
    assert kept.keys() == image.keys() - {"what"} and kept["file_name"] == "a.png"
    assert torch.equal(kept["image"], image["image"])
    assert torch.equal(kept["ignore_boxes"].tensor, image["ignore_boxes"].tensor)
    assert kept["instances"].image_size == (8, 9)
    assert kept["instances"].get_fields().keys() == {"gt_boxes", "gt_classes"}
    assert torch.equal(kept["instances"].gt_boxes.tensor, instances.gt_boxes.tensor)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "there is no such file; expected a diverged_"),
        (b"not a zip file", "damaged"),
        ({"model": {}}, "holds no batch but model"),
        ({"batch": [{"a": {"Boxes": [10**400]}}], "model": {}}, "holds no batch as it was saved (OverflowError("),
    ],
)
def test_a_file_that_is_no_batch(tmp_path, monkeypatch, capsys, content, problem):
    path = tmp_path / "batch.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    monkeypatch.setattr("sys.argv", ["replay", str(path)])
    with pytest.raises(SystemExit, match="2"):
        replay.main()
    message = capsys.readouterr().err
    assert str(path) in message and problem in message


@pytest.mark.parametrize(
    ("config", "words", "problem"),
    [
        (None, [], "config.yaml"),
        ("dataloader: {}\n", [], "there is no key dataloader"),  # a LazyConfig's
        ("VERSION: 2\n", ["MODEL.DEVISE", "1"], "MODEL.DEVICE"),
        ("VERSION: 2\n", ["MODEL.DEVICE"], "pairs of a key and its value"),
    ],
)
def test_a_config_that_cannot_be_read(tmp_path, monkeypatch, capsys, config, words, problem):
    save_batch(str(tmp_path / "batch.pth"), [], nn.Linear(1, 1))
    if config:
        (tmp_path / "config.yaml").write_text(config)
    monkeypatch.setattr("sys.argv", ["replay", str(tmp_path / "batch.pth"), *words])
    with pytest.raises(SystemExit, match="2"):
        replay.main()
    assert problem in capsys.readouterr().err


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def turned():
    exif = Image.Exif()
    exif[274] = 6
    return exif


IMAGES = {
    "black.png": (Image.fromarray(np.zeros((48, 64, 3), np.uint8)), {}),
    "white.png": (Image.fromarray(np.full((48, 64, 3), 255, np.uint8)), {}),
    "1x1.png": (Image.fromarray(noise(1, 1, 3)), {}),
    "long.png": (Image.fromarray(noise(50, 20_000, 3)), {}),
    "tall.jpg": (Image.fromarray(noise(20_000, 50, 3)), {}),
    "grey.png": (Image.fromarray(noise(48, 64)), {}),
    "grey.jpg": (Image.fromarray(noise(48, 64)), {}),
    "rgba.png": (Image.fromarray(noise(48, 64, 4)), {}),
    "palette.png": (Image.fromarray(noise(48, 64)).convert("P"), {}),
    "two.png": (Image.fromarray(noise(48, 64) > 127), {}),
    "cmyk.jpg": (Image.fromarray(noise(48, 64, 4), mode="CMYK"), {}),
    "turned.jpg": (Image.fromarray(noise(48, 64, 3)), {"exif": turned()}),
}


@pytest.fixture
def images(tmp_path):
    """Write a data set of one box an image, and give its entry for DATASETS.LOCAL."""

    def write(images):
        folder = tmp_path / "images"
        folder.mkdir()
        records, boxes = [], []
        for number, (name, (image, options)) in enumerate(images.items(), start=1):
            image.save(folder / name, **options)
            width, height = image.size[::-1] if "exif" in options else image.size
            records.append({"id": number, "file_name": name, "width": width, "height": height})
            size = {"bbox": [0, 0, width / 2, height / 2], "area": width * height / 4, "iscrowd": 0}
            boxes.append({"id": number, "image_id": number, "category_id": 1 + number % 2, **size})
        content = {"images": records, "annotations": boxes, "categories": [{"id": i, "name": f"{i}"} for i in (1, 2)]}
        (tmp_path / "images.json").write_text(json.dumps(content))
        return {"name": "all_kinds", "format": "coco", "json": str(tmp_path / "images.json"), "images": str(folder)}

    yield write
    from detectron2.data import DatasetCatalog, MetadataCatalog

    DatasetCatalog.remove("all_kinds")
    MetadataCatalog.remove("all_kinds")


def on(entry, count):
    words = ["DATASETS.LOCAL", str([entry]), "DATASETS.TRAIN", "('all_kinds',)", *NO_TEST]
    return [*words, "SOLVER.IMS_PER_BATCH", 1, "SOLVER.MAX_ITER", count, "SOLVER.CHECKPOINT_PERIOD", 1000]


def test_images_of_every_kind_train(train_net, tmp_path, images, monkeypatch):
    seen, read = [], FocalDatasetMapper.__call__

    def note(mapper, record):
        sample = read(mapper, record)
        seen.append((sample["file_name"].rpartition("/")[2], tuple(sample["image"].shape), len(sample["instances"])))
        return sample

    monkeypatch.setattr(FocalDatasetMapper, "__call__", note)
    train_net(*on(images(IMAGES), len(IMAGES)), "OUTPUT_DIR", tmp_path / "out")  # stops at a loss that is not finite
    shapes = {name: shape for name, shape, _ in seen}
    assert shapes.keys() == IMAGES.keys()  # one step each
    assert all(boxes == 1 for *_, boxes in seen)
    assert shapes["turned.jpg"] == (3, 85, 64) and shapes["grey.png"] == (3, 64, 85)
    assert shapes["1x1.png"] == (3, 64, 64)
    assert shapes["long.png"] == (3, 3, 1333) and shapes["tall.jpg"] == (3, 1333, 3)


def test_a_truncated_image_is_named(train_net, tmp_path, images):
    entry = images({"good.png": IMAGES["black.png"], "cut.jpg": (Image.fromarray(noise(200, 200, 3)), {})})
    path = tmp_path / "images/cut.jpg"
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ValueError, match=r"images/cut\.jpg: .*truncated"):
        train_net(*on(entry, 2), "OUTPUT_DIR", tmp_path / "out")
