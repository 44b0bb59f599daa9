"""The results of a table: of every row over its seeds, beside the paper's, with exactly what was run."""

import math
import os
import statistics
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from scipy.stats import ttest_ind

from ..config.explain import flatten
from ..files.shipped import CONFIGS
from .code import recorded_code, short_hash
from .job import read_json
from .rows import Table
from .runs import STATUSES, Outcome, Run
from .unread import without_effect

CONFIDENCE = 0.95  # of intervals of differences


def summarize(table: Table, runs: Sequence[Run], base: Path | None, opts: Sequence[str], output: Path) -> dict:
    """Return the content of the report as numbers, texts, lists and dicts, which JSON can hold.

    The standard deviation is that of a sample (n − 1); one seed has none. Runs without a result are in no mean.
    """
    outcomes = {run: run.outcome() for run in runs}
    texts = {name: text for run in runs for name, text in recorded_code(run).items()}
    code = {name: {"sha256": short_hash(text), "text": text} for name, text in sorted(texts.items())}
    rows = [_row(table, {run: out for run, out in outcomes.items() if run.row.name == row.name}) for row in table.rows]
    baseline = next(row for row in rows if row["row"] == table.baseline)
    for row in rows:
        row["difference"] = _minus(row["mean"].get("AP"), baseline["mean"].get("AP"))
        row["difference_interval"] = None if row is baseline else interval(_values(row), _values(baseline))
        row["paper_difference"] = _minus(row["paper"].get("AP"), baseline["paper"].get("AP"))
    return {
        "title": ": ".join(filter(None, [output.resolve().name, table.name])),
        "legend": f"AP in percent, mean ± standard deviation over the seeds. Δ: difference from {table.baseline}, and "
        f"between which values it is with {CONFIDENCE:.0%} confidence, as far as the seeds can tell (Welch's t-test).",
        "baseline": table.baseline,
        "rows": rows,
        "without_effect": without_effect(runs),
        "run": _what_was_run(table, runs, base, opts, output),
        "code": code,
        "not_run": _what_was_not_run(table, outcomes, base),
    }


def interval(values: Sequence[float], others: Sequence[float]) -> list[float] | None:
    """Return the confidence interval [low, high] of the difference of two means, by Welch's t-test.

    None if there are less than two values on a side, or all are equal there.
    """
    if min(len(values), len(others)) < 2 or len(set(values)) == len(set(others)) == 1:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that one side does not vary
        found = ttest_ind(values, others, equal_var=False).confidence_interval(CONFIDENCE)
    return [float(found.low), float(found.high)]


def _values(row: dict) -> list[float]:
    """The AP of a row's finished runs, if each has one."""
    found = [run["results"].get("AP") for run in row["runs"] if run["status"] == "finished"]
    return [] if None in found else found


def _row(table: Table, outcomes: Mapping[Run, Outcome]) -> dict:
    row = next(iter(outcomes)).row
    finished = [outcome for outcome in outcomes.values() if outcome.status == "finished"]
    metrics = dict.fromkeys(metric for outcome in finished for metric in outcome.results)
    values = {metric: [outcome.results.get(metric, math.nan) for outcome in finished] for metric in metrics}
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
        "num_seeds": len(outcomes),
        "remark": _remark(list(outcomes.values())),
        "runs": [
            {
                "seed": run.seed,
                "folder": str(run.folder),
                "status": outcome.status,
                "step": outcome.step,
                "results": {name: value if math.isfinite(value) else None for name, value in outcome.results.items()},
                "seconds": outcome.seconds,
                "reason": outcome.reason,
            }
            for run, outcome in outcomes.items()
        ],
    }


def _remark(outcomes: Sequence[Outcome]) -> str:
    """Return a remark on the runs without a result, such as "1 of 3 diverged at step 5; 1 failed"."""
    counts = Counter(outcome.status for outcome in outcomes)
    parts = []
    if steps := ", ".join(str(outcome.step) for outcome in outcomes if outcome.status == "diverged"):
        share = "" if counts["diverged"] == len(outcomes) else f"{counts['diverged']} of {len(outcomes)} "
        parts.append(f"{share}diverged at step {steps}")
    for status in STATUSES[2:]:
        if counts[status]:
            parts.append(f"{counts[status]} {status}" if len(outcomes) > 1 else status)
    return "; ".join(parts)


def _label(name: str, table: Table) -> str:
    """Return a short name: ``gamma_2`` for ``table1b_gamma_2`` if all rows are of table 1b."""
    first, _, rest = name.partition("_")
    alike = all(row.name.startswith(f"{first}_") for row in table.rows)
    return rest if alike and rest and first.startswith("table") else name


def _what_was_run(table: Table, runs: Sequence[Run], base: Path | None, opts: Sequence[str], output: Path) -> dict:
    cfg = next(run.cfg for run in runs if run.row.name == table.baseline)
    notes = read_json(output / "ablation.json", {})
    images = notes.get("images", {})
    attempts = [attempt for run in runs for attempt in run.attempts()]
    data = {name: f"{number} images" for name, number in images.items()}
    data |= {name: text for attempt in attempts for name, text in attempt.get("data", {}).items()}
    named = lambda names: ", ".join(f"{name} ({data.get(name, '? images')})" for name in names)  # noqa: E731
    threads = {attempt.get("env", {}).get("OMP_NUM_THREADS") for attempt in attempts} - {None}
    facts = {
        "Training set": named(cfg.DATASETS.TRAIN),
        "Test set": named(cfg.DATASETS.TEST),
        "Config": f"each row's own keys on {_place(base)}" if base else "each row with its _BASE_",
        "Changes": " ".join(opts),
        "Schedule": _schedule(cfg.SOLVER, sum(images.get(name, 0) for name in cfg.DATASETS.TRAIN)),
        "Seeds": ", ".join(_unique(str(run.seed) for run in runs)),
        "Versions": "; ".join(_unique(", ".join(f"{k} {v}" for k, v in a["versions"].items()) for a in attempts)),
        "Processor": "; ".join(_unique(f"{a['processor']}, {a['cores']} cores" for a in attempts)),
        "GPU": "; ".join(_unique(", ".join(a["gpus"]) or "none" for a in attempts)),
        "Threads of a run": ", ".join(sorted(threads)),
    }
    commands = _unique(start["command"] for start in notes.get("starts", []))
    return {"facts": {name: text for name, text in facts.items() if text}, "commands": commands}


def _place(config: Path) -> str:
    """Return where a config is: a shipped one under ``configs/``, another one relative to the current folder."""
    if config.is_relative_to(CONFIGS):
        return f"configs/{config.relative_to(CONFIGS)}"
    return os.path.relpath(config)


def _schedule(solver, num_images: int) -> str:
    """Return the schedule of the baseline in words; ``num_images`` is 0 if the size of the training set is unknown."""
    epochs = f" ({solver.MAX_ITER * solver.IMS_PER_BATCH / num_images:.3g} epochs)" if num_images else ""
    has_steps = "MultiStep" in solver.LR_SCHEDULER_NAME and solver.STEPS
    steps = f", at steps {', '.join(map(str, solver.STEPS))}" if has_steps else ""
    return (
        f"{solver.MAX_ITER} steps of {solver.IMS_PER_BATCH} images{epochs}, SOLVER.BASE_LR {solver.BASE_LR:g}, "
        f"{solver.LR_SCHEDULER_NAME}{steps} (of the baseline; for other rows, see their keys)"
    )


def _unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _what_was_not_run(table: Table, outcomes: Mapping[Run, Outcome], base: Path | None) -> list[str]:
    lines = [f"{run.name}: {outcome.status}" for run, outcome in outcomes.items() if not outcome.over]
    if table.missing:
        lines.append(f"Rows of the paper's table: {', '.join(table.missing)}")
    if base and any(row.paper for row in table.rows):
        text = "The paper's data set and schedule: compare the order and the differences of rows, not their values"
        lines.append(text)
    return lines


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
