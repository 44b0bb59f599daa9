"""Run what is left of a table: jobs through submitit, on this machine or on SLURM, with one progress bar."""

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
from .code import code_difference, read_code, record_code
from .job import LOG, PID, TrainJob
from .runs import Outcome, Run

cloudpickle.register_pickle_by_value(job_module)  # so that a job imports neither this package nor PyTorch

JOBS = "submitit"  # the folder of a run's jobs, with their output before training
POLL_SECONDS = 1.0
_ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED")  # states of SLURM's jobs
_A_YEAR = 60 * 24 * 365  # minutes


class LocalLauncher:
    """Jobs on this machine, which share its cores and GPUs.

    Args:
        num_jobs: the number of jobs at a time; None for one for each GPU, or one without a GPU.
    """

    def __init__(self, num_jobs: int | None = None):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        self.gpus = names[: torch.cuda.device_count()]
        self.num_jobs = num_jobs or max(1, len(self.gpus))

    def environment(self, slot: int) -> dict[str, str]:
        """Return the threads, unless the user has set them, and the GPU of the job in a slot, 0 to num_jobs − 1."""
        cores = len(os.sched_getaffinity(0))
        env = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // self.num_jobs))}
        if self.gpus:
            env["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        return env

    def submit(self, folder: Path, train: TrainJob) -> submitit.Job:
        """Start a job."""
        executor = submitit.LocalExecutor(folder=folder / JOBS)
        executor.update_parameters(timeout_min=_A_YEAR)
        # Ctrl+C in a terminal reaches all processes there. The jobs ignore it, and `interrupt` stops them.
        former = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return executor.submit(train)
        finally:
            signal.signal(signal.SIGINT, former)

    def interrupt(self, jobs: Mapping[Run, submitit.Job | None], say: Callable[[str], None]) -> None:
        """Let all running jobs save and stop, and wait for them."""
        say(f"Interrupted: {len(jobs)} running jobs save and stop. Press Ctrl+C again to leave without waiting.")
        signalled = set()
        while left := [run for run, job in jobs.items() if not has_ended(run, job)]:
            for run in left:
                if run not in signalled and (pid := run.pid()):
                    with contextlib.suppress(ProcessLookupError):  # it has just ended
                        os.kill(pid, signal.SIGTERM)
                    signalled.add(run)
            time.sleep(0.1)
        say("All jobs have stopped. The same command resumes them from their last checkpoints.")


class SlurmLauncher:
    """Jobs on a SLURM cluster, submitted from this machine.

    Args:
        num_jobs: the number of jobs in the queue at a time; None for all.
        options: options of submitit's ``SlurmExecutor``, which are sbatch's: partition, time in minutes, ...

    Raises:
        ValueError: there is no SLURM here, an option is unknown, or time is missing.
    """

    def __init__(self, num_jobs: int | None = None, options: dict[str, str | int] | None = None):
        self.num_jobs = num_jobs or sys.maxsize
        self.options = {"job_name": "ablation", **(options or {})}
        if "time" not in self.options:
            raise ValueError("--launcher slurm: give the longest time of a run in minutes, such as --slurm time=240.")
        try:
            self._executor(Path())
        except RuntimeError as error:
            raise ValueError(f"--launcher slurm: {error}") from error

    def environment(self, slot: int) -> dict[str, str]:
        """Return {}, since SLURM sets what a job may use."""
        return {}

    def submit(self, folder: Path, train: TrainJob) -> submitit.Job:
        """Submit a job and note its number in the folder, or return the job of an earlier start that still runs."""
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
        """Leave the jobs in the queue, and say so."""
        numbers = " ".join(job.job_id for job in jobs.values() if job is not None)
        say(
            f"Interrupted: {len(jobs)} jobs stay in SLURM's queue. The same command waits for them again, and "
            f"`scancel {numbers}` ends them."
        )


class Progress:
    """A progress bar over all steps of ``runs``, with the time left."""

    def __init__(self, runs: Sequence[Run]):
        self.steps = {run: (run.outcome().step, run.num_steps) for run in runs}  # done, in all
        done, total = map(sum, zip(*self.steps.values()))
        quiet = not sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            initial=done,
            unit="step",
            smoothing=0,  # the mean speed, since jobs write their progress every 20 steps only
            mininterval=60 if quiet else 0.5,
            dynamic_ncols=not quiet,
            file=sys.stderr,
        )

    def update(self, run: Run, outcome: Outcome, ended: bool = False) -> None:
        """Show the steps that a run has done; a run that has ``ended`` does no more."""
        self.steps[run] = outcome.step, outcome.step if ended else run.num_steps
        done, self.bar.total = map(sum, zip(*self.steps.values()))
        self.bar.update(done - self.bar.n)

    def say(self, text: str) -> None:
        """Write a line above the bar."""
        self.bar.write(text, file=sys.stderr)


def train_command(run: Run, train_net: Path | None) -> list[str]:
    """Return the command of a run: ``python -m focal_plugin train``, or another ``train_net``, on the run's config."""
    program = [str(train_net)] if train_net else ["-m", "focal_plugin", "train"]
    return [sys.executable, *program, "--config-file", str(run.config_file), "--resume"]


def execute(runs: Sequence[Run], launcher, train_net: Path | None, facts: dict) -> None:
    """Run what is left, at most ``launcher.num_jobs`` at a time, and wait for it.

    A run that fails or diverges does not stop the others. A run that an earlier start of this program has left running
    is waited for, not started again.

    Args:
        runs: the runs, in the order to start them.
        launcher: a ``LocalLauncher`` or a ``SlurmLauncher``.
        train_net: the path of a train_net.py; None for `python -m focal_plugin train`.
        facts: what the jobs add to their notes.

    Raises:
        KeyboardInterrupt: the program was interrupted; a message has said what becomes of the jobs.
    """
    for run in runs:
        run.prepare()
        record_code(run)
    code = {run: read_code(run.cfg.MODEL.FOCAL.IMPORTS) for run in runs}
    waiting = [run for run in runs if not run.outcome().over]
    if not waiting:
        return
    progress = Progress(waiting)
    slots: dict[Run, int] = {}
    jobs: dict[Run, submitit.Job | None] = {}  # None: started by an earlier program

    def start(run: Run, own: bool) -> None:
        waiting.remove(run)
        if own and (changed := code_difference(code[run], read_code(run.cfg.MODEL.FOCAL.IMPORTS))):
            progress.say(
                f"{run.name} is not started: {changed}, and the runs of a table have one code. Change it back."
            )
            progress.update(run, run.outcome(), ended=True)
            return
        slots[run] = min(set(range(len(slots) + 1)) - set(slots.values()))
        jobs[run] = None
        if own:
            (run.folder / PID).unlink(missing_ok=True)  # of a process that was killed
            command, environment = train_command(run, train_net), launcher.environment(slots[run])
            train = TrainJob(str(run.folder.resolve()), command, os.getcwd(), environment, facts)
            jobs[run] = launcher.submit(run.folder, train)

    try:
        for run in [run for run in waiting if run.is_running()]:
            progress.say(f"{run.name} is already running: waiting for it.")
            start(run, own=False)
        while waiting or jobs:
            for run in list(jobs):
                ended = has_ended(run, jobs[run])
                outcome = run.outcome()  # read after that, so that it has what the job wrote at its end
                if ended:
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
    """Return whether a job is over and no process of this or an earlier program trains the run."""
    return (job is None or job.done()) and not run.is_running()


def describe(run: Run, outcome: Outcome) -> str:
    """Return the outcome of a job that has ended, in a line, or in several if it failed."""
    match outcome.status:
        case "finished":
            return f"AP {outcome.results['AP']:.1f}"
        case "diverged":
            return f"diverged at step {outcome.step}. {outcome.reason}"
        case "no AP":
            return f"no AP. {outcome.reason}"
        case "failed":
            return f"failed after {outcome.step} steps, {outcome.reason}"
    return f"{outcome.status}, {outcome.step} steps done; see {run.folder / LOG} and {run.folder / JOBS}"
