"""A table of three rows on the tiny data set, and a stand-in for train_net.py that takes a moment."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from focal_plugin.ablation import __main__ as runner
from focal_plugin.ablation import launch

ROOT = Path(__file__).parents[2]

# Writes what a run of train_net.py leaves behind, a step at a time, and goes on where it stopped. It says in `starts`
# each time it is started, and in `twice` if another one is at work in the same folder.
# MODEL.WEIGHTS tells it how to end: "diverge" or "fail" at step 2.
STAND_IN = """
import fcntl, json, os, signal, sys, time
from pathlib import Path
import yaml

assert sys.argv[1] == "--config-file" and sys.argv[3] == "--resume", sys.argv
cfg = yaml.safe_load(open(sys.argv[2]))
out = Path(cfg["OUTPUT_DIR"])
busy = open(out / "busy", "a")
try:
    fcntl.flock(busy, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    (out / "twice").touch()
with open(out / "starts", "a") as file:
    print(os.getpid(), os.environ.get("OMP_NUM_THREADS"), file=file)
lines = (out / "metrics.json").read_text().splitlines() if (out / "metrics.json").exists() else []
steps, gamma = cfg["SOLVER"]["MAX_ITER"], cfg.get("MODEL", {}).get("RETINANET", {}).get("FOCAL_LOSS_GAMMA", 2.0)
end = cfg["MODEL"].get("WEIGHTS")

told = []
signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
signal.signal(signal.SIGINT, lambda number, frame: told.append(number))

def write(**values):
    with open(out / "metrics.json", "a") as file:
        print(json.dumps(values), file=file)

for step in range(len(lines), steps):
    time.sleep(float(os.environ.get("PACE", "0")))
    if step == 2 and end == "diverge":
        record = {"iteration": step, "cause": "It starts in the losses."}
        (out / "diverged.json").write_text(json.dumps(record))
        raise FloatingPointError("Loss became infinite or NaN")
    if step == 2 and end == "fail":
        raise RuntimeError("no space left")
    if told:
        (out / "saved").write_text(f"{told}")
        sys.exit(143)
    write(iteration=step, total_loss=2.0 / (step + 1), time=0.5, lr=0.1)
ap = 10 * gamma + cfg["SEED"] ** 2
write(iteration=steps, **{"bbox/AP": ap, "bbox/AP50": 2 * ap, "bbox/AP75": ap / 2, "bbox/APs": float("nan"),
                          "bbox/APm": ap, "bbox/APl": ap})
"""


@pytest.fixture
def train_net(tmp_path):
    """The stand-in's path."""
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    return path


@pytest.fixture
def rows(tmp_path):
    """A folder of rows ``gamma_0``, ``gamma_1`` and ``gamma_2``; write more of them with ``rows.add(name, text)``."""
    return Rows(tmp_path / "rows")


class Rows:
    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        (folder / "Base.yaml").write_text("SOLVER: {BASE_LR: 7.0}\n")
        for gamma in (0, 1, 2):
            self.add(f"gamma_{gamma}", f"MODEL: {{RETINANET: {{FOCAL_LOSS_GAMMA: {gamma}.0}}}}")

    def add(self, name, text):
        path = self.folder / f"{name}.yaml"
        path.write_text(f"_BASE_: Base.yaml\n{textwrap.dedent(text)}\n")
        return path


@pytest.fixture
def ablation(rows, tiny_config, train_net, tmp_path, monkeypatch):
    """Run the program on the rows in this process, with more words of its command line; returns its exit code."""
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.05)

    def run(*words):
        return runner.main(command(rows, tiny_config, train_net, tmp_path, *words))

    return run


def command(rows, tiny_config, train_net, tmp_path, *words):
    """The words after ``python -m focal_plugin.ablation``."""
    options = {"--data": tiny_config, "--train-net": train_net, "--output": tmp_path / "table", "--jobs": 3}
    options = [str(word) for pair in options.items() for word in pair]
    return [str(rows.folder), *options, *map(str, words)]


@pytest.fixture
def start_ablation(rows, tiny_config, train_net, tmp_path, monkeypatch):
    """Start the program in a process of its own, in a group of its own."""
    started = []

    def start(*words):
        words = command(rows, tiny_config, train_net, tmp_path, *words)
        process = subprocess.Popen(
            [sys.executable, "-m", "focal_plugin.ablation", *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
