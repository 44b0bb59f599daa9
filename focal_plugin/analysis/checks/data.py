"""Checks of the training set: its classes, boxes, empty images and crowds, and the anchors that its boxes get."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ...data import DataError, FocalDatasetMapper, check_num_classes, has_boxes
from ...data.images import decode_all
from ...data.records import NO_SIZE, NOT_NUMBERS, OUTSIDE, box_defect, objects
from ...data.suspects import repeated_boxes
from ...engine.validation import check_truth
from ...files.progress import progress
from ...registry import build_matcher
from ...structures import Anchors
from ..common import read_records, spread
from ..coverage import count_positives
from .case import ERROR, OK, SKIPPED, WARNING, Case, Finding, few, percent

_BATCH_IMAGES = 16
_MANY_EMPTY, _MANY_WITHOUT, _MANY_LOW_QUALITY = 0.1, 0.01, 0.25  # shares above which there is a warning


def check_data(case: Case) -> Iterator[Finding]:
    """Check that the training set can be read and has boxes."""
    boxes = sum(len(objects(record)) for record in case.records)
    text = f"{few(case.cfg.DATASETS.TRAIN)}: {len(case.records):,} images, {boxes:,} boxes"
    if not boxes:
        yield Finding(ERROR, f"{text}, so nothing to learn. Look at the annotations of these data sets.")
        return
    left_out = Counter()
    for name in case.cfg.DATASETS.TRAIN:
        left_out.update(getattr(DatasetCatalog[name], "left_out", {}))
    listed = ", ".join(f"{count:,} × {kind}" for (_, kind), count in sorted(left_out.items()))
    yield Finding(OK, text + (f"; left out by on_error skip: {listed}" if left_out else ""))


def check_test_data(case: Case) -> Iterator[Finding]:
    """Check that the test sets and those of ``DATASETS.VALIDATION`` can be read."""
    names = case.cfg.DATASETS.TEST
    if validation := case.cfg.DATASETS.VALIDATION:
        records = read_records(case.cfg, "VALIDATION")
        check_truth(case.cfg, records)
        yield Finding(OK, f"{few(validation)}: {len(records):,} images for losses")
    if not names:
        yield Finding(OK, "DATASETS.TEST is empty: nothing is evaluated")
        return
    yield Finding(OK, f"{few(names)}: {len(read_records(case.cfg, 'TEST')):,} images")


def check_images(case: Case) -> Iterator[Finding]:
    """Check that images can be decoded: a broken one may have a header that opens."""
    test = read_records(case.cfg, "TEST") if case.cfg.DATASETS.TEST else []
    broken, several, decoded = defaultdict(list), [], []  # broken: messages by (what, whether they are skipped)
    for what, records in (("training", case.records), ("test", test)):
        chosen = spread(records, case.num_images)
        for record, found in zip(chosen, decode_all([record["file_name"] for record in chosen], f"{what} images")):
            if isinstance(found, DataError):
                broken[what, record.get("on_error") == "skip"].append(str(found))
            elif found > 1:
                several.append(record["file_name"])
        if chosen:
            total = f"all {len(records):,}" if len(chosen) == len(records) else f"{len(chosen):,} of {len(records):,}"
            decoded.append(f"{total} {what} images")
    sampled = ", evenly spread," if any(" of " in text for text in decoded) else ""
    for (what, skipped), messages in broken.items():
        then = "Others take their places in training" if what == "training" else "They are left out of evaluation"
        change = f"{then} (on_error: skip)." if skipped else "Correct them, or leave them out with on_error: skip."
        text = (
            f"{len(messages):,} {what} images cannot be decoded, of {' and '.join(decoded)}: {few(messages)} {change}"
        )
        yield Finding(WARNING if skipped else ERROR, text)
    if several:
        have = "has" if len(several) == 1 else "have"
        text = (
            f"{len(several):,} of the decoded images {have} several frames, of which the first is read: {few(several)}"
        )
        yield Finding(WARNING, text)
    if not broken and not several:
        yield Finding(OK, f"{' and '.join(decoded)}{sampled} are decoded")


def check_classes(case: Case) -> Iterator[Finding]:
    """Check that the data sets and ``NUM_CLASSES`` agree, that each box has such a class, and each class a box."""
    try:
        check_num_classes(case.cfg)
    except ValueError as error:
        yield Finding(ERROR, str(error))
        return
    if not case.is_dense:
        yield Finding(OK, "the data sets have as many as the model")
        return
    num_classes = case.cfg.MODEL.RETINANET.NUM_CLASSES
    counts = Counter(annotation["category_id"] for record in case.records for annotation in objects(record))
    names = MetadataCatalog.get(case.cfg.DATASETS.TRAIN[0]).get("thing_classes") or list(range(num_classes))
    if beyond := {k: count for k, count in sorted(counts.items()) if not 0 <= k < num_classes}:
        yield Finding(
            ERROR,
            f"{sum(beyond.values()):,} boxes have category_id {few(beyond)}; expected 0 to {num_classes - 1} "
            f"(MODEL.RETINANET.NUM_CLASSES {num_classes}). In the records, count the classes from 0; class "
            f"{num_classes} is the background.",
        )
        return
    background = [name for name in names if str(name).strip("_ ").lower() in ("background", "bg")]
    if background:
        yield Finding(
            WARNING,
            f"{background[0]!r} is one of the classes, but the model needs no class for the background. Remove it from "
            "the classes and from MODEL.RETINANET.NUM_CLASSES.",
        )
    absent = [name for k, name in enumerate(names) if not counts[k] and name not in background]
    if absent:
        yield Finding(WARNING, f"No box is of class {few(absent)}, which is never learnt. Add boxes or remove it.")
    if not background and not absent:
        images = Counter(k for record in case.records for k in {box["category_id"] for box in objects(record)})
        listed = few((f"{name} in {images[k]:,} images" for k, name in enumerate(names)), most=10)
        yield Finding(OK, f"{num_classes} in the data and in MODEL.RETINANET.NUM_CLASSES: {listed}")


def check_boxes(case: Case) -> Iterator[Finding]:
    """Check that boxes are finite, have an area, lie in their image, and are there once."""
    bad, total = defaultdict(list), 0  # the file of each bad box, by its defect
    for record in case.records:
        size = record.get("width", math.inf), record.get("height", math.inf)
        for annotation in record.get("annotations", []):
            total += 1
            box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
            if defect := box_defect(box, size):
                bad[defect].append(record.get("file_name"))
    if files := bad[NOT_NUMBERS]:
        yield Finding(ERROR, f"{len(files):,} boxes have coordinates that are not finite, as in {files[0]}.")
    if files := bad[NO_SIZE]:
        yield Finding(
            WARNING,
            f"{percent(len(files), total)} of the boxes have no area, as in {files[0]}, and are not trained on. Are "
            "they (x, y, width, height) with a bbox_mode of XYXY_ABS?",
        )
    if files := bad[OUTSIDE]:
        yield Finding(
            WARNING,
            f"{percent(len(files), total)} of the boxes reach outside their image, as in {files[0]}, and are clipped. "
            "Are they in pixels of another image size, or (x0, y0, x1, y1) with a bbox_mode of XYWH_ABS?",
        )
    if files := repeated_boxes(case.records):
        yield Finding(
            WARNING,
            f"{percent(len(files), total)} of the boxes repeat another (same image, box and class), as in {files[0]}: "
            "they count twice in the loss. Remove them.",
        )
    elif not any(bad.values()):
        yield Finding(OK, f"all {total:,} have an area and lie in their images")


def check_empty_images(case: Case) -> Iterator[Finding]:
    """Check how many images have no object, and whether they are trained on."""
    empty, total = sum(not has_boxes(record) for record in case.records), len(case.records)
    if not empty:
        yield Finding(OK, f"none of {total:,}")
    elif not case.cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        yield Finding(OK, f"{percent(empty, total)}, trained on (DATALOADER.FILTER_EMPTY_ANNOTATIONS False)")
    else:
        text = f"{percent(empty, total)}, left out of training by DATALOADER.FILTER_EMPTY_ANNOTATIONS True"
        many = empty > _MANY_EMPTY * total
        change = ". Set it to False to train on them, if they show the background." if many else ""
        yield Finding(WARNING if many else OK, text + change)


def check_crowds(case: Case) -> Iterator[Finding]:
    """Check that the anchors in crowds are ignored."""
    annotations = [annotation for record in case.records for annotation in record.get("annotations", [])]
    for record in case.records:
        for annotation in record.get("annotations", []):
            if (found := annotation.get("iscrowd", 0)) not in (0, 1):
                yield Finding(ERROR, f"a box of {record.get('file_name')} has iscrowd {found!r}; expected 0 or 1.")
                return
    crowds = sum(annotation.get("iscrowd", 0) != 0 for annotation in annotations)
    architecture, ioa = case.cfg.MODEL.META_ARCHITECTURE, case.cfg.MODEL.FOCAL.MATCHER.IGNORE_IOA
    share = f"{percent(crowds, len(annotations))} of the boxes are crowds"
    if not crowds:
        yield Finding(OK, "none")
    elif architecture != "FocalRetinaNet":
        text = f"{share}, background to {architecture}. MODEL.META_ARCHITECTURE FocalRetinaNet ignores their anchors."
        yield Finding(WARNING, text)
    elif ioa == 0:
        text = f"{share}, and their anchors background, as MODEL.FOCAL.MATCHER.IGNORE_IOA is 0; 0.5 ignores them."
        yield Finding(WARNING, text)
    else:
        text = f"{share}; anchors with {ioa:g} of their area in one are ignored (MODEL.FOCAL.MATCHER.IGNORE_IOA)"
        yield Finding(OK, text)


def check_coverage(case: Case) -> Iterator[Finding]:
    """Check how many boxes get no anchor, or only by the low-quality rule."""
    if not case.has_anchors:
        yield Finding(SKIPPED, f"{case.cfg.MODEL.META_ARCHITECTURE} is no RetinaNet")
        return
    coverage, total = case.coverage, len(case.coverage.regular)
    if not total:
        yield Finding(ERROR, f"no box with an area in {len(case.images)} images")
        return
    without, low = ~coverage.covered, coverage.covered & ~coverage.regular
    change = (
        "`python -m focal_plugin analysis anchors` suggests other MODEL.ANCHOR_GENERATOR sizes and ratios; a larger "
        "INPUT.MIN_SIZE_TRAIN or a level P2 reaches small boxes."
    )
    if without.any():
        yield Finding(
            WARNING if without.sum() > _MANY_WITHOUT * total else OK,
            f"{percent(without.sum(), total)} of the boxes ({_half_below(case, without)}) get no anchor and are never "
            f"learnt. {change}",
        )
    if low.sum() > _MANY_LOW_QUALITY * total:
        yield Finding(
            WARNING,
            f"{percent(low.sum(), total)} of the boxes ({_half_below(case, low)}) get an anchor only by the "
            f"low-quality rule, as no anchor overlaps them enough. {change}",
        )
    elif not without.any():
        shares = coverage.positives.astype(bool).mean(axis=0)
        by_level = ", ".join(f"{name} {share:.0%}" for name, share in zip(case.levels, shares))
        yield Finding(
            OK,
            f"all {total:,} boxes of {len(case.images):,} images have one: {by_level}; {low.mean():.1%} by the "
            "low-quality rule alone",
        )


def _half_below(case: Case, chosen: np.ndarray) -> str:
    return f"half of them below {np.median(np.sqrt(case.areas[chosen])):.0f} px a side"


def check_positives(case: Case) -> Iterator[Finding]:
    """Check that each level gets positive anchors, in images as training gets them."""
    if not case.has_anchors:
        yield Finding(SKIPPED, f"{case.cfg.MODEL.META_ARCHITECTURE} is no RetinaNet")
        return
    matcher, mapper = build_matcher(case.cfg), FocalDatasetMapper(case.cfg, is_train=True)
    records = spread(case.used_records, _BATCH_IMAGES)
    boxes, totals = 0, np.zeros(len(case.levels), dtype=int)
    for record in progress(records, desc="Images"):
        try:
            sample = mapper(record)
        except DataError:
            if record.get("on_error") != "skip":
                raise
            continue  # reported by check_images
        anchors = Anchors.from_generator(case.anchor_generator, case.grid.features(sample["image"].shape[-2:]))
        boxes += len(sample["instances"])
        totals += count_positives(matcher, anchors, sample["instances"]).sum(axis=0)  # (L,)
    if not totals.any():
        yield Finding(
            ERROR,
            f"no anchor is positive for the {boxes} boxes of {len(records)} images: loss_box_reg stays 0. Look at the "
            "boxes' bbox_mode, at MODEL.ANCHOR_GENERATOR.SIZES and at MODEL.RETINANET.IOU_THRESHOLDS.",
        )
        return
    listed = ", ".join(f"{name} {total / len(records):.1f}" for name, total in zip(case.levels, totals))
    text = f"{listed} an image, in {len(records)} images as training gets them"
    has_any = (totals > 0) | case.coverage.positives.any(axis=0)  # (L,)
    if has_any.all():
        yield Finding(OK, text)
        return
    never = [name for name, some in zip(case.levels, has_any) if not some]
    have = "has" if len(never) == 1 else "have"
    yield Finding(
        WARNING,
        f"{text}: {few(never, most=9)} never {have} any, nor in {len(case.images):,} images without augmentation. "
        "Change the sizes of its anchors (MODEL.ANCHOR_GENERATOR.SIZES), or make the model faster: remove the level "
        "from MODEL.RETINANET.IN_FEATURES and its sizes from MODEL.ANCHOR_GENERATOR.SIZES (and ASPECT_RATIOS, if by "
        "level).",
    )
