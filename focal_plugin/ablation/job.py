"""A job: train one run in its folder, as the only one there, and note how it ended.

This module is pickled by value, so that a job starts without importing this package and PyTorch. It may import the
standard library and submitit only.
"""

import contextlib
import fcntl
import json
import os
import platform
import shlex
import socket
import subprocess
import time
from pathlib import Path

from submitit.helpers import Checkpointable, DelayedSubmission

LOCK, PID, NOTES, LOG = "job.lock", "job.pid", "job.json", "job.log"
DIVERGED = "diverged.json"  # the training's record of a divergence


class TrainJob(Checkpointable):
    """Runs ``command`` for a folder. A job that SLURM stops at its time limit is queued again, and resumes.

    The process of ``command`` holds a lock in the folder while it lives, whatever becomes of its parents. Another job
    does nothing while the lock is held, and after the run has diverged or ended without an error. To stop the run, send
    SIGTERM to that process, whose number is in the folder: signals of a terminal do not reach it.

    Args:
        folder: the folder of the run.
        command: the command, as a list of words.
        cwd: the folder to run it in.
        env: environment variables to set.
        facts: what to add to the notes, besides the host, processor, times and exit code.
    """

    def __init__(self, folder: str, command: list[str], cwd: str, env: dict[str, str], facts: dict):
        self.folder, self.command, self.cwd, self.env, self.facts = folder, command, cwd, env, facts
        self.process: subprocess.Popen | None = None

    def __call__(self) -> str:
        folder = Path(self.folder)
        with open(folder / LOCK, "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return "another job is running it"
            attempts = read_json(folder / NOTES, [])
            if (attempts and attempts[-1].get("exit_code") == 0) or read_json(folder / DIVERGED, None):
                return "it has ended already"
            attempt = {"started": time.time(), "command": shlex.join(self.command), "env": self.env}
            attempt |= {**machine(), **self.facts}
            _write(folder / NOTES, [*attempts, attempt])
            with open(folder / LOG, "a") as log:
                self.process = subprocess.Popen(
                    self.command,
                    cwd=self.cwd,
                    env={**os.environ, **self.env},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[lock.fileno()],
                    start_new_session=True,
                )
            try:
                (folder / PID).write_text(str(self.process.pid))
                code = self.process.wait()
            except BaseException:  # this process was told to end
                self.stop()
                raise
            (folder / PID).unlink()
            _write(folder / NOTES, [*attempts, {**attempt, "ended": time.time(), "exit_code": code}])
        return f"exit code {code}"

    def stop(self) -> None:
        """Let the process save and stop, and wait for it."""
        if self.process is not None:
            self.process.terminate()
            # Not process.wait(): a signal may have interrupted a call of it, which holds a lock.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)

    def checkpoint(self) -> DelayedSubmission:
        """Save, stop, and queue the job again: submitit calls this shortly before SLURM's time limit."""
        self.stop()
        return DelayedSubmission(TrainJob(self.folder, self.command, self.cwd, self.env, self.facts))


def machine() -> dict:
    """Return the host, its processor, the number of cores that this process may use, and the GPUs."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        processor = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    query, gpus = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        gpus = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    return {
        "host": socket.gethostname(),
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [gpu.strip() for gpu in gpus.splitlines() if gpu.strip()],
    }


def read_json(path: Path, otherwise):
    """Return the content of a file; ``otherwise`` if there is no file, only the beginning of one, or a damaged one."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # not JSON, or no text
        return otherwise


def _write(path: Path, attempts: list[dict]) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(attempts, indent=2))
    new.replace(path)  # at once, never a part of the file
