#!/usr/bin/env python
"""Measure the AP of a quickstart model on the whole photograph that the validation tiles are cut from.

    tiled_ap.py output/quickstart/config.yaml output/quickstart/model_final.pth

prints AP, AP50, the number of detections and that of boxes larger than a tile: untiled, in tiles with the whole image,
and in tiles alone.
"""

import contextlib
import io
import sys

from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from PIL import Image
from pycocotools.coco import COCO

from focal_plugin.data.quickstart import CLASSES, SOURCES, source_folder
from focal_plugin.data.records import Checker
from focal_plugin.data.voc import parse_xml, read_record
from focal_plugin.deploy import Predictor
from focal_plugin.evaluation.fast import coco_eval

TILE = 400  # as in training
WAYS = {
    "untiled": {},
    "untiled, full resolution": {"opts": ["INPUT.MIN_SIZE_TEST", 0]},
    "tiles and the whole image": {"tile": TILE},
    "tiles alone": {"tile": TILE, "whole_image": False},
}


def read_truth() -> tuple[str, COCO]:
    """Return the path of the photograph, and its objects."""
    stem = SOURCES["val"]
    xml, png = (str(source_folder() / f"{stem}.{ending}") for ending in ("xml", "png"))
    record = read_record(parse_xml(xml), xml, png, stem, {name: k for k, name in enumerate(CLASSES)}, Checker(stem))
    boxes = [(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in (box["bbox"] for box in record["annotations"])]
    objects = [
        {"id": i, "image_id": 1, "category_id": 0, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}
        for i, box in enumerate(boxes, start=1)
    ]
    truth = COCO()
    width, height = Image.open(png).size
    images = [{"id": 1, "width": width, "height": height}]
    truth.dataset = {"images": images, "annotations": objects, "categories": [{"id": 0, "name": CLASSES[0]}]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return png, truth


def main(config: str, weights: str) -> None:
    """Print a line of Markdown for each way."""
    png, truth = read_truth()
    print(f"{Image.open(png).size}, {len(truth.anns)} trees\n")
    print(f"| | AP | AP50 | detections | larger than a tile |\n{'|---' * 5}|")
    for name, options in WAYS.items():
        opts = ["TEST.DETECTIONS_PER_IMAGE", 1000, *options.get("opts", [])]
        options = {key: value for key, value in options.items() if key != "opts"}
        found = Predictor(config, weights, opts=opts, score_thresh=None, optimize=False, **options)(png)
        large = int(((found.pred_boxes.tensor[:, 2:] - found.pred_boxes.tensor[:, :2]) > TILE).any(dim=1).sum())
        with contextlib.redirect_stdout(io.StringIO()):
            results = coco_eval(truth, truth.loadRes(instances_to_coco_json(found, 1)))
            results.params.maxDets = [1, 10, 1000]
            results.evaluate()
            results.accumulate()
            results.summarize()
        ap, ap50 = (f"{100 * value:.1f}" for value in results.stats[:2])
        print(f"| {name} | {ap} | {ap50} | {len(found)} | {large} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
