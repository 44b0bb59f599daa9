"""Files that grow, and are whole whenever they are read."""

import json
import os
from collections.abc import Iterable
from typing import Any


class GrowingFile:
    """A new file, which grows: it is whole after each ``append``, also if the process is killed then.

    Args:
        path: the file.
        head, tail: the text around what is appended.

    Attributes:
        path: as given.

    Raises:
        OSError: there is such a file, or it cannot be written.
    """

    def __init__(self, path: str, head: str = "", tail: str = ""):
        self.path = path
        self._tail = tail.encode()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._end = 0  # of the last text
        try:
            self._replace_end(head.encode())
        except OSError:
            os.close(self._file)
            os.remove(path)
            raise

    def append(self, text: str, tail: str | None = None) -> None:
        """Append ``text``, and replace the tail by ``tail``.

        Raises:
            OSError: it could not be written; the file is as it was.
        """
        self._undo = self._tail, self._end
        if tail is not None:
            self._tail = tail.encode()
        try:
            self._replace_end(text.encode())
        except OSError:
            self.undo()
            raise

    def undo(self) -> None:
        """Take back the last ``append``; it needs no room on the disk."""
        self._tail, self._end = self._undo
        os.pwrite(self._file, self._tail, self._end)
        os.ftruncate(self._file, self._end + len(self._tail))

    def close(self) -> None:
        """Sync the file to the disk, and close it."""
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)

    def _replace_end(self, text: bytes) -> None:
        """Write ``text`` and the tail after the last text: in one call, unless the disk is full."""
        content = text + self._tail
        written = 0
        while written < len(content):
            written += os.pwrite(self._file, content[written:], self._end + written)
        self._end += len(text)
        os.ftruncate(self._file, self._end + len(self._tail))


class GrowingJson(GrowingFile):
    """A new JSON file of a list, which grows.

    Args:
        path: the file.
        head, tail: the JSON around the list, such as '{"images": ' and "}".

    Attributes:
        count: the number of items.
    """

    def __init__(self, path: str, head: str = "", tail: str = ""):
        super().__init__(path, f"{head}[", _list_end(tail))
        self.count = 0

    def add(self, items: Iterable[Any], tail: str | None = None) -> None:
        """Append ``items``, and replace the JSON after the list by ``tail``.

        Raises:
            OSError: they could not be written; the file is as it was.
        """
        lines = [json.dumps(item) for item in items]
        text = "".join(f"{',' if self.count + number else ''}\n{line}" for number, line in enumerate(lines))
        self._count_before = self.count
        self.append(text, None if tail is None else _list_end(tail))
        self.count += len(lines)

    def undo(self) -> None:
        """Take back the last ``add``; it needs no room on the disk."""
        super().undo()
        self.count = self._count_before


def _list_end(tail: str) -> str:
    return f"\n]{tail}\n"
