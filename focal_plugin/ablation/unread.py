"""Keys that rows set without effect, and rows that are the same run because of it."""

from collections.abc import Sequence

from ..config.explain import flatten
from ..engine.advice import unread_keys
from .runs import Run


def without_effect(runs: Sequence[Run]) -> list[str]:
    """Return a line for each key that rows set without effect, and for rows that differ in such keys only.

    Args:
        runs: the runs of a table, of which those of the first seed are compared.
    """
    runs = [run for run in runs if run.seed == runs[0].seed]
    unread = {run: dict(unread_keys(run.cfg)) for run in runs}
    rows: dict[str, list[str]] = {}  # by what is wrong with them
    for run in runs:
        for message in unread[run].values():
            rows.setdefault(message, []).append(run.row.name)
    lines = [f"{', '.join(names)}: {message}" for message, names in rows.items()]

    configs = {run: flatten(run.cfg) for run in runs}
    same: dict[Run, dict[Run, set[str]]] = {}  # the first of several equal runs: the others, and the differing keys
    for run in runs:
        for first, others in same.items():
            ours, theirs = configs[run], configs[first]
            keys = {key for key in ours.keys() | theirs if ours.get(key) != theirs.get(key)} - {"OUTPUT_DIR"}
            nodes = tuple(f"{node}." for node in unread[run] | unread[first])
            if all(f"{key}.".startswith(nodes) for key in keys):
                others[run] = keys
                break
        else:
            same[run] = {}
    for first, others in same.items():
        if others:
            keys = ", ".join(sorted(set().union(*others.values())))
            names = ", ".join(run.row.name for run in (first, *others))
            lines.append(
                f"{names}: the same run, as {f'only {keys} differ and are not read' if keys else 'no key differs'}."
            )
    return lines
