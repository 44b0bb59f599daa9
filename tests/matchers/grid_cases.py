"""Anchors and boxes of all kinds, and the matcher's oracle: Detectron2's, by the matrix of all pairs."""

import focal_plugin  # noqa: F401  # before Detectron2, whose deprecation warnings it keeps away

# isort: split
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances, pairwise_iou
from hypothesis import strategies as st
from torch import Tensor

from focal_plugin import Anchors

NAN, INF = float("nan"), float("inf")

# A line, boxes turned inside out (one of area −256, as a square is of 256), a speck, boxes that are or nearly are too
# large for areas in float32, and what is no number.
ODD_BOXES = [[5, 5, 5, 9], [9, 9, 3, 3], [0, 0, 1e-20, 1e-20], [-1e6, -1e6, 1e6, 1e6], [-1e18, -1e18, 1e19, 1e18]]
ODD_BOXES += [[-1e30, -1e30, 1e30, 1e30], [-1e30, 0, 1e30, 8], [NAN, NAN, NAN, NAN], [0, 0, INF, INF], [0, 0, INF, 0]]
ODD_BOXES += [[16, -8, 0, 8], [8, 8, -8, -8]]


def make_anchors(grid_sizes, strides, sizes, ratios=((0.5, 1.0, 2.0),), offset=0.0, device="cpu") -> Anchors:
    """Anchors of Detectron2's generator on feature maps of these (H, W)."""
    generator = DefaultAnchorGenerator(sizes=sizes, aspect_ratios=ratios, strides=strides, offset=offset).to(device)
    return Anchors.from_generator(generator, [torch.zeros(1, 1, h, w, device=device) for h, w in grid_sizes])


def square_anchors(size: float, width: int, height: int = 1, stride: int = 8) -> Anchors:
    """Squares at every stride of one level, the first centred on the image's corner."""
    return make_anchors([(height, width)], [stride], [[size]], [[1.0]])


def without_grid(anchors: Anchors) -> Anchors:
    """The same anchors, as of a generator that tells nothing of its grid."""
    return Anchors(anchors.boxes, anchors.grid_sizes, anchors.num_cell_anchors)


def make_instances(boxes) -> Instances:
    """An image's ``Instances`` with nothing but boxes."""
    return Instances((64, 64), gt_boxes=Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)))


def iou_matrix(anchors: Anchors, boxes: Tensor) -> Tensor:
    """(G, R)."""
    return pairwise_iou(Boxes(boxes), Boxes(torch.cat(anchors.boxes)))


def match_by_matrix(iou: Tensor, thresholds, labels, low_quality: str) -> tuple[Tensor, Tensor]:
    """What a matcher must return for a (G, R) matrix: Detectron2's bands, and each box's best anchors one by one."""
    matched, codes = Matcher(list(thresholds), labels, allow_low_quality_matches=False)(iou)
    for row in iou if iou.numel() else []:
        best = row.max()
        if (low_quality == "detectron1" and best >= thresholds[0]) or (low_quality == "detectron2" and best > 0):
            codes[row == best] = 1
    return matched, codes


def matched_counts(iou: Tensor, codes: Tensor, lowest: float) -> Tensor:
    """(R,) bool: the anchors of which ``matched`` is specified."""
    return (codes == 1) | (iou.amax(dim=0) >= lowest) if iou.numel() else codes == 1


@st.composite
def anchors_and_boxes(draw) -> tuple[Anchors, Tensor]:
    """Anchors of one to three levels and 0 to 12 boxes, ordinary and odd ones.

    Few distinct values and round numbers, so that ties of IoU are common; sizes, strides and coordinates over many
    orders of magnitude, so that float32's rounding matters.
    """
    num_levels = draw(st.integers(1, 3))
    lengths = st.one_of(st.sampled_from([8.0, 16.0, 32.0]), st.floats(0.01, 300))
    anchors = make_anchors(
        [(draw(st.integers(1, 7)), draw(st.integers(1, 7))) for _ in range(num_levels)],
        [draw(st.sampled_from([1, 3, 8, 16, 100, 4096])) for _ in range(num_levels)],
        [draw(st.lists(lengths, min_size=1, max_size=2)) for _ in range(num_levels)],
        [draw(st.lists(st.sampled_from([0.5, 1.0, 2.0, 7.0]), min_size=1, max_size=2, unique=True))],
        draw(st.sampled_from([0.0, 0.5, 0.3])),
    )
    flat = torch.cat(anchors.boxes)
    reach = float(flat.abs().max())
    places = st.one_of(st.integers(-8, 8).map(lambda i: 4.0 * i), st.floats(-1.5 * reach, 1.5 * reach))
    sides = st.one_of(st.sampled_from([0.0, 8.0, 16.0, 32.0]), st.floats(1e-3, 2 * reach))
    ordinary = st.builds(lambda x, y, w, h: [x, y, x + w, y + h], places, places, sides, sides)
    anchor = st.integers(0, len(flat) - 1).map(lambda i: flat[i].tolist())
    shifted = st.builds(
        lambda box, shift: [box[0] + shift, box[1] - shift, box[2] + shift, box[3] - shift],
        anchor,
        st.sampled_from([0.5, 4.0, 1e-4]),
    )
    boxes = draw(st.lists(st.one_of(ordinary, ordinary, st.sampled_from(ODD_BOXES), anchor, shifted), max_size=9))
    boxes += draw(st.lists(st.sampled_from(boxes), max_size=3)) if boxes else []
    return anchors, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
