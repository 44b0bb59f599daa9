"""Runs in Weights & Biases and MLflow, which get what ``metrics.json`` does: ``LOGGERS``."""

import glob
import importlib.util
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter

from ..config import ConfigError
from ..files.write import replace_file
from .metrics import MetricsWriter

logger = logging.getLogger(__name__)

RECORD = "loggers.json"  # in OUTPUT_DIR: {logger: {"run": its name there, "last": the last step that was sent}}
_PICTURES = ("curves.png", "detections.png")
_PAGES = ("inference*/evaluation.html", "inference*/*/evaluation.html")
_PROJECT = "focal_plugin"


class RunLogger(EventWriter):
    """Sends each line of ``metrics.json`` once; at the end of the run its pictures and the pages of its evaluations.

    What cannot be sent is sent with later lines. A run that resumes is the same run there: steps that were sent before
    it was interrupted are not sent again, since they cannot be taken back.

    Args:
        output_dir: the run's folder.
        config: the run's, by whole keys.
    """

    name = ""  # in LOGGERS, and of the extra in setup.cfg
    errors: tuple[type[Exception], ...] = (OSError,)  # of the network

    def __init__(self, output_dir: str, config: Mapping[str, Any]):
        self.output_dir, self.config = output_dir, config
        self._read = 0  # bytes of metrics.json
        self._run: dict[str, Any] = {}  # as in RECORD

    def open(self, resume: bool) -> None:
        """Start a run there, or go on with that of ``output_dir``.

        Raises:
            ConfigError: there is no access, or no such run any more.
        """
        before = self._record().get(self.name, {}) if resume else {}
        try:
            self._run = {"run": self._open(before.get("run")), "last": before.get("last", -1)}
        except Exception as error:
            way = f", and to log to a new run, remove {self.name} from {self.output_dir}/{RECORD}" if before else ""
            raise ConfigError(f"LOGGERS: {self.name}: {error} Set it up as its own pages say{way}.") from error
        self._save()

    def write(self) -> None:
        """Send the new lines of metrics.json."""
        sent = self._run["last"]
        try:
            with open(os.path.join(self.output_dir, "metrics.json"), errors="replace") as file:
                file.seek(self._read)
                while (text := file.readline()).endswith("\n"):
                    line = json.loads(text)
                    if (step := line.pop("iteration")) > self._run["last"]:
                        self._send(step, line)
                        self._run["last"] = step
                    self._read = file.tell()
        except self.errors as error:
            logger.warning(f"LOGGERS: {self.name} cannot be reached; what it lacks is sent later: {error}")
        if self._run["last"] > sent:
            self._save()

    def finish(self, code: int) -> None:
        """End the run there; with pictures and pages if ``code``, its exit code, is 0."""
        found = {} if code else {pattern: self._files(pattern) for pattern in (*_PICTURES, *_PAGES)}
        try:
            self._finish(
                [name for pattern in _PICTURES for name in found.get(pattern, ())],
                [name for pattern in _PAGES for name in found.get(pattern, ())],
                code,
            )
        except self.errors as error:
            logger.warning(f"LOGGERS: {self.name} cannot be reached, and lacks the end of this run: {error}")

    def _files(self, pattern: str) -> list[str]:
        return sorted(glob.glob(pattern, root_dir=self.output_dir))

    def _path(self, name: str) -> str:
        return os.path.join(self.output_dir, name)

    def _record(self) -> dict[str, Any]:
        try:
            with open(self._path(RECORD)) as file:
                return json.load(file)
        except (FileNotFoundError, ValueError):  # ValueError: a disk has damaged it
            return {}

    def _save(self) -> None:
        text = json.dumps(self._record() | {self.name: self._run}, indent=1)
        replace_file(self._path(RECORD), lambda file: file.write(text.encode()))

    def _open(self, run: str | None) -> str:
        """Start a run, or go on with ``run``; return its name."""
        raise NotImplementedError

    def _send(self, step: int, numbers: Mapping[str, float]) -> None:
        raise NotImplementedError

    def _finish(self, pictures: Sequence[str], pages: Sequence[str], code: int) -> None:
        raise NotImplementedError


class WandbLogger(RunLogger):
    """Weights & Biases. What its environment variables say holds: WANDB_PROJECT, WANDB_MODE and so on."""

    name = "wandb"

    def _open(self, run: str | None) -> str:
        import wandb

        self.errors = (OSError, wandb.errors.Error)
        self._wandb = wandb.init(
            id=run,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=os.environ.get("WANDB_NAME", os.path.basename(os.path.abspath(self.output_dir))),
            dir=os.environ.get("WANDB_DIR", self.output_dir),
            config=dict(self.config),
            allow_val_change=True,
        )
        return self._wandb.id

    def _send(self, step: int, numbers: Mapping[str, float]) -> None:
        self._wandb.log(dict(numbers), step=step, commit=True)

    def _finish(self, pictures: Sequence[str], pages: Sequence[str], code: int) -> None:
        import wandb

        if pictures:
            self._wandb.log({os.path.splitext(name)[0]: wandb.Image(self._path(name)) for name in pictures})
        if pages:
            artifact = wandb.Artifact(f"evaluation-{self._wandb.id}", "evaluation")
            for name in pages:
                artifact.add_file(self._path(name), name)
            self._wandb.log_artifact(artifact)
        self._wandb.finish(exit_code=code)


class MlflowLogger(RunLogger):
    """MLflow. What its environment variables say holds: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and so on."""

    name = "mlflow"

    def _open(self, run: str | None) -> str:
        import mlflow

        self.errors = (OSError, mlflow.exceptions.MlflowException)
        self._client = mlflow.MlflowClient()
        if run is not None:
            self._client.update_run(run, status="RUNNING")
        else:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            found = self._client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else self._client.create_experiment(experiment)
            name = os.path.basename(os.path.abspath(self.output_dir))
            run = self._client.create_run(number, run_name=name).info.run_id
            params = [mlflow.entities.Param(_allowed(key), _short(value)) for key, value in self.config.items()]
            self._client.log_batch(run, params=params)
        if os.path.exists(self._path("config.yaml")):
            self._client.log_artifact(run, self._path("config.yaml"))
        return run

    def _send(self, step: int, numbers: Mapping[str, float]) -> None:
        import mlflow

        now = int(time.time() * 1000)
        metrics = [mlflow.entities.Metric(_allowed(name), value, now, step) for name, value in numbers.items()]
        self._client.log_batch(self._run["run"], metrics=metrics)

    def _finish(self, pictures: Sequence[str], pages: Sequence[str], code: int) -> None:
        for name in (*pictures, *pages):
            self._client.log_artifact(self._run["run"], self._path(name), os.path.dirname(name) or None)
        status = "FAILED" if code == 1 else "KILLED" if code else "FINISHED"
        self._client.set_terminated(self._run["run"], status)


def _allowed(name: str) -> str:
    """Return ``name`` in the characters that MLflow takes."""
    return re.sub(r"[^/\w.\- :]", "_", name)


def _short(value: object, most: int = 500) -> str:
    """Return ``value`` as a parameter of MLflow's; config.yaml has it in full."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


_LOGGERS = {kind.name: kind for kind in (WandbLogger, MlflowLogger)}
TENSORBOARD = "tensorboard"  # Detectron2's writer


def check_loggers(names: Sequence[str], vis_period: int = 0) -> None:
    """Check that there are such loggers, and that their libraries are installed.

    Args:
        names: ``LOGGERS``.
        vis_period: ``VIS_PERIOD``.

    Raises:
        ConfigError: one is unknown or not installed, or TensorBoard, which alone takes the pictures of ``VIS_PERIOD``,
            is missing.
    """
    known, where = (TENSORBOARD, *_LOGGERS), "LOGGERS (in a LazyConfig train.loggers)"
    for name in names:
        if name not in known:
            raise ConfigError(f"{where} has {name!r}; expected some of {', '.join(known)}.")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # None: a folder of that name, such as one that wandb has written
            package = TENSORBOARD if name == TENSORBOARD else f'"focal_plugin[{name}]"'
            raise ConfigError(f"{where} has {name}, which is not installed: pip install {package}, or leave it out.")
    if vis_period and TENSORBOARD not in names:
        raise ConfigError(
            f"VIS_PERIOD is {vis_period}, and {where} has no {TENSORBOARD}, which alone takes its pictures: add it, or "
            "set VIS_PERIOD 0."
        )


def run_writers(
    writers: Sequence[EventWriter], output_dir: str, names: Sequence[str], config: Mapping[str, Any]
) -> list[EventWriter]:
    """Return the writers of a run.

    Args:
        writers: Detectron2's. In place of the one of metrics.json comes a ``MetricsWriter``.
        output_dir: the run's folder.
        names: ``LOGGERS``.
        config: the run's, by whole keys.
    """
    ours: list[EventWriter] = []
    for writer in writers:
        if isinstance(writer, JSONWriter):
            writer.close()
            writer = MetricsWriter(os.path.join(output_dir, "metrics.json"))
        if TENSORBOARD in names or not isinstance(writer, TensorboardXWriter):
            ours.append(writer)
    return ours + [_LOGGERS[name](output_dir, config) for name in dict.fromkeys(names) if name in _LOGGERS]


@contextmanager
def logged(loggers: Sequence[RunLogger], resume: bool) -> Iterator[None]:
    """Open the loggers, which the main process alone has, and end their runs as what is inside ends.

    Raises:
        ConfigError: one has no access. In all processes.
    """
    problem, code, opened = "", 1, []
    try:
        try:
            for each in loggers:
                each.open(resume)
                opened.append(each)
        except ConfigError as error:
            problem = str(error)
        if problem := comm.all_gather(problem)[0]:
            raise ConfigError(problem)
        yield
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        raise
    finally:
        for each in opened:
            each.finish(code)
