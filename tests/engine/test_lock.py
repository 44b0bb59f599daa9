"""Two commands in one folder: no training harms another, and reading harms none."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from focal_plugin.config import ConfigError
from focal_plugin.engine import Trainer, evaluation_folder, lock, sole_training
from focal_plugin.engine.lock import LOCK, holder
from focal_plugin.files.write import process_name, replace_file


@pytest.fixture
def fork():
    """Start a function in a process that is forked from this one; its end of a pipe is the first argument."""
    context, processes = multiprocessing.get_context("fork"), []

    def start(function, *args):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=function, args=(theirs, *args)))
        processes[-1].start()
        theirs.close()
        return processes[-1], ours

    yield start
    for process in processes:
        process.kill()
        process.join()


def hold(pipe, folder):
    """Train in a folder until it is killed."""
    with sole_training(folder):
        pipe.send("held")
        time.sleep(600)


@pytest.fixture
def training(fork, tmp_path):
    """Another process that trains in the folder ``output``."""
    process, pipe = fork(hold, str(tmp_path / "output"))
    assert pipe.recv() == "held"
    return process


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_a_second_training_is_refused_and_changes_nothing(training, train_net, lazy_config, tmp_path):
    output = tmp_path / "output"
    (output / "config.yaml").write_text("SEED: 7\n")
    (output / "model_0000001.pth@elsewhere-7.part").write_text("half")
    before = snapshot(output)
    message = (
        rf"OUTPUT_DIR .*output is in use: process {training.pid} on \S+ since \d{{4}}-.* trains there\. Wait for it"
    )
    for words in (["--resume"], []):
        with pytest.raises(ConfigError, match=message):
            train_net(*words)
    with pytest.raises(ConfigError, match=message):
        train_net(config=lazy_config)
    assert snapshot(output) == before
    training.kill()  # the system releases the lock, and the training takes over
    training.join()
    train_net("DATASETS.TEST", "()", "SOLVER.MAX_ITER", 1)
    assert not list(output.glob("*.part"))


def test_an_evaluation_beside_a_training(training, train_net, lazy_config, tmp_path):
    """It reads the last checkpoint, and writes to a folder of its own."""
    output, other = tmp_path / "output", tmp_path / "other"
    train_net("SOLVER.MAX_ITER", 1, "OUTPUT_DIR", other)
    for name in ("model_final.pth", "last_checkpoint", "metrics.json", "config.yaml", "log.txt"):
        (output / name).write_bytes((other / name).read_bytes())
    (output / "inference").mkdir()
    (output / "inference/coco_instances_results.json").write_text("[]")
    (output / "model_0000004.pth@elsewhere-7.part").write_text("half")
    before = snapshot(output)
    results = train_net("--eval-only", "--resume")
    train_net("--eval-only", "--resume", config=lazy_config)
    after = snapshot(output)
    assert {path: after[path] for path in before} == before
    assert {path.relative_to(output).parts[0] for path in after.keys() - before.keys()} == {"eval", "eval-2"}
    assert (output / "eval/inference/coco_instances_results.json").exists()
    assert (output / "eval-2/coco_instances_results.json").exists()
    assert "AP" in results["bbox"]


def test_an_evaluation_alone_writes_to_its_folder(tmp_path):
    assert evaluation_folder(str(tmp_path)) == str(tmp_path)
    (tmp_path / "config.yaml").write_text("")  # of an evaluation before
    assert evaluation_folder(str(tmp_path)) == str(tmp_path)
    (tmp_path / "metrics.json").write_text("")
    assert evaluation_folder(str(tmp_path)) == str(tmp_path / "eval")
    assert evaluation_folder(str(tmp_path)) == str(tmp_path / "eval-2")


def try_to_hold(pipe, folder):
    lock._held.clear()  # of the process that it was forked from
    with pytest.raises(ConfigError) as error, sole_training(folder):
        pass
    pipe.send(str(error.value))


def test_who_holds_it(training, fork, tmp_path):
    output = str(tmp_path / "output")
    assert f"process {training.pid} on" in holder(output)
    with pytest.raises(ConfigError), sole_training(output):
        pass
    training.kill()
    training.join()
    assert holder(output) == holder(str(tmp_path)) == ""
    with sole_training(output), sole_training(output):  # a process may enter again
        assert holder(output) == ""
        _, pipe = fork(try_to_hold, output)
        assert f"process {os.getpid()} on" in pipe.recv()
    note = json.loads((tmp_path / "output" / LOCK).read_text())
    assert note["pid"] == os.getpid() and note["command"]


def test_a_look_at_the_lock_does_not_refuse_a_training(tmp_path):
    """Whoever looks holds it for a moment."""
    with sole_training(str(tmp_path)):
        pass
    look = "import fcntl, sys, time; file = open(sys.argv[1]); fcntl.lockf(file, fcntl.LOCK_SH); print(1, flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{look}; time.sleep(0.15)", tmp_path / LOCK], stdout=subprocess.PIPE
    )
    process.stdout.readline()
    with sole_training(str(tmp_path)):
        pass
    process.wait()


def hold_with_a_child(pipe, folder):
    with sole_training(folder):
        if (child := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
        pipe.send(child)
        time.sleep(60)


def test_a_child_of_a_killed_training_does_not_keep_the_lock(fork, tmp_path):
    """As the processes that load data, which a killed training leaves behind for some seconds."""
    process, pipe = fork(hold_with_a_child, str(tmp_path))
    child = pipe.recv()
    assert f"process {process.pid} on" in holder(str(tmp_path))
    process.kill()
    process.join()
    assert holder(str(tmp_path)) == ""
    os.kill(child, signal.SIGKILL)  # it was alive


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def unsupported(*args):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", unsupported)
    with sole_training(str(tmp_path)):
        assert "start no second training" in caplog.text


def test_parts_of_processes_that_live_are_kept(training, tmp_path):
    """In a folder that is free: a conversion may write there."""
    host = process_name().rpartition("-")[0]
    for name in ("model_x.pth", "last_checkpoint", "other.pth"):
        for process in (f"{host}-{training.pid}", f"{host}-{2**22 + 1}", "elsewhere-1", process_name()):
            (tmp_path / f"{name}@{process}.part").write_text("half")
    (tmp_path / "model_y.pth.part").write_text("of an earlier version")
    with sole_training(str(tmp_path)):
        kept = {path.name for path in tmp_path.glob("*.part")}
    assert {name for name in kept if not name.startswith("other")} == {
        f"{name}@{host}-{training.pid}.part" for name in ("model_x.pth", "last_checkpoint")
    }
    assert sum(name.startswith("other") for name in kept) == 4


def write_theirs(pipe, path):
    replace_file(path, lambda file: (file.write(b"theirs"), pipe.send("half"), pipe.recv()))


def test_two_processes_write_one_file(fork, tmp_path):
    """Each to a part of its own; the last to end wins."""
    path = tmp_path / "file"
    process, pipe = fork(write_theirs, str(path))
    assert pipe.recv() == "half"
    replace_file(str(path), lambda file: file.write(b"ours"))
    assert path.read_bytes() == b"ours"
    pipe.send("go on")
    process.join()
    assert process.exitcode == 0 and path.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["file"]


def test_a_run_that_cannot_start_leaves_config_yaml(train_net, tmp_path):
    train_net("DATASETS.TEST", "()", "SOLVER.MAX_ITER", 1)
    before = (tmp_path / "output/config.yaml").read_text()
    with pytest.raises(ConfigError, match="is of another model"):
        train_net("--resume", "SOLVER.BASE_LR", 0.5, "MODEL.FPN.OUT_CHANNELS", 8)
    assert (tmp_path / "output/config.yaml").read_text() == before


def test_the_lock_lasts_as_long_as_the_training(train_net, tmp_path, monkeypatch):
    held = []
    report = Trainer.report

    def look(*args):
        held.append(str(tmp_path / "output") in lock._held)
        return report(*args)

    monkeypatch.setattr(Trainer, "report", staticmethod(look))
    began = time.time()
    train_net("SOLVER.MAX_ITER", 1)
    assert held == [True] and not lock._held
    assert (tmp_path / "output" / LOCK).stat().st_mtime >= began - 1
