"""Detectron2's own configs of other models, made small, and batches for them."""

import pytest
import torch
from detectron2 import model_zoo
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from focal_plugin import add_focal_config

SMALL = [
    *["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.NORM", "GN", "MODEL.BACKBONE.FREEZE_AT", 0],
    *["MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 16],
    *["MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 40, "MODEL.RPN.POST_NMS_TOPK_TEST", 40],
    *["MODEL.RETINANET.NUM_CLASSES", 2, "MODEL.RETINANET.NUM_CONVS", 1, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0],
]
SMALL_FPN = [
    *["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.FPN.OUT_CHANNELS", 16],
    *["MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]]],
]
# R50 is the smallest here: the head is its last stage.
SMALL_C4 = ["MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16]


@pytest.fixture
def small_words():
    """The ``KEY, VALUE`` pairs that make the model of a config of the zoo small."""
    return lambda name: [*SMALL, *(SMALL_C4 if "C4" in name else SMALL_FPN)]


@pytest.fixture
def small_config(small_words):
    """A config of the zoo with a small model and ``KEY, VALUE`` pairs; ``focal=False`` leaves our keys out."""

    def make(name, *opts, focal=True):
        cfg = model_zoo.get_config(name)
        if focal:
            add_focal_config(cfg)
        cfg.merge_from_list([*small_words(name), *opts])
        return cfg

    return make


@pytest.fixture
def draw_images():
    """Images of 64 × 96 px, with so many boxes each, of ``num_classes`` classes, and a mask a box."""

    def draw(counts, num_classes=2):
        images = []
        for count in counts:
            corners = torch.rand(count, 2) * 40
            boxes = torch.cat([corners, corners + torch.rand(count, 2) * 16 + 8], dim=1)
            masks = PolygonMasks([[[x0, y0, x1, y0, x1, y1]] for x0, y0, x1, y1 in boxes.tolist()])
            classes = torch.randint(num_classes, (count,))
            instances = Instances((64, 96), gt_boxes=Boxes(boxes), gt_classes=classes, gt_masks=masks)
            image = torch.randint(256, (3, 64, 96), dtype=torch.uint8)
            images.append({"image": image, "instances": instances, "height": 64, "width": 96})
        return images

    return draw


@pytest.fixture(autouse=True)
def storage():
    """Where the models put their numbers."""
    with EventStorage() as storage:
        yield storage
