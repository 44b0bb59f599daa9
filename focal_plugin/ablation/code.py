"""The source of a user's modules: recorded with each run, so that one table has results of one code."""

import ast
import contextlib
import hashlib
import importlib.util
import json
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..files.write import replace_file
from .job import read_json
from .runs import Run, difference, refuse_others

CODE = "code-ablation.json"  # in the folder of a run: {module: its source}
_RECORDED_BY_VERSION = ("focal_plugin", "detectron2")
_INSTALLED = {Path(path).resolve() for path in sysconfig.get_paths().values()}


def read_code(modules: Sequence[str]) -> dict[str, str]:
    """Return the source of modules and of those that they import from beside them, by name.

    Args:
        modules: names of modules that are imported already, as of ``MODEL.FOCAL.IMPORTS``.
    """
    found: dict[str, str] = {}
    for name in modules:
        path = getattr(sys.modules[name], "__file__", None)
        if path and name.partition(".")[0] not in _RECORDED_BY_VERSION:
            path = Path(path).resolve()
            folder = path.parents[name.count(".") + (path.name == "__init__.py")]
            _add(found, name, folder)
    return dict(sorted(found.items()))


def _add(found: dict[str, str], name: str, folder: Path) -> None:
    """Add the source of the module ``name``, of which ``folder`` is in ``sys.path``, and of those that it imports."""
    stem = folder.joinpath(*name.split("."))
    path = next((path for path in (stem / "__init__.py", stem.with_name(f"{stem.name}.py")) if path.is_file()), None)
    if name in found or path is None:
        return
    found[name] = text = path.read_text(encoding="utf-8", errors="replace")
    for other in _imports(text, name if path.name == "__init__.py" else name.rpartition(".")[0]):
        top = other.partition(".")[0]
        beside = folder not in _INSTALLED and top not in _RECORDED_BY_VERSION
        if beside or top == name.partition(".")[0]:
            parts = other.split(".")
            for end in range(1, len(parts) + 1):  # a.b runs a, too
                _add(found, ".".join(parts[:end]), folder)


def _imports(text: str, package: str) -> Iterator[str]:
    """Yield the names that a module of ``package`` imports, some of which may be functions or classes."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError):  # it is being edited
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            with contextlib.suppress(ImportError):  # more dots than packages
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                yield from (f"{base}.{alias.name}" for alias in node.names)


def short_hash(text: str) -> str:
    """Return the first twelve digits of the SHA-256 of a source."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def check_code(runs: Sequence[Run], to_run: bool) -> None:
    """Check that the runs so far are all of one code and, if more is ``to_run``, that this is the code of now.

    Raises:
        ConfigError: they are not.
    """
    first: dict[str, str] = {}
    changes = {}
    for run in runs:
        before = recorded_code(run)
        first = before | first
        now = read_code(run.cfg.MODEL.FOCAL.IMPORTS) if to_run else {name: first[name] for name in before}
        changes[run] = code_difference(before, now) if before else ""
    refuse_others(changes, "other code")


def code_difference(before: dict[str, str], now: dict[str, str]) -> str:
    """Return how two sources differ, as in "my_losses was 0123456789ab and is now ba9876543210"; "" if they do not."""
    hashes = ({name: short_hash(text) for name, text in code.items()} for code in (before, now))
    return difference(*hashes, missing="not imported")


def recorded_code(run: Run) -> dict[str, str]:
    """Return the source that a run was started with; {} if nothing was run, or by a version that did not record it."""
    return read_json(run.folder / CODE, {}) if run.has_begun() else {}


def record_code(run: Run) -> None:
    """Write the source that a run is going to use, unless it has begun."""
    if not run.has_begun() and (code := read_code(run.cfg.MODEL.FOCAL.IMPORTS)):
        replace_file(str(run.folder / CODE), lambda file: file.write(json.dumps(code, indent=2).encode()))
