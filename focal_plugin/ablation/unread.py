"""What rows say that no code reads, and rows that are therefore one and the same run."""

from collections.abc import Iterable, Sequence

from ..config.explain import flatten
from ..engine.advice import unread_keys
from .rows import difference
from .runs import Run


def without_effect(runs: Sequence[Run]) -> list[str]:
    """A line for each key that rows set without effect, and for rows that differ in nothing that is read.

    Args:
        runs: of a table; those of the first seed are looked at.
    """
    runs = [run for run in runs if run.seed == runs[0].seed]
    unread = {run: dict(unread_keys(run.cfg)) for run in runs}
    rows: dict[str, list[str]] = {}
    for run, messages in unread.items():
        for message in messages.values():
            rows.setdefault(message, []).append(run.row.name)
    lines = [f"{', '.join(names)}: {message}" for message, names in rows.items()]

    same: dict[Run, dict[Run, set[str]]] = {}  # the first of its kind: the others, and in what they differ
    for run in runs:
        for first, others in same.items():
            pair = difference(run.cfg, first.cfg), difference(first.cfg, run.cfg)
            keys = {key for config in pair for key in flatten(config)} - {"OUTPUT_DIR"}
            if all(_is_in(key, unread[run] | unread[first]) for key in keys):
                others[run] = keys
                break
        else:
            same[run] = {}
    for first, others in same.items():
        if others:
            keys = ", ".join(sorted(set().union(*others.values())))
            names = ", ".join(run.row.name for run in (first, *others))
            lines.append(f"{names}: the same run, as they differ in {f'{keys} alone, not read' if keys else 'no key'}.")
    return lines


def _is_in(key: str, nodes: Iterable[str]) -> bool:
    return any(f"{key}.".startswith(f"{node}.") for node in nodes)
