"""train_net.py from end to end, on a data set and a model of seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.evaluation import COCOEvaluator

from focal_plugin.config import ConfigError
from focal_plugin.config.load import load_config
from focal_plugin.engine import Trainer, trainer

SCRIPT = Path(__file__).parents[1] / "train_net.py"


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def test_train_evaluate_draw(train_net, output, capfd):
    results = train_net("VIS.ENABLED", True, "VIS.NUM_IMAGES", 2, "VIS.SCORE_THRESH", 0.1)
    assert {"AP", "AP50", "APm"} <= results["bbox"].keys()
    for name in ("detections.png", "curves.png"):
        assert cv2.imread(str(output / name)).std() > 5
    lines = metrics(output)
    assert lines[0]["iteration"] == 0 and lines[-1]["iteration"] == 4  # from the first step to the evaluation
    assert {"total_loss", "loss_cls", "loss_box_reg", "lr", "num_pos_anchors"} <= lines[0].keys()
    assert "bbox/AP" in lines[-1]
    assert list(output.glob("events.out.tfevents.*"))
    state = torch.load(output / "model_final.pth", weights_only=True)
    assert state.keys() == {"model", "trainer", "iteration", "config"}
    assert state["model"]["normalizer.mean"] != 100  # what the losses are divided by goes with the weights

    screen = capfd.readouterr().out
    ending = screen[screen.rindex("Results on shapes_test") :]
    assert "AP50" in ending
    for name in ("detections.png", "curves.png", "metrics.json", "model_final.pth", "log.txt", "config.yaml"):
        assert str(output / name) in ending
    if not torch.cuda.is_available():
        assert screen.count("No GPU found") == 1


def test_eval_only_gives_the_results_of_training(train_net, output, capfd):
    trained = train_net()
    capfd.readouterr()
    evaluated = train_net("--eval-only", "MODEL.WEIGHTS", output / "model_final.pth")
    assert evaluated["bbox"] == pytest.approx(trained["bbox"], nan_ok=True)
    screen = capfd.readouterr().out
    assert "Results on shapes_test" in screen and "No weights given" not in screen


def test_curves_without_detections(train_net, output):
    train_net("SOLVER.MAX_ITER", 1, "VIS.ENABLED", True, "VIS.NUM_IMAGES", 0)
    assert (output / "curves.png").exists() and not (output / "detections.png").exists()


def test_training_ends_with_an_evaluation_with_augmentation_too(train_net, output, capfd):
    """As Detectron2's own script; with the plain evaluation's look alone, the best detections are the same."""
    results = train_net(
        "SOLVER.MAX_ITER", "2", "TEST.AUG.ENABLED", "True", "TEST.AUG.FLIP", "False", "TEST.AUG.MIN_SIZES", "(64,)"
    )
    assert results.keys() == {"bbox", "bbox_TTA"}
    assert metrics(output)[-1]["bbox_TTA/AP"] == results["bbox_TTA"]["AP"]
    assert "| bbox_TTA |" in capfd.readouterr().out
    plain, augmented = (
        sorted(d["score"] for d in json.loads((output / folder / "coco_instances_results.json").read_text()))[-20:]
        for folder in ("inference", "inference_TTA")
    )
    assert len(plain) == 20 and plain == pytest.approx(augmented, abs=1e-3)


def test_eval_only_without_weights_says_so(train_net, capfd):
    train_net("--eval-only")
    assert "No weights given" in capfd.readouterr().out


def test_resume_goes_on_where_it_stopped(train_net, output):
    train_net("SOLVER.MAX_ITER", 2)
    halfway = torch.load(output / "model_final.pth", weights_only=True)
    train_net("--resume", "DATASETS.TEST", "()")
    state = torch.load(output / "model_final.pth", weights_only=True)
    assert (halfway["iteration"], state["iteration"]) == (1, 3)
    # As a run of four steps in one go, of which Detectron2 writes the last, and this the first.
    assert [line["iteration"] for line in metrics(output)] == [0, 3]
    with pytest.raises(ConfigError, match="holds an earlier run"):
        train_net("SOLVER.MAX_ITER", 1)


def trained(train_net, output, *words):
    """The losses that a run writes, of its first step and the median of 4, and how far the head's biases moved."""
    train_net("DATASETS.TEST", "()", "SOLVER.BASE_LR", 0.02, "OUTPUT_DIR", output, *words)
    return outcome(output)


def outcome(output):
    losses = [line["total_loss"] for line in metrics(output) if "total_loss" in line]
    weights = torch.load(output / "model_final.pth", weights_only=True)["model"]
    prior = torch.tensor(0.01).logit()
    return torch.tensor(losses), torch.cat([weights["head.cls_score.bias"] - prior, weights["head.bbox_pred.bias"]])


@pytest.mark.parametrize(
    ("words", "common", "tolerance"),
    [
        (["MODEL.FOCAL.CHANNELS_LAST", True], [], 1e-4),
        (["SOLVER.ACCUMULATE", 2], [], 1e-4),
        (["SOLVER.ACCUMULATE", 2], ["MODEL.FOCAL.NORMALIZER", "num_fg"], 1e-4),
        (["SOLVER.AMP.ENABLED", True, "MODEL.DEVICE", "cpu"], [], 0.05),
        (["SOLVER.AMP.ENABLED", True, "MODEL.FOCAL.CHANNELS_LAST", True, "SOLVER.ACCUMULATE", 2], [], 0.05),
        (["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1e9], [], 1e-6),
    ],
    ids=["channels-last", "in parts", "in parts, num_fg", "bf16", "all of them", "clipping"],
)
def test_the_same_training_in_other_ways(train_net, tmp_path, words, common, tolerance):
    losses, moves = trained(train_net, tmp_path / "reference", *common)
    assert len(losses) == 2 and moves.abs().max() > 1e-4
    other_losses, other_moves = trained(train_net, tmp_path / "other", *common, *words)
    torch.testing.assert_close(other_losses, losses, rtol=tolerance, atol=0)
    torch.testing.assert_close(other_moves, moves, rtol=0, atol=tolerance * float(moves.abs().max()))


def test_a_diverged_run_stops_and_says_where(train_net, output):
    words = ["SOLVER.BASE_LR", 1e6, "SOLVER.WARMUP_ITERS", 0, "SOLVER.CHECKPOINT_PERIOD", 1, "DATASETS.TEST", "()"]
    with pytest.raises(FloatingPointError, match=r"at iteration \d, learning rate 1e\+06") as error:
        train_net(*words, "SOLVER.MAX_ITER", 50)
    assert ".png" in str(error.value) and "It starts in" in str(error.value)
    assert not (output / "model_final.pth").exists()


def test_more_parts_than_images(train_net):
    with pytest.raises(ValueError, match=r"SOLVER\.ACCUMULATE is 3; expected 1 to 2"):
        train_net("SOLVER.ACCUMULATE", 3)


def test_a_step_without_images(train_net):
    with pytest.raises(ValueError, match=r"SOLVER\.IMS_PER_BATCH is 0; expected a whole number ≥ 1"):
        train_net("SOLVER.IMS_PER_BATCH", 0)


def test_weights_that_are_not_there(train_net):
    for words in ([], ["--eval-only"]):
        with pytest.raises(FileNotFoundError, match=r"MODEL\.WEIGHTS .* is nowhere\.pth, which is no file"):
            train_net(*words, "MODEL.WEIGHTS", "nowhere.pth")


def test_words_of_yaml_for_a_lazy_config(train_net, lazy_config):
    with pytest.raises(ValueError, match=r"SOLVER\.BASE_LR 0\.1: .* path\.key=value, as in optimizer\.lr"):
        train_net("train.seed=1", "SOLVER.BASE_LR", 0.1, config=str(lazy_config))


def test_a_stock_model_trains_too(train_net):
    assert train_net("MODEL.META_ARCHITECTURE", "RetinaNet", "SOLVER.ACCUMULATE", 2)["bbox"]


def test_each_test_set_keeps_its_detections(train_net, output, capfd):
    results = train_net("--eval-only", "DATASETS.TEST", "('shapes_test', 'shapes_train')")
    assert results.keys() == {"shapes_test", "shapes_train"}
    screen = capfd.readouterr().out
    for name, num_images in (("shapes_test", 4), ("shapes_train", 6)):
        path = output / "inference" / name / "coco_instances_results.json"
        assert {found["image_id"] for found in json.loads(path.read_text())} == set(range(num_images))
        assert str(path) in screen


@pytest.mark.parametrize("period", [0, -1])
def test_checkpoints_at_no_period(train_net, period):
    with pytest.raises(ValueError, match=rf"SOLVER\.CHECKPOINT_PERIOD is {period}; expected a whole number ≥ 1"):
        train_net("SOLVER.CHECKPOINT_PERIOD", period)


def test_evaluators(tiny_config, monkeypatch):
    made = []
    for name in ("LVISEvaluator", "VOCEvaluator"):
        monkeypatch.setattr(trainer, name, lambda *args, name=name, **kwargs: made.append(name))
    cfg = load_config(tiny_config)
    DatasetCatalog.get("shapes_test")
    assert isinstance(Trainer.build_evaluator(cfg, "shapes_test"), COCOEvaluator)
    for kind, name in (("lvis", "LVISEvaluator"), ("pascal_voc", "VOCEvaluator")):
        MetadataCatalog.get(f"of kind {kind}").evaluator_type = kind
        Trainer.build_evaluator(cfg, f"of kind {kind}")
        assert made.pop() == name
    MetadataCatalog.get("of another kind").evaluator_type = "panoptic"
    with pytest.raises(ConfigError, match="evaluator type 'panoptic'"):
        Trainer.build_evaluator(cfg, "of another kind")


def test_a_kind_of_evaluation_that_there_is_not_is_told_before_training(tiny_config, tmp_path, monkeypatch):
    """Unless the user's trainer evaluates it."""
    monkeypatch.setitem(MetadataCatalog.data, "a set", Metadata(name="a set", evaluator_type="panoptic"))
    cfg = load_config(tiny_config, ["DATASETS.TEST", "('a set',)", "OUTPUT_DIR", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match=r"'a set' of DATASETS\.TEST is of evaluator type 'panoptic'"):
        Trainer(cfg)
    own = type("Own", (Trainer,), {"build_evaluator": classmethod(lambda cls, cfg, name, folder=None: None)})
    assert own(cfg).start_iter == 0


def test_lazy_config(train_net, lazy_config, output, capfd):
    results = train_net("train.max_iter=4", "train.amp.enabled=True", "train.accumulate=2", config=lazy_config)
    assert "AP" in results["bbox"]
    assert metrics(output)[-1]["iteration"] == 4
    assert any("positives/p3" in line and "grad_norm/cls_subnet" in line for line in metrics(output))
    assert f"{output}/model_final.pth" in capfd.readouterr().out
    weights = output / "model_final.pth"
    evaluated = train_net("--eval-only", f"train.init_checkpoint={weights}", config=lazy_config)
    assert evaluated["bbox"] == pytest.approx(results["bbox"], nan_ok=True)


def run_script(*words, timeout=300):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [[], ["SOLVER.ACCUMULATE", 2, "MODEL.FOCAL.CHANNELS_LAST", True]],
    ids=["at once", "in parts, channels-last"],
)
def test_two_processes_are_one(train_net, tiny_config, tmp_path, words):
    common = ["VIS.ENABLED", True, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.BASE_LR", 0.02, "INPUT.RANDOM_FLIP", "none"]
    run = run_script(
        *["--config-file", tiny_config, "--num-gpus", 2, "--dist-url", "auto", *common, *words],
        *["MODEL.FOCAL.NORMALIZER", "num_fg_sync", "OUTPUT_DIR", tmp_path / "two"],
    )
    assert run.returncode == 0, run.stderr
    assert "2 processes of 1 thread" in run.stdout
    assert run.stdout.count("Results on shapes_test") == 1
    assert "Warning" not in run.stderr, run.stderr
    # A process has every other image of the batch, and the mean of their gradients is that of the whole.
    losses, moves = trained(train_net, tmp_path / "one", *common, "MODEL.FOCAL.NORMALIZER", "num_fg")
    torch.testing.assert_close(outcome(tmp_path / "two"), (losses, moves), rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_stock_config_and_one_line(tiny_config, output):
    run = run_script(
        *["--config-file", "COCO-Detection/retinanet_R_50_FPN_1x.yaml", "MODEL.META_ARCHITECTURE", "FocalRetinaNet"],
        *["MODEL.WEIGHTS", "", "MODEL.RETINANET.NUM_CLASSES", 2, "OUTPUT_DIR", output],
        *["INPUT.MIN_SIZE_TRAIN", "[64]", "INPUT.MIN_SIZE_TEST", 64, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2],
        *["DATASETS.LOCAL", str(_entries(tiny_config)), "DATALOADER.NUM_WORKERS", 0],
        *["DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_test',)"],
    )
    assert run.returncode == 0, run.stderr
    assert "Results on shapes_test" in run.stdout
    assert "SOLVER.BASE_LR 0.00125" in run.stdout  # its learning rate is for 16 images
    assert "Warning" not in run.stderr, run.stderr


def _entries(tiny_config):
    import yaml

    return yaml.safe_load(Path(tiny_config).read_text())["DATASETS"]["LOCAL"]
