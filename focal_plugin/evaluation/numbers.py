"""The numbers of an evaluation: AP, thresholds, calibration and errors of a detector's boxes on a data set.

AP and precision-recall curves are pycocotools'. All else counts at IoU 0.5 how detections and objects pair, by COCO's
rule: the best detection first, each takes the free object of its class that it overlaps most. Regions to ignore
(``iscrowd``) are no objects, and unmatched detections in one of their class count as neither right nor wrong.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask
from pycocotools.cocoeval import COCOeval

IOU = 0.5  # a detection is right from this IoU with an object of its class on
_NEAR = 0.1  # below it, a detection has nothing to do with an object
KINDS = ("localisation", "class", "duplicate", "background")  # of false positives
SIZES = ("small", "medium", "large")
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass(frozen=True)
class Paired:
    """The D detections of an image, the highest score first, and its G objects.

    Attributes:
        image: the image's entry in COCO's JSON.
        boxes, classes, scores: (D, 4) XYWH in pixels, (D,) and (D,).
        objects, object_classes, areas: (G, 4) XYWH in pixels, (G,) and (G,).
        iou: (D, G).
        matched: (D,) the index of the object of its class that the detection has found, or −1.
    """

    image: dict
    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    objects: np.ndarray
    object_classes: np.ndarray
    areas: np.ndarray
    iou: np.ndarray
    matched: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """Whether each detection has found an object, (D,) bool."""
        return self.matched >= 0

    def missed(self, score_thresh: float) -> np.ndarray:
        """Whether each object is found by no detection of at least ``score_thresh``, (G,) bool."""
        missed = np.ones(len(self.objects), dtype=bool)
        missed[self.matched[self.right & (self.scores >= score_thresh)]] = False
        return missed

    def kinds(self) -> np.ndarray:
        """Return what is wrong with each detection if it is not right, (D,) indices into ``KINDS``.

        It is a duplicate on an object of its class that a better one has found; of the wrong class on an object of
        another; badly localised near an object of its class, at IoU 0.1 to 0.5; or else on background.
        """
        same = self.classes[:, None] == self.object_classes  # (D, G)
        own = np.where(same, self.iou, 0).max(axis=1, initial=0)
        other = np.where(same, 0, self.iou).max(axis=1, initial=0)
        return np.select([own >= IOU, other >= IOU, own >= _NEAR], [2, 1, 0], 3)


def match(iou: np.ndarray) -> np.ndarray:
    """Return the object that each detection takes, (D,), −1 for none, from their (D, G) IoU, the best detection first.

    As in pycocotools, the last of the objects that it overlaps equally.
    """
    matched = np.full(len(iou), -1)
    free = np.ones(iou.shape[1], dtype=bool)
    for d in np.flatnonzero(iou.max(axis=1, initial=0) >= IOU):
        candidates = np.where(free, iou[d], 0)[::-1]
        best = len(candidates) - 1 - candidates.argmax()
        if free[best] and iou[d, best] >= IOU:
            matched[d], free[best] = best, False
    return matched


def pair(coco_eval: COCOeval) -> list[Paired]:
    """Pair the detections and the objects in each image of an evaluation of boxes."""
    classes = {category: k for k, category in enumerate(coco_eval.params.catIds)}
    pairs = []
    for image_id in coco_eval.params.imgIds:
        truth, found = (
            [a for a in coco.imgToAnns.get(image_id, ()) if a["category_id"] in classes]
            for coco in (coco_eval.cocoGt, coco_eval.cocoDt)
        )
        found.sort(key=lambda a: -a["score"])
        boxes, labels = _arrays(found, classes)
        scores = np.array([a["score"] for a in found], dtype=float)
        is_crowd = np.array([bool(a.get("iscrowd", 0)) for a in truth], dtype=bool)
        objects, object_labels = _arrays(truth, classes)
        iou = np.zeros((len(boxes), len(objects)))
        if iou.size:
            iou = mask.iou(boxes, objects, is_crowd.astype(np.uint8).tolist())
        same = np.where(labels[:, None] == object_labels, iou, 0)
        matched = match(same[:, ~is_crowd])
        kept = (matched >= 0) | (same[:, is_crowd].max(axis=1, initial=0) < IOU)
        areas = np.array([a["area"] for a in truth], dtype=float)
        pairs.append(
            Paired(
                coco_eval.cocoGt.imgs[image_id],
                *(boxes[kept], labels[kept], scores[kept]),
                *(objects[~is_crowd], object_labels[~is_crowd], areas[~is_crowd]),
                iou=iou[kept][:, ~is_crowd],
                matched=matched[kept],
            )
        )
    return pairs


def _arrays(annotations: Sequence[dict], classes: dict) -> tuple[np.ndarray, np.ndarray]:
    boxes = np.array([a["bbox"] for a in annotations], dtype=float).reshape(-1, 4)
    return boxes, np.array([classes[a["category_id"]] for a in annotations], dtype=int)


def best_f1(scores: np.ndarray, right: np.ndarray, num_objects: int) -> dict | None:
    """Return the threshold at which F1 is highest, with F1, precision and recall there; None if nothing is right.

    Detections of at least the threshold count. Of equally good thresholds it is the highest.

    Args:
        scores: (D,).
        right: (D,) bool.
        num_objects: the number of objects, found or not.
    """
    if not right.any():
        return None
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # equal scores are in or out together
    found, count = right[order].cumsum()[ends], ends + 1
    best = (found / (count + num_objects)).argmax()  # F1 is twice that
    return {
        "score_thresh": float(scores[order][ends[best]]),
        "f1": float(2 * found[best] / (count[best] + num_objects)),
        "precision": float(found[best] / count[best]),
        "recall": float(found[best] / num_objects),
    }


def calibration(scores: np.ndarray, right: np.ndarray, num_bins: int = 10) -> dict:
    """Compare scores with the share of right detections, in bins of equal width over [0, 1].

    Returns:
        ``ece``, the expected calibration error: the mean over the detections of the distance between the two in their
        bin; ``mean_score`` and ``precision`` over all; all None without detections. ``bins``, each with the same two
        numbers, where it is ``from`` and ``to``, and how many ``detections`` it has.
    """
    place = np.minimum((scores * num_bins).astype(int), num_bins - 1)
    bins = [
        {"from": i / num_bins, "to": (i + 1) / num_bins, **_confidence(scores[place == i], right[place == i])}
        for i in range(num_bins)
    ]
    gaps = [b["detections"] * abs(b["mean_score"] - b["precision"]) for b in bins if b["detections"]]
    return {"ece": sum(gaps) / len(scores) if len(scores) else None, **_confidence(scores, right), "bins": bins}


def _confidence(scores: np.ndarray, right: np.ndarray) -> dict:
    found = len(scores) > 0
    return {
        "detections": len(scores),
        "mean_score": float(scores.mean()) if found else None,
        "precision": float(right.mean()) if found else None,
    }


def confusion(pairs: Sequence[Paired], num_classes: int, score_thresh: float) -> np.ndarray:
    """Return how often an object of class i is detected as class j, (K + 1, K + 1) int64; the last is background.

    The right detections are the diagonal. The others, the best first, take the objects that are still missed, whatever
    their class; what is then left is background, detected or missed.
    """
    counts = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    for p in pairs:
        shown = p.scores >= score_thresh
        classes, missed = p.classes[shown & ~p.right], np.flatnonzero(p.missed(score_thresh))
        matched = match(p.iou[shown & ~p.right][:, missed])
        truth = np.append(p.object_classes[missed], num_classes)[matched]  # −1 is the last, background
        np.add.at(counts, (truth, classes), 1)
        left = np.delete(p.object_classes[missed], matched[matched >= 0])
        np.add.at(counts, (left, num_classes), 1)
        found = p.classes[shown & p.right]
        np.add.at(counts, (found, found), 1)
    return counts


def measure(coco_eval: COCOeval, num_worst: int = 6) -> dict:
    """Return the content of evaluation.json for an accumulated evaluation of boxes, without the data set's name."""
    pairs = pair(coco_eval)
    names = [coco_eval.cocoGt.cats[category]["name"] for category in coco_eval.params.catIds]
    scores, right = _joined(p.scores for p in pairs), _joined(p.right for p in pairs).astype(bool)
    best = best_f1(scores, right, sum(len(p.objects) for p in pairs))
    score_thresh = best["score_thresh"] if best else 0.0
    counts = _counts(pairs, len(names), score_thresh, coco_eval)
    rows = [
        {"name": name, **_average_precisions(coco_eval, k), **counts[k]}
        for k, name in [(None, "all"), *enumerate(names)]
    ]
    return {
        "images": len(pairs),
        "iou": IOU,
        "score_thresh": score_thresh,
        "overall": rows[0],
        "classes": rows[1:],
        "calibration": calibration(scores, right),
        "confusion": confusion(pairs, len(names), score_thresh).tolist(),
        "worst_images": _worst_images(pairs, score_thresh, num_worst),
    }


def _joined(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([[], *arrays])


def _average_precisions(coco_eval: COCOeval, k: int | None) -> dict:
    """The AP of a class, or with None of all, in percent, None without objects; the curve at IoU 0.5."""
    params, precision = coco_eval.params, coco_eval.eval["precision"]  # (T, R, K, A, M)
    chosen = slice(None) if k is None else slice(k, k + 1)
    at = {"": slice(None), **{f"{100 * t:.0f}": slice(i, i + 1) for i, t in enumerate(params.iouThrs)}}

    def average(thresholds: str, area: str) -> float | None:
        values = precision[at[thresholds], :, chosen, params.areaRngLbl.index(area), -1]
        known = values[values > -1]
        return float(100 * known.mean()) if known.size else None

    metrics = {"AP": average("", "all"), "AP50": average("50", "all"), "AP75": average("75", "all")}
    metrics |= {f"AP{size[0]}": average("", size) for size in SIZES}
    curve = precision[at["50"], :, chosen, params.areaRngLbl.index("all"), -1][0]  # (R, K or 1)
    known = curve[:, (curve > -1).all(axis=0)]
    return {**metrics, "curve": known.mean(axis=1).round(4).tolist() if known.size else None}


def _counts(pairs: Sequence[Paired], num_classes: int, score_thresh: float, coco_eval: COCOeval) -> dict:
    """The best threshold of each class, and of all under None; its detections and misses at ``score_thresh``."""
    ranges = dict(zip(coco_eval.params.areaRngLbl, coco_eval.params.areaRng))
    scores, right = _joined(p.scores for p in pairs), _joined(p.right for p in pairs).astype(bool)
    classes, kinds = _joined(p.classes for p in pairs), _joined(p.kinds() for p in pairs)
    areas, object_classes = _joined(p.areas for p in pairs), _joined(p.object_classes for p in pairs)
    missed = _joined(p.missed(score_thresh) for p in pairs).astype(bool)
    sizes = {size: (areas >= ranges[size][0]) & (areas < ranges[size][1]) for size in SIZES}
    counts = {}
    for k in (None, *range(num_classes)):
        found = np.full(len(classes), True) if k is None else classes == k
        there = np.full(len(areas), True) if k is None else object_classes == k
        shown = found & (scores >= score_thresh)
        counts[k] = {
            "objects": int(there.sum()),
            "detections": int(found.sum()),
            "best_f1": best_f1(scores[found], right[found], int(there.sum())),
            "right": int((shown & right).sum()),
            "false_positives": {kind: int((shown & ~right & (kinds == i)).sum()) for i, kind in enumerate(KINDS)},
            "objects_by_size": {size: int((there & chosen).sum()) for size, chosen in sizes.items()},
            "missed_by_size": {size: int((there & chosen & missed).sum()) for size, chosen in sizes.items()},
        }
    return counts


def _worst_images(pairs: Sequence[Paired], score_thresh: float, number: int) -> list[dict]:
    """The images with the most errors, and in them the boxes, XYWH in pixels."""
    errors = [int(p.missed(score_thresh).sum() + (~p.right & (p.scores >= score_thresh)).sum()) for p in pairs]
    worst = sorted(range(len(pairs)), key=lambda i: -errors[i])[:number]
    return [_picture(pairs[i], score_thresh) for i in worst if errors[i]]


def _picture(p: Paired, score_thresh: float) -> dict:
    missed, shown = p.missed(score_thresh), np.flatnonzero(p.scores >= score_thresh)
    verdicts = [None if p.right[d] else KINDS[kind] for d, kind in enumerate(p.kinds())]
    return {
        "file_name": p.image.get("file_name", str(p.image["id"])),
        **{key: p.image.get(key) for key in ("id", "width", "height")},
        "missed": int(missed.sum()),
        "false_positives": int((~p.right[shown]).sum()),
        "objects": [
            {"box": box.tolist(), "class": int(k), "missed": bool(is_missed)}
            for box, k, is_missed in zip(p.objects, p.object_classes, missed)
        ],
        "detections": [
            {"box": p.boxes[d].tolist(), "class": int(p.classes[d]), "score": float(p.scores[d]), "error": verdicts[d]}
            for d in shown
        ],
    }
