"""Running what is left of a table: jobs through submitit, on this machine or on SLURM, and one bar over all of them."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cloudpickle
import submitit
import torch
from tqdm import tqdm

from . import job as job_module
from .job import LOG, PID, TrainJob
from .runs import Outcome, Run

cloudpickle.register_pickle_by_value(job_module)  # so that a job does not import this package, and PyTorch with it

JOBS = "submitit"  # the folder of a run's jobs, with what they said before training
POLL_SECONDS = 1.0
_ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED")  # of SLURM's states
_A_YEAR = 60 * 24 * 365  # in minutes


class LocalLauncher:
    """Jobs on this machine, which share its cores and its GPUs.

    Args:
        num_jobs: how many run at a time; None, one for each GPU, or one.
    """

    def __init__(self, num_jobs: int | None = None):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        self.gpus = names[: torch.cuda.device_count()]
        self.num_jobs = num_jobs or max(1, len(self.gpus))

    def environment(self, slot: int) -> dict[str, str]:
        """The threads and the GPU of the job in a slot, 0 to num_jobs − 1. OMP_NUM_THREADS of the user's is left."""
        cores = len(os.sched_getaffinity(0))
        env = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // self.num_jobs))}
        if self.gpus:
            env["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        return env

    def submit(self, folder: Path, train: TrainJob) -> submitit.Job:
        """Start a job."""
        executor = submitit.LocalExecutor(folder=folder / JOBS)
        executor.update_parameters(timeout_min=_A_YEAR)
        # Ctrl+C in a terminal reaches all processes there, and is for this one alone: see interrupt.
        former = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return executor.submit(train)
        finally:
            signal.signal(signal.SIGINT, former)

    def interrupt(self, jobs: Mapping[Run, submitit.Job | None], say: Callable[[str], None]) -> None:
        """Let all running jobs save and end, and wait for them."""
        say(f"Interrupted: {len(jobs)} running jobs save and stop. Ctrl+C again does not wait for them.")
        told = set()
        while left := [run for run, job in jobs.items() if not has_ended(run, job)]:
            for run in left:
                if run not in told and (pid := run.pid()):
                    with contextlib.suppress(ProcessLookupError):  # it has just ended
                        os.kill(pid, signal.SIGTERM)
                    told.add(run)
            time.sleep(0.1)
        say("They have stopped. The same command goes on from their last checkpoints.")


class SlurmLauncher:
    """Jobs on a SLURM cluster, submitted from here.

    Args:
        num_jobs: how many are submitted at a time; None, all.
        options: of submitit's ``SlurmExecutor``, which are sbatch's: partition, time in minutes, gpus_per_node, ...

    Raises:
        ValueError: there is no SLURM here, an option is unknown, or time is missing.
    """

    def __init__(self, num_jobs: int | None = None, options: dict[str, str | int] | None = None):
        self.num_jobs = num_jobs or sys.maxsize
        self.options = {"job_name": "ablation", **(options or {})}
        if "time" not in self.options:
            raise ValueError("--launcher slurm: say how long a run may take, in minutes: --slurm time=240.")
        try:
            self._executor(Path())
        except RuntimeError as error:
            raise ValueError(f"--launcher slurm: {error}") from error

    def environment(self, slot: int) -> dict[str, str]:
        """Nothing: SLURM says what a job may use."""
        return {}

    def submit(self, folder: Path, train: TrainJob) -> submitit.Job:
        """Submit a job, and note its number in the folder; or find the one again that an earlier start submitted."""
        note = folder / "slurm_job"
        if note.exists():
            earlier = submitit.SlurmJob(folder / JOBS, note.read_text())
            if earlier.watcher.get_state(earlier.job_id, mode="force") in _ALIVE:
                return earlier
        job = self._executor(folder).submit(train)
        note.write_text(job.job_id)
        return job

    def _executor(self, folder: Path) -> submitit.SlurmExecutor:
        executor = submitit.SlurmExecutor(folder=folder / JOBS)
        executor.update_parameters(**self.options)
        return executor

    def interrupt(self, jobs: Mapping[Run, submitit.Job | None], say: Callable[[str], None]) -> None:
        """Let the jobs go on, and say so."""
        numbers = " ".join(job.job_id for job in jobs.values() if job is not None)
        say(
            f"Interrupted: {len(jobs)} jobs stay in SLURM's queue. The same command waits for them again, and "
            f"`scancel {numbers}` ends them."
        )


class Progress:
    """One bar over all steps of all runs that are still to do, with the time left."""

    def __init__(self, runs: Sequence[Run]):
        self.steps = {run: run.outcome().step for run in runs}
        self.left = {run: run.num_steps for run in runs}
        quiet = not sys.stderr.isatty()
        # The mean speed: jobs write every 20 steps, so that the momentary one jumps.
        self.bar = tqdm(
            total=sum(self.left.values()),
            initial=sum(self.steps.values()),
            unit="step",
            smoothing=0,
            mininterval=60 if quiet else 0.5,
            dynamic_ncols=not quiet,
            file=sys.stderr,
        )

    def update(self, run: Run, outcome: Outcome, ended: bool = False) -> None:
        """Take the steps a run has done; with ``ended``, it does no more of them."""
        if ended:
            self.left[run] = outcome.step
        self.steps[run] = outcome.step
        self.bar.total = sum(self.left.values())
        self.bar.update(sum(self.steps.values()) - self.bar.n)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.bar.write(text, file=sys.stderr)


def train_command(run: Run, train_net: Path | None) -> list[str]:
    """Return what runs a run: ``python -m focal_plugin train``, or another ``train_net``, on the run's config."""
    program = [str(train_net)] if train_net else ["-m", "focal_plugin", "train"]
    return [sys.executable, *program, "--config-file", str(run.config_file), "--resume"]


def execute(runs: Sequence[Run], launcher, train_net: Path | None, facts: dict) -> None:
    """Run what is not over, at most ``launcher.num_jobs`` at a time, and wait for all of it.

    A run that fails, or diverges, does not keep the others from running. One that another start of this program has
    left running is waited for, not started again.

    Args:
        runs: in the order to run them.
        launcher: a ``LocalLauncher`` or a ``SlurmLauncher``.
        train_net: the path of a train_net.py; None for `python -m focal_plugin train`.
        facts: what the jobs note of themselves.

    Raises:
        KeyboardInterrupt: after having said what becomes of the jobs.
    """
    for run in runs:
        run.prepare()
    waiting = [run for run in runs if not run.outcome().over]
    if not waiting:
        return
    progress = Progress(waiting)
    # Those that an earlier start has left running come first, without a job of ours.
    slots: dict[Run, int] = {}
    jobs: dict[Run, submitit.Job | None] = {}

    def start(run: Run, own: bool) -> None:
        slots[run] = min(set(range(len(slots) + 1)) - set(slots.values()))
        train = TrainJob(
            str(run.folder.resolve()),
            train_command(run, train_net),
            os.getcwd(),
            launcher.environment(slots[run]),
            facts,
        )
        if own:
            (run.folder / PID).unlink(missing_ok=True)  # of a process that was killed
        jobs[run] = launcher.submit(run.folder, train) if own else None
        waiting.remove(run)

    try:
        for run in [run for run in waiting if run.is_running()]:
            progress.say(f"{run.name} is running already: waiting for it.")
            start(run, own=False)
        while waiting or jobs:
            for run in list(jobs):
                outcome = run.outcome()
                ended = has_ended(run, jobs[run])
                if ended:
                    outcome = run.outcome()  # what it wrote at its end
                    del jobs[run], slots[run]
                    progress.say(f"{run.name}: {describe(run, outcome)}")
                progress.update(run, outcome, ended)
            while waiting and len(jobs) < launcher.num_jobs:
                start(waiting[0], own=True)
            progress.bar.set_postfix_str(f"{len(jobs)} running, {len(waiting)} waiting", refresh=False)
            if jobs:
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        launcher.interrupt(jobs, progress.say)
        raise
    finally:
        progress.bar.close()


def has_ended(run: Run, job: submitit.Job | None) -> bool:
    """Whether a job is over, and nothing that it, or an earlier start of this program, has started trains any more."""
    return (job is None or job.done()) and not run.is_running()


def describe(run: Run, outcome: Outcome) -> str:
    """The outcome of a job that has ended, in a line, or in some more if it failed."""
    if outcome.status == "finished":
        return f"AP {outcome.results['AP']:.1f}"
    if outcome.status == "diverged":
        return f"diverged at step {outcome.step}. {outcome.reason}"
    if outcome.status == "no AP":
        return f"no AP. {outcome.reason}"
    if outcome.status == "failed":
        return f"failed after {outcome.step} steps, {outcome.reason}"
    return f"{outcome.status}, {outcome.step} steps done; see {run.folder / LOG} and {run.folder / JOBS}"
