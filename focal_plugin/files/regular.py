"""Open files that may come from anywhere: a pipe would wait for ever, and a device has no end."""

import errno
import os
import stat
from typing import BinaryIO

from detectron2.utils.file_io import PathManager

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: str) -> BinaryIO:
    """Open a file for reading its bytes. What Detectron2's PathManager knows as a URL is downloaded first.

    Raises:
        OSError: it does not exist, or is no regular file.
    """
    return open(regular_path(path), "rb")


def regular_path(path: str) -> str:
    """Return where ``path`` is on this machine, as ``open_regular`` opens it, with its errors."""
    local = PathManager.get_local_path(path)
    mode = os.stat(local).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(mode):
        raise OSError(f"{path} is {_KINDS.get(stat.S_IFMT(mode), 'something else')}; expected a file.")
    return local


def read_regular(path: str, most: int) -> bytes:
    """Return the bytes of a file as ``open_regular`` opens it.

    Raises:
        OSError: it does not exist, is no regular file, or has more than ``most`` bytes.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(f"{path} has more than {most:,} bytes; expected a smaller file.")
    return content
