"""Where the loss comes from: the cumulative distribution of normalised focal losses, figure 4 of the paper.

A checkpoint is run over images of a data set. Each (anchor, class) pair that is not ignored is an example: positive
where the class is that of the box matched to the anchor, negative elsewhere. For positives and for negatives, and for
each γ, the losses are divided by their sum, sorted and added up. α multiplies all losses of a kind, so it does not
matter here.

Of ten million examples none is kept: FL grows with the wrongness u (u = −x for a positive of logit x, x for a negative)
whatever γ, so one histogram of u, of bins 1/1024 wide, serves for all γ. Taking a bin's examples at its centre changes
a loss by (1 + γ)/2048 of itself at most. Beyond ±64 an example counts as one at ±64.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import build_augmentation
from detectron2.evaluation import inference_context
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from ..data import FocalDatasetMapper
from ..evaluation import style
from ..retinanet import FocalRetinaNet
from ..structures import IGNORED, DenseTargets
from .common import (
    UserError,
    add_flags,
    build_focal_model,
    load_weights,
    output_stem,
    read_config,
    read_records,
    spread,
    written,
)

HARDEST = (0.01, 0.1, 0.2)
_LIMIT, _PER_UNIT = 64, 1024
_BINS = 2 * _LIMIT * _PER_UNIT
_SUFFIXES = (".png", ".csv")


class WrongnessHistogram:
    """Counts of examples by wrongness u; what it says of their focal losses.

    Attributes:
        counts: (131072,) int64, from u = −64 to 64.
        beyond: how many examples of wrongness outside ±64 were counted at the ends.
    """

    def __init__(self):
        self.counts = np.zeros(_BINS, dtype=np.int64)
        self.beyond = 0

    def __len__(self) -> int:
        """The number of examples."""
        return int(self.counts.sum())

    def add(self, wrongness: Tensor) -> None:
        """Count some examples, a tensor of any shape and floating dtype.

        Raises:
            UserError: one of them is NaN.
        """
        u = wrongness.detach().float().flatten()
        if u.isnan().any():
            raise UserError("The model gives logits that are NaN: its weights or its input are not finite.")
        self.beyond += int((u.abs() > _LIMIT).sum())
        bins = ((u.clamp(-_LIMIT, _LIMIT) + _LIMIT) * _PER_UNIT).long().clamp(max=_BINS - 1)
        self.counts += torch.bincount(bins, minlength=_BINS).cpu().numpy()

    def cumulative_loss(self, gamma: float, fractions: Sequence[float]) -> np.ndarray:
        """The share of the summed losses that the easiest ``fractions`` of the examples hold; NaN without examples."""
        used = self.counts.nonzero()[0]
        if not len(used):
            return np.full(len(fractions), np.nan)
        counts = self.counts[used].astype(np.float64)
        u = (used + 0.5) / _PER_UNIT - _LIMIT
        log_p = -np.logaddexp(0, -u)  # log σ(u): of being as wrong as that
        # In logs, for σ(−64)^γ is no float64 at γ = 12; the largest loss is 1 after this.
        log_loss = np.log(np.logaddexp(0, u)) + gamma * log_p
        loss = counts * np.exp(log_loss - log_loss.max())
        examples = np.concatenate([[0], counts.cumsum() / counts.sum()])
        return np.interp(fractions, examples, np.concatenate([[0], loss.cumsum() / loss.sum()]))

    def hardest(self, gamma: float, fraction: float) -> float:
        """The share of the summed losses that the hardest ``fraction`` of the examples hold."""
        return float(1 - self.cumulative_loss(gamma, [1 - fraction])[0])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("--weights", metavar="FILE", help="the checkpoint; MODEL.WEIGHTS if not given")
    parser.add_argument("--gamma", type=float, nargs="+", default=[0.0, 0.5, 1.0, 2.0], help="the curves to draw")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="of the config's data sets")
    parser.add_argument("--num-images", type=int, default=100, help="spread over the set; 0 for all (default: 100)")
    add_flags(parser)


def main(args: argparse.Namespace) -> int:
    """Run the checkpoint, print the shares of the hardest examples, draw and write the curves."""
    if not all(0 <= gamma < float("inf") for gamma in args.gamma):
        raise UserError(f"--gamma is {args.gamma}; expected finite numbers ≥ 0.")
    cfg = read_config(args)
    if not cfg.MODEL.WEIGHTS:
        raise UserError("No weights: give a trained checkpoint with --weights or MODEL.WEIGHTS.")
    records = spread(read_records(cfg, args.split.upper()), args.num_images)
    model = build_focal_model(cfg, "loss-cdf")
    load_weights(model, cfg.MODEL.WEIGHTS)
    histograms = collect(model, cfg, records)
    for kind, histogram in histograms.items():
        if not len(histogram):
            raise UserError(f"The {len(records)} images have no {kind} example; try more --num-images.")

    shares = share_table(histograms, args.gamma)
    print(f"Share of the focal loss in the hardest examples, {len(records)} images of DATASETS.{args.split.upper()}:")
    print(tabulate(shares, headers="keys", tablefmt="pipe", floatfmt=".1f"))
    if beyond := sum(histogram.beyond for histogram in histograms.values()):
        print(f"{beyond} logits are beyond ±{_LIMIT} and count as ±{_LIMIT}.")
    stem = output_stem(args, cfg, f"loss_cdf_{args.split}", _SUFFIXES)
    write_csv(Path(f"{stem}.csv"), histograms, args.gamma)
    draw(Path(f"{stem}.png"), histograms, args.gamma)
    print(written(stem, _SUFFIXES))
    return 0


@torch.no_grad()
def collect(model: FocalRetinaNet, cfg: CfgNode, records: Sequence[dict]) -> dict[str, WrongnessHistogram]:
    """The histograms of the "positive" and the "negative" examples of some records, resized as in a test."""
    mapper = FocalDatasetMapper(  # is_train: with the annotations
        is_train=True, augmentations=build_augmentation(cfg, is_train=False), image_format=cfg.INPUT.FORMAT
    )
    histograms = {"positive": WrongnessHistogram(), "negative": WrongnessHistogram()}
    with inference_context(model):
        for record in tqdm(records, desc="Losses", unit="image"):
            logits, _, targets = model.predict([mapper(record)])
            add_image(histograms, model.by_class(logits), targets)
    return histograms


def add_image(histograms: dict[str, WrongnessHistogram], logits: list[Tensor], targets: DenseTargets) -> None:
    """Count the examples of ``logits`` in the "positive" and the "negative" of ``histograms``."""
    for level, labels in zip(logits, targets.labels):
        x = level.movedim(2, -1)[labels != IGNORED]  # (M, K), of the anchors that are not ignored
        classes = labels[labels != IGNORED]  # (M,)
        positive = classes[:, None] == torch.arange(x.shape[1], device=x.device)  # (M, K)
        histograms["positive"].add(-x[positive])
        histograms["negative"].add(x[~positive])


def share_table(histograms: dict[str, WrongnessHistogram], gammas: Sequence[float]) -> list[dict]:
    """A row for each kind and γ: how many examples, and the percentage of the loss that the hardest hold."""
    return [
        {
            "examples": kind,
            "number": f"{len(histogram):,}",
            "γ": f"{gamma:g}",
            **{f"hardest {part:.0%} (%)": 100 * histogram.hardest(gamma, part) for part in HARDEST},
        }
        for kind, histogram in histograms.items()
        for gamma in gammas
    ]


def write_csv(path: Path, histograms: dict[str, WrongnessHistogram], gammas: Sequence[float]) -> None:
    """Write the curves: a row for each kind, γ and fraction of the examples from the easiest on, in steps of .001.

    ``hardest_share`` of the row with ``fraction`` .99 is what the hardest 1 % hold, and so on.
    """
    fractions = np.linspace(0, 1, 1001)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["examples", "gamma", "fraction", "cumulative_loss", "hardest_fraction", "hardest_share"])
        for kind, histogram in histograms.items():
            for gamma in gammas:
                for fraction, share in zip(fractions, histogram.cumulative_loss(gamma, fractions)):
                    row = (fraction, share, 1 - fraction, 1 - share)
                    writer.writerow([kind, f"{gamma:g}", *(f"{value:.6g}" for value in row)])


def draw(path: Path, histograms: dict[str, WrongnessHistogram], gammas: Sequence[float]) -> None:
    """Draw the two panels of figure 4 to a PNG."""
    figure, axes = style.panels(2)
    fractions = np.linspace(0, 1, 2001)
    for axis, (kind, histogram) in zip(axes, histograms.items()):
        for i, gamma in enumerate(gammas):
            axis.plot(
                fractions,
                histogram.cumulative_loss(gamma, fractions),
                color=style.color(i),
                linestyle=style.DASHES[i % len(style.DASHES)],
                linewidth=2,
                label=f"γ = {gamma:g}",
            )
        axis.set(title=f"{len(histogram):,} {kind} examples", xlim=(0, 1), ylim=(0, 1))
        axis.set(xlabel=f"fraction of {kind} examples, easiest first", ylabel="cumulative normalised loss")
        axis.legend(frameon=False, loc="upper left")
    style.save(figure, path)
