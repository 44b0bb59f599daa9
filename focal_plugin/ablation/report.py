"""The report of a table: Markdown, CSV, JSON, one HTML page and a picture."""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

from ..evaluation.numbers import METRICS
from ..evaluation.page import render
from .figures import detections, save_picture, themed_svgs
from .rows import Table
from .runs import STATUSES, Run
from .summary import summarize

_MOST_METRICS = len(METRICS) + 10  # in a table for people: with more classes than that, report.csv has their AP


def write_report(table: Table, runs: Sequence[Run], base: Path | None, opts: Sequence[str], output: Path) -> dict:
    """Write ``report.{json,csv,md,png,html}`` of a table from what is in the folders of ``runs``.

    Args:
        table: the rows.
        runs: all runs of the table, also those that were not run.
        base: the base config of the rows, if there is one.
        opts: the KEY VALUE pairs that changed all configs.
        output: the folder with the notes of the program. The report is written there; if there are several tables, to a
            folder of the table's name in it.

    Returns:
        The content of report.json: see ``summarize``.
    """
    summary = summarize(table, runs, base, opts, output)
    folder = output / table.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    (folder / "report.md").write_text(to_markdown(summary), encoding="utf-8")
    write_csv(folder / "report.csv", summary)
    save_picture(folder / "report.png", summary, runs)
    page = to_html(summary, themed_svgs(summary, runs), detections(runs))
    (folder / "report.html").write_text(page, encoding="utf-8")
    return summary


def columns(summary: dict) -> dict[str, list[str]]:
    """Return the table as texts by heading, without columns for which neither the paper nor the runs have numbers."""
    rows = summary["rows"]
    table = {"row": [f"{row['label']}{' (baseline)' * row['is_baseline']}" for row in rows]}
    if _has_paper(summary):
        table["paper AP"] = ["diverged" if row["paper_diverged"] else _number(row["paper"].get("AP")) for row in rows]
        table["paper Δ"] = [_signed(row["paper_difference"], row["is_baseline"]) for row in rows]
    known = _metrics(summary)
    for metric in known if len(known) <= _MOST_METRICS else METRICS:
        if metric == "AP" or any(metric in row["mean"] for row in rows):
            table[metric] = [_spread(row, metric) for row in rows]
        if metric == "AP":
            table["Δ"] = [_signed(row["difference"], row["is_baseline"], row["difference_interval"]) for row in rows]
    table["seeds"] = [f"{row['num_finished']} of {row['num_seeds']}" for row in rows]
    table["min a run"] = [_number(row["minutes"]) for row in rows]
    if any(row["remark"] for row in rows):
        table["remark"] = [row["remark"] for row in rows]
    return table


def to_markdown(summary: dict) -> str:
    """Return the whole report as a text."""
    rows, facts, commands = summary["rows"], summary["run"]["facts"], summary["run"]["commands"]
    codes = summary["code"].items()
    keys = [", ".join(f"`{key}` {value}" for key, value in row["keys"].items()) for row in rows]
    failures = [
        f"{row['row']} seed {run['seed']} {run['status']}: {_indented(run['reason'])}"
        for row in rows
        for run in row["runs"]
        if run["reason"]
    ]
    parts = [
        f"# {summary['title']}",
        _table(columns(summary)),
        summary["legend"],
        _list("Without effect:", summary["without_effect"]),
        "![AP of each row, and training losses](report.png)",
        _list("## What was run", [f"{name}: {text}" for name, text in facts.items()]),
        "\n".join(["```", *commands, "```"]) if commands else "",
        _table({"row": [row["row"] for row in rows], "its own keys": keys}),
        _list("## Code of the modules in MODEL.FOCAL.IMPORTS", [f"{name} {code['sha256']}" for name, code in codes]),
        *(f"{name}:\n\n{_fenced(code['text'])}" for name, code in codes),
        _list("## Runs without a result", failures),
        _list("## What was not run", summary["not_run"]),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def write_csv(path: Path, summary: dict) -> None:
    """Write a line for each row, with numbers in full precision, and empty where there is none."""
    numbers = [name for metric in _metrics(summary) for name in (metric, f"{metric}_std")]
    counts = {status: status.replace(" ", "_") for status in STATUSES}
    paper = ["paper_AP", "paper_difference"] if _has_paper(summary) else []
    bounds = ["difference_low", "difference_high"]
    header = ["row", "baseline", *paper, *numbers, "difference", *bounds, "seeds", *counts.values()]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*header, "minutes"], extrasaction="ignore")
        writer.writeheader()
        for row in summary["rows"]:
            statuses = [run["status"] for run in row["runs"]]
            writer.writerow(
                {key: row[key] for key in ("row", "paper_difference", "difference", "minutes")}
                | dict(zip(bounds, row["difference_interval"] or ()))
                | {"baseline": "x" if row["is_baseline"] else "", "seeds": row["num_seeds"]}
                | {"paper_AP": "diverged" if row["paper_diverged"] else row["paper"].get("AP")}
                | row["mean"]
                | {f"{metric}_std": value for metric, value in row["std"].items()}
                | {name: statuses.count(status) for status, name in counts.items()}
            )


def to_html(summary: dict, figures: Sequence[dict], pictures: Sequence[dict]) -> str:
    """Return a page that needs no other file."""
    table = columns(summary)
    cells = list(zip(*table.values()))
    values = {"headings": list(table), "cells": cells, "figures": figures, "pictures": pictures}
    return render(__package__, "template.html", summary=summary, **values)


def _has_paper(summary: dict) -> bool:
    """Whether the paper has a result for any row."""
    return any(row["paper"] or row["paper_diverged"] for row in summary["rows"])


def _metrics(summary: dict) -> list[str]:
    """COCO's metrics, and the AP of each class where the rows have it."""
    return list(dict.fromkeys([*METRICS, *(metric for row in summary["rows"] for metric in row["mean"])]))


def _table(table: Mapping[str, Sequence[str]]) -> str:
    cells = {heading: [cell.replace("|", "/") for cell in column] for heading, column in table.items()}
    return tabulate(cells, headers="keys", tablefmt="pipe", disable_numparse=True)


def _list(heading: str, lines: Sequence[str]) -> str:
    return "\n".join([heading, "", *(f"- {line}" for line in lines)]) if lines else ""


def _indented(text: str) -> str:
    """Return a text of several lines for a list: the first line as it is, and the others as code."""
    first, *rest = text.splitlines()
    return "\n".join([first, "", "  ```", *(f"  {line}" for line in rest), "  ```"]) if rest else first


def _fenced(code: str) -> str:
    """Return a module for Markdown, in a fence that is longer than any in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}python\n{code.rstrip()}\n{fence}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _signed(value: float | None, is_baseline: bool, interval: Sequence[float] | None = None) -> str:
    between = f" ({interval[0]:+.1f} to {interval[1]:+.1f})" if interval else ""
    return "" if value is None or is_baseline else f"{value:+.1f}{between}".replace("-", "−")


def _spread(row: dict, metric: str) -> str:
    if metric == "AP" and not row["mean"] and "diverged" in row["remark"]:
        return "diverged"
    std = f" ± {row['std'][metric]:.1f}" if metric in row["std"] else ""
    return _number(row["mean"].get(metric)) + std
