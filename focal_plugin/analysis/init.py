"""The loss of the first step: expected from the bias and the targets, and observed with the new model.

At the start all logits should be near the classifier's bias (section 3.3), so the bias and the targets alone determine
the loss of a batch: it is the configured loss on constant logits. This is compared with the loss of the config's model,
with its backbone's weights and a new head, on the same batch of the training set; and for the focal loss and the cross
entropies with the formula. The exit code is 1 if they differ, if one is not finite, or if background dominates the
loss, as it does at a prior of .5.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass

import torch
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import Tensor, nn

from ..class_loss import with_quality
from ..config import ConfigError
from ..data import check_num_classes
from ..engine import Trainer
from ..engine.balance import loss_of_positives
from ..losses import AlphaBalancedBCELoss, BCELoss, ElementwiseLoss, SigmoidFocalLoss
from ..registry import build_bias_init
from ..retinanet import FocalRetinaNet
from ..structures import IGNORED, DenseTargets
from .common import add_flags, build_focal_model, load_weights, output_paths, print_written, read_config, read_records

_PAPERS_PRIOR = 0.01
# Background dominates above both: its share of the loss, and the loss ÷ that at the paper's prior.
_MOST_SHARE, _MOST_RATIO = 0.9, 10.0


@dataclass(frozen=True)
class FirstStep:
    """Losses of one batch at the first step, each the sum over the batch divided by its positives (at least 1).

    Attributes:
        loss: the class loss, in words.
        bias_init: the name of the bias init.
        prior: the mean over anchors and classes of the probability σ(bias).
        num_images, num_anchors, num_positives, num_ignored: numbers of the batch.
        num_classes: K.
        expected: the configured loss with all logits at the configured bias.
        observed: the loss of the new model.
        textbook: the formula of the focal loss or cross entropy; None for other losses.
        background_share: the background anchors' share of ``expected``; None for a loss that is not a sum over anchors.
        at_papers_prior: ``expected`` at a prior of .01.
        logit_mean, logit_std: mean and standard deviation of the new model's logits minus their bias.
        bias_off: the largest difference between the head's bias and the configured one; None for a head whose
            classifier is not called ``cls_score``.
        loss_cls, loss_box_reg: the losses as the model returns them and the training log shows them.
    """

    loss: str
    bias_init: str
    prior: float
    num_images: int
    num_anchors: int
    num_positives: int
    num_ignored: int
    num_classes: int
    expected: float
    observed: float
    textbook: float | None
    background_share: float | None
    at_papers_prior: float
    logit_mean: float
    logit_std: float
    bias_off: float | None
    loss_cls: float
    loss_box_reg: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this analysis."""
    parser.add_argument("--weights", metavar="FILE", help="weights to start from (default: MODEL.WEIGHTS)")
    parser.add_argument(
        "--tolerance", type=float, default=0.25, help="largest |observed ÷ expected − 1| (default: .25)"
    )
    add_flags(parser)


def main(args: argparse.Namespace) -> int:
    """Compare the losses and report them. Returns 1 if there is a problem."""
    if not args.tolerance > 0:
        raise ConfigError(f"--tolerance is {args.tolerance}; expected a number above 0.")
    cfg = read_config(args)
    step = first_step(cfg)
    problems = find_problems(step, args.tolerance)
    print(describe(step))
    for problem in problems:
        print(f"WRONG: {problem}")
    if not problems:
        print("The first step is as expected.")
    (path,) = output_paths(args, cfg, "init.json")
    path.write_text(json.dumps({**asdict(step), "problems": problems}, indent=2) + "\n")
    print_written([path])
    return 1 if problems else 0


def first_step(cfg: CfgNode) -> FirstStep:
    """Return the losses of a batch of the training set at the first step of ``cfg``.

    Raises:
        ConfigError: the training set cannot be read or has other classes than the config, or the model is not a
            FocalRetinaNet.
        FileNotFoundError, WeightsError: files of the training set or the weights are missing, or hold something else.
    """
    read_records(cfg, "TRAIN", filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    check_num_classes(cfg)
    seed_all_rng(cfg.SEED if cfg.SEED >= 0 else None)
    model = build_focal_model(cfg, "init")
    if cfg.MODEL.WEIGHTS:
        load_weights(model, cfg.MODEL.WEIGHTS)
    loader_cfg = cfg.clone()
    loader_cfg.DATALOADER.NUM_WORKERS = 0  # a process takes longer to start than one batch to load
    batch = next(iter(Trainer.build_train_loader(loader_cfg)))
    with torch.no_grad(), EventStorage():
        logits, deltas, targets = model.train().predict(batch)
        losses = {name: loss.item() for name, loss in model.losses(logits, deltas, targets).items()}
        logits = model.by_class(logits)
        targets = with_quality(model.cls_loss, targets, lambda: model.decode(deltas, targets))
        observed = model.cls_loss(logits, targets).item()

    num_anchors, num_classes = logits[0].shape[1:3]
    bias = _configured_bias(cfg, num_anchors, num_classes).to(model.device)
    papers = torch.full_like(bias, math.log(_PAPERS_PRIOR / (1 - _PAPERS_PRIOR)))
    expected = _at_bias(model.cls_loss, bias, logits, targets)
    background = None
    if isinstance(model.cls_loss, ElementwiseLoss) and expected:
        background = 1 - loss_of_positives(model.cls_loss, _constant(bias, logits), targets).item() / expected
    mean, deviation = _offsets(bias, logits)
    per_positive = 1 / max(targets.num_positives, 1)
    labels = torch.cat([level.flatten() for level in targets.labels])
    textbook = _textbook(model.cls_loss, bias, targets)
    return FirstStep(
        loss=str(model.cls_loss),
        bias_init=cfg.MODEL.FOCAL.BIAS_INIT.NAME,
        prior=bias.double().sigmoid().mean().item(),
        num_images=len(batch),
        num_anchors=len(labels),
        num_positives=targets.num_positives,
        num_ignored=int((labels == IGNORED).sum()),
        num_classes=num_classes,
        expected=expected * per_positive,
        observed=observed * per_positive,
        textbook=None if textbook is None else textbook * per_positive,
        background_share=background,
        at_papers_prior=_at_bias(model.cls_loss, papers, logits, targets) * per_positive,
        logit_mean=mean,
        logit_std=deviation,
        bias_off=_bias_off(model, bias),
        loss_cls=losses["loss_cls"],
        loss_box_reg=losses["loss_box_reg"],
    )


def _configured_bias(cfg: CfgNode, num_anchors: int, num_classes: int) -> Tensor:
    """Return the (A, K) bias of a classifier after ``MODEL.FOCAL.BIAS_INIT``."""
    conv = nn.Conv2d(1, num_anchors * num_classes, 1)
    build_bias_init(cfg)(conv, num_anchors, num_classes)
    return conv.bias.detach().view(num_anchors, num_classes)


def _spread_bias(bias: Tensor, level: Tensor) -> Tensor:
    """Expand the (A, K) ``bias`` to the shape of (N, A, K, H, W) logits."""
    return bias[:, :, None, None].to(level.dtype).expand_as(level)


def _constant(bias: Tensor, logits: list[Tensor]) -> list[Tensor]:
    """Return logits of the same shapes that all equal the ``bias``."""
    return [_spread_bias(bias, level).contiguous() for level in logits]


def _offsets(bias: Tensor, logits: list[Tensor]) -> tuple[float, float]:
    """Return the mean and the standard deviation of the logits minus their bias."""
    offsets = [(level - _spread_bias(bias, level)).double() for level in logits]
    count = sum(level.numel() for level in offsets)
    mean = sum(level.sum() for level in offsets).item() / count
    square = sum(level.square().sum() for level in offsets).item() / count
    return mean, math.sqrt(max(square - mean**2, 0)) if math.isfinite(square) else math.nan


@torch.no_grad()
def _at_bias(loss: nn.Module, bias: Tensor, logits: list[Tensor], targets: DenseTargets) -> float:
    """Return the loss with all logits at ``bias``."""
    return loss(_constant(bias, logits), targets).item()


def _bias_off(model: FocalRetinaNet, bias: Tensor) -> float | None:
    classifier = getattr(model.head, "cls_score", None)
    if getattr(classifier, "bias", None) is None or classifier.bias.numel() != bias.numel():
        return None
    return (classifier.bias.detach().view_as(bias) - bias).abs().max().item()


def _textbook(loss: nn.Module, bias: Tensor, targets: DenseTargets) -> float | None:
    """Return equation 5 for probabilities σ(bias), from the numbers of positives and negatives of each (a, k)."""
    if not isinstance(loss, (SigmoidFocalLoss, AlphaBalancedBCELoss, BCELoss)):
        return None
    p = bias.double().sigmoid().cpu()  # (A, K)
    alpha = torch.as_tensor(loss.alpha, dtype=torch.float64).cpu().expand(p.shape[1])  # (K,)
    positive = torch.zeros_like(p)
    total = torch.zeros(len(p), 1, dtype=torch.float64)
    for labels in targets.labels:
        for a in range(len(p)):
            mine = labels[:, a].flatten().cpu()
            total[a] += (mine != IGNORED).sum()
            positive[a] += torch.bincount(mine[mine != IGNORED], minlength=p.shape[1] + 1)[:-1]
    weight_1, weight_0 = torch.where(alpha == -1, 1.0, alpha), torch.where(alpha == -1, 1.0, 1 - alpha)
    of_positive = -weight_1 * (1 - p) ** loss.gamma * p.log()
    of_negative = -weight_0 * p**loss.gamma * (-p).log1p()
    return (positive * of_positive + (total - positive) * of_negative).sum().item()


def describe(step: FirstStep) -> str:
    """Return the comparison as a text."""
    rows = [
        ["expected: the loss on logits equal to the bias", step.expected],
        ["  by the formula", "-" if step.textbook is None else step.textbook],
        ["observed: the new model", step.observed],
        [f"expected at a prior of {_PAPERS_PRIOR:g}", step.at_papers_prior],
    ]
    share = "-" if step.background_share is None else f"{step.background_share:.1%}"
    return "\n".join(
        [
            f"{step.loss}, {step.bias_init}: prior {step.prior:.4g}, {step.num_classes} classes",
            f"A batch of {step.num_images} images: {step.num_anchors:,} anchors, {step.num_positives:,} of them "
            f"positive, {step.num_ignored:,} ignored",
            tabulate(rows, headers=["", "class loss a positive"], tablefmt="pipe", floatfmt=".5g"),
            f"Background's share of the expected loss: {share}. Logits minus bias: {step.logit_mean:+.3g} ± "
            f"{step.logit_std:.3g}. A training logs {step.loss_cls:.5g}, divided by MODEL.FOCAL.NORMALIZER.",
        ]
    )


def find_problems(step: FirstStep, tolerance: float) -> list[str]:
    """Return a sentence for each problem of a first step, with what to look at."""
    problems = []
    where = f"MODEL.FOCAL.BIAS_INIT.NAME {step.bias_init}"
    ratio = step.expected / step.at_papers_prior if step.at_papers_prior else math.inf
    share = 1.0 if step.background_share is None else step.background_share
    if not math.isfinite(step.expected):
        problems.append(f"The expected loss is {step.expected}: the loss is not finite at the bias of {where}.")
    elif share > _MOST_SHARE and ratio > _MOST_RATIO:
        of_it = "" if step.background_share is None else f" {share:.1%} of it is from background anchors."
        problems.append(
            f"At the prior of {step.prior:.3g} ({where}) the loss starts at {ratio:.3g} times that at a prior of "
            f"{_PAPERS_PRIOR:g}.{of_it} Training is likely to diverge or to find no objects: use PriorBiasInit with "
            f"MODEL.RETINANET.PRIOR_PROB {_PAPERS_PRIOR:g} (section 3.3)."
        )
    if not math.isfinite(step.observed):
        problems.append(
            f"The observed loss is {step.observed}: look at MODEL.WEIGHTS, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD, and "
            "for norms that a backbone with random weights lacks."
        )
    elif math.isfinite(step.expected) and abs(step.observed - step.expected) > tolerance * abs(step.expected):
        problems.append(
            f"The observed loss is {_times(step.observed, step.expected)} the expected one, beyond the tolerance of "
            f"{tolerance:g}. {_why_different(step)}"
        )
    if not math.isfinite(step.loss_box_reg):
        problems.append(f"loss_box_reg is {step.loss_box_reg}: look at MODEL.FOCAL.BOX_LOSS, and at the boxes.")
    return problems


def _times(value: float, reference: float) -> str:
    return f"{value / reference:.3g} times" if reference else f"{value:.3g} beside 0 of"


def _why_different(step: FirstStep) -> str:
    """Return why the logits of the model are not at the bias."""
    if step.bias_off is not None and step.bias_off > 1e-3:
        return (
            f"The classifier's bias differs from the configured one by up to {step.bias_off:.3g}: MODEL.WEIGHTS holds "
            "a trained classifier, or the head does not apply MODEL.FOCAL.BIAS_INIT."
        )
    return (
        f"The logits differ from the bias by {step.logit_mean:+.3g} ± {step.logit_std:.3g}. The head's convs should "
        "start from N(0, .01²), and its features should be about 1 in size: look at MODEL.RETINANET.NORM, at the "
        "norms of the backbone (FPN.NORM, RESNETS.NORM) and at MODEL.PIXEL_STD."
    )
