"""A run: one row with one seed in a folder of its own, and what that folder says about it."""

import contextlib
import fcntl
import math
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from ..config import ConfigError
from ..config.explain import flatten
from ..data import check_registered, register_local_datasets
from ..evaluation.curves import read_metrics
from ..evaluation.report import has_found_nothing
from ..files.safe_yaml import parse_yaml
from ..registry import check_names, import_user_modules
from .job import DIVERGED, LOCK, LOG, NOTES, PID, read_json
from .rows import METRICS, Row, as_yaml, compose

CONFIG = "config-ablation.yaml"
_CHECKOUT = Path(__file__).parents[2]  # or the folder that the package is installed in
_NAN = "bbox/AP is NaN: the test set has no boxes, or its detections are not in the folder inference any more."
_TOLD_TO_END = (130, 143, -signal.SIGINT, -signal.SIGTERM)  # exit codes of a process that a signal has ended


@dataclass(frozen=True)
class Outcome:
    """How a run stands.

    Attributes:
        status: "finished", "diverged", "no AP" (it has ended well without a result), "failed", "unfinished" or
            "not started".
        step: how many steps are done; of a diverged run, the step it diverged at, counted from 0 as in its log.
        results: {metric: percent} of the final evaluation; NaN where the test set has no such boxes.
        seconds: the time of the training steps, without start, evaluation and interruptions; None if it is not known.
        reason: of a failure the last lines of its log, of a divergence where it starts, of no AP why there is none.
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
        seed: SEED of its config.
        folder: its OUTPUT_DIR, which is nobody else's.
        cfg: its whole config.
    """

    row: Row
    seed: int
    folder: Path
    cfg: CfgNode

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.row.name} seed {self.seed}"

    @property
    def config_file(self) -> Path:
        """What train_net.py is given."""
        return self.folder / CONFIG

    @property
    def num_steps(self) -> int:
        """The steps of its schedule."""
        return self.cfg.SOLVER.MAX_ITER

    def changes(self) -> str:
        """What a run in the same folder was configured otherwise; empty if there is none, or it is the same config.

        Raises:
            ConfigError: its config is no YAML mapping any more.
        """
        if not self.config_file.exists():
            taken = [name for name in ("metrics.json", "model_final.pth") if (self.folder / name).exists()]
            return f"has {' and '.join(taken)}, but no {CONFIG}" if taken else ""
        if not (self.attempts() or self.series()):  # nothing has been run
            return ""
        texts = self.config_file.read_bytes(), as_yaml(self.cfg)
        before, now = (flatten(parse_yaml(text, str(self.config_file))) for text in texts)
        # OUTPUT_DIR may differ: a folder that was moved holds the same run.
        keys = (before.keys() | now.keys()) - {"OUTPUT_DIR"}
        keys = sorted(key for key in keys if before.get(key) != now.get(key))
        show = lambda config, key: repr(config[key]) if key in config else "the default"  # noqa: E731
        return "; ".join(f"{key} was {show(before, key)} and is now {show(now, key)}" for key in keys)

    def prepare(self) -> None:
        """Make the folder and write the config."""
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.config_file.with_suffix(".new")
        new.write_text(f"# {self.name}, composed by focal_plugin.ablation from {self.row.file}\n{as_yaml(self.cfg)}")
        new.replace(self.config_file)

    def is_running(self) -> bool:
        """Whether a process is training in the folder, whoever started it."""
        try:
            with open(self.folder / LOCK) as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def pid(self) -> int | None:
        """The process that is training in the folder, once it is known."""
        try:
            return int((self.folder / PID).read_text()) if self.is_running() else None
        except (FileNotFoundError, ValueError):  # not yet, or not yet in full
            return None

    def attempts(self) -> list[dict]:
        """What the jobs of this run have noted: when, where, with which versions, and how it ended."""
        return read_json(self.folder / NOTES, [])

    def series(self) -> dict[str, tuple[list[int], list[float]]]:
        """The series in metrics.json: for each name its iterations and values."""
        path = self.folder / "metrics.json"
        return read_metrics(str(path)) if path.exists() else {}

    def outcome(self) -> Outcome:
        """How the run stands, from what is in its folder."""
        series = self.series()
        step = min(max((it[-1] + 1 for it, _ in series.values()), default=0), self.num_steps)
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
            return Outcome("no AP", step, seconds=seconds, reason=self._what_is_missing(series))
        if code is not None and code not in _TOLD_TO_END:
            reason = f"exit code {code}; {self.folder / LOG} ends:\n{_tail(self.folder / LOG)}"
            return Outcome("failed", step, seconds=seconds, reason=reason)
        return Outcome("unfinished" if attempts or series else "not started", step, seconds=seconds)

    def _final_results(self, series: dict) -> dict[str, float]:
        """Of the evaluation after the last step; of the first test set, if there are several."""
        for name in ("", *self.cfg.DATASETS.TEST[:1]):
            prefix = f"{name}/bbox/" if name else "bbox/"
            iterations, _ = series.get(f"{prefix}AP", ([], []))
            if iterations and iterations[-1] >= self.num_steps:
                found = {metric: series.get(f"{prefix}{metric}", ([], []))[1] for metric in METRICS}
                results = {metric: values[-1] for metric, values in found.items() if values}
                if math.isnan(results["AP"]) and has_found_nothing(self.folder, name):
                    results |= dict.fromkeys(("AP", "AP50", "AP75"), 0.0)
                return results
        return {}

    def _what_is_missing(self, series: dict) -> str:
        """Of a run that has ended well without an AP, and what to do."""
        last = [name for name, (iterations, _) in series.items() if "/" in name and iterations[-1] >= self.num_steps]
        return (
            f"{self.folder / 'metrics.json'} has no bbox/AP of step {self.num_steps}, only {', '.join(sorted(last))}. "
            f"The evaluator of {self.cfg.DATASETS.TEST[0]} has to return {{'bbox': {{'AP': ...}}}}, as COCO's does. "
            f"When it does, delete {self.folder / NOTES}: the same command then evaluates the last checkpoint again."
        )


def _training_seconds(series: dict) -> float | None:
    """Seconds a step times steps, over the stretches between two lines of metrics.json."""
    iterations, times = series.get("time", ([], []))
    if not iterations:
        return None
    return sum(time * (end - start) for time, end, start in zip(times, iterations, [-1, *iterations]))


def _tail(log: Path, lines: int = 15) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        text = file.read().decode(errors="replace")
    return "\n".join(line.rpartition("\r")[2] for line in text.splitlines()[-lines:])


def plan(rows: Sequence[Row], base: Path | None, opts: Sequence[str], seeds: int, output: Path) -> list[Run]:
    """All ``rows`` with all seeds: every row with the first seed, then with the second, and so on. Nothing is written.

    Raises:
        ValueError: a config is not right, or a folder holds a run of another config.
    """
    runs = []
    for seed in range(1, seeds + 1):
        for row in rows:
            folder = output / row.name / f"seed{seed}"
            cfg = compose(row, base, [*opts, "SEED", str(seed), "OUTPUT_DIR", str(folder)])
            if not cfg.DATASETS.TEST:
                raise ValueError(f"{row.file}: DATASETS.TEST is empty: name the set to report the AP of.")
            runs.append(Run(row, seed, folder, cfg))
    changed: dict[str, list[str]] = {}
    for run in runs:
        if changes := run.changes():
            changed.setdefault(changes, []).append(f"\n    {run.folder}")
    if changed:
        raise ValueError(
            "These folders hold runs of another config, which are not overwritten. Delete them, or choose another "
            "--output." + "".join(f"\n  {changes}:{''.join(folders)}" for changes, folders in changed.items())
        )
    return runs


def count_images(runs: Sequence[Run]) -> dict[str, int]:
    """How many images each data set of the runs has, in the order of training and test; each is read and checked once.

    Raises:
        ImportError: a module of ``MODEL.FOCAL.IMPORTS``, which may register sets, is not found.
        ValueError, OSError: a component or a set is not known, its files are not as they should be, or there
            is no box to find in the first of a run's test sets.
    """
    has_boxes: dict[str, bool] = {}
    counts: dict[str, int] = {}
    for run in runs:
        import_user_modules(run.cfg)
        try:
            check_names(run.cfg)
        except ConfigError as error:
            raise ConfigError(f"{run.row.name}: {error}") from error
        register_local_datasets(run.cfg)
        for name in (*run.cfg.DATASETS.TRAIN, *run.cfg.DATASETS.TEST):
            if name not in counts:
                check_registered(name, f"DATASETS of {run.row.name}")
                records = DatasetCatalog.get(name)
                counts[name], has_boxes[name] = len(records), any(map(_has_box, records))
        if not has_boxes[first := run.cfg.DATASETS.TEST[0]]:
            raise ValueError(
                f"{first}, the first of DATASETS.TEST, has no boxes (crowds are none), so that there would be no AP to "
                "report: name another one. --report-only reports what has been run."
            )
    return counts


def _has_box(record: dict) -> bool:
    return any(not annotation.get("iscrowd", 0) for annotation in record.get("annotations", ()))


def versions() -> dict[str, str]:
    """What the runs are computed with: PyTorch, Detectron2, and this package's commit where it is a git checkout."""
    found = {"torch": str(torch.__version__), "detectron2": str(detectron2.__version__)}  # of classes of their own
    describe = ["git", "-C", str(_CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with contextlib.suppress(metadata.PackageNotFoundError):  # neither installed nor under git: a copy of the sources
        found["focal_plugin"] = metadata.version("focal_plugin")
    # Asked only where the checkout is the package's: an environment may be inside one of something else.
    if (_CHECKOUT / ".git").exists():
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            found["focal_plugin"] = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    return found
