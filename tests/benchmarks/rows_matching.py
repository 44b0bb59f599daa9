"""Which anchor is matched to which box, for one image."""

import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances, pairwise_iou
from timing import Row
from torchvision.models.detection._utils import Matcher as TorchvisionMatcher

from focal_plugin import Anchors, IgnoreBandMatcher

STRIDES = (8, 16, 32, 64, 128)


def inputs(height, width, num_boxes):
    """RetinaNet's anchors for an image, and boxes of all sizes from 10 px to half of it."""
    cfg = get_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[size * 2 ** (i / 3) for i in range(3)] for size in (32, 64, 128, 256, 512)]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0, 2.0]]
    generator = build_anchor_generator(cfg, [ShapeSpec(channels=1, stride=stride) for stride in STRIDES])
    features = [torch.empty(1, 1, -(-height // stride), -(-width // stride)) for stride in STRIDES]
    random = torch.Generator().manual_seed(0)
    size = 10 * (min(height, width) / 20) ** torch.rand(num_boxes, 2, generator=random)
    corner = torch.rand(num_boxes, 2, generator=random) * (torch.tensor([width, height]) - size)
    return Anchors.from_generator(generator, features), Boxes(torch.cat([corner, corner + size], dim=1))


def rows(height=800, width=1216, counts=(100, 1000)):
    for count in counts:
        yield _row(height, width, count)


def _row(height, width, count):
    def theirs():
        anchors, boxes = inputs(height, width, count)
        everything = Boxes(torch.cat(anchors.boxes))
        matcher = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
        return lambda: matcher(pairwise_iou(boxes, everything))

    def torchvisions():
        anchors, boxes = inputs(height, width, count)
        everything = torch.cat(anchors.boxes)
        matcher = TorchvisionMatcher(0.5, 0.4, allow_low_quality_matches=True)
        return lambda: matcher(torchvision.ops.box_iou(boxes.tensor, everything))

    def ours():
        anchors, boxes = inputs(height, width, count)
        instances = Instances((height, width), gt_boxes=boxes)
        matcher = IgnoreBandMatcher(thresholds=[0.4, 0.5], labels=[0, -1, 1], low_quality="detectron2")
        return lambda: matcher(anchors, instances)

    def floor():
        everything = torch.cat(inputs(height, width, count)[0].boxes)
        return everything.clone

    anchors = len(inputs(height, width, 1)[0])
    return Row(
        name=f"matching, {count} boxes, CPU",
        size=f"{anchors} anchors ({height}×{width})",
        variants={
            "Detectron2": theirs,
            "torchvision": torchvisions,
            "ours": ours,
            "floor (a copy of the anchors)": floor,
        },
        target={100: {"ours": "≥ 30×"}, 1000: {"ours": "≥ 200×, memory ≤ 50 MB"}}.get(count, {}),
    )
