"""Proposal files are read as Detectron2 reads them, and run nothing."""

import pickle
import sys

import numpy as np
import pytest
import torch
from detectron2.data import (
    DatasetCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import build as detectron2_build
from detectron2.structures import BoxMode

from focal_plugin import ConfigError
from focal_plugin.analysis.__main__ import main as analyse
from focal_plugin.commands.train import main as train
from focal_plugin.config.load import load_config
from focal_plugin.data import check_files
from focal_plugin.engine import Trainer

RECORDS = [{"image_id": 3}, {"image_id": "b"}]
PROPOSALS = {
    "ids": [7, "b", 3],
    "boxes": [np.zeros((1, 4), np.float32), np.eye(4, dtype=np.float32)[:2], np.ones((3, 4), np.float32)],
    "objectness_logits": [np.zeros(1), np.array([0.1, 0.9]), np.array([3.0, -1.0, 2.0])],
}
VARIANTS = {
    "ids and boxes": PROPOSALS,
    "a mode as a number": PROPOSALS | {"bbox_mode": 1},
    "a mode as an enum": PROPOSALS | {"bbox_mode": BoxMode.XYWH_ABS},
    "Detectron's names": {
        "indexes": np.array([3, 7, 5]),
        "boxes": PROPOSALS["boxes"],
        "scores": PROPOSALS["objectness_logits"],
    },
}


class Call:
    """Unpickled, it makes the file "executed"."""

    def __reduce__(self):
        return open, ("executed", "w")


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A file that a hostile one would write, and the hostile file: a proposal file but for one call."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile.pkl").write_bytes(pickle.dumps(PROPOSALS | {"more": Call()}))
    return tmp_path / "executed"


@pytest.fixture(scope="module")
def theirs():
    """Detectron2's own function, as a fresh copy of its module has it."""
    spec = detectron2_build.__spec__
    module = type(sys)(spec.name)
    module.__package__ = "detectron2.data"
    exec(spec.loader.get_code(spec.name), vars(module))
    return module.load_proposals_into_dataset


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("content", VARIANTS.values(), ids=VARIANTS)
def test_what_detectron2_reads(content, protocol, tmp_path, theirs):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    records = RECORDS if "ids" in content else [{"image_id": 3}, {"image_id": 5}]
    expected = theirs([dict(record) for record in records], str(path))
    found = detectron2_build.load_proposals_into_dataset([dict(record) for record in records], str(path))
    for ours, others in zip(found, expected, strict=True):
        assert ours.keys() == others.keys() and ours["proposal_bbox_mode"] is others["proposal_bbox_mode"]
        np.testing.assert_array_equal(ours["proposal_boxes"], others["proposal_boxes"])
        np.testing.assert_array_equal(ours["proposal_objectness_logits"], others["proposal_objectness_logits"])


MALFORMED = {
    "no dict": ([1], "of type list"),
    "no boxes": ({"ids": [], "objectness_logits": []}, "no boxes"),
    "too few": (PROPOSALS | {"boxes": PROPOSALS["boxes"][:2]}, "3 ids, 2 boxes and 3 objectness_logits"),
    "no list": (PROPOSALS | {"boxes": 5}, "boxes of type int"),
    "no such image": (PROPOSALS | {"ids": [7, 8, 3]}, "no proposals for the image 'b'"),
    "another shape": (PROPOSALS | {"boxes": [np.zeros((2, 5))] * 3}, r"boxes of shape \(2, 5\)"),
    "another number": (PROPOSALS | {"objectness_logits": [np.zeros(2)] * 3}, r"boxes of shape \(3, 4\)"),
    "a box that is no array": (PROPOSALS | {"boxes": ["a"] * 3}, "boxes of type str"),
    "not finite": (PROPOSALS | {"boxes": [box * np.nan for box in PROPOSALS["boxes"]]}, "not finite"),
    "no such mode": (PROPOSALS | {"bbox_mode": 99}, "bbox_mode 99"),
}


@pytest.mark.parametrize(("content", "says"), MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_proposal_file(content, says, tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ConfigError, match=rf"DATASETS\.PROPOSAL_FILES_TRAIN.*a\.pkl.*{says}"):
        detectron2_build.load_proposals_into_dataset([dict(record) for record in RECORDS], str(path))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"DATASETS\.PROPOSAL_FILES_TRAIN.*expected a file"):
        detectron2_build.load_proposals_into_dataset(RECORDS, str(tmp_path / "gone.pkl"))


def proposals_of(tiny_config, name, hostile="hostile.pkl"):
    return ["MODEL.LOAD_PROPOSALS", "True", f"DATASETS.PROPOSAL_FILES_{name}", f"('{hostile}',)"]


@pytest.mark.parametrize("command", ["train", "evaluate", "doctor", "--doctor", "init"])
def test_no_command_runs_them(command, tiny_config, trap, loggers, capsys):
    opts = [*proposals_of(tiny_config, "TRAIN"), *proposals_of(tiny_config, "TEST"), "MODEL.DEVICE", "cpu"]
    words = ["--config-file", tiny_config]
    code = {
        "train": lambda: train([*words, *opts]),
        "evaluate": lambda: train([*words, "--eval-only", *opts]),
        "doctor": lambda: analyse(["doctor", *words, *opts]),
        "--doctor": lambda: train([*words, "--doctor", *opts]),
        "init": lambda: analyse(["init", *words, *opts]),
    }[command]()
    assert not trap.exists()
    assert code != 0
    printed = capsys.readouterr()
    assert "io.open, which is refused" in printed.out + printed.err


@pytest.mark.parametrize("sampler", ["TrainingSampler", "WeightedTrainingSampler", "WeightedCategoryTrainingSampler"])
def test_no_loader_of_detectron2s_runs_them(sampler, tiny_config, trap):
    cfg = load_config(tiny_config, [*proposals_of(tiny_config, "TRAIN"), *proposals_of(tiny_config, "TEST")])
    cfg.DATALOADER.SAMPLER_TRAIN = sampler
    for build in (build_detection_train_loader, Trainer.build_train_loader):
        with pytest.raises(ConfigError, match="refused"):
            build(cfg)
    for build in (build_detection_test_loader, Trainer.build_test_loader):
        with pytest.raises(ConfigError, match="refused"):
            build(cfg, "shapes_test")
    with pytest.raises(ConfigError, match="refused"):  # as LazyConfigs call it
        get_detection_dataset_dicts("shapes_train", proposal_files=["hostile.pkl"])
    assert not trap.exists()


def test_good_files_reach_the_batch(tiny_config, tmp_path):
    records = DatasetCatalog.get(load_config(tiny_config).DATASETS.TRAIN[0])
    boxes = [np.array([[1, 2, 30, 40], [5, 5, 20, 20]], np.float32)] * len(records)
    content = {
        "ids": [r["image_id"] for r in records],
        "boxes": boxes,
        "objectness_logits": [np.array([1, 0])] * len(boxes),
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    cfg = load_config(tiny_config, proposals_of(tiny_config, "TRAIN", tmp_path / "a.pkl"))
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (64,), "none"
    batch = next(iter(Trainer.build_train_loader(cfg)))
    torch.testing.assert_close(batch[0]["proposals"].proposal_boxes.tensor, torch.from_numpy(boxes[0]))


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_files_are_checked_before_a_run(key, tiny_config, tmp_path):
    cfg = load_config(tiny_config, ["MODEL.LOAD_PROPOSALS", "True"])
    with pytest.raises(ConfigError, match=rf"DATASETS\.PROPOSAL_FILES_{key} has 0 files; expected 1"):
        check_files(cfg, [key])
    cfg.DATASETS[f"PROPOSAL_FILES_{key}"] = ("gone.pkl",)
    with pytest.raises(FileNotFoundError, match=rf"DATASETS\.PROPOSAL_FILES_{key} names gone\.pkl"):
        check_files(cfg, [key])
    cfg.MODEL.LOAD_PROPOSALS = False
    check_files(cfg, [key])


def test_the_trap_works(trap, theirs):
    theirs([dict(record) for record in RECORDS], "hostile.pkl")
    assert trap.exists()
