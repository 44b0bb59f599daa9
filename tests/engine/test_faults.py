"""Runs that are killed, or lose what they need: an error in bounded time; resumed, the run that was not disturbed."""

import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from focal_plugin.engine import StepTrainer
from tests.engine import faulty
from tests.engine.same import assert_same_run, final

# A detector of 0.4M parameters with running statistics, sampling and augmentation.
TINY = ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.FOCAL.TIMM.WEIGHTS", ""]
TINY += [
    "MODEL.FOCAL.TIMM.NAME",
    "test_resnet",
    "MODEL.FOCAL.TIMM.NORM",
    "BN",
    "MODEL.FPN.IN_FEATURES",
    "['c3', 'c4', 'c5']",
]
TINY += ["MODEL.FOCAL.CLS_LOSS.NAME", "SampledBCELoss", "DATASETS.TEST", "()", "SOLVER.BASE_LR", 0.01]
TINY += ["INPUT.AUGMENTATIONS", "[{'name': 'RandomBrightness', 'intensity_min': 0.5, 'intensity_max': 1.5}]"]
SECONDS = 60  # in which a run that lost something must have ended


@pytest.fixture(scope="module")
def context():
    """Processes that start at once: they are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.engine.faulty"])
    return context


@pytest.fixture
def start(context, tiny_config, tmp_path):
    """Start train_net.py in a process of its own: in a folder, with a fault at a place, or without."""
    processes = []

    def run(folder, *words, fault=None, place=0):
        words = ["--config-file", tiny_config, "--resume", "OUTPUT_DIR", tmp_path / folder, *TINY, *words]
        process = context.Process(target=faulty.train, args=(words, tmp_path / f"{folder}.log", fault, place))
        process.start()
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.join()


def ended(process):
    """Its exit code."""
    process.join(SECONDS)
    assert not process.is_alive(), "it hangs"
    return process.exitcode


def test_killed_and_resumed(start, tmp_path):
    words = ["SOLVER.MAX_ITER", 5, "SOLVER.CHECKPOINT_PERIOD", 1]
    assert ended(start("whole", *words)) == 0, (tmp_path / "whole.log").read_text()
    for fault, place in (("in a write", 2), ("before a rename", 4), ("before a sync", 6), ("in a step", 4)):
        assert ended(start("killed", *words, fault=fault, place=place)) == -signal.SIGKILL, fault
    assert ended(start("killed", *words)) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert not list((tmp_path / "killed").glob("*.part"))


EVALUATED = ["DATASETS.TEST", "('shapes_test',)", "TEST.EVAL_PERIOD", 2, "SOLVER.MAX_ITER", 5]


@pytest.mark.parametrize("where", ["signal in Python", "signal in C++"])
def test_a_signal_in_an_evaluation(start, tmp_path, where):
    """The step before it is saved, and the run ends within seconds. Resumed, it evaluates, and goes on as the whole."""
    began = time.monotonic()
    assert ended(start("stopped", *EVALUATED, fault=where, place=2)) == 143, (tmp_path / "stopped.log").read_text()
    assert time.monotonic() - began < 45  # the start included; the evaluation would take 60
    log = (tmp_path / "stopped.log").read_text()
    assert "stopped after 4 steps, which are saved" in log
    assert (tmp_path / "stopped/last_checkpoint").read_text() == "model_0000003.pth"
    assert ended(start("stopped", *EVALUATED)) == 0
    assert ended(start("whole", *EVALUATED)) == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_any_moment(start, tmp_path, workers):
    """Runs are killed at random moments until they are done: 24 kills, 6 of them while a checkpoint is written."""
    words = ["SOLVER.MAX_ITER", 12, "SOLVER.CHECKPOINT_PERIOD", 1, "DATALOADER.NUM_WORKERS", workers]
    assert ended(start("first", *words)) == 0
    began = time.monotonic()
    assert ended(start("whole", *words)) == 0  # without what the first one waited for
    duration = time.monotonic() - began
    moments = random.Random(workers)
    kills, runs, killed_here = 0, 0, 0
    while kills < 24 or killed_here:
        if kills < 24 and kills % 4 == 3:
            process = start(f"killed{runs}", *words, fault="in a write", place=moments.randint(1, 3))
        else:
            process = start(f"killed{runs}", *words)
            process.join(moments.uniform(0, duration) if kills < 24 else SECONDS)
            process.kill()
        code = ended(process)
        assert code in (0, -signal.SIGKILL), (tmp_path / f"killed{runs}.log").read_text()
        if code == 0:
            assert_same_run(tmp_path / f"killed{runs}", tmp_path / "whole")
            runs, killed_here = runs + 1, 0
        else:
            kills, killed_here = kills + 1, killed_here + 1
    print(f"{kills} kills, {runs} runs, all the same as the undisturbed one")
    assert kills == 24 and runs >= 1


def test_a_worker_is_killed(start, tmp_path):
    words = ["SOLVER.MAX_ITER", 12, "SOLVER.CHECKPOINT_PERIOD", 2, "DATALOADER.NUM_WORKERS", 2]
    assert ended(start("killed", *words, fault="worker", place=3)) == 1
    assert "A process that loads images has died" in (tmp_path / "killed.log").read_text()
    assert ended(start("killed", *words)) == 0
    assert ended(start("whole", *words)) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_files_vanish(train_net, tiny_config, tmp_path, monkeypatch, capfd, workers):
    """The run ends with their name, after what it has done is saved."""
    words = ["DATASETS.TEST", "()", "SOLVER.MAX_ITER", 12, "DATALOADER.NUM_WORKERS", workers]
    run_step, folder = StepTrainer.run_step, tmp_path / "shapes_train"

    def without_files(trainer):
        if trainer.iter == 2:
            folder.rename(tmp_path / "away")
        run_step(trainer)

    with monkeypatch.context() as patched, pytest.raises((ValueError, RuntimeError), match=r"shapes_train/\d\.png"):
        patched.setattr(StepTrainer, "run_step", without_files)
        train_net("OUTPUT_DIR", tmp_path / "broken", *words)
    assert "All steps before are saved" in capfd.readouterr().out
    (tmp_path / "away").rename(folder)
    last = (tmp_path / "broken/last_checkpoint").read_text()
    assert last in [f"model_{step:07d}.pth" for step in range(1, 8)]  # workers had loaded some more
    if workers == 0:
        assert last == "model_0000001.pth"
    train_net("--resume", "OUTPUT_DIR", tmp_path / "broken", *words)
    train_net("OUTPUT_DIR", tmp_path / "whole", *words)
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


def test_the_disk_fills_up(train_net, tmp_path, monkeypatch):
    """No more than half a checkpoint fits from the second one on."""
    words = ["DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", 1, "OUTPUT_DIR", tmp_path / "out"]
    run_step, limits = StepTrainer.run_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def with_less_room(trainer):
        if trainer.iter == 1:
            half = (tmp_path / "out/model_0000000.pth").stat().st_size // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (half, limits[1]))
        run_step(trainer)

    try:
        with monkeypatch.context() as patched, pytest.raises(OSError, match="The checkpoints are whole"):
            patched.setattr(StepTrainer, "run_step", with_less_room)
            train_net(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "out/last_checkpoint").read_text() == "model_0000000.pth"
    train_net("--resume", *words)
    assert final(tmp_path / "out")["iteration"] == 3


@pytest.fixture
def two_processes(tiny_config, tmp_path):
    """Start train_net.py with two processes. The started process, with its screen in a file."""
    runs = []

    def run(folder, *words):
        words = ["--config-file", tiny_config, "--num-gpus", 2, "--dist-url", "auto", "--resume", *words]
        words += ["OUTPUT_DIR", tmp_path / folder, *TINY]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, str(faulty.TRAIN_NET), *map(str, words)]
        with open(tmp_path / f"{folder}.log", "a") as screen:
            runs.append(
                subprocess.Popen(command, stdout=screen, stderr=screen, env=environment, start_new_session=True)
            )
        return runs[-1]

    yield run
    for process in runs:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def children(pid):
    """The Python processes that a process has started to train."""
    tasks = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(task) for task in tasks if b"spawn_main" in Path(f"/proc/{task}/cmdline").read_bytes()]


def wait_for(path):
    deadline = time.monotonic() + 2 * SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["first dies", "second dies", "signal"])
def test_two_processes(two_processes, tmp_path, what):
    """One of two dies: the other does not wait for it. A signal to the one that started them: both save, and end."""
    words = ["SOLVER.MAX_ITER", 400, "SOLVER.CHECKPOINT_PERIOD", 10, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"]
    if what == "second dies":
        words += ["SOLVER.OPTIMIZER", "adamw", "MODEL.FOCAL.EMA.DECAY", 0.9, "DATASETS.TEST", "()"]
    run = two_processes("broken", *words)
    wait_for(tmp_path / "broken/model_0000019.pth")
    processes = children(run.pid)
    assert len(processes) == 2
    if what == "signal":
        run.send_signal(signal.SIGTERM)
    else:
        os.kill(processes[what == "second dies"], signal.SIGKILL)
    code = run.wait(SECONDS)
    log = (tmp_path / "broken.log").read_text()
    assert code == 143 if what == "signal" else code not in (0, 143), log
    assert all(not Path(f"/proc/{pid}").exists() for pid in processes)
    # The rest of the way is short, so that the test is: to the next checkpoint but one.
    last = (tmp_path / "broken/last_checkpoint").read_text()
    steps = int(last[6:13]) + 1
    assert 20 <= steps < 400
    name = f"model_{steps // 10 * 10 + 19:07d}.pth"
    for folder in ("broken", "whole"):
        run = two_processes(folder, *words)
        wait_for(tmp_path / folder / name)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    assert_same_run(tmp_path / "broken", tmp_path / "whole", name)
