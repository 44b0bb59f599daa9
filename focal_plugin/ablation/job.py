"""What a job does: train one run in its folder, alone there, and note how it went.

This module travels to the job as it is and is not imported there, so that a job starts without importing PyTorch: it
needs the standard library and submitit alone.
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
    """Runs ``command`` once for a folder. A job that SLURM ends for its time is queued again, and goes on.

    The process of ``command`` holds a lock in the folder as long as it lives, whatever becomes of those that started
    it; while it is held, and after the run has ended well or diverged, another job there does nothing. To end it, send
    SIGTERM to that process, whose number is in the folder: the signals of a terminal do not reach it.

    Args:
        folder: of the run.
        command: what to run, as a list of words.
        cwd: where to run it.
        env: variables of the environment to set.
        facts: what to note of the attempt besides its host, processor, times and exit code.
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
            except BaseException:  # this process is told to end
                self.stop()
                raise
            (folder / PID).unlink()
            _write(folder / NOTES, [*attempts, {**attempt, "ended": time.time(), "exit_code": code}])
        return f"exit code {code}"

    def stop(self) -> None:
        """Let the process save and end, and wait for it."""
        if self.process is not None:
            self.process.terminate()
            # Not its wait(), which may be what a signal has interrupted, and holds a lock.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit calls when the job's time is nearly over: save, and be queued again."""
        self.stop()
        return DelayedSubmission(TrainJob(self.folder, self.command, self.cwd, self.env, self.facts))


def machine() -> dict:
    """The host, its processor, how many of its cores this process may use, and its GPUs."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        processor = names[0] if names else processor
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    gpus: list[str] = []
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        gpus = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.split("\n")
    cores = len(os.sched_getaffinity(0))
    return {
        "host": socket.gethostname(),
        "processor": processor,
        "cores": cores,
        "gpus": [gpu.strip() for gpu in gpus if gpu.strip()],
    }


def read_json(path: Path, otherwise):
    """What a file holds; ``otherwise`` if it is not there, not yet in full, or cut off, as a power cut leaves it."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return otherwise


def _write(path: Path, attempts: list[dict]) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(attempts, indent=2))
    new.replace(path)  # never half a file
