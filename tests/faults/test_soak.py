"""A long run whose images break and are repaired, and whose loaders die, is the one that skipped the same images."""

import json
import multiprocessing
import random
import re
import threading
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import write_shapes
from tests.engine.same import assert_same_run
from tests.engine.test_faults import TINY
from tests.faults import soaking

STEPS, IMAGES, BROKEN, KILLS = 1000, 400, 20, (230, 470)
SECONDS = 240  # in which each run must have ended
WARM_UP, FLAT = 100, 0.03  # steps of a process; the share by which its memory may then grow


class Vandal(threading.Thread):
    """Keeps ``BROKEN`` of the files broken, each for a moment: truncated, replaced, emptied or gone.

    All are whole until the file ``started`` is there: a run leaves out what it cannot open as it begins.
    """

    def __init__(self, folder):
        super().__init__(daemon=True)
        self.whole = {path: path.read_bytes() for path in sorted(folder.glob("*.png"))}
        self.random, self.broken, self.done = random.Random(0), [], threading.Event()
        self.count, self.lock = 0, threading.Lock()
        self.started = None

    def spoil(self):
        path = self.random.choice([path for path in self.whole if path not in self.broken])
        content = self.whole[path]
        ways = [
            lambda: path.write_bytes(content[: self.random.randint(100, len(content) // 2)]),
            lambda: path.write_text("not an image"),
            lambda: path.write_bytes(b""),
            path.unlink,
        ]
        self.random.choice(ways)()
        self.broken.append(path)
        self.count += 1

    def repair(self):
        path = self.broken.pop(0)
        path.write_bytes(self.whole[path])

    def run(self):
        while not self.done.wait(0.02):
            with self.lock:
                if self.started is not None and self.started.exists():
                    if len(self.broken) == BROKEN:
                        self.repair()
                    self.spoil()

    def wait_for(self, started):
        with self.lock:
            self.started = started
            while self.broken:
                self.repair()


@pytest.fixture
def config(tiny_config, tmp_path):
    """The tiny detector on 400 images that may be skipped."""
    content = yaml.safe_load(Path(tiny_config).read_text())
    entry = write_shapes(tmp_path, "soak", IMAGES, seed=3) | {"on_error": "skip"}
    content["DATASETS"] |= {"LOCAL": [entry], "TRAIN": ["soak"], "TEST": []}
    path = tmp_path / "soak.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture
def run(config, tmp_path):
    """Run train_net.py in a process of its own; its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.soaking"])
    processes = []

    def run(folder, readings, workers, **faults):
        words = ["--config-file", config, "--resume", "OUTPUT_DIR", tmp_path / folder, *TINY, "SOLVER.MAX_ITER", STEPS]
        words += ["SOLVER.CHECKPOINT_PERIOD", 100, "SOLVER.BASE_LR", 0.002, "DATALOADER.NUM_WORKERS", workers]
        arguments = (words, tmp_path / f"{folder}.log", str(tmp_path / readings))
        process = context.Process(target=soaking.train, args=arguments, kwargs=faults)
        process.start()
        processes.append(process)
        process.join(SECONDS)
        assert not process.is_alive(), f"it hangs: {(tmp_path / f'{folder}.log').read_text()[-2000:]}"
        return process.exitcode

    yield run
    for process in processes:
        process.kill()


def growth(path):
    """The share by which the memory of a run grew from the end of its warm-up to its largest, and to its end."""
    values = [tuple(map(int, line.split())) for line in path.read_text().splitlines()]
    values = [size for step, size in values if step >= values[0][0] + WARM_UP]
    start = sorted(values[:5])[2]
    return max(values) / start - 1, sorted(values[-5:])[2] / start - 1


@pytest.mark.slow
def test_soak(run, tmp_path, capsys):
    began = time.monotonic()
    vandal = Vandal(tmp_path / "soak")
    vandal.start()
    codes = []
    for i, step in enumerate([*KILLS, None]):
        vandal.wait_for(tmp_path / f"readings{i}")
        codes.append(run("soaked", f"readings{i}", workers=2, kill_at=step))
    vandal.wait_for(None)
    vandal.done.set()
    log = (tmp_path / "soaked.log").read_text()
    assert codes == [1] * len(KILLS) + [0], log[-3000:]
    assert "A process that loads images has died" in log

    unread = {}  # by position, as it was read last: what a killed run had read ahead was read again
    for i in range(len(codes)):
        unread |= dict(map(json.loads, (tmp_path / f"readings{i}").read_text().splitlines()))
    pairs = [[position, index] for position, indices in unread.items() for index in indices]
    (tmp_path / "unread").write_text(json.dumps(pairs))
    assert len(pairs) > 0.02 * 2 * STEPS

    assert run("skipped", "readings", workers=0, repeat=str(tmp_path / "unread")) == 0
    assert_same_run(tmp_path / "soaked", tmp_path / "skipped")
    most, end = growth(tmp_path / f"readings{len(KILLS)}.memory")
    files = len(set(re.findall(r"soak/(\d+)\.png", log)))
    with capsys.disabled():
        print(
            f"\n{STEPS} steps: {vandal.count} breakages, {len(pairs)} images not read ({files} files), {len(KILLS)} "
            f"loaders killed; memory {most:+.1%} at most, {end:+.1%} at the end; {time.monotonic() - began:.0f} s"
        )
    assert most < FLAT
