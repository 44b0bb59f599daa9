"""Speed against accuracy, figure 2 of the paper: milliseconds an image and AP of runs and of Detectron2's models.

``--runs`` takes folders of runs (config.yaml, their last checkpoint, and the last AP in metrics.json) and configs,
files or names of Detectron2's model zoo such as COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml. A config's AP comes from
``--ap NAME=AP`` and its weights from ``--weights NAME=FILE``; without weights it is timed with random ones, which may
find fewer boxes than trained ones. NAME is the folder's name, or the file's without its suffix, or what is said with
``--runs NAME=RUN``. A model without an AP stands on the axis, hollow. ``--join a,b,c`` draws a line through these, as
the paper's figure does through one model at several image sizes.

All models see the same images, those of DATASETS.TEST of ``--config-file`` (if not given, of the first run), one at a
time, each model at its own INPUT.MIN_SIZE_TEST. They take turns, image by image, in an order that rotates, after a
warm-up, so that whatever else the machine does meets all of them. The time is that of the whole model, with the
normalisation of the image and NMS, without reading and resizing it. KEY VALUE at the end changes every config.
"""

import argparse
import csv
import math
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from ..config.load import load_config
from ..deploy import optimize_for_inference
from ..engine import Trainer
from ..evaluation import style
from ..evaluation.curves import read_metrics
from ..evaluation.report import has_found_nothing
from .common import UserError, add_flags, load_weights, output_stem, read_records, spread, synchronize, written

_SUFFIXES = (".png", ".csv", ".md")
_OPTIMIZED = ", optimised"
_PAPER = {  # table 1e: test-dev AP and ms on an M40 GPU at 400, 500, 600, 700 and 800 pixels
    "RetinaNet-50, paper": ([64, 72, 98, 121, 153], [30.5, 32.5, 34.3, 35.1, 35.7]),
    "RetinaNet-101, paper": ([81, 90, 122, 154, 198], [31.9, 34.4, 36.0, 37.1, 37.8]),
}


@dataclass
class Entry:
    """A model to time.

    Attributes:
        name: of the run or config.
        cfg: its config.
        model: on its device, in eval mode.
        weights: where they come from; "random" if from nowhere.
        ap: in percent; None if not known. ap_source: where it comes from.
    """

    name: str
    cfg: CfgNode
    model: nn.Module
    weights: str
    ap: float | None
    ap_source: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("--runs", nargs="+", required=True, metavar="[NAME=]RUN", help="folders of runs, and configs")
    parser.add_argument("--ap", nargs="+", default=[], metavar="NAME=AP", help="in percent, where a run has none")
    parser.add_argument("--weights", nargs="+", default=[], metavar="NAME=FILE", help="where a run has none")
    parser.add_argument("--num-images", type=int, default=20, help="spread over the set; 0 for all (default: 20)")
    parser.add_argument("--warmup", type=int, default=2, help="images before the timing starts (default: 2)")
    parser.add_argument(
        "--optimize", action="store_true", help="time each model also after deploy.optimize_for_inference"
    )
    parser.add_argument("--join", nargs="+", default=[], metavar="NAME,NAME", help="models to draw a line through")
    parser.add_argument("--paper", action="store_true", help="draw the paper's table 1e as series of their own")
    add_flags(parser, config_required=False)


def main(args: argparse.Namespace) -> int:
    """Build, time, print, draw, write."""
    if args.warmup < 0:
        raise UserError(f"--warmup is {args.warmup}; expected a number ≥ 0.")
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
    text = tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".1f", missingval="-")
    print(text)
    stem = output_stem(args, data_cfg, "speed", _SUFFIXES)
    Path(f"{stem}.md").write_text(f"{len(records)} images, one at a time, on {where(entries)}.\n\n{text}\n")
    write_csv(Path(f"{stem}.csv"), rows)
    draw(Path(f"{stem}.png"), rows, lines, paper=args.paper, title=f"On {where(entries)}")
    print(written(stem, _SUFFIXES))
    return 0


# What to time


def parse_pairs(words: Sequence[str], flag: str) -> dict[str, str]:
    """``NAME=VALUE`` words as a dict."""
    pairs = [word.partition("=") for word in words]
    for (name, equals, value), word in zip(pairs, words):
        if not (name and equals and value):
            raise UserError(f"{flag} {word}: expected NAME=VALUE.")
    return {name: value for name, _, value in pairs}


def build_entry(run: str, opts: Sequence[str], aps: dict[str, str], weights: dict[str, str]) -> Entry:
    """The model of a run's folder or of a config, ``RUN`` or ``NAME=RUN``.

    Raises:
        UserError: there is no such folder or config, the folder lacks a file, or an AP is no number.
    """
    given, equals, rest = run.partition("=")
    if named := bool(equals) and not os.path.exists(run):
        run = rest
    folder = Path(run)
    is_folder = folder.is_dir()
    name = given if named else folder.resolve().name if is_folder else folder.stem
    config_file = str(folder / "config.yaml") if is_folder else run
    if is_folder and not os.path.isfile(config_file):
        raise UserError(f"--runs {run}: there is no config.yaml in that folder.")
    try:
        cfg = load_config(config_file, opts)
    except FileNotFoundError as error:
        raise UserError(f"--runs {run}: no folder, config file or name of the model zoo ({error}).") from error
    ap, ap_source = (aps[name], "--ap") if name in aps else (last_ap(folder) if is_folder else None, "metrics.json")
    try:
        ap = None if ap is None else float(ap)
    except ValueError:
        ap = math.nan
    if ap is not None and not math.isfinite(ap):
        raise UserError(f"--ap {name}={aps[name]}: expected a number, the AP in percent.")
    source = weights.get(name) or (last_checkpoint(folder) if is_folder else None)
    if source:
        cfg.MODEL.WEIGHTS, cfg.MODEL.FOCAL.TIMM.WEIGHTS = source, ""  # the encoder's own would be replaced
    model = Trainer.build_model(cfg).eval()
    if source:
        load_weights(model, source, f"--weights {name}" if name in weights else f"The checkpoint of {run}")
    return Entry(name, cfg, model, source or "random", ap, "-" if ap is None else ap_source)


def last_checkpoint(folder: Path) -> str:
    """The last checkpoint of a run.

    Raises:
        UserError: it has none.
    """
    mark = folder / "last_checkpoint"
    path = folder / (mark.read_text().strip() if mark.is_file() else "model_final.pth")
    if not path.is_file():
        raise UserError(f"--runs {folder}: there is no {path.name}; expected --weights {folder.name}=FILE.")
    return str(path)


def last_ap(folder: Path) -> float | None:
    """The last box AP in a run's metrics.json: 0 if the model finds nothing at all.

    None if there is none, if the test set has no boxes to find, or if there are several test sets.
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
    """Refuse two models of one name, and a name in ``given`` that no model has."""
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"--runs: several are called {', '.join(twice)}; give them names of their own: --runs NAME={twice[0]} ..."
        )
    if unknown := sorted({name for some in given for name in some} - set(names)):
        raise UserError(f"--ap, --weights or --join: {', '.join(unknown)} is none of the models {', '.join(names)}.")


def optimized(entry: Entry) -> Entry:
    """The same model, optimised for inference. Its AP is the model's before, and said to be."""
    source = "-" if entry.ap is None else "before optimisation"
    model = optimize_for_inference(entry.model)
    return Entry(f"{entry.name}{_OPTIMIZED}", entry.cfg, model, entry.weights, entry.ap, source)


def where(entries: Sequence[Entry]) -> str:
    """The devices of the models, in words."""
    devices = {next(entry.model.parameters()).device for entry in entries}
    cpu = f"a CPU ({torch.get_num_threads()} threads)" if torch.get_num_threads() > 1 else "a CPU (1 thread)"
    names = [
        torch.cuda.get_device_name(device) if device.type == "cuda" else cpu for device in sorted(devices, key=str)
    ]
    return " and ".join(names)


# Timing


@torch.no_grad()
def time_models(entries: Sequence[Entry], records: Sequence[dict], warmup: int) -> np.ndarray:
    """Milliseconds of each model on each image, (number of entries, number of images)."""
    mappers = [DatasetMapper(entry.cfg, is_train=False) for entry in entries]
    times = np.zeros((len(entries), len(records)))
    schedule = [records[i % len(records)] for i in range(warmup)] + list(records)
    for step, record in enumerate(tqdm(schedule, desc="Timing", unit="image")):
        for turn in range(len(entries)):
            i = (turn + step) % len(entries)
            image = mappers[i](dict(record))
            elapsed = _time(entries[i].model, image)
            if step >= warmup:
                times[i, step - warmup] = elapsed
    return times


def _time(model: nn.Module, image: dict) -> float:
    device = next(model.parameters()).device
    synchronize(device)
    start = time.perf_counter()
    model([image])
    synchronize(device)
    return 1000 * (time.perf_counter() - start)


# What comes out


def table(entries: Sequence[Entry], times: np.ndarray) -> list[dict]:
    """A row a model: the quartiles of its times, its AP and where things come from."""
    rows = []
    for entry, mine in zip(entries, times):
        low, median, high = np.percentile(mine, [25, 50, 75])
        quartiles = {"ms (median)": float(median), "ms (25 %)": float(low), "ms (75 %)": float(high)}
        origin = {"AP from": entry.ap_source, "weights": entry.weights}
        rows.append({"model": entry.name, "AP": entry.ap, **quartiles, **origin})
    return rows


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """Write the rows of ``table``."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw(path: Path, rows: Sequence[dict], lines: Sequence[Sequence[str]], *, paper: bool, title: str) -> None:
    """Draw ms against AP to a PNG; bars from quartile to quartile; models without AP on the axis, hollow.

    Each of ``lines`` joins the models it names, those of known AP.
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
            label=row["model"] + ("" if has_ap else " (AP not known)"),
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
