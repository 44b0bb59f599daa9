"""Speed against accuracy, figure 2 of the paper: milliseconds an image and AP of runs and of Detectron2's models.

``--runs`` takes folders of runs (config.yaml, the last checkpoint, and the last AP in metrics.json) and configs, which
are files or names of Detectron2's model zoo such as COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml. A config's AP comes
from ``--ap NAME=AP`` and its weights from ``--weights NAME=FILE``; without weights it is timed with random ones, which
may find fewer boxes than trained ones. NAME is the folder's name, the file's name without its suffix, or the one given
by ``--runs NAME=RUN``. A model without an AP is drawn hollow, on the axis. ``--join a,b,c`` draws a line through these
models, as the paper's figure does through one model at several image sizes.

All models get the same images, those of DATASETS.TEST of ``--config-file`` (by default, of the first run), one at a
time, each model at its own INPUT.MIN_SIZE_TEST. After a warm-up they take turns on each image, in a rotating order, so
that other load on the machine affects all of them. The time is that of the whole model, with normalisation of the image
and NMS, without reading and resizing. KEY VALUE pairs at the end change every config.
"""

import argparse
import contextlib
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from tabulate import tabulate
from torch import nn
from torch.utils.benchmark.utils.timer import timer
from tqdm import tqdm

from ..config import ConfigError
from ..config.load import load_config
from ..deploy import optimize_for_inference
from ..engine import AtomicCheckpointer, Trainer
from ..evaluation import style
from ..evaluation.curves import read_metrics
from ..evaluation.report import has_found_nothing
from .common import add_flags, load_weights, named_run, output_paths, print_written, read_records, spread, write_csv

_OPTIMIZED = ", optimised"
_PAPER = {  # table 1e: test-dev AP and ms on an M40 GPU at 400, 500, 600, 700 and 800 pixels
    "RetinaNet-50, paper": ([64, 72, 98, 121, 153], [30.5, 32.5, 34.3, 35.1, 35.7]),
    "RetinaNet-101, paper": ([81, 90, 122, 154, 198], [31.9, 34.4, 36.0, 37.1, 37.8]),
}


@dataclass
class Entry:
    """A model to time.

    Attributes:
        name: the name of the run or config.
        cfg: its config.
        model: the model on its device, in eval mode.
        weights: the file of its weights, or "random".
        ap: its AP in percent; None if unknown.
        ap_source: the flag or file that the AP is from.
    """

    name: str
    cfg: CfgNode
    model: nn.Module
    weights: str
    ap: float | None
    ap_source: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this analysis."""
    parser.add_argument("--runs", nargs="+", required=True, metavar="[NAME=]RUN", help="folders of runs, and configs")
    parser.add_argument("--ap", nargs="+", default=[], metavar="NAME=AP", help="AP in percent of what has none")
    parser.add_argument("--weights", nargs="+", default=[], metavar="NAME=FILE", help="weights of what has none")
    parser.add_argument("--warmup", type=int, default=2, help="images before the timing starts (default: 2)")
    parser.add_argument(
        "--optimize", action="store_true", help="time each model also after deploy.optimize_for_inference"
    )
    parser.add_argument("--join", nargs="+", default=[], metavar="NAME,NAME", help="models to draw a line through")
    parser.add_argument("--paper", action="store_true", help="draw the paper's table 1e as series of their own")
    add_flags(parser, num_images=20, config_required=False)


def main(args: argparse.Namespace) -> int:
    """Build and time the models, and print, draw and write the result."""
    if args.warmup < 0:
        raise ConfigError(f"--warmup is {args.warmup}; expected a number ≥ 0.")
    aps, weights = parse_pairs(args.ap, "--ap"), parse_pairs(args.weights, "--weights")
    entries = [build_entry(run, args.opts, aps, weights) for run in args.runs]
    lines = [names.split(",") for names in args.join]
    check_names(entries, aps, weights, *lines)
    data_cfg = load_config(args.config_file, args.opts) if args.config_file else entries[0].cfg
    records = spread(read_records(data_cfg, "TEST"), args.num_images)
    if args.optimize:
        entries = [either for entry in entries for either in (entry, optimized(entry))]
        lines += [[f"{name}{_OPTIMIZED}" for name in names] for names in lines]
    times = time_models(entries, records, args.warmup)  # (number of entries, number of images) in ms
    rows = table(entries, times)
    print(f"{len(records)} images of DATASETS.TEST, one at a time, on {where(entries)}:")
    text = tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".1f", missingval="-", disable_numparse=[0])  # 007
    print(text)
    picture, numbers, markdown = paths = output_paths(args, data_cfg, "speed.png", "speed.csv", "speed.md")
    markdown.write_text(f"{len(records)} images, one at a time, on {where(entries)}.\n\n{text}\n")
    write_csv(numbers, rows)
    draw(picture, rows, lines, paper=args.paper, title=f"On {where(entries)}")
    print_written(paths)
    return 0


# What to time


def parse_pairs(words: Sequence[str], flag: str) -> dict[str, str]:
    """Return words of the form NAME=VALUE as a dict."""
    pairs = {}
    for word in words:
        name, _, value = word.partition("=")
        if not (name and value):
            raise ConfigError(f"{flag} {word}: expected NAME=VALUE.")
        pairs[name] = value
    return pairs


def build_entry(run: str, opts: Sequence[str], aps: dict[str, str], weights: dict[str, str]) -> Entry:
    """Return the model of a run's folder or of a config, ``RUN`` or ``NAME=RUN``.

    Raises:
        ConfigError: there is no such folder or config, the folder lacks a file, or the AP is not a number.
    """
    name, path = named_run(run)
    folder = Path(path) if os.path.isdir(path) else None
    if folder and not (folder / "config.yaml").is_file():
        raise ConfigError(f"--runs {path}: there is no config.yaml in that folder.")
    try:
        cfg = load_config(str(folder / "config.yaml") if folder else path, opts)
    except FileNotFoundError as error:
        raise ConfigError(f"--runs {path}: no folder, config file or name of the model zoo ({error}).") from error
    ap, ap_source = last_ap(folder) if folder else None, "metrics.json"
    if name in aps:
        ap, ap_source = parse_ap(name, aps[name]), "--ap"
    source = weights.get(name) or (last_checkpoint(folder) if folder else None)
    if source:
        cfg.MODEL.WEIGHTS, cfg.MODEL.FOCAL.TIMM.WEIGHTS = source, ""  # the encoder's own would be replaced
    model = Trainer.build_model(cfg).eval()
    if source:
        load_weights(model, source, f"The checkpoint of --runs {path} (or --weights {name}=FILE)")
    return Entry(name, cfg, model, source or "random", ap, "-" if ap is None else ap_source)


def parse_ap(name: str, text: str) -> float:
    """Return the AP of ``--ap NAME=AP``."""
    with contextlib.suppress(ValueError):
        if math.isfinite(ap := float(text)):
            return ap
    raise ConfigError(f"--ap {name}={text}: expected a number, the AP in percent.")


def last_checkpoint(folder: Path) -> str:
    """Return the path of a run's last checkpoint, which need not be there."""
    return AtomicCheckpointer(None, str(folder)).get_checkpoint_file() or str(folder / "model_final.pth")


def last_ap(folder: Path) -> float | None:
    """Return the last box AP in a run's metrics.json: 0 if the model finds nothing at all.

    None if there is no AP, if the test set has no boxes, or if there are several test sets.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        return None
    last = {name: values[-1] for name, (_, values) in read_metrics(str(path)).items()}
    found = {name: ap for name, ap in last.items() if f"/{name}".endswith("/bbox/AP")}
    if len(found) != 1:
        return None
    ((name, ap),) = found.items()
    if not math.isnan(ap):
        return ap
    return 0.0 if has_found_nothing(folder, name.removesuffix("bbox/AP")) else None


def check_names(entries: Sequence[Entry], *given: Collection[str]) -> None:
    """Check that the names of the models differ, and that each of the ``given`` ones is the name of a model."""
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"--runs: several are called {', '.join(twice)}; give them names of their own: --runs NAME={twice[0]} ..."
        )
    if unknown := sorted({name for some in given for name in some} - set(names)):
        raise ConfigError(f"--ap, --weights or --join: {', '.join(unknown)} is none of the models {', '.join(names)}.")


def optimized(entry: Entry) -> Entry:
    """Return the model optimised for inference, with the AP from before optimisation."""
    source = "-" if entry.ap is None else "before optimisation"
    model = optimize_for_inference(entry.model)
    return Entry(f"{entry.name}{_OPTIMIZED}", entry.cfg, model, entry.weights, entry.ap, source)


def where(entries: Sequence[Entry]) -> str:
    """Return the devices of the models, in words."""
    threads = torch.get_num_threads()
    cpu = f"a CPU ({threads} thread{'s' * (threads > 1)})"
    devices = sorted({next(entry.model.parameters()).device for entry in entries}, key=str)
    return " and ".join(torch.cuda.get_device_name(d) if d.type == "cuda" else cpu for d in devices)


# Timing


@torch.no_grad()
def time_models(entries: Sequence[Entry], records: Sequence[dict], warmup: int) -> np.ndarray:
    """Return the milliseconds of each model on each image, (number of models, number of images)."""
    mappers = [DatasetMapper(entry.cfg, is_train=False) for entry in entries]
    times = np.zeros((len(entries), len(records)))
    schedule = [records[i % len(records)] for i in range(warmup)] + list(records)
    for step, record in enumerate(tqdm(schedule, desc="Timing", unit="image", disable=None)):
        for turn in range(len(entries)):
            i = (turn + step) % len(entries)
            image = mappers[i](dict(record))
            start = timer()  # PyTorch's: waits for a GPU to finish
            entries[i].model([image])
            if step >= warmup:
                times[i, step - warmup] = 1000 * (timer() - start)
    return times


# Output


def table(entries: Sequence[Entry], times: np.ndarray) -> list[dict]:
    """Return a row for each model: the quartiles of its times, its AP, and the sources of AP and weights."""
    rows = []
    for entry, mine in zip(entries, times):
        low, median, high = np.percentile(mine, [25, 50, 75])
        quartiles = {"ms (median)": float(median), "ms (25 %)": float(low), "ms (75 %)": float(high)}
        origin = {"AP from": entry.ap_source, "weights": entry.weights}
        rows.append({"model": entry.name, "AP": entry.ap, **quartiles, **origin})
    return rows


def draw(path: Path, rows: Sequence[dict], lines: Sequence[Sequence[str]], *, paper: bool, title: str) -> None:
    """Draw ms against AP to a PNG, with bars from quartile to quartile; models without an AP are hollow, on the axis.

    Each of ``lines`` names models to join by a line; those without an AP are left out of it.
    """
    figure, (axis,) = style.panels(1, width=7.0, height=5.2)
    known = [row["AP"] for row in rows if row["AP"] is not None]
    drawn = known + [ap for _, aps in _PAPER.values() for ap in aps] * paper
    floor = min(drawn, default=0) - 0.12 * max(max(drawn, default=1) - min(drawn, default=0), 1)
    for i, row in enumerate(rows):
        median, low, high = (row[f"ms ({which})"] for which in ("median", "25 %", "75 %"))
        has_ap = row["AP"] is not None
        axis.errorbar(
            [median],
            [row["AP"] if has_ap else floor],
            xerr=[[median - low], [high - median]],
            color=style.color(i),
            marker=style.MARKERS[i % len(style.MARKERS)],
            markersize=8,
            markerfacecolor=style.color(i) if has_ap else "white",
            capsize=3,
            linestyle="none",
            clip_on=has_ap,
            label=row["model"] + ("" if has_ap else " (AP unknown)"),
        )
    points = {row["model"]: (row["ms (median)"], row["AP"]) for row in rows if row["AP"] is not None}
    for names in lines:
        axis.plot(*zip(*(points[name] for name in names if name in points)), color=style.GRAY, zorder=1)
    if paper:
        for i, (name, (ms, aps)) in enumerate(_PAPER.items()):
            axis.plot(
                ms, aps, style.DASHES[i + 1], color=style.GRAY, marker=".", label=f"{name}: COCO test-dev, M40 GPU"
            )
    axis.set(xlabel="ms an image", ylabel="box AP (%)", title=title, xlim=(0, None), ylim=(floor, None))
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    style.save(figure, path)
