"""A run: one row with one seed in a folder of its own, and what that folder says about it."""

import contextlib
import fcntl
import math
import signal
import subprocess
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import detectron2
import torch
from detectron2.config import CfgNode

from ..config import ConfigError
from ..config.explain import flatten
from ..evaluation.curves import read_metrics
from ..evaluation.numbers import METRICS
from ..evaluation.report import has_found_nothing
from ..files.safe_yaml import parse_yaml
from ..files.write import replace_file
from .job import DIVERGED, LOCK, LOG, NOTES, PID, read_json
from .rows import Row, as_yaml, compose

CONFIG = "config-ablation.yaml"
_CHECKOUT = Path(__file__).parents[2]  # or the folder that the package is installed in
STATUSES = ("finished", "diverged", "no AP", "failed", "unfinished", "not started")
OF_AVERAGE = "AP of the average"  # of the weights, MODEL.FOCAL.EMA; beside the AP of the weights themselves
_NAN = "bbox/AP is NaN: the test set has no boxes, or the detections are gone from the folder inference."
_TOLD_TO_END = (130, 143, -signal.SIGINT, -signal.SIGTERM)  # exit codes of a process that was interrupted


@dataclass(frozen=True)
class Outcome:
    """The state of a run.

    Attributes:
        status: one of ``STATUSES``; "no AP" is that of a run that ended without an error and without an AP.
        step: the number of steps done; of a diverged run, the step at which it diverged, counted from 0 as in its log.
        results: {metric: percent} of the final evaluation, with ``OF_AVERAGE`` where the weights were averaged; NaN
            where the test set has no such boxes.
        seconds: the time of the training steps, without start, evaluation and interruptions; None if unknown.
        reason: the last lines of the log of a failed run, where a divergence starts, or why there is no AP.
    """

    status: str
    step: int = 0
    results: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    reason: str = ""

    @property
    def over(self) -> bool:
        """Whether there is nothing left to run."""
        return self.status in ("finished", "diverged", "no AP")


@dataclass(frozen=True, eq=False)
class Run:
    """A row with a seed.

    Attributes:
        row: the row.
        seed: the SEED of its config.
        folder: its OUTPUT_DIR, which no other run shares.
        cfg: its whole config.
    """

    row: Row
    seed: int
    folder: Path
    cfg: CfgNode

    @property
    def name(self) -> str:
        """The name of the run in messages."""
        return f"{self.row.name} seed {self.seed}"

    @property
    def config_file(self) -> Path:
        """The config file for train_net.py."""
        return self.folder / CONFIG

    @property
    def num_steps(self) -> int:
        """The number of steps of its schedule."""
        return self.cfg.SOLVER.MAX_ITER

    def changes(self) -> str:
        """Return how the config of an earlier run in the folder differs; "" if it does not, or if there is none.

        Raises:
            ConfigError: the earlier config is not a YAML mapping.
        """
        if not self.config_file.exists():
            taken = [name for name in ("metrics.json", "model_final.pth") if (self.folder / name).exists()]
            return f"has {' and '.join(taken)}, but no {CONFIG}" if taken else ""
        if not self.has_begun():
            return ""
        texts = self.config_file.read_bytes(), as_yaml(self.cfg)
        configs = (flatten(parse_yaml(text, str(self.config_file))) for text in texts)
        # The folder may have been moved.
        before, now = ({k: repr(v) for k, v in config.items() if k != "OUTPUT_DIR"} for config in configs)
        return difference(before, now, missing="the default")

    def has_begun(self) -> bool:
        """Return whether anything has been run."""
        return bool(self.attempts() or self.series())

    def prepare(self) -> None:
        """Make the folder and write the config."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = f"# {self.name}, composed by focal_plugin.ablation from {self.row.file}\n{as_yaml(self.cfg)}"
        replace_file(str(self.config_file), lambda file: file.write(text.encode()))

    def is_running(self) -> bool:
        """Return whether a process is training in the folder, whoever started it."""
        try:
            with open(self.folder / LOCK) as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def pid(self) -> int | None:
        """Return the process that is training in the folder, once it is known."""
        try:
            return int((self.folder / PID).read_text()) if self.is_running() else None
        except (FileNotFoundError, ValueError):  # not written yet, or not all of it
            return None

    def attempts(self) -> list[dict]:
        """Return what each job of this run has noted: when, where, with which versions, and its exit code."""
        return read_json(self.folder / NOTES, [])

    def series(self) -> dict[str, tuple[list[int], list[float]]]:
        """Return the series in metrics.json: for each name its iterations and values."""
        path = self.folder / "metrics.json"
        return read_metrics(str(path)) if path.exists() else {}

    def outcome(self) -> Outcome:
        """Return the state of the run, read from its folder."""
        series = self.series()
        step = min(max((iterations[-1] + 1 for iterations, _ in series.values()), default=0), self.num_steps)
        seconds = _training_seconds(series)
        if record := read_json(self.folder / DIVERGED, None):
            return Outcome("diverged", record["iteration"], seconds=seconds, reason=record["cause"])
        results = self._final_results(series)
        if results and math.isnan(results["AP"]):
            return Outcome("no AP", self.num_steps, seconds=seconds, reason=_NAN)
        if results:
            return Outcome("finished", self.num_steps, results, seconds)
        attempts = self.attempts()
        code = attempts[-1].get("exit_code") if attempts else None
        if code == 0:
            return Outcome("no AP", step, seconds=seconds, reason=self._no_ap(series))
        if code is not None and code not in _TOLD_TO_END:
            reason = f"exit code {code}; {self.folder / LOG} ends:\n{_tail(self.folder / LOG)}"
            return Outcome("failed", step, seconds=seconds, reason=reason)
        return Outcome("unfinished" if attempts or series else "not started", step, seconds=seconds)

    def _final_results(self, series: dict) -> dict[str, float]:
        """Return the results of the first test set after the last step; {} if there are none."""
        for name in ("", *self.cfg.DATASETS.TEST[:1]):  # metrics have the set's name if there are several sets
            prefix = f"{name}/bbox/" if name else "bbox/"
            iterations, _ = series.get(f"{prefix}AP", ([], []))
            if iterations and iterations[-1] >= self.num_steps:
                classes = [name.removeprefix(prefix) for name in series if name.startswith(f"{prefix}AP-")]
                known = {OF_AVERAGE: f"{prefix[:-1]}_EMA/AP"} | {
                    name: f"{prefix}{name}" for name in (*METRICS, *classes)
                }
                results = {name: series[key][1][-1] for name, key in known.items() if key in series}
                if math.isnan(results["AP"]) and has_found_nothing(self.folder, name):
                    results |= dict.fromkeys(("AP", "AP50", "AP75"), 0.0)
                return results
        return {}

    def _no_ap(self, series: dict) -> str:
        """Return why a run that ended without an error has no AP, and what to do."""
        last = [name for name, (iterations, _) in series.items() if "/" in name and iterations[-1] >= self.num_steps]
        return (
            f"{self.folder / 'metrics.json'} has no bbox/AP of step {self.num_steps}, only {', '.join(sorted(last))}. "
            f"The evaluator of {self.cfg.DATASETS.TEST[0]} has to return {{'bbox': {{'AP': ...}}}}, as COCO's does. "
            f"Then delete {self.folder / NOTES}, and the same command evaluates the last checkpoint again."
        )


def _training_seconds(series: dict) -> float | None:
    """Return the sum of seconds a step × steps between two lines of metrics.json."""
    iterations, times = series.get("time", ([], []))
    if not iterations:
        return None
    return sum(time * (end - start) for time, end, start in zip(times, iterations, [-1, *iterations]))


def _tail(log: Path, count: int = 15) -> str:
    """Return the last lines of a file, each as a terminal shows it after the last carriage return."""
    if not log.exists():
        return ""
    with log.open(errors="replace", newline="\n") as file:
        return "".join(line.rpartition("\r")[2] for line in deque(file, count))


def plan(rows: Sequence[Row], base: Path | None, opts: Sequence[str], seeds: int, output: Path) -> list[Run]:
    """Return all ``rows`` with all seeds: all rows with the first seed, then with the second, and so on.

    Nothing is written.

    Raises:
        ValueError: a config is wrong, or a folder holds a run of another config.
    """
    runs = []
    for seed in range(1, seeds + 1):
        for row in rows:
            folder = output / row.name / f"seed{seed}"
            cfg = compose(row, base, [*opts, "SEED", str(seed), "OUTPUT_DIR", str(folder)])
            if not cfg.DATASETS.TEST:
                raise ConfigError(f"{row.file}: DATASETS.TEST is empty; expected the data set to report the AP of.")
            if cfg.TEST.PATIENCE:
                raise ConfigError(
                    f"{row.file}: TEST.PATIENCE is {cfg.TEST.PATIENCE}; expected 0: all runs have as many steps."
                )
            runs.append(Run(row, seed, folder, cfg))
    refuse_others({run: run.changes() for run in runs}, "another config")
    return runs


def refuse_others(changes: Mapping[Run, str], of_what: str) -> None:
    """Check that none of the runs in the folders differs from those that are asked for.

    Args:
        changes: in words, how each differs; "" if it does not.
        of_what: "another config", or what else it is that differs.

    Raises:
        ConfigError: some do. It names each difference and the folders that have it.
    """
    folders: dict[str, str] = {}
    for run, changed in changes.items():
        if changed:
            folders[changed] = f"{folders.get(changed, '')}\n    {run.folder}"
    if folders:
        raise ConfigError(
            f"These folders hold runs of {of_what}, which are not overwritten. Delete them or choose another "
            "--output." + "".join(f"\n  {changed}:{listed}" for changed, listed in folders.items())
        )


def difference(before: Mapping[str, str], now: Mapping[str, str], missing: str) -> str:
    """Return how two versions differ, as in "a was 1 and is now 2; b was 3 and is now missing"; "" if they do not."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return "; ".join(f"{name} was {before.get(name, missing)} and is now {now.get(name, missing)}" for name in names)


def versions() -> dict[str, str]:
    """Return the versions of PyTorch and Detectron2, and this package's commit, or its version outside a checkout."""
    found = {"torch": str(torch.__version__), "detectron2": str(detectron2.__version__)}  # not plain strings
    describe = ["git", "-C", str(_CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with contextlib.suppress(metadata.PackageNotFoundError):  # a copy of the sources, not installed
        found["focal_plugin"] = metadata.version("focal_plugin")
    # Only if the checkout is the package's: an environment may be inside the checkout of something else.
    if (_CHECKOUT / ".git").exists():
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            found["focal_plugin"] = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    return found
