"""Which boxes the anchors reach, and which anchors would reach more.

The config's matcher matches every box of the training set, at the size to which its image is resized. The tables count
the boxes that have positive anchors: on which levels; with the low-quality rule only (they have none with
MODEL.FOCAL.MATCHER.LOW_QUALITY none); or not at all. They do so by size in the original image (small below 32² pixels,
large from 96² on, as in COCO's metric) and by shape. Then other sizes and ratios are tried, as many as in the config,
which k-means of the boxes' logarithms gives. The best are printed with their gain, if there is one.

Images are not read if the records have their sizes. Crops and INPUT.AUGMENTATIONS are left out; if there are several
INPUT.MIN_SIZE_TRAIN, each image gets a random one, the same in each call.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator, _broadcast_params, build_anchor_generator
from tabulate import tabulate
from tqdm import tqdm

from ..config import ConfigError
from ..evaluation import style
from .common import add_flags, output_paths, print_written, read_config, read_records, spread
from .coverage import Coverage, FeatureGrid, Image, measure, ratios_of, read_images

SIZE_BANDS = [("small", 0, 32**2), ("medium", 32**2, 96**2), ("large", 96**2, np.inf)]  # area in pixels, COCO's
SHAPE_BANDS = [  # height ÷ width
    ("wider than 3:1", 0, 1 / 3),
    ("3:1 to 3:2", 1 / 3, 2 / 3),
    ("3:2 to 2:3", 2 / 3, 3 / 2),
    ("2:3 to 1:3", 3 / 2, 3),
    ("taller than 1:3", 3, np.inf),
]
_FIRST_OCTAVES = (2.0, 2.0**1.5, 4.0, 2.0**2.5)  # smallest size of a level ÷ its stride; 4 in the paper
_SEARCH_IMAGES = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this analysis."""
    add_flags(parser, num_images=2000)


def main(args: argparse.Namespace) -> int:
    """Measure the coverage, look for better anchors, and print, draw and write both."""
    cfg = read_config(args)
    records = read_records(cfg, "TRAIN", filter_empty=True)
    images = read_images(cfg, spread(records, args.num_images))
    boxes = torch.cat([image.boxes for image in images]).numpy()
    if not len(boxes):
        raise ConfigError(f"DATASETS.TRAIN names {', '.join(cfg.DATASETS.TRAIN)}, which has no box.")
    areas = np.concatenate([image.areas for image in images])
    levels = list(cfg.MODEL.RETINANET.IN_FEATURES)
    grid = FeatureGrid(cfg)
    now = measure(cfg, grid, build_anchor_generator(cfg, grid.shapes), images)
    tables = tabulate_coverage(now, areas, ratios_of(boxes), levels)
    print(f"{len(images)} images of DATASETS.TRAIN, {len(boxes)} boxes, matched by {cfg.MODEL.FOCAL.MATCHER.NAME}:")
    for title, rows in tables.items():
        print(f"\n{title}")
        print(tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".1f"))
    better = suggest(cfg, grid, images, now)
    print("\n" + (better["text"] if better else "No sizes and ratios taken from the boxes reach more of them."))

    picture, numbers = paths = output_paths(args, cfg, "anchors.png", "anchors.json")
    content = {"images": len(images), "tables": tables, "suggestion": better}
    numbers.write_text(json.dumps(content, indent=2) + "\n")
    draw(picture, tables)
    print_written(paths)
    return 0


def tabulate_coverage(
    coverage: Coverage, areas: np.ndarray, ratios: np.ndarray, levels: Sequence[str]
) -> dict[str, list[dict]]:
    """Return tables, as lists of rows, of all boxes, by level, by size and by shape (height ÷ width)."""
    total = len(coverage.regular)
    by_level = [
        {
            "level": name,
            "boxes with a positive there": int(positives.astype(bool).sum()),
            "of all boxes (%)": 100 * float(positives.astype(bool).sum()) / total,
            "positives": int(positives.sum()),
        }
        for name, positives in zip(levels, coverage.positives.T)
    ]
    by_size = [{"size": name, **coverage.row((low <= areas) & (areas < high))} for name, low, high in SIZE_BANDS]
    by_shape = [{"shape": name, **coverage.row((low <= ratios) & (ratios < high))} for name, low, high in SHAPE_BANDS]
    return {"All boxes": [coverage.row()], "By level": by_level, "By size": by_size, "By shape": by_shape}


def suggest(cfg: CfgNode, grid: FeatureGrid, images: Sequence[Image], now: Coverage) -> dict | None:
    """Return sizes and ratios that give more boxes a regular positive than ``now``, and their gain; None if none do.

    There are as many on each level as in the config. The ratios are the centres of the boxes' log ratios. A level's
    sizes are the centres of the log sizes between a multiple of its stride and the same multiple of the next level's.
    Several multiples are tried, with the new ratios and the old, on at most 300 images.
    """
    if type(build_anchor_generator(cfg, grid.shapes)) is not DefaultAnchorGenerator:
        return None  # another generator need not have sizes and ratios
    num_levels, strides = len(grid.shapes), [shape.stride for shape in grid.shapes]
    keys = [_broadcast_params(cfg.MODEL.ANCHOR_GENERATOR[key], num_levels, key) for key in ("SIZES", "ASPECT_RATIOS")]
    sizes, ratios = ([list(level) for level in levels] for levels in keys)
    boxes = torch.cat([image.boxes for image in images]).numpy()
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
    new_ratios = [_centres(ratios_of(boxes), len(level)) for level in ratios]
    candidates = [(sizes, new_ratios)]
    for octave in _FIRST_OCTAVES:
        new_sizes = sizes_by_level(sides, strides, sizes, octave)
        candidates += [(new_sizes, ratios), (new_sizes, new_ratios)]

    def coverage(candidate: tuple[list, list], images: Sequence[Image]) -> Coverage:
        generator = DefaultAnchorGenerator(
            sizes=candidate[0],
            aspect_ratios=candidate[1],
            strides=strides,
            offset=cfg.MODEL.ANCHOR_GENERATOR.OFFSET,
        )
        return measure(cfg, grid, generator, images)

    some = spread(images, _SEARCH_IMAGES)
    reached = [
        coverage(candidate, some).regular.sum()
        for candidate in tqdm(candidates, desc="Other anchors", unit="set", disable=None)
    ]
    sizes, ratios = candidates[int(np.argmax(reached))]
    then = coverage((sizes, ratios), images)
    if then.regular.sum() <= now.regular.sum():
        return None
    before, after = now.row(), then.row()
    gain = ", ".join(f"{name} {before[name]:.1f} → {after[name]:.1f}" for name in before if name != "boxes")
    text = f"Sizes and ratios from the boxes reach more of them: {gain}.\n\n{config_lines(sizes, ratios)}"
    return {"text": text, "sizes": sizes, "ratios": ratios, "before": before, "after": after}


def sizes_by_level(
    side: np.ndarray, strides: Sequence[int], sizes: Sequence[Sequence[float]], octave: float
) -> list[list[float]]:
    """Return the centres of the box sizes ``side`` of each level, from ``octave`` times its stride to that of the next.

    The first level also takes the smaller boxes and the last the larger. A level with fewer boxes than sizes keeps its
    own ``sizes``.
    """
    edges = [0.0, *(octave * stride for stride in strides[1:]), np.inf]
    return [
        _centres(mine, len(own)) if len(mine := side[(low <= side) & (side < high)]) >= len(own) else list(own)
        for low, high, own in zip(edges, edges[1:], sizes)
    ]


def _centres(values: np.ndarray, count: int) -> list[float]:
    """Return ``count`` centres of positive ``values`` by k-means of their logarithms, ascending, to three digits."""
    return [float(f"{centre:.3g}") for centre in np.exp(kmeans(np.log(values), count))]


def kmeans(values: np.ndarray, count: int, rounds: int = 100) -> np.ndarray:
    """Return ``count`` ascending centres of ``values`` (n,), n ≥ 1, by Lloyd's algorithm from the quantiles.

    Nothing is random. Some centres are equal if there are fewer different values than ``count``.
    """
    centres = np.quantile(values, (np.arange(count) + 0.5) / count)
    for _ in range(rounds):
        nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, values)  # (n,)
        sizes = np.bincount(nearest, minlength=count)  # (count,)
        sums = np.bincount(nearest, values, minlength=count)
        centres, before = np.where(sizes > 0, sums / np.maximum(sizes, 1), centres), centres
        if np.array_equal(centres, before):
            break
    return centres


def config_lines(sizes: list[list[float]], ratios: list[list[float]]) -> str:
    """Return YAML of both, to paste into a config."""
    if all(level == ratios[0] for level in ratios):
        ratios = ratios[:1]
    keys = {"MODEL": {"ANCHOR_GENERATOR": {"SIZES": sizes, "ASPECT_RATIOS": ratios}}}
    return yaml.safe_dump(keys, default_flow_style=None, sort_keys=False).rstrip()


def draw(path: Path, tables: dict[str, list[dict]]) -> None:
    """Draw the boxes with positives by level, by size and by shape to a PNG."""
    figure, (by_level, by_size, by_shape) = style.panels(3)
    rows = tables["By level"]
    by_level.bar([row["level"] for row in rows], [row["of all boxes (%)"] for row in rows], color=style.color(0))
    by_level.set(title="Boxes with a positive at each level", ylabel="% of all boxes", ylim=(0, 100))
    for axis, title, key in ((by_size, "By size", "size"), (by_shape, "By shape", "shape")):
        rows = [row for row in tables[title] if row["boxes"]]
        names = [f"{row[key]}\n({row['boxes']:,})" for row in rows]
        left = np.zeros(len(rows))
        kinds = {"regular (%)": style.color(0), "low quality only (%)": style.color(5), "none (%)": style.GRAY}
        for kind, color in kinds.items():
            values = np.array([row[kind] for row in rows])
            axis.barh(names, values, left=left, color=color, label=kind.removesuffix(" (%)"))
            left += values
        axis.invert_yaxis()
        axis.set(title=title, xlabel="% of the boxes", xlim=(0, 100))
    handles, labels = by_shape.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    style.save(figure, path)
