"""``metrics.json`` and the numbers it is written from, restored as they were at a checkpoint."""

import json
import os

import torch
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage

WINDOW = 20  # steps that Detectron2's writers take the median of
_TIMES = ("time", "data_time", "rank_data_time", "eta_seconds")  # not restored: they are of one process


class MetricsWriter(EventWriter):
    """Append to ``metrics.json`` what Detectron2's ``JSONWriter`` does; a resumed run continues where it was saved.

    Args:
        path: the file.
    """

    def __init__(self, path: str):
        self._path = path
        self._file = open(path, "a")  # noqa: SIM115
        self._last = -1

    def write(self) -> None:
        """Write what is new since the last call, a line per step in order, and sync it to the disk."""
        lines: dict[int, dict] = {}
        for name, (value, step) in get_event_storage().latest_with_smoothing_hint(WINDOW).items():
            if step > self._last:
                lines.setdefault(step, {"iteration": step})[name] = value
        self._file.writelines(json.dumps(lines[step], sort_keys=True) + "\n" for step in sorted(lines))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._last = max([self._last, *lines])

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def state_dict(self) -> dict:
        """Return the file's length in bytes and the last step in it."""
        return {"bytes": os.path.getsize(self._path), "last": self._last}

    def load_state_dict(self, state: dict) -> None:
        """Cut off what was written since; a file that is shorter is another one, and is left as it is."""
        if state["bytes"] <= os.path.getsize(self._path):
            self._file.truncate(state["bytes"])
        self._last = state["last"]


def storage_state(storage: EventStorage) -> dict:
    """Return the last values of each series but times.

    Returns:
        {name: {"values": (n,) float64, "steps": (n,) int64, "smoothing": bool}}, n ≤ ``WINDOW``.
    """
    state = {}
    for name, history in storage.histories().items():
        if name not in _TIMES:
            values, steps = zip(*history.values()[-WINDOW:])
            state[name] = {
                "values": torch.tensor(values, dtype=torch.float64),
                "steps": torch.tensor([int(step) for step in steps]),
                "smoothing": storage.smoothing_hints()[name],
            }
    return state


def load_storage_state(storage: EventStorage, state: dict) -> None:
    """Put the values of ``storage_state`` into a new ``storage``."""
    for name, series in state.items():
        for value, step in zip(series["values"].tolist(), series["steps"].tolist()):
            storage.put_scalar(name, value, smoothing_hint=series["smoothing"], cur_iter=step)
