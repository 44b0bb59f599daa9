"""Runs of two processes of which one is hit: both end, or go on, in bounded time; resumed, the run is the whole one."""

import os
import random
import signal
import time

import pytest

from tests.engine import faulty
from tests.engine.same import assert_same_run
from tests.engine.test_faults import SECONDS, TINY, context  # noqa: F401  # a fixture

pytestmark = pytest.mark.slow

WORDS = [*TINY, "SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", "('shapes_test',)"]
WORDS += ["TEST.EVAL_PERIOD", 3]


@pytest.fixture
def start(context, tiny_config, tmp_path):  # noqa: F811
    """Start both processes of a run, with a fault in that of a rank."""
    processes = []

    def run(folder, rank=None, fault=None, place=0):
        port = random.SystemRandom().randint(20_000, 60_000)
        words = ["--config-file", tiny_config, "--resume", "OUTPUT_DIR", tmp_path / folder, *WORDS]
        both = []
        for this in (0, 1):
            args = (fault, place) if this == rank else ()
            log = tmp_path / f"{folder}.{this}.log"
            both.append(context.Process(target=faulty.train_rank, args=(this, port, words, log, *args)))
            both[-1].start()
        processes.extend(both)
        return both

    yield run
    for process in processes:
        process.kill()
        process.join()


def ended(processes, seconds=SECONDS):
    """Their exit codes."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
        assert not process.is_alive(), f"{process} hangs"
    return [process.exitcode for process in processes]


def logged(tmp_path, text, name="hit.0.log"):
    deadline = time.monotonic() + SECONDS
    while text not in ((tmp_path / name).read_text() if (tmp_path / name).exists() else ""):
        assert time.monotonic() < deadline, f"{text} does not come"
        time.sleep(0.02)


def resumes(start, tmp_path):
    assert ended(start("hit")) == [0, 0], (tmp_path / "hit.0.log").read_text()
    assert ended(start("whole")) == [0, 0]
    assert_same_run(tmp_path / "hit", tmp_path / "whole")


def test_the_disk_of_the_main_process_fills_up(start, tmp_path):
    codes = ended(start("hit", rank=0, fault="full disk", place=1_000_000))
    assert 0 not in codes and codes[0] == 1
    assert "The disk of" in (tmp_path / "hit.0.log").read_text()
    resumes(start, tmp_path)


def test_the_disk_of_another_process_fills_up(start, tmp_path):
    """It writes nothing but its log: the run goes on."""
    assert ended(start("hit", rank=1, fault="full disk", place=1000)) == [0, 0], (tmp_path / "hit.1.log").read_text()
    resumes(start, tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_image_of_one_process_is_broken(start, tmp_path, rank):
    codes = ended(start("hit", rank=rank, fault="broken image", place=4))
    assert 0 not in codes
    assert "is broken" in (tmp_path / f"hit.{rank}.log").read_text()
    resumes(start, tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_is_stopped_for_a_while(start, tmp_path, rank):
    """As by a machine that is suspended: the other waits for it."""
    processes = start("hit")
    logged(tmp_path, "Saving checkpoint")
    os.kill(processes[rank].pid, signal.SIGSTOP)
    time.sleep(5)
    os.kill(processes[rank].pid, signal.SIGCONT)
    assert ended(processes) == [0, 0]
    resumes(start, tmp_path)


@pytest.mark.parametrize("to", [[0, 1], [0], [1]])
@pytest.mark.parametrize("slow", [0, 1])
def test_a_signal_in_an_evaluation(start, tmp_path, slow, to):
    """To both processes or one, while one computes and the other waits for it: both end within seconds, saved."""
    processes = start("hit", rank=slow, fault="slow rank", place=slow)
    logged(tmp_path, "EVALUATES", f"hit.{slow}.log")
    time.sleep(1)  # the other one waits by now
    for rank in to:
        os.kill(processes[rank].pid, signal.SIGTERM)
    assert ended(processes, 20) == [143, 143], (tmp_path / "hit.0.log").read_text()
    assert (tmp_path / "hit/last_checkpoint").read_text() == "model_0000002.pth"
    resumes(start, tmp_path)
