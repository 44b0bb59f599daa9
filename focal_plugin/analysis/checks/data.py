"""Checks of the training set: its classes, boxes, empty images and crowds, and what the anchors make of them."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from tqdm import tqdm

from ...data import FocalDatasetMapper, check_num_classes
from ...registry import build_matcher
from ...structures import POSITIVE, Anchors
from ..common import read_records, spread
from .case import ERROR, OK, SKIPPED, WARNING, Case, Finding, few, objects, percent

_BATCH_IMAGES = 16
_OUTSIDE = 1.0  # pixels: what rounding explains
_MANY_EMPTY, _MANY_WITHOUT, _MANY_LOW_QUALITY = 0.1, 0.01, 0.25  # shares from which on it is worth a warning


def check_data(case: Case) -> Iterator[Finding]:
    """Whether the training set is there and can be read."""
    boxes = sum(len(objects(record)) for record in case.records)
    text = f"{few(case.cfg.DATASETS.TRAIN)}: {len(case.records):,} images, {boxes:,} boxes"
    if not boxes:
        yield Finding(ERROR, f"{text}: nothing to learn from. Look at the annotations that DATASETS.TRAIN names.")
        return
    left_out = Counter()
    for name in case.cfg.DATASETS.TRAIN:
        left_out.update(getattr(DatasetCatalog[name], "left_out", {}))
    listed = ", ".join(f"{count:,} × {kind}" for (_, kind), count in sorted(left_out.items()))
    yield Finding(OK, text + (f"; left out by on_error skip: {listed}" if left_out else ""))


def check_test_data(case: Case) -> Iterator[Finding]:
    """Whether the test sets are there and can be read."""
    names = case.cfg.DATASETS.TEST
    if not names:
        yield Finding(OK, "DATASETS.TEST is empty: nothing is evaluated")
        return
    yield Finding(OK, f"{few(names)}: {len(read_records(case.cfg, 'TEST')):,} images")


def check_classes(case: Case) -> Iterator[Finding]:
    """``NUM_CLASSES`` against the data sets, the sets against each other, and every box against ``NUM_CLASSES``."""
    try:
        check_num_classes(case.cfg)
    except (KeyError, ValueError) as error:
        yield Finding(ERROR, str(error.args[0]))
        return
    if not case.is_dense:
        yield Finding(OK, "as many as the model has")
        return
    num_classes = case.cfg.MODEL.RETINANET.NUM_CLASSES
    counts = Counter(annotation["category_id"] for record in case.records for annotation in objects(record))
    names = MetadataCatalog.get(case.cfg.DATASETS.TRAIN[0]).get("thing_classes") or list(range(num_classes))
    if beyond := {k: count for k, count in sorted(counts.items()) if not 0 <= k < num_classes}:
        yield Finding(
            ERROR,
            f"{sum(beyond.values()):,} boxes have category_id {few(beyond)}; expected 0 to {num_classes - 1} "
            f"(MODEL.RETINANET.NUM_CLASSES {num_classes}). Count the classes from 0 in the records; class "
            f"{num_classes} is the background.",
        )
        return
    background = [name for name in names if str(name).strip("_ ").lower() in ("background", "bg")]
    if background:
        yield Finding(
            WARNING,
            f"{background[0]!r} is one of the classes, but the background has no channel and no boxes. Leave it out of "
            "the classes and of MODEL.RETINANET.NUM_CLASSES.",
        )
    absent = [name for k, name in enumerate(names) if not counts[k] and name not in background]
    if absent:
        yield Finding(WARNING, f"No box is of class {few(absent)}: it is never learnt. Add boxes, or leave it out.")
    if not background and not absent:
        yield Finding(OK, f"{num_classes} in the data and in MODEL.RETINANET.NUM_CLASSES: {few(names, most=10)}")


@dataclass
class _Bad:
    """Boxes of one kind that cannot be right, counted, and an image that has one."""

    count: int = 0
    where: str = ""

    def add(self, record: dict) -> None:
        self.count += 1
        self.where = self.where or str(record.get("file_name"))


def check_boxes(case: Case) -> Iterator[Finding]:
    """Boxes that are no numbers, have no area, or lie outside their image."""
    not_numbers, no_area, outside, total = _Bad(), _Bad(), _Bad(), 0
    for record in case.records:
        size = (record.get("width", math.inf), record.get("height", math.inf))
        for annotation in record.get("annotations", []):
            total += 1
            x0, y0, x1, y1 = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
            if not all(math.isfinite(value) for value in (x0, y0, x1, y1)):
                not_numbers.add(record)
            elif x1 <= x0 or y1 <= y0:
                no_area.add(record)
            elif min(x0, y0) < -_OUTSIDE or x1 > size[0] + _OUTSIDE or y1 > size[1] + _OUTSIDE:
                outside.add(record)
    if not_numbers.count:
        yield Finding(ERROR, f"{not_numbers.count:,} boxes are not finite numbers, as in {not_numbers.where}.")
    if no_area.count:
        yield Finding(
            WARNING,
            f"{percent(no_area.count, total)} of the boxes have no area, as in {no_area.where}: they are never trained "
            "on. Are they (x, y, width, height) with a bbox_mode of XYXY_ABS?",
        )
    if outside.count:
        yield Finding(
            WARNING,
            f"{percent(outside.count, total)} of the boxes reach outside their image, as in {outside.where}: they are "
            "clipped to it. Are they in the pixels of another size, or (x0, y0, x1, y1) with a bbox_mode of XYWH_ABS?",
        )
    if not (not_numbers.count or no_area.count or outside.count):
        yield Finding(OK, f"all {total:,} have an area and lie in their images")


def check_empty_images(case: Case) -> Iterator[Finding]:
    """How many images have no object, and what becomes of them."""
    empty, total = sum(not objects(record) for record in case.records), len(case.records)
    if not empty:
        yield Finding(OK, f"none of {total:,}")
    elif not case.filters_empty:
        yield Finding(OK, f"{percent(empty, total)}, trained on (DATALOADER.FILTER_EMPTY_ANNOTATIONS False)")
    else:
        text = f"{percent(empty, total)}, left out of training by DATALOADER.FILTER_EMPTY_ANNOTATIONS True"
        many = empty > _MANY_EMPTY * total
        change = ". If they show what is no object, False trains on them." if many else ""
        yield Finding(WARNING if many else OK, text + change)


def check_crowds(case: Case) -> Iterator[Finding]:
    """How many boxes are crowds, and whether the anchors in them are ignored."""
    annotations = [annotation for record in case.records for annotation in record.get("annotations", [])]
    crowds = sum(annotation.get("iscrowd", 0) != 0 for annotation in annotations)
    ioa = case.cfg.MODEL.FOCAL.MATCHER.IGNORE_IOA
    if not crowds:
        yield Finding(OK, "none")
    elif case.cfg.MODEL.META_ARCHITECTURE != "FocalRetinaNet":
        yield Finding(
            WARNING,
            f"{percent(crowds, len(annotations))} of the boxes are crowds, which are background to "
            f"{case.cfg.MODEL.META_ARCHITECTURE}. MODEL.META_ARCHITECTURE FocalRetinaNet ignores the anchors in them.",
        )
    elif ioa == 0:
        yield Finding(
            WARNING,
            f"{percent(crowds, len(annotations))} of the boxes are crowds, and the anchors in them background, since "
            "MODEL.FOCAL.MATCHER.IGNORE_IOA is 0; 0.5 ignores them.",
        )
    else:
        yield Finding(
            OK,
            f"{percent(crowds, len(annotations))} of the boxes: anchors in one by {ioa:g} of their area or more are "
            "ignored (MODEL.FOCAL.MATCHER.IGNORE_IOA)",
        )


def check_coverage(case: Case) -> Iterator[Finding]:
    """Boxes that no anchor is matched to, or only by the low-quality rule."""
    if not case.is_dense:
        yield Finding(SKIPPED, f"{case.cfg.MODEL.META_ARCHITECTURE} is no RetinaNet")
        return
    coverage, total = case.coverage, len(case.coverage.regular)
    if not total:
        yield Finding(ERROR, f"none of {len(case.images)} images has a box that has an area")
        return
    without, low = ~coverage.covered, coverage.covered & ~coverage.regular
    change = (
        "`python -m focal_plugin.analysis anchors` suggests other MODEL.ANCHOR_GENERATOR sizes and ratios; a larger "
        "INPUT.MIN_SIZE_TRAIN, or a level P2, reaches small boxes."
    )
    if without.any():
        sides = np.sqrt(case.areas[without])
        yield Finding(
            WARNING if without.sum() > _MANY_WITHOUT * total else OK,
            f"{percent(without.sum(), total)} of the boxes get no anchor (half of them below {np.median(sides):.0f} px "
            f"a side) and are never learnt. {change}",
        )
    if low.sum() > _MANY_LOW_QUALITY * total:
        yield Finding(
            WARNING,
            f"{percent(low.sum(), total)} of the boxes get an anchor by the low-quality rule alone, half of them below "
            f"{np.median(np.sqrt(case.areas[low])):.0f} px a side: no anchor overlaps them enough. {change}",
        )
    elif not without.any():
        yield Finding(
            OK,
            f"all {total:,} boxes of {len(case.images):,} images have one: {_by_level(case)}; {low.mean():.1%} by the "
            "low-quality rule alone",
        )


def check_positives(case: Case) -> Iterator[Finding]:
    """Positive anchors by level, in images as training gets them."""
    if not case.is_dense:
        yield Finding(SKIPPED, f"{case.cfg.MODEL.META_ARCHITECTURE} is no RetinaNet")
        return
    matcher, mapper = build_matcher(case.cfg), FocalDatasetMapper(case.cfg, is_train=True)
    positives, boxes, records = [], 0, spread(case.used_records, _BATCH_IMAGES)
    for record in tqdm(records, desc="Images", unit="image", delay=2, leave=False):
        sample = mapper(record)
        instances = sample["instances"]
        boxes += len(instances)
        anchors = Anchors.from_generator(case.anchor_generator, case.grid.features(sample["image"].shape[-2:]))
        _, labels = matcher(anchors, instances)
        levels = labels.split([len(level) for level in anchors.boxes])
        positives.append([int((level == POSITIVE).sum()) for level in levels])
    names = case.cfg.MODEL.RETINANET.IN_FEATURES
    totals = dict(zip(names, np.sum(positives, axis=0)))
    listed = ", ".join(f"{name} {total / len(records):.1f}" for name, total in totals.items())
    text = f"{listed} an image, in {len(records)} images as training gets them"
    if not sum(totals.values()):
        yield Finding(
            ERROR,
            f"no anchor is positive for the {boxes} boxes of {len(records)} images: loss_box_reg stays 0. Look at the "
            "boxes' bbox_mode, at MODEL.ANCHOR_GENERATOR.SIZES and at MODEL.RETINANET.IOU_THRESHOLDS.",
        )
        return
    never = [name for name, any_box in zip(names, case.coverage.positives.any(axis=0)) if not any_box]
    if never := [name for name in never if not totals[name]]:
        yield Finding(
            WARNING,
            f"{text}: {few(never, most=9)} never has any, also not in {len(case.images):,} images. Either the anchors "
            "there are of the wrong size (MODEL.ANCHOR_GENERATOR.SIZES), or the level is not needed, and without it in "
            "MODEL.RETINANET.IN_FEATURES the model is faster.",
        )
    else:
        yield Finding(OK, text)


def _by_level(case: Case) -> str:
    """Which share of the boxes has a positive at each level."""
    shares = case.coverage.positives.astype(bool).mean(axis=0)
    return ", ".join(f"{name} {share:.0%}" for name, share in zip(case.cfg.MODEL.RETINANET.IN_FEATURES, shares))
