"""What a process of tests/faults/test_soak.py does: train, and write down what it reads and how much memory it has."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

from focal_plugin.data import DataError
from focal_plugin.engine import StepTrainer, loader
from tests.engine import faulty


def train(words, log, readings, kill_at=None, repeat=None):
    """Run train_net.py.

    Args:
        words: of its command line.
        log: the file for its screen.
        readings: a file to append to: of each position, the images that could not be read.
        kill_at: the step before which a process that loads images is killed.
        repeat: the file of another run's readings, whose unread images are skipped without being tried.
    """
    if repeat:
        _repeat({tuple(pair) for line in Path(repeat).read_text().splitlines() for pair in json.loads(line)})
    else:
        _record(readings)
    run_step = StepTrainer.run_step

    def watched(trainer):
        if trainer.iter == kill_at:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        run_step(trainer)
        if trainer.iter % 10 == 0:
            with open(f"{readings}.memory", "a") as file:
                file.write(f"{trainer.iter} {memory()}\n")

    StepTrainer.run_step = watched
    faulty.train(words, log)


def memory():
    """The bytes that are of no file, for those of files come and go.

    Also those that it shares with the process that it was forked from: what it writes to is its own from then on, which
    would look like growth.
    """
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous"))


def _record(readings):
    """Append a line for each position, in whatever process reads it."""
    read = loader._Reader.__getitem__

    def recorded(reader, where):
        result = read(reader, where)
        with open(readings, "a") as file:
            file.write(json.dumps([where[0], list(result[2])]) + "\n")
        return result

    loader._Reader.__getitem__ = recorded


def _repeat(skipped):
    """Skip these (position, index), whose files are whole."""
    read = loader._Reader.__getitem__

    class Without:
        def __init__(self, dataset, position):
            self.dataset, self.position = dataset, position

        def __getitem__(self, index):
            if (self.position, index) in skipped:
                raise DataError("skipped", "as in the other run.")
            return self.dataset[index]

    def repeated(reader, where):
        whole = reader.dataset
        reader.dataset = Without(whole, where[0])
        try:
            return read(reader, where)
        finally:
            reader.dataset = whole

    loader._Reader.__getitem__ = repeated
