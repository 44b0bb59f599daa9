"""What a LazyConfig gets wrong is said by its own keys, before anything is built."""

import re
from pathlib import Path

import pytest
from detectron2.config import LazyConfig

from focal_plugin.config import ConfigError
from focal_plugin.config.arguments import _READ
from focal_plugin.engine import lazy
from focal_plugin.engine.lazy import _move_output
from focal_plugin.evaluation.evaluator import PageEvaluator
from tests.engine.same import final, metrics

TRAIN, TEST = "dataloader.train.dataset.names", "dataloader.test.dataset.names"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ([f"{TRAIN}=coco_2017_val"], TRAIN),
        ([f"{TEST}=coco_2017_val"], TEST),
        ([f"{TEST}=[shapes_test,coco_2017_val]"], TEST),
        (
            ["--eval-only", f"{TRAIN}=coco_2017_train", f"{TEST}=coco_2017_val"],
            TEST,
        ),  # not what is trained on
    ],
)
def test_data_that_are_not_there(train_net, lazy_config, monkeypatch, tmp_path, words, key):
    monkeypatch.chdir(tmp_path)
    message = rf"{key} names 'coco_2017_val', whose .*instances_val2017\.json does not exist .*DETECTRON2_DATASETS"
    with pytest.raises(FileNotFoundError, match=message):
        train_net(*words, config=lazy_config)


@pytest.mark.parametrize("change", ["del dataloader['evaluator']", "dataloader['evaluator'] = None"])
def test_test_data_that_nothing_evaluates_need_not_be_there(train_net, lazy_config, change):
    with open(lazy_config, "a") as file:
        file.write(f"\n{change}\n")
    assert train_net(f"{TEST}=coco_2017_val", "train.max_iter=1", config=lazy_config) == {}
    with pytest.raises(ValueError, match=r"dataloader\.evaluator is missing; expected"):
        train_net("--eval-only", config=lazy_config)


def test_what_is_said_of_weights_and_of_an_earlier_run(train_net, lazy_config, capfd):
    words = ["dataloader.evaluator=null", "train.max_iter=1"]
    train_net("--eval-only", config=lazy_config)
    assert "No weights given" in capfd.readouterr().out
    train_net(*words, config=lazy_config)
    screen = capfd.readouterr().out
    assert "No weights given" not in screen and "holds an earlier run" not in screen
    train_net("--resume", "--eval-only", config=lazy_config)
    train_net("--resume", *words, config=lazy_config)
    screen = capfd.readouterr().out
    assert "No weights given" not in screen and "holds an earlier run" not in screen
    with pytest.raises(ConfigError, match="holds an earlier run"):
        train_net(*words, config=lazy_config)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("dataloader.train.total_batch_size=0", r"dataloader\.train\.total_batch_size"),
        ("train.accumulate=3", r"train\.accumulate"),
        ("train.amp={enabled:True,dtype:fp8}", r"train\.amp\.dtype"),
        ("model.cfg.config_fil=x.yaml", r"model\.cfg\.config_fil: load_config has no such argument\. .*: config_file"),
        ("train.acumulate=2", r"train\.acumulate: .* Near it: train\.accumulate"),
        ("train.ema.decai=0.9", r"train\.ema\.decai: .* Near it: train\.ema\.decay"),
        ("train.patiens=1", r"train\.patiens: .* Near it: train\.patience"),
        ("optimiser.lr=1", r"optimiser\.lr: .* Near it: optimizer"),
    ],
)
def test_a_value_that_is_none_and_a_key_that_nothing_reads(train_net, lazy_config, word, says):
    with pytest.raises(ValueError, match=says):
        train_net(word, config=lazy_config)


def test_what_training_reads_may_be_set():
    found = set(re.findall(r'cfg\.train\.(?:get\(")?(\w+)', Path(lazy.__file__).read_text()))
    listed = {name.split(".")[1] for name in _READ if name.startswith("train.")}
    assert found - {"get"} == listed - {"cudnn_benchmark"}  # which Detectron2 reads


def test_a_device_that_is_none(train_net, lazy_config):
    with pytest.raises(ValueError, match=r"train\.device is 'gpu'; expected cpu, cuda"):
        train_net("train.device=gpu", config=lazy_config)


@pytest.mark.parametrize(("key", "value"), [("max_skips", -1), ("accumulate", 0)])
def test_numbers_that_a_key_may_not_have(train_net, lazy_config, key, value):
    with pytest.raises(ValueError, match=rf"train\.{key}\) is {value}; expected a whole number"):
        train_net(f"train.{key}={value}", config=lazy_config)


def test_the_best_and_losses_on_other_data(train_net, lazy_config, tmp_path):
    with open(lazy_config, "a") as file:
        file.write(
            "\ndataloader['validation'] = L(build_detection_test_loader)("
            'dataset=L(get_detection_dataset_dicts)(names="shapes_test", filter_empty=False), num_workers=0,'
            'mapper=L(DatasetMapper)(is_train=True, augmentations=[], image_format="BGR"))\n'
        )
    output, words = tmp_path / "output", ["optimizer.lr=0", "train.max_iter=9", "train.eval_period=1"]
    words += ["train.best_metric=validation/total_loss", "train.patience=2", "train.loggers=[]"]
    train_net(*words, config=lazy_config)
    lines = metrics(output)  # the learning rate is 0: the first evaluation is the best
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3]
    assert len({line["validation/total_loss"] for line in lines}) == 1
    assert final(output)["iteration"] == 2 and final(output, "model_best.pth")["iteration"] == 0
    assert not list(output.glob("events.*"))
    for word, message in {
        "train.best_metric=": r"train\.patience and train\.best_metric",
        "train.loggers=[wandbb]": r"train\.loggers\) has 'wandbb'",
        "train.best_metric=bbox_EMA/AP": r"is 'bbox_EMA/AP', and MODEL\.FOCAL\.EMA\.DECAY is 0.*train\.ema\.decay",
        "dataloader.validation=null": r"is 'validation/total_loss', and .*dataloader\.validation",
        "dataloader.evaluator=null": r"is 'bbox/AP', and DATASETS\.TEST is empty.*dataloader\.evaluator",
    }.items():
        with pytest.raises(ConfigError, match=message):
            metric = "bbox/AP" if "evaluator" in word else "validation/total_loss"
            other = [f"train.best_metric={metric}", f"train.output_dir={tmp_path / 'other'}", "train.max_iter=1"]
            train_net("train.patience=2", *other, word, config=lazy_config)


CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_shipped_ones_write_the_page(path):
    cfg = LazyConfig.apply_overrides(LazyConfig.load(str(path)), ["train.output_dir=runs/a"])
    assert cfg.dataloader.evaluator._target_ is PageEvaluator
    assert cfg.dataloader.evaluator.output_dir == "runs/a/inference"
    _move_output(cfg, "runs/a/eval")
    assert cfg.dataloader.evaluator.output_dir == "runs/a/eval/inference"
