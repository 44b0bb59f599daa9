"""No run mixes with an earlier one: a folder that the user has named is refused, the default gets a number."""

import os
import shutil

import pytest
from detectron2.utils import comm

from focal_plugin.config import ConfigError
from focal_plugin.config.load import load_config
from focal_plugin.engine import Trainer, evaluation_folder, folder, training_folder
from focal_plugin.engine.folder import refuse_used


def content(path):
    """All but the log, to which all runs of this process write."""
    return {p: p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != "log.txt"}


def test_a_used_folder_is_refused_and_stays_as_it_is(train_net, tiny_config, tmp_path):
    words = ["OUTPUT_DIR", tmp_path / "mine", "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 1]
    train_net(*words)
    before = content(tmp_path / "mine")
    message = r"OUTPUT_DIR .*mine holds an earlier run \(model_final\.pth\).*--resume"
    for other in ([], ["SOLVER.MAX_ITER", 2]):
        with pytest.raises(ConfigError, match=message):
            train_net(*words, *other)
    assert content(tmp_path / "mine") == before
    trainer = Trainer(load_config(tiny_config, [str(word) for word in words]))
    with pytest.raises(ConfigError, match=message):
        trainer.resume_or_load(resume=False)
    train_net("--resume", *words, "SOLVER.MAX_ITER", 2)


@pytest.mark.parametrize("words", [(), ("--eval-only",), ("--resume",)])
def test_a_url_is_no_folder_of_a_run(train_net, lazy_config, tmp_path, monkeypatch, words):
    """A run's files grow and are renamed, which no store behind a URL does."""
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    for command in (
        lambda: train_net(*words, "OUTPUT_DIR", "s3://mine/run"),
        lambda: train_net(*words, "train.output_dir=s3://mine/run", config=lazy_config),
    ):
        with pytest.raises(ConfigError, match="OUTPUT_DIR s3://mine/run is a URL; expected a folder"):
            command()
    assert set(tmp_path.rglob("*")) == before


def test_a_lazy_configs_folder_too(train_net, lazy_config, tmp_path):
    words = ["dataloader.evaluator=null", "train.max_iter=1", f"train.output_dir={tmp_path / 'mine'}"]
    train_net(*words, config=lazy_config)
    with pytest.raises(ConfigError, match=r"train\.output_dir"):
        train_net(*words, config=lazy_config)


@pytest.mark.parametrize(
    ("files", "used"),
    [
        ({}, False),
        ({"config.yaml": "SEED: 1\n", "log.txt": "x", "metrics.json": ""}, False),  # a run that could not start
        ({"metrics.json": '{"iteration": 0}\n'}, True),
        ({"model_0000009.pth": "x"}, True),
        ({"last_checkpoint": "model_0000009.pth"}, True),
        ({"quickstart/model_final.pth": "x", "model_best.txt": "x"}, False),  # of other runs, below
    ],
)
def test_what_makes_a_folder_used(tmp_path, files, used):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    if not used:
        refuse_used(str(tmp_path))
        return
    with pytest.raises(ConfigError, match=r"holds an earlier run"):
        refuse_used(str(tmp_path))


def test_the_default_gets_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def use(name):
        os.makedirs(name, exist_ok=True)
        (tmp_path / name / "last_checkpoint").write_text("model_final.pth")

    for resume in (False, True):
        assert training_folder("./output", resume) == "./output"
    use("output")
    assert training_folder("./output", False) == "./output-2"
    assert training_folder("output", False) == "output-2"
    assert training_folder("./output", True) == "./output"
    use("output-2")
    assert training_folder("./output", False) == "./output-3"
    assert training_folder("./output", True) == "./output-2"  # the last one
    assert training_folder("elsewhere", False) == "elsewhere"
    assert evaluation_folder("./output-2") == "./output-2/eval"
    shutil.rmtree("output")
    assert training_folder("./output", False) == "./output"
    monkeypatch.setattr(folder, "holder", lambda path: "process 7" if path == "./output" else "")
    assert training_folder("./output", False) == "./output-3"  # one is training there since a moment


@pytest.mark.parametrize(
    "main, other, expected", [("./output-2", "./output", "./output-2"), ("here", "there", "there")]
)
def test_a_machine_may_have_a_folder_of_its_own(monkeypatch, main, other, expected):
    """That the user names; what the default is numbered, the main process tells the others."""
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    monkeypatch.setattr(comm, "all_gather", lambda value: [main if isinstance(value, str) and value else value, value])
    assert training_folder(other, resume=True) == expected


def test_a_folder_in_use_is_left_to_the_lock(tmp_path, monkeypatch):
    """Which says who trains there."""
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    monkeypatch.setattr(folder, "holder", lambda path: "process 7")
    assert training_folder(str(tmp_path), False) == str(tmp_path)


def test_two_runs_by_default(train_net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["OUTPUT_DIR", "./output", "DATASETS.TEST", "()", "SOLVER.MAX_ITER"]
    train_net(*words, 1)
    before = content(tmp_path / "output")
    train_net(*words, 1)
    train_net("--resume", *words, 2)
    assert content(tmp_path / "output") == before
    assert (tmp_path / "output-2/metrics.json").read_text().count("\n") == 2
    assert not (tmp_path / "output-3").exists()
