"""LOGGERS: the real libraries, offline. What they get is metrics.json, once, in one run however often it resumes."""

import importlib.util
import json
import os
import struct
from types import SimpleNamespace

import pytest

from focal_plugin.config import ConfigError
from focal_plugin.engine import StepTrainer, loggers
from focal_plugin.engine.loggers import RunLogger, check_loggers, logged


class Interruption(BaseException):
    """Ends a run as nothing in it expects."""


class Memory(RunLogger):
    """A logger that keeps what it gets; it can be out of reach."""

    name = "memory"
    reached = True

    def __init__(self, *args):
        super().__init__(*args)
        self.got, self.ends = [], []

    def _open(self, run):
        if run == "gone":
            raise KeyError("no run 'gone'")
        return run or "new"

    def _send(self, step, numbers):
        if not self.reached:
            raise OSError("no route to host")
        self.got.append((step, numbers))

    def _finish(self, pictures, pages, code):
        self.ends.append((pictures, pages, code))


@pytest.fixture
def folder(tmp_path):
    def write(*lines):
        with open(tmp_path / "metrics.json", "a") as file:
            file.writelines(json.dumps({"iteration": step, "loss": float(step)}) + "\n" for step in lines)

    return SimpleNamespace(
        path=tmp_path, write=write, record=lambda: json.loads((tmp_path / "loggers.json").read_text())
    )


def test_each_line_is_sent_once(folder):
    logger = Memory(str(folder.path), {})
    logger.open(resume=False)
    folder.write(0, 4)
    logger.write()
    logger.write()
    (folder.path / "metrics.json").open("a").write('{"iteration": 19, "lo')  # being written
    logger.write()
    assert logger.got == [(0, {"loss": 0.0}), (4, {"loss": 4.0})]
    assert folder.record() == {"memory": {"run": "new", "last": 4}}


def test_a_resumed_run_is_the_same_run(folder):
    """metrics.json goes back to the checkpoint; what was sent since is not sent again."""
    first = Memory(str(folder.path), {})
    first.open(resume=True)
    folder.write(0, 19, 39)
    first.write()
    (folder.path / "metrics.json").write_text("")
    folder.write(0, 19)
    second = Memory(str(folder.path), {})
    second.open(resume=True)
    second.write()
    folder.write(39, 59)
    second.write()
    assert second.got == [(59, {"loss": 59.0})]
    assert folder.record() == {"memory": {"run": "new", "last": 59}}


def test_what_could_not_be_sent_is_sent_later(folder, caplog):
    logger = Memory(str(folder.path), {})
    logger.open(resume=False)
    logger.reached = False
    folder.write(0, 19)
    logger.write()
    assert "memory cannot be reached" in caplog.text and folder.record()["memory"]["last"] == -1
    logger.reached = True
    folder.write(39)
    logger.write()
    assert [step for step, _ in logger.got] == [0, 19, 39]


def test_a_run_that_is_gone(folder):
    folder.path.joinpath("loggers.json").write_text('{"memory": {"run": "gone", "last": 3}}')
    with pytest.raises(ConfigError, match=r"LOGGERS: memory: .*no run 'gone'.*remove memory from .*loggers\.json"):
        Memory(str(folder.path), {}).open(resume=True)
    Memory(str(folder.path), {}).open(resume=False)
    assert folder.record() == {"memory": {"run": "new", "last": -1}}


@pytest.mark.parametrize(
    ("error", "code"), [(None, 0), (SystemExit(143), 143), (KeyError(), 1), (KeyboardInterrupt(), 1)]
)
def test_how_a_run_ends(folder, error, code):
    for name in ("inference", "inference/one"):
        (folder.path / name).mkdir()
        (folder.path / name / "evaluation.html").write_text("")
    (folder.path / "curves.png").write_text("")
    logger = Memory(str(folder.path), {})
    try:
        with logged([logger], resume=False):
            if error:
                raise error
    except BaseException as raised:
        assert raised is error
    pages = ["inference/evaluation.html", "inference/one/evaluation.html"]
    assert logger.ends == [(["curves.png"], pages, 0) if code == 0 else ([], [], code)]


def test_a_run_that_does_not_start_is_ended_where_it_was_opened(folder):
    first, second, third = (type(name, (Memory,), {"name": name})(str(folder.path), {}) for name in ("a", "b", "c"))
    second._open = lambda run: 1 / 0
    problem = pytest.raises(ConfigError, match=r"LOGGERS: b: division by zero")
    with problem, logged([first, second, third], resume=False):
        pytest.fail("it has started")
    assert (first.ends, second.ends, third.ends) == ([([], [], 1)], [], [])


def test_mistakes(monkeypatch):
    check_loggers(["tensorboard", "wandb", "mlflow"])
    check_loggers([])
    with pytest.raises(ConfigError, match=r"LOGGERS .*has 'wandbb'; expected some of tensorboard, wandb, mlflow"):
        check_loggers(["wandbb"])
    with pytest.raises(ConfigError, match=r"VIS_PERIOD is 20, and LOGGERS .*has no tensorboard"):
        check_loggers(["wandb"], vis_period=20)
    for spec in (None, SimpleNamespace(origin=None)):  # not there; a folder that wandb has written
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        for name in ("wandb", "mlflow"):
            with pytest.raises(
                ConfigError, match=rf'has {name}, which is not installed: pip install "focal_plugin\[{name}\]"'
            ):
                check_loggers([name])


def test_a_mistake_ends_a_run_before_it_starts(train_net, tmp_path, monkeypatch):
    monkeypatch.setattr(StepTrainer, "run_step", lambda trainer: pytest.fail("a step was taken"))
    with pytest.raises(ConfigError, match="has 'wandbb'"):
        train_net("OUTPUT_DIR", tmp_path, "LOGGERS", "['wandbb']")


def test_without_tensorboard(train_net, tmp_path):
    words = ["DATASETS.TEST", "()", "SOLVER.MAX_ITER", 1]
    train_net("OUTPUT_DIR", tmp_path / "without", *words, "LOGGERS", "[]")
    assert not list((tmp_path / "without").glob("events.*")) and not (tmp_path / "without/loggers.json").exists()


@pytest.fixture
def interrupted(train_net, tmp_path, monkeypatch):
    """Train with pictures, interrupted after the sixth step, then resumed; the lines of metrics.json at the end."""

    def run(name):
        take_step, left = StepTrainer.run_step, [6]

        def run_step(trainer):
            if left and trainer.iter == left[0]:
                raise Interruption(left.pop())
            take_step(trainer)

        monkeypatch.setattr(StepTrainer, "run_step", run_step)
        words = ["--resume", "OUTPUT_DIR", tmp_path / "run", "LOGGERS", f"['{name}']", "VIS.ENABLED", True]
        words += ["SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 3, "TEST.EVAL_PERIOD", 2]
        with pytest.raises(Interruption):
            train_net(*words)
        train_net(*words)
        assert not list((tmp_path / "run").glob("events.*"))
        return [json.loads(line) for line in (tmp_path / "run/metrics.json").read_text().splitlines()]

    return run


def records(path):
    """The records of a ``.wandb`` file: LevelDB's log format around protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@pytest.mark.slow
def test_weights_and_biases(interrupted, tmp_path, monkeypatch):
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    lines = interrupted("wandb")
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and len({path.name for path in files}) == 1  # two parts of one run
    found = [record for path in files for record in records(path)]
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    numbers = [row for row in rows if "total_loss" in row or "bbox/AP" in row]
    assert [row["_step"] for row in numbers] == [line["iteration"] for line in lines]
    for row, line in zip(numbers, lines):
        for key in ("total_loss", "lr", "bbox/AP50", "positives/p3"):
            assert row.get(key) == line.get(key)
    assert {"curves/path", "detections/path"} <= rows[-1].keys()
    config = {u.key: u.value_json for record in found if record.HasField("run") for u in record.run.config.update}
    assert config["SOLVER.MAX_ITER"] == "8"
    (artifact,) = [record.artifact for record in found if record.HasField("artifact")]
    assert artifact.type == "evaluation"
    assert [entry.path for entry in artifact.manifest.contents] == ["inference/evaluation.html"]


@pytest.mark.slow
def test_mlflow(interrupted, tmp_path, monkeypatch):
    """On its files, which need no database."""
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    lines = interrupted("mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    for key in ("total_loss", "lr", "bbox/AP50", "positives/p3"):
        found = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key)]
        assert found == [(line["iteration"], line[key]) for line in lines if key in line], key
    assert run.data.params["SOLVER.MAX_ITER"] == "8" and run.data.params["MODEL.META_ARCHITECTURE"] == "FocalRetinaNet"
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert names == {"config.yaml", "curves.png", "detections.png", "inference"}
    assert [item.path for item in client.list_artifacts(run.info.run_id, "inference")] == ["inference/evaluation.html"]


@pytest.mark.slow
def test_mlflow_without_access(train_net, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://")
    monkeypatch.setattr(StepTrainer, "run_step", lambda trainer: pytest.fail("a step was taken"))
    with pytest.raises(ConfigError, match=r"LOGGERS: mlflow: .*nowhere"):
        train_net("OUTPUT_DIR", tmp_path, "LOGGERS", "['mlflow']")


def test_names_and_values_that_mlflow_takes():
    assert loggers._allowed("bbox/AP-cell (white): é") == "bbox/AP-cell _white_: é"
    assert loggers._short(list(range(999))).endswith("...") and len(loggers._short("x" * 999)) == 500
    assert os.path.basename(loggers.RECORD) == "loggers.json"
