"""One training at a time in a folder, by a lock that the system releases when its process ends, however it ends."""

import errno
import fcntl
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.utils import comm

from ..config import ConfigError
from ..files.write import remove_unfinished

logger = logging.getLogger(__name__)

LOCK = ".lock"  # the file in a training's folder; it stays there, since removing it would let two hold two files
# By trainings alone.
_WRITTEN = ("model_*.pth", "diverged_*.pth", "diverged.json", "last_checkpoint", "config.yaml", "loggers.json")
_TRIES, _PAUSE = 5, 0.1  # whoever looks at the lock holds it for a moment, too
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_held: dict[str, int | None] = {}  # the folders of this process's trainings; the lock's file on the main process


@contextmanager
def sole_training(folder: str) -> Iterator[None]:
    """Hold the lock of a training's folder, which is made. For all processes of a run: the main one holds it for all.

    A process that holds it already may enter again. What dead trainings were writing there is removed.

    The lock is one of POSIX (``lockf``). Unlike that of ``flock``, which lock libraries take, it is made for NFS, and
    the processes that load the data do not inherit it, so that none of them keeps it when the training is killed.

    Args:
        folder: ``OUTPUT_DIR``. After a warning, nothing is locked if its file system has no locks.

    Raises:
        ConfigError: another process trains there, or it is a URL.
        OSError: the folder cannot be written to.
    """
    check_local(folder)
    path = os.path.realpath(folder)
    if path in _held:
        yield
        return
    file, problem = _acquire(folder) if comm.is_main_process() else (None, "")
    if problem := comm.all_gather(problem)[0]:
        raise ConfigError(problem)
    _held[path] = file
    try:
        if file is not None:
            remove_unfinished(folder, *_WRITTEN)
        yield
    finally:
        del _held[path]
        if file is not None:
            os.close(file)


def check_local(folder: str) -> None:
    """Check that the folder of a run is none behind a URL, where files cannot grow or be renamed.

    Raises:
        ConfigError: it is.
    """
    if "://" in folder:
        raise ConfigError(
            f"OUTPUT_DIR {folder} is a URL; expected a folder (in a LazyConfig train.output_dir). Copy it when the run "
            "has ended."
        )


def holder(folder: str) -> str:
    """Return who else trains in ``folder``, as in "process 12 on node3 since 2026-01-02 03:04:05"; "" for no one."""
    if os.path.realpath(folder) in _held:  # to open the file here would release the lock when it is closed
        return ""
    try:
        file = os.open(os.path.join(folder, LOCK), os.O_RDONLY)
    except OSError:
        return ""
    try:
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return ""
    except OSError as error:
        return "" if error.errno in _UNSUPPORTED else _read(file)
    finally:
        os.close(file)


def _acquire(folder: str) -> tuple[int | None, str]:
    """Return the lock's file, and what is wrong."""
    os.makedirs(folder, exist_ok=True)
    file = os.open(os.path.join(folder, LOCK), os.O_RDWR | os.O_CREAT, 0o644)
    for tries_left in reversed(range(_TRIES)):
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                logger.warning(f"{folder} is on a file system without locks: start no second training in it.")
                break
            if not tries_left:
                problem = (
                    f"OUTPUT_DIR {folder} is in use: {_read(file)} trains there. Wait for it, let it save and stop by "
                    "`kill` with its number, or set another OUTPUT_DIR (in a LazyConfig train.output_dir)."
                )
                os.close(file)
                return None, problem
            time.sleep(_PAUSE)
    command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    note = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "command": command}
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(note).encode(), 0)
    return file, ""


def _read(file: int) -> str:
    try:
        note = json.loads(os.pread(file, 1 << 16, 0))
        return f"process {note['pid']} on {note['host']} since {note['since']}"
    except (ValueError, TypeError, KeyError):  # not written yet
        return "another process"
