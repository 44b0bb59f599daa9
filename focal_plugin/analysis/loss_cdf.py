"""Where the loss comes from: the cumulative distribution of normalised focal losses, figure 4 of the paper.

A checkpoint is run over images of a data set. Each (anchor, class) pair that is not ignored is an example: positive for
the class of the box that is matched to the anchor, negative otherwise. The losses of the positives, and those of the
negatives, are sorted, divided by their sum and accumulated, for each γ. α multiplies all losses of a kind alike, so it
has no effect here.

The examples are not kept, as there may be ten million. For every γ the focal loss grows with the wrongness u (−x for a
positive of logit x, x for a negative), so one histogram of u with bins of width 1/1024 serves for all γ. To count an
example at the centre of its bin changes its loss by a factor of at most 1 ± (1 + γ)/2048. Beyond ±64 an example counts
as one at ±64.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.evaluation import inference_context
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from ..config import ConfigError
from ..data.mapper import mapper_with_truth
from ..evaluation import style
from ..retinanet import FocalRetinaNet
from ..structures import IGNORED, DenseTargets
from .common import (
    add_flags,
    build_focal_model,
    load_weights,
    output_paths,
    print_written,
    read_config,
    read_records,
    spread,
    write_csv,
)

HARDEST = (0.01, 0.1, 0.2)
_LIMIT, _PER_UNIT = 64, 1024
_BINS = 2 * _LIMIT * _PER_UNIT


class WrongnessHistogram:
    """Counts of examples by wrongness u, and what follows for their focal losses.

    Attributes:
        counts: (131072,) int64, from u = −64 to 64.
        beyond: the number of examples with a wrongness outside ±64, which are counted at the ends.
    """

    def __init__(self):
        self.counts = np.zeros(_BINS, dtype=np.int64)
        self.beyond = 0

    def __len__(self) -> int:
        """The number of examples."""
        return int(self.counts.sum())

    def add(self, wrongness: Tensor) -> None:
        """Count examples, given as a floating-point tensor of any shape.

        Raises:
            ConfigError: one of them is NaN, because the weights or the input are not finite.
        """
        u = wrongness.detach().float().flatten()
        if u.isnan().any():
            raise ConfigError("The model gives logits that are NaN: its weights or its input are not finite.")
        self.beyond += int((u.abs() > _LIMIT).sum())
        bins = ((u.clamp(-_LIMIT, _LIMIT) + _LIMIT) * _PER_UNIT).long().clamp(max=_BINS - 1)
        self.counts += torch.bincount(bins, minlength=_BINS).cpu().numpy()

    def cumulative_loss(self, gamma: float, fractions: Sequence[float]) -> np.ndarray:
        """Return the share of the total loss in the easiest ``fractions`` of the examples; NaN without examples."""
        used = self.counts.nonzero()[0]
        if not len(used):
            return np.full(len(fractions), np.nan)
        counts = self.counts[used].astype(np.float64)
        u = (used + 0.5) / _PER_UNIT - _LIMIT
        log_p = -np.logaddexp(0, -u)  # log σ(u): (1 − p_t) of equation 4
        # In logs, since float64 cannot hold σ(−64)^12. The largest loss becomes 1.
        log_loss = np.log(np.logaddexp(0, u)) + gamma * log_p
        loss = counts * np.exp(log_loss - log_loss.max())
        examples = np.concatenate([[0], counts.cumsum() / counts.sum()])
        return np.interp(fractions, examples, np.concatenate([[0], loss.cumsum() / loss.sum()]))

    def hardest(self, gamma: float, fraction: float) -> float:
        """Return the share of the total loss in the hardest ``fraction`` of the examples."""
        return float(1 - self.cumulative_loss(gamma, [1 - fraction])[0])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this analysis."""
    parser.add_argument("--weights", metavar="FILE", help="the checkpoint (default: MODEL.WEIGHTS)")
    gammas = [0.0, 0.5, 1.0, 2.0]
    parser.add_argument("--gamma", type=float, nargs="+", default=gammas, help="one curve each (default: 0 .5 1 2)")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="data sets (default: test)")
    add_flags(parser, num_images=100)


def main(args: argparse.Namespace) -> int:
    """Run the checkpoint, print the shares of the hardest examples, draw and write the curves."""
    if not all(0 <= gamma < float("inf") for gamma in args.gamma):
        raise ConfigError(f"--gamma is {args.gamma}; expected finite numbers ≥ 0.")
    cfg = read_config(args)
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("No weights: give a trained checkpoint with --weights or MODEL.WEIGHTS.")
    records = spread(read_records(cfg, args.split.upper()), args.num_images)
    model = build_focal_model(cfg, "loss-cdf")
    load_weights(model, cfg.MODEL.WEIGHTS)
    histograms = collect(model, cfg, records)
    for kind, histogram in histograms.items():
        if not len(histogram):
            raise ConfigError(f"The {len(records)} images have no {kind} example; try more --num-images.")

    shares = share_table(histograms, args.gamma)
    print(f"Share of the focal loss in the hardest examples, {len(records)} images of DATASETS.{args.split.upper()}:")
    print(tabulate(shares, headers="keys", tablefmt="pipe", floatfmt=".1f"))
    if beyond := sum(histogram.beyond for histogram in histograms.values()):
        print(f"{beyond} logits are beyond ±{_LIMIT} and count as ±{_LIMIT}.")
    picture, curves = paths = output_paths(args, cfg, f"loss_cdf_{args.split}.png", f"loss_cdf_{args.split}.csv")
    write_csv(curves, curve_rows(histograms, args.gamma))
    draw(picture, histograms, args.gamma)
    print_written(paths)
    return 0


@torch.no_grad()
def collect(model: FocalRetinaNet, cfg: CfgNode, records: Sequence[dict]) -> dict[str, WrongnessHistogram]:
    """Return the histograms of the "positive" and the "negative" examples of ``records``, resized as for testing."""
    mapper = mapper_with_truth(cfg)
    histograms = {"positive": WrongnessHistogram(), "negative": WrongnessHistogram()}
    with inference_context(model):
        for record in tqdm(records, desc="Losses", unit="image", disable=None):
            logits, _, targets = model.predict([mapper(record)])
            add_image(histograms, model.by_class(logits), targets)
    return histograms


def add_image(histograms: dict[str, WrongnessHistogram], logits: list[Tensor], targets: DenseTargets) -> None:
    """Count the examples of an image in the "positive" and the "negative" histogram."""
    for level, labels in zip(logits, targets.labels):
        x = level.movedim(2, -1)[labels != IGNORED]  # (M, K), of the anchors that are not ignored
        classes = labels[labels != IGNORED]  # (M,)
        positive = classes[:, None] == torch.arange(x.shape[1], device=x.device)  # (M, K)
        histograms["positive"].add(-x[positive])
        histograms["negative"].add(x[~positive])


def share_table(histograms: dict[str, WrongnessHistogram], gammas: Sequence[float]) -> list[dict]:
    """Return a row for each kind and γ: the number of examples, and the percentage of the loss in the hardest."""
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


def curve_rows(histograms: dict[str, WrongnessHistogram], gammas: Sequence[float]) -> list[dict]:
    """Return the curves: a row for each kind, γ and fraction of the examples, easiest first, in steps of .001.

    In the row with the ``fraction`` .99, ``hardest_share`` is the loss share of the hardest 1 %, and so on.
    """
    fractions = np.linspace(0, 1, 1001)
    return [
        {
            "examples": kind,
            "gamma": f"{gamma:g}",
            "fraction": f"{fraction:.6g}",
            "cumulative_loss": f"{share:.6g}",
            "hardest_fraction": f"{1 - fraction:.6g}",
            "hardest_share": f"{1 - share:.6g}",
        }
        for kind, histogram in histograms.items()
        for gamma in gammas
        for fraction, share in zip(fractions, histogram.cumulative_loss(gamma, fractions))
    ]


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
