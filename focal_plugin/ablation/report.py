"""The report of a table: Markdown, CSV, JSON, one HTML page and a picture."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import jinja2

from .figures import detections, save_picture, themed_svgs
from .rows import METRICS, Table
from .runs import Run
from .summary import summarize

_TEMPLATES = Path(__file__).parent


def write_report(table: Table, runs: Sequence[Run], base: Path | None, opts: Sequence[str], output: Path) -> dict:
    """Write ``report.{json,csv,md,png,html}`` of a table from what is in the folders of ``runs``.

    Args:
        table: the rows.
        runs: all of the table, whether they have been run or not.
        base: what the rows' own keys went onto, if anything.
        opts: the KEY VALUE pairs that changed all configs.
        output: where the notes of the runner are. The report goes there; that of one of several tables into a folder
            there of the table's name.

    Returns:
        What report.json has: see ``summarize``.
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
    """The table as texts by their headings; what the paper and the runs have no number for is left out.

    A ± is the standard deviation over the seeds.
    """
    rows = summary["rows"]
    table = {"row": [f"{row['label']}{' (baseline)' * row['is_baseline']}" for row in rows]}
    if any(row["paper"] or row["paper_diverged"] for row in rows):
        table["paper AP"] = ["diverged" if row["paper_diverged"] else _number(row["paper"].get("AP")) for row in rows]
        table["paper Δ"] = [_signed(row["paper_difference"], row["is_baseline"]) for row in rows]
    for metric in METRICS:
        if metric == "AP" or any(metric in row["mean"] for row in rows):
            table[metric] = [_spread(row["mean"].get(metric), row["std"].get(metric)) for row in rows]
        if metric == "AP":
            diverged = ["diverged" if not row["mean"] and "diverged" in row["remark"] else "" for row in rows]
            table["AP"] = [cell or instead for cell, instead in zip(table["AP"], diverged)]
            table["Δ"] = [_signed(row["difference"], row["is_baseline"]) for row in rows]
    table["seeds"] = [f"{row['num_finished']} of {row['num_seeds']}" for row in rows]
    table["min a run"] = [_number(row["minutes"]) for row in rows]
    if any(row["remark"] for row in rows):
        table["remark"] = [row["remark"] for row in rows]
    return table


def to_markdown(summary: dict) -> str:
    """The whole report as a text."""
    table = columns(summary)
    lines = [f"# {summary['title']}", "", _markdown_row(table), _markdown_row(["---"] * len(table))]
    lines += [_markdown_row(cells) for cells in zip(*table.values())]
    lines += ["", f"AP in percent, mean ± standard deviation over seeds; Δ: to {summary['baseline']}.", ""]
    if summary["without_effect"]:
        lines += ["Without effect:", "", *(f"- {line}" for line in summary["without_effect"]), ""]
    lines += ["![AP of each row, and training losses](report.png)", "", "## What was run", ""]
    lines += [f"- {name}: {text}" for name, text in summary["run"]["facts"].items()]
    commands = summary["run"]["commands"]
    lines += ["", *(["```", *commands, "```", ""] if commands else [])]
    lines += [_markdown_row(["row", "its own keys"]), _markdown_row(["---"] * 2)]
    for row in summary["rows"]:
        lines.append(_markdown_row([row["row"], ", ".join(f"`{key}` {value}" for key, value in row["keys"].items())]))
    failures = [(row["row"], run) for row in summary["rows"] for run in row["runs"] if run["reason"]]
    if failures:
        lines += ["", "## Runs without a result", ""]
        lines += [f"- {name} seed {run['seed']} {run['status']}: {_indented(run['reason'])}" for name, run in failures]
    if summary["not_run"]:
        lines += ["", "## What was not run", "", *(f"- {line}" for line in summary["not_run"])]
    return "\n".join(lines) + "\n"


def write_csv(path: Path, summary: dict) -> None:
    """A line a row, numbers in full precision, empty where there is none."""
    numbers = [name for metric in METRICS for name in (metric, f"{metric}_std")]
    counts = ("finished", "diverged", "no AP", "failed", "unfinished", "not started")
    header = ["row", "baseline", "paper_AP", "paper_difference", *numbers, "difference", "seeds", *counts, "minutes"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [name.replace(" ", "_") for name in header])
        writer.writeheader()
        for row in summary["rows"]:
            line = {
                "row": row["row"],
                "baseline": "x" if row["is_baseline"] else "",
                "paper_AP": "diverged" if row["paper_diverged"] else row["paper"].get("AP"),
                "paper_difference": row["paper_difference"],
                **row["mean"],
                **{f"{metric}_std": value for metric, value in row["std"].items()},
                "difference": row["difference"],
                "seeds": row["num_seeds"],
                "minutes": row["minutes"],
            }
            for status in counts:
                line[status.replace(" ", "_")] = sum(run["status"] == status for run in row["runs"])
            writer.writerow(line)


def to_html(summary: dict, figures: Sequence[dict], pictures: Sequence[dict]) -> str:
    """One page that needs nothing else."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    table = columns(summary)
    return environment.get_template("template.html").render(
        summary=summary, headings=list(table), cells=list(zip(*table.values())), figures=figures, pictures=pictures
    )


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _indented(text: str) -> str:
    """A text of several lines as part of a list: the first line, and the rest as code."""
    first, *rest = text.splitlines()
    return "\n".join([first, "", "  ```", *(f"  {line}" for line in rest), "  ```"]) if rest else first


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _signed(value: float | None, is_baseline: bool) -> str:
    return "" if value is None or is_baseline else f"{value:+.1f}".replace("-", "−")


def _spread(mean: float | None, std: float | None) -> str:
    return _number(mean) if std is None else f"{mean:.1f} ± {std:.1f}"
