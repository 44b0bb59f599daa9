#!/usr/bin/env python
"""Plant mistakes in the labels of a training set, and count how many of them `focal analysis hardest --folds` finds.

    label_errors.py --data bccd trees --seeds 1 2 3 [--folds 2] [--output output/label_errors]

10 % of the boxes are removed; of 5 % the class is changed, where there are several; 5 % are moved by 20 to 40 % of
their width and of their height. For each kind, k is the number planted, and the k suggestions that rank highest are
compared with what was planted: precision and recall are then one number. The same is counted for plain confidence
(detections on no label, by score; labels, by the lowest score of a detection of their class on them) and for random
choice among the same. What the page marks is counted too. Trainings that are done, or begun, are not
repeated. It prints a table and writes it to label_errors.md and .json.
"""

# ruff: noqa: E402  # the folder comes first: the package need not be installed

import argparse
import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

import focal_plugin  # noqa: F401  # before Detectron2, whose deprecation warnings it keeps away

# isort: split
import torch
from detectron2.config import CfgNode
from detectron2.evaluation import inference_context
from detectron2.structures import Boxes, pairwise_iou
from tabulate import tabulate
from tqdm import tqdm

from focal_plugin.analysis.common import build_focal_model, load_weights, read_records
from focal_plugin.analysis.labels.folds import cut, train_folds
from focal_plugin.analysis.labels.judge import Judge
from focal_plugin.analysis.labels.suggestions import Ranking
from focal_plugin.config.load import load_config

SETS = {  # config, and changes of it
    "bccd": (str(Path(__file__).with_name("label_errors_bccd.yaml")), []),
    "trees": ("quickstart/trees.yaml", ["SOLVER.MAX_ITER", "200"]),
}
KINDS = ("missing", "class", "box")
REMOVED, SWAPPED, SHIFTED = 0.10, 0.05, 0.05


def plant(records: list[dict], num_classes: int, seed: int) -> list[dict]:
    """Plant mistakes in the labels of ``records``, and return them: ``kind``, ``true`` and ``given`` label of each."""
    rng = random.Random(seed)
    labels = [(r, a) for r in records for a in r["annotations"] if not a.get("iscrowd", 0)]
    rng.shuffle(labels)
    shares = zip(KINDS, (REMOVED, SWAPPED * (num_classes > 1), SHIFTED))
    kinds = [kind for kind, share in shares for _ in range(round(share * len(labels)))]
    planted = []
    for kind, (record, label) in zip(kinds, labels):
        planted.append({"kind": kind, "file_name": record["file_name"], "true": dict(label), "given": label})
        if kind == "missing":
            record["annotations"] = [a for a in record["annotations"] if a is not label]
        elif kind == "class":
            label["category_id"] = rng.choice([k for k in range(num_classes) if k != label["category_id"]])
        else:
            move(label, record, rng)
    return planted


def move(label: dict, record: dict, rng: random.Random) -> None:
    """Move a label's box to a side where the image has room for it; clip it where none has."""
    box = list(label["bbox"])
    for axis, size in ((0, record["width"]), (1, record["height"])):
        side = box[axis + 2] - box[axis]
        step = rng.uniform(0.2, 0.4) * side * rng.choice((-1, 1))
        if box[axis] + step < 0 or box[axis + 2] + step > size:
            step = -step
        box[axis], box[axis + 2] = max(box[axis] + step, 0), min(box[axis + 2] + step, size)
    label["bbox"] = box


class Planted:
    """The planted mistakes of a set, to look up what a suggestion has found."""

    def __init__(self, planted: list[dict]):
        self.planted = planted

    def count(self, kind: str) -> int:
        """Return k."""
        return sum(mistake["kind"] == kind for mistake in self.planted)

    def of_label(self, kind: str, label: dict) -> int | None:
        """Return the number of the mistake of this kind in a label."""
        found = (i for i, mistake in enumerate(self.planted) if mistake["given"] is label and mistake["kind"] == kind)
        return next(found, None)

    def removed_at(self, file_name: str, box: Sequence[float], category: int) -> int | None:
        """Return the number of the removed label of this class that overlaps a box by an IoU of at least .5."""
        for i, mistake in enumerate(self.planted):
            same = (mistake["kind"], mistake["file_name"]) == ("missing", file_name)
            if same and mistake["true"]["category_id"] == category and iou(box, mistake["true"]["bbox"]) >= 0.5:
                return i
        return None


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the IoU of two boxes, XYXY."""
    return float(pairwise_iou(Boxes(torch.tensor([a]).float()), Boxes(torch.tensor([b]).float())))


def plain_confidence(found, record: dict, planted: Planted) -> Iterator[tuple[str, float, int | None]]:
    """Yield (kind, value, mistake found) for the detections and the labels of an image."""
    labels = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
    boxes = torch.tensor([a["bbox"] for a in labels]).reshape(-1, 4).float()
    overlap = pairwise_iou(found.pred_boxes, Boxes(boxes)) >= 0.5  # (D, G)
    for d in (~overlap.any(dim=1)).nonzero().flatten().tolist():
        box, category = found.pred_boxes.tensor[d].tolist(), int(found.pred_classes[d])
        yield "missing", float(found.scores[d]), planted.removed_at(record["file_name"], box, category)
    for g, label in enumerate(labels):
        same = overlap[:, g] & (found.pred_classes == label["category_id"])
        for kind in ("class", "box"):
            yield kind, -float(found.scores[same].max()) if same.any() else 0.0, planted.of_label(kind, label)


def hits(ranked: Sequence[int | None], k: int) -> int:
    """Return how many mistakes are among the first k; one that is there twice counts once."""
    return len({mistake for mistake in ranked[:k] if mistake is not None})


def planted_parts(cfg: CfgNode, folds: int, seed: int) -> tuple[list[list[dict]], list[dict]]:
    """Return the parts of the training set with mistakes, the same images for every seed; and the mistakes."""
    records = read_records(cfg, "TRAIN")
    planted = plant(records, cfg.MODEL.RETINANET.NUM_CLASSES, seed)
    return cut(records, folds), planted


def measure(cfg: CfgNode, seed: int, args: argparse.Namespace, folder: Path) -> list[dict]:
    """Return a row for each kind of mistake, planted by ``seed``; what was trained on has those of ``cfg.SEED``."""
    runs = train_folds(cfg, planted_parts(cfg, args.folds, cfg.SEED)[0], folder)
    parts, mistakes = planted_parts(cfg, args.folds, seed)
    parts = parts[: args.parts]
    records = [record for part in parts for record in part]
    files = {record["file_name"] for record in records}
    planted = Planted([mistake for mistake in mistakes if mistake["file_name"] in files])
    ranking = Ranking(top=sum(len(record["annotations"]) for record in records))
    confidence: dict[str, list] = {kind: [] for kind in KINDS}
    for part, run in zip(parts, runs):
        model = build_focal_model(run, "hardest")
        load_weights(model, run.MODEL.WEIGHTS)
        judge = Judge(model, run)
        for record in tqdm(part, desc="Judging", unit="image"):
            ranking.add(judge(record))
            inputs = {"image": judge.mapper(record)["image"], "height": record["height"], "width": record["width"]}
            with inference_context(model), torch.no_grad():
                found = model([inputs])[0]["instances"].to("cpu")
            for kind, value, mistake in plain_confidence(found, record, planted):
                confidence[kind].append((value, mistake))
    rows = []
    agreement = ranking.agreement()
    score_thresh = agreement["score_thresh"] if agreement else math.inf
    by_file = {record["file_name"]: record for record in records}
    for kind, suggestions in ranking.best().items():
        if not (k := kind in KINDS and planted.count(kind)):
            continue
        ours = [
            planted.removed_at(s.record["file_name"], s.predicted_box, s.predicted_class)
            if kind == "missing"
            else planted.of_label(kind, by_file[s.record["file_name"]]["annotations"][s.label])
            for s in suggestions
        ]
        marked = [mistake for s, mistake in zip(suggestions, ours) if s.is_sure(score_thresh)]
        plain = [mistake for _, mistake in sorted(confidence[kind], key=lambda pair: -pair[0])]
        rows.append(
            {
                "kind": kind,
                "planted": k,
                "hardest": hits(ours, k) / k,
                "confidence": hits(plain, k) / k,
                "random": sum(mistake is not None for mistake in plain) / len(plain),
                "hardest, recall at 2k": hits(ours, 2 * k) / k,
                "confidence, recall at 2k": hits(plain, 2 * k) / k,
                "marked": len(marked),
                "precision of marked": hits(marked, len(marked)) / len(marked) if marked else None,
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--parts", type=int, metavar="N", help="train for and judge only N of the folds (default: all)")
    text = "train with the first seed alone; the others judge other mistakes, in images that the models have not seen"
    parser.add_argument("--one-training", action="store_true", help=text)
    parser.add_argument("--output", type=Path, default=Path("output/label_errors"))
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="changes of the configs")
    args = parser.parse_args(argv)
    rows = []
    for data in args.data:
        config, opts = SETS[data]
        for seed in args.seeds:
            trained = args.seeds[0] if args.one_training else seed
            cfg = load_config(config, [*opts, *args.opts, "SEED", str(trained)])
            found = measure(cfg, seed, args, args.output / data / f"seed_{trained}")
            rows += [{"data": data, "seed": seed, **row} for row in found]
            text = tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".3f")
            (args.output / "label_errors.md").write_text(text + "\n")
            (args.output / "label_errors.json").write_text(json.dumps(rows, indent=1))
    print(text)


if __name__ == "__main__":
    main()
