"""What a table came to: every row's results over its seeds, beside the paper's, and exactly what was run."""

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..config.explain import flatten
from ..files.shipped import CONFIGS
from .job import read_json
from .rows import METRICS, Table
from .runs import Outcome, Run
from .unread import without_effect


def summarize(table: Table, runs: Sequence[Run], base: Path | None, opts: Sequence[str], output: Path) -> dict:
    """Everything the report says, as numbers, texts, lists and dicts that go into a JSON file.

    The standard deviation is that of a sample (n − 1), and None for one seed. Runs without a result are in no mean.
    """
    outcomes = {run: run.outcome() for run in runs}
    rows = [_row(table, [run for run in runs if run.row.name == row.name], outcomes) for row in table.rows]
    baseline = next(row for row in rows if row["row"] == table.baseline)
    for row in rows:
        row["difference"] = _minus(row["mean"].get("AP"), baseline["mean"].get("AP"))
        row["paper_difference"] = _minus(row["paper"].get("AP"), baseline["paper"].get("AP"))
    return {
        "title": ": ".join(filter(None, [output.resolve().name, table.name])),
        "baseline": table.baseline,
        "rows": rows,
        "without_effect": without_effect(runs),
        "run": _what_was_run(table, runs, base, opts, output),
        "not_run": _what_was_not_run(table, runs, outcomes, base),
    }


def _row(table: Table, runs: Sequence[Run], outcomes: Mapping[Run, Outcome]) -> dict:
    row = runs[0].row
    finished = [outcomes[run] for run in runs if outcomes[run].status == "finished"]
    values = {metric: [outcome.results.get(metric, math.nan) for outcome in finished] for metric in METRICS}
    known = {metric: numbers for metric, numbers in values.items() if numbers and all(map(math.isfinite, numbers))}
    seconds = [outcome.seconds for outcome in finished if outcome.seconds is not None]
    return {
        "row": row.name,
        "label": _label(row.name, table),
        "is_baseline": row.name == table.baseline,
        "keys": {key: str(value) for key, value in flatten(row.own_keys).items()},
        "paper": row.paper,
        "paper_diverged": row.diverged,
        "mean": {metric: statistics.fmean(numbers) for metric, numbers in known.items()},
        "std": {metric: statistics.stdev(numbers) for metric, numbers in known.items() if len(numbers) > 1},
        "minutes": statistics.fmean(seconds) / 60 if seconds else None,
        "num_finished": len(finished),
        "num_seeds": len(runs),
        "remark": _remark([outcomes[run] for run in runs]),
        "runs": [
            {
                "seed": run.seed,
                "folder": str(run.folder),
                "status": outcomes[run].status,
                "step": outcomes[run].step,
                "results": {name: _finite(value) for name, value in outcomes[run].results.items()},
                "seconds": outcomes[run].seconds,
                "reason": outcomes[run].reason,
            }
            for run in runs
        ],
    }


def _remark(outcomes: Sequence[Outcome]) -> str:
    """Of the runs without a result, such as "diverged at step 3, 5; 1 failed"."""
    diverged = [str(outcome.step) for outcome in outcomes if outcome.status == "diverged"]
    parts = [f"{len(diverged)} of {len(outcomes)} diverged at step {', '.join(diverged)}"] if diverged else []
    if len(diverged) == len(outcomes):
        parts = [f"diverged at step {', '.join(diverged)}"]
    for status in ("no AP", "failed", "unfinished", "not started"):
        if count := sum(outcome.status == status for outcome in outcomes):
            parts.append(f"{count} {status}" if len(outcomes) > 1 else status)
    return "; ".join(parts)


def _label(name: str, table: Table) -> str:
    """A short name: ``table1b_gamma_2`` is ``gamma_2`` where all rows are of table 1b."""
    first, _, rest = name.partition("_")
    alike = all(row.name.startswith(f"{first}_") for row in table.rows)
    return rest if alike and rest and first.startswith("table") else name


def _what_was_run(table: Table, runs: Sequence[Run], base: Path | None, opts: Sequence[str], output: Path) -> dict:
    cfg = next(run.cfg for run in runs if run.row.name == table.baseline)
    notes = read_json(output / "ablation.json", {})
    images = notes.get("images", {})
    attempts = [attempt for run in runs for attempt in run.attempts()]
    named = lambda names: ", ".join(f"{name} ({images.get(name, '?')} images)" for name in names)  # noqa: E731
    solver = cfg.SOLVER
    has_steps = "MultiStep" in solver.LR_SCHEDULER_NAME and solver.STEPS
    steps = f", at steps {', '.join(map(str, solver.STEPS))}" if has_steps else ""
    num_images = sum(images.get(name, 0) for name in cfg.DATASETS.TRAIN)
    epochs = f" ({solver.MAX_ITER * solver.IMS_PER_BATCH / num_images:.3g} epochs)" if num_images else ""
    threads = {attempt.get("env", {}).get("OMP_NUM_THREADS") for attempt in attempts} - {None}
    facts = {
        "Training set": named(cfg.DATASETS.TRAIN),
        "Test set": named(cfg.DATASETS.TEST),
        "Config": f"each row's own keys on {_place(base)}" if base else "each row with its _BASE_",
        "Changes": " ".join(opts),
        "Schedule": f"{solver.MAX_ITER} steps of {solver.IMS_PER_BATCH} images{epochs}, SOLVER.BASE_LR "
        f"{solver.BASE_LR:g}, {solver.LR_SCHEDULER_NAME}{steps} (of the baseline; for other rows, see their keys)",
        "Seeds": ", ".join(str(seed) for seed in dict.fromkeys(run.seed for run in runs)),
        "Versions": "; ".join(_each(attempts, lambda a: ", ".join(f"{k} {v}" for k, v in a["versions"].items()))),
        "Processor": "; ".join(_each(attempts, lambda a: f"{a['processor']}, {a['cores']} cores")),
        "GPU": "; ".join(_each(attempts, lambda a: ", ".join(a["gpus"]) or "none")),
        "Threads of a run": ", ".join(sorted(threads)),
    }
    commands = list(dict.fromkeys(start["command"] for start in notes.get("starts", [])))
    return {"facts": {name: text for name, text in facts.items() if text}, "commands": commands}


def _place(config: Path) -> str:
    """Return where a config is: a shipped one under ``configs/``, another one relative to the current folder."""
    if config.is_relative_to(CONFIGS):
        return f"configs/{config.relative_to(CONFIGS)}"
    return os.path.relpath(config)


def _each(attempts: Sequence[dict], describe) -> list[str]:
    """What ``describe`` says of the attempts, each text once."""
    return list(dict.fromkeys(describe(attempt) for attempt in attempts))


def _what_was_not_run(
    table: Table, runs: Sequence[Run], outcomes: Mapping[Run, Outcome], base: Path | None
) -> list[str]:
    lines = [f"{run.name}: {outcomes[run].status}" for run in runs if not outcomes[run].over]
    if table.missing:
        lines.append(f"Rows of the paper's table: {', '.join(table.missing)}")
    if base and any(row.paper for row in table.rows):
        lines.append(
            "The paper's data set and schedule: compare the order and the differences of rows, not their values"
        )
    return lines


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
