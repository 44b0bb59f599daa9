"""The rows of a table: small YAML files, the paper's results for them, and their configs on a data set."""

import contextlib
import csv
import glob
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path

from detectron2.config import CfgNode, get_cfg

from ..config import ConfigError, add_focal_config
from ..config.explain import explained_keys, merge_from_list
from ..config.load import find_config
from ..evaluation.numbers import METRICS
from ..files.safe_yaml import merge_from_file, parse_yaml
from ..files.shipped import CONFIGS, shipped

# The base configs that --data knows by name.
DATA = {
    "quickstart": CONFIGS / "quickstart/trees.yaml",
    "bccd": CONFIGS / "bccd/focal_retinanet_R_18_FPN_scratch.yaml",
    "deeppcb": CONFIGS / "deeppcb/focal_retinanet_R_18_FPN_scratch.yaml",
}

_BASE = re.compile("Base([-_].*)?")  # the names of files that are not rows


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        file: its YAML file.
        own_keys: the keys in the file itself, without its ``_BASE_``.
        paper: the paper's results, {metric: percent}; empty if it has none.
        diverged: whether the row diverged in the paper.
    """

    file: Path
    own_keys: dict
    paper: dict[str, float] = field(default_factory=dict)
    diverged: bool = False

    @property
    def name(self) -> str:
        """The name of the file without its suffix."""
        return self.file.stem


@dataclass(frozen=True)
class Table:
    """Rows to compare.

    Attributes:
        name: the name of the table among several; "" if it is the only one.
        rows: the rows, in the order of the report.
        baseline: the name of the row that the others are compared with.
        missing: the names of rows of the paper's table that are not among ``rows``.
    """

    name: str
    rows: list[Row]
    baseline: str
    missing: list[str]


def find_tables(words: Sequence[str]) -> list[Table]:
    """Return the tables of the rows that ``words`` name: folders, YAML files, or beginnings of file names
    (``paper/table1b`` is ``paper/table1b_*.yaml``), in the current folder or else among the shipped configs.

    ``Base.yaml``, ``Base-*`` and ``Base_*`` in a folder are not rows. A ``results.csv`` beside the files has the
    paper's results, order and baseline; without one, the rows are in the order of their names and the first is the
    baseline.

    All rows form one table, unless their baselines belong to several of the paper's tables, whose rows begin with the
    same word (``table1b_``): then each of these is a table.

    Raises:
        FileNotFoundError: there is no such row.
        ValueError: two rows have the same name; a row's file or a ``results.csv`` is wrong.
    """
    files = [file for word in words for file in _find_files(word)]
    names = [file.stem for file in files]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        found = ", ".join(str(file) for file in files if file.stem in twice)
        raise ConfigError(f"{found}: rows have the names of their files, and no two rows may have the same.")
    paper: dict[Path, dict] = {}  # by the row's file, without its suffix
    for folder in dict.fromkeys(file.parent for file in files):
        paper |= {folder / name: record for name, record in read_results(folder / "results.csv").items()}
    order = {path: i for i, path in enumerate(paper)}
    files.sort(key=lambda file: order.get(file.with_suffix(""), len(order)))
    rows = [_read_row(file, paper.get(file.with_suffix(""), {})) for file in files]
    marked = [file.stem for file in files if paper.get(file.with_suffix(""), {}).get("baseline")]
    groups: dict[str, list[Row]] = {}
    several = len({_table_of(name) for name in marked}) > 1
    for row in rows:
        groups.setdefault(_table_of(row.name) if several else "", []).append(row)
    tables = []
    for name, group in groups.items():
        baseline = next((row.name for row in group if row.name in marked), group[0].name)
        begin = {_table_of(row.name) for row in group}
        missing = [path.name for path in paper if _table_of(path.name) in begin and path.name not in names]
        tables.append(Table(name, group, baseline, missing))
    return tables


def compared_with(tables: Sequence[Table], baseline: str) -> list[Table]:
    """Return the tables, of which that with the row ``baseline`` (a name, with or without .yaml) is compared with it.

    Raises:
        ConfigError: no table has such a row.
    """
    names = [row.name for table in tables for row in table.rows]
    name = Path(baseline).name.removesuffix(".yaml")
    if name not in names:
        known = get_close_matches(name, names) or names
        raise ConfigError(f"--baseline {baseline}: expected the name of a row, such as {', '.join(known)}.")
    return [replace(table, baseline=name) if name in [row.name for row in table.rows] else table for table in tables]


def _read_row(file: Path, record: dict) -> Row:
    keys = {key: value for key, value in parse_yaml(file.read_bytes(), str(file)).items() if key != "_BASE_"}
    results = {metric: float(record[metric]) for metric in METRICS if record.get(metric)}
    return Row(file, keys, results, record.get("note") == "diverged")


def read_results(path: Path) -> dict[str, dict]:
    """Return the lines of a ``results.csv`` by their column ``row``; {} if there is no such file.

    Raises:
        ValueError: the file is not UTF-8, has no column ``row``, or has an entry that should be a number and is not.
    """
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin it with a byte order mark
        reader = csv.DictReader(file)
        try:
            lines, headings = list(reader), reader.fieldnames or []
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: {error}; save it as UTF-8.") from error
    if "row" not in headings:
        raise ConfigError(f"{path}: expected a column 'row' of file names; found the columns {', '.join(headings)}.")
    for line in lines:
        for metric in METRICS:
            if line.get(metric) and not _is_number(line[metric]):
                raise ConfigError(f"{path}: {metric} of {line['row']} is {line[metric]}; expected a number or nothing.")
    return {line["row"]: line for line in lines if line["row"]}


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return math.isfinite(float(text))
    return False


def _table_of(name: str) -> str:
    return name.partition("_")[0]


def _find_files(word: str) -> list[Path]:
    for path in (Path(word), shipped(word)):
        if path.is_file():
            return [path]
        ending = "/*.yaml" if path.is_dir() else "_*.yaml"
        found = [Path(file) for file in sorted(glob.glob(glob.escape(str(path)) + ending))]
        if files := [file for file in found if not _BASE.fullmatch(file.stem)]:
            return files
        if path.is_dir():
            raise FileNotFoundError(f"{path}: no row in this folder (expected {ending[1:]}, not Base.yaml, Base-*).")
    raise FileNotFoundError(
        f"{word}: not a folder, a file, or the beginning of names of rows ({word}_*.yaml), in {os.getcwd()} or in "
        f"{CONFIGS}."
    )


def find_base(data: str) -> Path:
    """Return the base config that ``--data`` names: one of ``DATA``, or what ``find_config`` finds.

    Raises:
        FileNotFoundError: it is none of them.
    """
    try:
        return Path(find_config(str(DATA.get(data, data))))
    except FileNotFoundError:
        known = ", ".join(DATA)
        raise FileNotFoundError(f"--data {data}: expected {known}, or the path or name of a base config.") from None


def compose(row: Row, base: Path | None, opts: Sequence[str]) -> CfgNode:
    """Return the config of a row: its own keys on ``base``, or the row with its ``_BASE_``; then ``opts`` on that.

    Args:
        row: the row.
        base: a config file, or None.
        opts: KEY VALUE pairs.

    Raises:
        ConfigError: a key is unknown, or a value has another type; the message names the file or the command line.
    """
    cfg = get_cfg()
    add_focal_config(cfg)
    with explained_keys(cfg, f"{row.file}{f' on {base}' if base else ''}"):
        merge_from_file(cfg, str(base or row.file))
        if base:
            cfg.merge_from_other_cfg(CfgNode(row.own_keys))
    merge_from_list(cfg, opts)
    return cfg


def as_yaml(cfg: CfgNode) -> str:
    """Return the YAML of the values of a config that are not the defaults: reading it gives the same config."""
    defaults = get_cfg()
    add_focal_config(defaults)
    return CfgNode({"VERSION": cfg.VERSION, **_difference(cfg, defaults)}).dump()


def _difference(cfg: CfgNode, other: CfgNode) -> dict:
    """Return the values of ``cfg`` that differ from those of ``other``, as nested dicts."""
    found = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            if inside := _difference(value, other.get(key, CfgNode())):
                found[key] = inside
        elif key not in other or value != other[key]:
            found[key] = value
    return found
