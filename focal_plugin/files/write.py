"""Writing files: whole or not at all, over nothing that is there, and with an explanation when the disk is full.

The rule on existing files: one that the user has named is refused (``check_free``), unless the command has ``--force``;
one that the program names gets a number (``free_paths``).
"""

import errno
import glob
import itertools
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

UNFINISHED = ".part"  # the ending of a file's name while it is written, after the host and process that write it
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_free(path: str | os.PathLike, flag: str, remedy: str = "") -> None:
    """Check that there is nothing at ``path``, which the user has named with ``flag``.

    Args:
        path: where a file or a folder is to be written.
        flag: such as "--output".
        remedy: a further way to go on, such as "overwrite it with --force".

    Raises:
        FileExistsError: there is something, be it a broken link.
    """
    if os.path.lexists(path):
        remedies = ["remove it", f"choose another {flag}", *([remedy] if remedy else [])]
        raise FileExistsError(f"{path} exists and is left as it is: {', or '.join(remedies)}.")


def free_paths(folder: str | os.PathLike, *names: str) -> list[str]:
    """Return paths in ``folder`` at which there is nothing: a.jpg, or else a-2.jpg, a-3.jpg and so on.

    All of ``names`` get the same number, so that one sees which files belong together.
    """
    parts = [os.path.splitext(os.path.join(folder, name)) for name in names]
    for number in itertools.count(1):
        paths = [f"{stem}-{number}{suffix}" if number > 1 else f"{stem}{suffix}" for stem, suffix in parts]
        if not any(map(os.path.lexists, paths)):
            return paths


def replace_file(path: str, write: Callable[[BinaryIO], Any]) -> None:
    """Replace the file ``path`` by what ``write`` writes.

    After a crash at any moment it is the old file or the new one, whole.

    Raises:
        OSError: it could not be written, and is unchanged.
    """
    unfinished = f"{path}@{process_name()}{UNFINISHED}"
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        _sync_folder(os.path.dirname(path) or ".")
    except (OSError, RuntimeError) as error:  # PyTorch raises a RuntimeError when the disk is full
        if os.path.exists(unfinished):
            os.remove(unfinished)
        cause = error
        while not isinstance(cause, OSError) and cause is not None:
            cause = cause.__cause__ or cause.__context__
        number = getattr(cause, "errno", None)
        message = f"{path} could not be written, and is as it was: {error}"
        raise (OSError(message) if number is None else OSError(number, message)) from error


def process_name() -> str:
    """Return the host and the number of this process, for the names of files that no other process may touch."""
    return f"{socket.gethostname()}-{os.getpid()}"


def is_running(name: str) -> bool | None:
    """Return whether the process is running whose ``process_name`` was ``name``; None for one of another host."""
    host, _, pid = name.rpartition("-")
    if host != socket.gethostname() or not pid.isdecimal():
        return None
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def remove_unfinished(folder: str, *patterns: str) -> None:
    """Remove what ``replace_file`` has left of files named like ``patterns`` in ``folder`` when it was killed.

    Only for whoever alone writes such files there: processes of other hosts are taken for dead.
    """
    for pattern in patterns:
        for path in glob.glob(os.path.join(glob.escape(folder), f"{pattern}*{UNFINISHED}")):
            process = path.removesuffix(UNFINISHED).rpartition("@")[2]
            if process == process_name() or not is_running(process):
                os.remove(path)


@contextmanager
def kept_on_error(path: str) -> Iterator[None]:
    """Put the content of the file ``path`` back if what is inside fails; a file that was not there may stay."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError:
        content = None
    try:
        yield
    except BaseException:
        with suppress(OSError):  # the original error matters more
            if content is not None:
                replace_file(path, lambda file: file.write(content))
        raise


@contextmanager
def set_aside(path: str) -> Iterator[None]:
    """Copy the file ``path`` while another program reads it and writes it anew; if that fails, it is as it was."""
    aside = f"{path}@{process_name()}{UNFINISHED}"
    try:
        shutil.copyfile(path, aside)
    except FileNotFoundError:
        yield
        return
    except OSError:
        with suppress(OSError):
            os.remove(aside)
        raise
    try:
        yield
    except BaseException:
        os.replace(aside, path)  # needs no room on a full disk
        raise
    os.remove(aside)


@contextmanager
def whole_folder(path: str | os.PathLike, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes ``path`` at the end. After an error inside, nothing remains of it.

    Args:
        path: the folder to make: nothing is there, or an empty folder.
        replace: take the place of the folder that is there, whatever it holds.

    Raises:
        OSError: there is something at ``path``, and ``replace`` is not given.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as work:  # same disk: one rename
        made, former = Path(work) / "made", Path(work) / "former"
        made.mkdir()
        yield made
        try:
            if replace and path.exists():
                os.rename(path, former)
            os.rename(made, path)
        except BaseException:
            if former.exists() and not path.exists():
                os.rename(former, path)
            raise


@contextmanager
def explained_full_disk(folder: str) -> Iterator[None]:
    """Explain the error of a full disk inside, and what of the run is safe."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(
            error.errno,
            f"The disk of {folder} is full, or a quota or limit of file sizes is reached: {error}. The checkpoints are "
            "whole. Make room, then go on with --resume.",
        ) from error


def _sync_folder(path: str) -> None:
    """Write the names in a folder to the disk, as ``os.fsync`` does with a file's content."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
