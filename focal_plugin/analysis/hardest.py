"""The hardest examples, which are often wrong labels: what to accept or reject of what a model says against them.

The focal loss puts nearly all of its weight on few examples (figure 4 of the paper). Where the model is right, they are
mistakes of the labels: an object that nobody labelled ("missing"), a label of another class ("class"), at another place
("box"), or without an object ("extra"). Each kind is ranked by the term of the loss that it raises, and the anchors of
one object are one suggestion. Crowds are left out.

With --folds K, the images of DATASETS.TRAIN are cut into K parts, and each is judged by a model that was trained on the
others, with this config. Otherwise --weights judges; give it labels that it was not trained on, since it knows those by
heart.
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from tabulate import tabulate
from tqdm import tqdm

from ..config import ConfigError
from ..data import check_num_classes, class_names
from .common import (
    add_flags,
    build_focal_model,
    load_weights,
    output_folder,
    output_paths,
    print_written,
    read_config,
    read_records,
    spread,
    write_csv,
)
from .labels.folds import cut, train_folds
from .labels.judge import Judge
from .labels.page import rows, to_coco, to_html
from .labels.suggestions import Ranking, Suggestion


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this analysis."""
    parser.add_argument("--weights", metavar="FILE", help="the checkpoint that judges (default: MODEL.WEIGHTS)")
    parser.add_argument("--split", choices=("test", "train"), help="data sets (default: test; with --folds: train)")
    text = "train K models, so that each image of DATASETS.TRAIN is judged by one that has not seen it; resumes"
    parser.add_argument("--folds", type=int, metavar="K", help=text)
    text = (
        "which images stay in one part: image (each alone), or as for `data split` a CSV file or a regular expression"
    )
    parser.add_argument("--by", default="image", metavar="WHAT", help=text)
    parser.add_argument("--top", type=int, default=100, metavar="N", help="suggestions of each kind (default: 100)")
    add_flags(parser, num_images=0)


def main(args: argparse.Namespace) -> int:
    """Judge the labels, print what was found, and write the page, the table and the COCO file."""
    if args.top < 1:
        raise ConfigError(f"--top is {args.top}; expected a number of suggestions of at least 1.")
    if args.folds is not None and (args.weights or args.split == "test"):
        raise ConfigError("--folds trains what judges DATASETS.TRAIN: leave out --weights and --split test.")
    if args.folds is None and args.by != "image":
        raise ConfigError(f"--by is {args.by!r}, which says what stays in one part: give --folds too.")
    cfg = read_config(args)
    key = (args.split or ("train" if args.folds is not None else "test")).upper()
    records = read_records(cfg, key)
    check_num_classes(cfg)
    ranking = rank(who_judges(args, cfg, records), args.top)

    names = class_names(cfg.DATASETS[key][0]) or [f"class {k}" for k in range(cfg.MODEL.RETINANET.NUM_CLASSES)]
    best = ranking.best()
    shown = [suggestion for kind in best.values() for suggestion in kind]
    share = sum(s.loss for s in shown) / ranking.loss if ranking.loss else 0.0
    of = f"{ranking.images} images of DATASETS.{key} with {ranking.labels} labels"
    agreement = ranking.agreement()
    score_thresh = agreement["score_thresh"] if agreement else math.inf
    sure = {kind: sum(s.is_sure(score_thresh) for s in found) for kind, found in best.items()}
    print(agreed(agreement))
    print(f"The hardest objects of {of}. They hold {share:.0%} of the focal loss:")
    print(table(best, names))
    if listed := ", ".join(f"{count} {kind}" for kind, count in sure.items() if count):
        print(f"Surest, and marked on the page: {listed}.")
    if ranking.unjudged:
        print(f"{ranking.unjudged} labels have no positive anchor and were not judged; see `analysis anchors`.")
    stem = f"hardest_{key.lower()}"
    page, csv, coco = paths = output_paths(args, cfg, f"{stem}.html", f"{stem}.csv", f"{stem}.json")
    folds = f"{args.folds} models, each trained on the other images" if args.folds else Path(cfg.MODEL.WEIGHTS).name
    about = {
        "data_set": ", ".join(cfg.DATASETS[key]),
        "judge": folds,
        "of": of,
        "share": share,
        "agreed": agreed(agreement),
        "score_thresh": score_thresh,
        "suggestions": coco.name,
    }
    page.write_text(to_html(best, names, about), encoding="utf-8")
    write_csv(csv, rows(shown, names))
    coco.write_text(to_coco(shown, names))
    print_written(paths)
    if shown:
        print(f"Apply those that are right: focal data correct IN OUT --suggestions {coco} --accept NUMBERS ...")
    return 0


def who_judges(args: argparse.Namespace, cfg: CfgNode, records: list[dict]) -> Iterable[tuple[CfgNode, list[dict]]]:
    """Return the config of each model that judges, and the records that it judges; with --folds, when it is trained.

    Raises:
        ConfigError: there is no model that judges.
    """
    judged = spread(records, args.num_images)
    if args.folds is not None:
        build_focal_model(cfg, "hardest")  # its errors before any training
        parts = cut(records, args.folds, args.by)
        runs = train_folds(cfg, parts, output_folder(args, cfg) / f"hardest_{args.folds}_folds")
        chosen = set(map(id, judged))
        return zip(runs, [[record for record in part if id(record) in chosen] for part in parts])
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("No weights: give a trained checkpoint with --weights or MODEL.WEIGHTS, or --folds K.")
    return [(cfg, judged)]


def rank(judges: Iterable[tuple[CfgNode, Sequence[dict]]], top: int) -> Ranking:
    """Return the ranking of the labels of records, which the model of the config beside them judges."""
    ranking = Ranking(top)
    for cfg, records in judges:
        model = build_focal_model(cfg, "hardest")
        load_weights(model, cfg.MODEL.WEIGHTS)
        judge = Judge(model, cfg)
        for record in tqdm(records, desc="Judging", unit="image", disable=None):
            ranking.add(judge(record))
    return ranking


def agreed(agreement: dict | None) -> str:
    """Return a sentence on how well detections and labels agree, as ``best_f1`` has it."""
    if agreement is None:
        return (
            "What judges finds none of the labels, so its suggestions are worth nothing: is its training finished, and "
            "long enough?"
        )
    return (
        f"What judges agrees best with the labels at a score of {agreement['score_thresh']:.2f}: "
        f"{agreement['recall']:.0%} of them are detected, and {agreement['precision']:.0%} of the detections have one."
    )


def table(best: dict[str, list[Suggestion]], names: Sequence[str]) -> str:
    """Return a table of the number of suggestions of each kind for each class, where there are any; "" without any."""
    counted = [
        {"class, if accepted": name, **{kind: sum(s.accepted[1] == k for s in found) for kind, found in best.items()}}
        for k, name in enumerate(names)
    ]
    rows = [row for row in counted if any(row[kind] for kind in best)]
    if not rows:
        return ""
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=[0])  # a class may be called 007
