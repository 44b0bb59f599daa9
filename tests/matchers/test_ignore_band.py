"""IgnoreBandMatcher against Detectron2's matcher, and against numbers worked out by hand."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling.matcher import Matcher
from hypothesis import given, settings
from hypothesis import strategies as st

from focal_plugin import IgnoreBandMatcher, add_focal_config, build_matcher
from focal_plugin.kernels import grid_pairs
from focal_plugin.matchers import ignore_band
from tests.matchers.grid_cases import (
    ODD_BOXES,
    anchors_and_boxes,
    iou_matrix,
    make_anchors,
    make_instances,
    match_by_matrix,
    matched_counts,
    square_anchors,
    without_grid,
)

PAPER = {"thresholds": [0.4, 0.5], "labels": [0, -1, 1]}
NO_OVERLAP = [[8, 0, 8, 5], [100, 100, 120, 120], *ODD_BOXES[:2], ODD_BOXES[5], *ODD_BOXES[7:]]
MODES = ["none", "detectron1", "detectron2"]


@st.composite
def rules(draw):
    """Arguments of a matcher: one to three thresholds, any labels, any mode; half of them the paper's bands."""
    arguments = dict(PAPER)
    if draw(st.booleans()):
        values = st.one_of(st.floats(0.01, 1), st.sampled_from([0.25, 0.5, 1.0]))
        arguments["thresholds"] = sorted(draw(st.lists(values, min_size=1, max_size=3)))
        num_labels = len(arguments["thresholds"]) + 1
        codes = st.sampled_from([-1, 0, 1])
        arguments["labels"] = draw(st.lists(codes, min_size=num_labels, max_size=num_labels))
    return arguments | {"low_quality": draw(st.sampled_from(MODES))}


def assert_same(result, iou, rule):
    """``result`` is what Detectron2's matcher makes of the matrix."""
    matched, labels = result
    expected, expected_labels = match_by_matrix(iou, **rule)
    assert matched.dtype == torch.int64 and labels.dtype == torch.int8
    assert torch.equal(labels, expected_labels)
    assert ((matched >= 0) & (matched < max(len(iou), 1))).all()
    counts = matched_counts(iou, labels, rule["thresholds"][0])
    assert torch.equal(matched[counts], expected[counts])


@pytest.fixture(scope="class")
def small_chunks():
    """Chunks so small that most images take several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid_pairs, "_BOXES_AT_ONCE", 5)
        patch.setattr(grid_pairs, "_CANDIDATES_AT_ONCE", 37)
        patch.setattr(ignore_band, "_IOUS_AT_ONCE", 50)
        yield


@pytest.mark.usefixtures("small_chunks")
class TestAgainstDetectron2:
    @settings(max_examples=200)
    @given(anchors_and_boxes(), rules())
    def test_on_a_grid(self, case, rule):
        anchors, boxes = case
        assert_same(IgnoreBandMatcher(**rule)(anchors, make_instances(boxes)), iou_matrix(anchors, boxes), rule)

    @settings(max_examples=50)
    @given(anchors_and_boxes(), rules())
    def test_without_a_grid(self, case, rule):
        anchors, boxes = case
        result = IgnoreBandMatcher(**rule)(without_grid(anchors), make_instances(boxes))
        assert_same(result, iou_matrix(anchors, boxes), rule)
        assert torch.equal(result[0], match_by_matrix(iou_matrix(anchors, boxes), **rule)[0])

    @settings(max_examples=50)
    @given(anchors_and_boxes(), rules())
    def test_on_a_matrix(self, case, rule):
        iou = iou_matrix(*case)
        matched, labels = IgnoreBandMatcher(**rule)(iou)
        expected, expected_labels = match_by_matrix(iou, **rule)
        assert torch.equal(matched, expected) and torch.equal(labels, expected_labels)

    @settings(max_examples=50)
    @given(anchors_and_boxes())
    def test_whole_where_each_box_has_an_anchor(self, case):
        """Its low-quality matches as well, which the oracle above does in a loop of its own."""
        anchors, boxes = case
        boxes = boxes[(iou_matrix(anchors, boxes) > 0).any(dim=1)]
        iou = iou_matrix(anchors, boxes)
        _, labels = IgnoreBandMatcher(**PAPER, low_quality="detectron2")(anchors, make_instances(boxes))
        assert torch.equal(labels, Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)(iou)[1])


@pytest.mark.parametrize("low_quality", MODES)
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_retinanet_anchors_and_thousands_of_boxes(low_quality, offset):
    """RetinaNet's own anchors of a small image; most boxes tiny, so that nearly all need a low-quality match."""
    sizes = [[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)]
    strides = [8, 16, 32, 64, 128]
    anchors = make_anchors([(-(-100 // s), -(-150 // s)) for s in strides], strides, sizes, offset=offset)
    generator = torch.Generator().manual_seed(0)
    corner, size = torch.rand(2, 2000, 2, generator=generator)
    corner = corner * torch.tensor([160.0, 110.0]) - 5
    boxes = torch.cat([corner, corner + 600 ** (size**2)], dim=1)
    boxes = torch.cat([boxes, boxes.round(), torch.tensor(ODD_BOXES)])
    rule = PAPER | {"low_quality": low_quality}
    assert_same(IgnoreBandMatcher(**rule)(anchors, make_instances(boxes)), iou_matrix(anchors, boxes), rule)


class TestByHand:
    """Squares of 16 px at x = −8, 0, 8, …: a box over a square's place, n px wide and high, has IoU n² / 256."""

    anchors = square_anchors(16, width=5)  # [-8, 8], [0, 16], [8, 24], [16, 32], [24, 40] in x, [-8, 8] in y

    def labels_of(self, boxes, low_quality, anchors=None):
        matcher = IgnoreBandMatcher(**PAPER, low_quality=low_quality)
        return matcher(anchors or self.anchors, make_instances(boxes))

    @pytest.mark.parametrize("low_quality", MODES)
    def test_bands(self, low_quality):
        """A square itself has IoU 1, the next 1/3, those beyond 0."""
        matched, labels = self.labels_of([[8, -8, 24, 8]], low_quality)
        assert labels.tolist() == [0, 0, 1, 0, 0]
        assert matched.tolist() == [0] * 5

    @pytest.mark.parametrize("low_quality, expected", [("none", -1), ("detectron1", 1), ("detectron2", 1)])
    def test_best_iou_in_the_ignored_band(self, low_quality, expected):
        """16 × 7 px within one square: IoU 112 / 256 = .4375; the next have 56 / 312."""
        _, labels = self.labels_of([[8, -8, 24, -1]], low_quality)
        assert labels.tolist() == [0, 0, expected, 0, 0]

    @pytest.mark.parametrize("low_quality, expected", [("none", 0), ("detectron1", 0), ("detectron2", 1)])
    def test_best_iou_below_the_bands(self, low_quality, expected):
        """16 × 4 px within one square: IoU 64 / 256 = .25; the next have 32 / 288."""
        _, labels = self.labels_of([[8, -8, 24, -4]], low_quality)
        assert labels.tolist() == [0, 0, expected, 0, 0]

    @pytest.mark.parametrize("low_quality, expected", [("none", -1), ("detectron1", 1), ("detectron2", 1)])
    def test_best_iou_at_the_lowest_threshold(self, low_quality, expected):
        """16 × 4 px within one square, as above, where the ignored band begins at .25."""
        matcher = IgnoreBandMatcher(thresholds=[0.25, 0.5], labels=[0, -1, 1], low_quality=low_quality)
        box = torch.tensor([[8.0, -8, 24, -4]])
        for result in [matcher(self.anchors, make_instances(box)), matcher(iou_matrix(self.anchors, box))]:
            assert result[1].tolist() == [0, 0, expected, 0, 0]

    def test_all_of_equal_anchors(self):
        """8 × 8 px where two squares overlap: IoU .25 with both."""
        _, labels = self.labels_of([[8, -8, 16, 0]], "detectron2")
        assert labels.tolist() == [0, 1, 1, 0, 0]

    def test_a_threshold_is_the_lower_end_of_its_band(self):
        """Half a square has IoU .5 exactly, which is positive."""
        _, labels = self.labels_of([[8, -8, 24, 0]], "none")
        assert labels.tolist() == [0, 0, 1, 0, 0]

    def test_the_first_of_equal_boxes(self):
        matched, labels = self.labels_of([[100, 0, 101, 1], [8, -8, 24, 8], [8, -8, 24, 8]], "none")
        assert matched[labels == 1].tolist() == [1]

    @pytest.mark.parametrize("low_quality", ["detectron1", "detectron2"])
    def test_a_low_quality_anchor_keeps_its_own_best_box(self, low_quality):
        """The second box's best anchor is the third, at 112 / 256; that anchor prefers the first box, at 144 / 256."""
        matched, labels = self.labels_of([[8, -8, 24, 1], [8, -8, 24, -1]], low_quality)
        assert labels.tolist() == [0, 0, 1, 0, 0]
        assert matched[2] == 0

    def test_a_low_quality_anchor_keeps_its_own_best_box_below_the_bands(self):
        """The first box's best is the third anchor, at 48 / 256. That one prefers the second box, at 66 / 286, whose
        own best is the fourth anchor, at 78 / 274."""
        matched, labels = self.labels_of([[10, -8, 22, -4], [13, -8, 29, -2]], "detectron2")
        assert labels.tolist() == [0, 0, 1, 1, 0]
        assert matched[labels == 1].tolist() == [1, 1]

    @pytest.mark.parametrize("box", NO_OVERLAP)
    def test_a_low_quality_anchor_is_not_matched_to_a_box_that_is_none(self, box):
        """Not even if its IoU is 0 over an area of 0."""
        matched, labels = self.labels_of([box, [8, -8, 24, -4]], "detectron2")
        assert labels.tolist() == [0, 0, 1, 0, 0]
        assert matched[2] == 1

    @pytest.mark.parametrize("low_quality", MODES)
    @pytest.mark.parametrize("box", NO_OVERLAP)
    @pytest.mark.parametrize("make", [square_anchors, lambda *a: without_grid(square_anchors(*a))])
    def test_a_box_that_overlaps_no_anchor_makes_nothing_positive(self, low_quality, box, make):
        """Detectron2's matcher makes more of them positive here: each that overlaps no box at all."""
        anchors, boxes = make(16, 5), [[8, -8, 24, 8], box]
        theirs = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
        assert (theirs(iou_matrix(anchors, torch.tensor(boxes)))[1] == 1).sum() > 1
        assert self.labels_of(boxes, low_quality, anchors)[1].tolist() == [0, 0, 1, 0, 0]
        assert self.labels_of([box], low_quality, anchors)[1].tolist() == [0] * 5

    def test_an_ignored_lowest_band(self):
        """Labels −1, 0, 1: what no box overlaps is ignored."""
        matcher = IgnoreBandMatcher(thresholds=[0.2, 0.5], labels=[-1, 0, 1])
        assert matcher(self.anchors, make_instances([[8, -8, 24, 8]]))[1].tolist() == [-1, 0, 1, 0, -1]

    def test_a_positive_lowest_band(self):
        """Then every anchor is positive, and has its own best box, however small the IoU."""
        matcher = IgnoreBandMatcher(thresholds=[0.4, 0.5], labels=[1, -1, 0])
        matched, labels = matcher(self.anchors, make_instances([[-8, -8, 0, -7], [32, -8, 40, -7]]))
        assert labels.tolist() == [1] * 5
        assert matched.tolist() == [0, 0, 0, 0, 1]


class TestEmpty:
    @pytest.mark.parametrize("labels", [[0, -1, 1], [-1, 0, 1], [1, -1, 0]])
    @pytest.mark.parametrize("low_quality", MODES)
    def test_no_boxes(self, labels, low_quality):
        """Every anchor is in the lowest band, and matched to 0 as in Detectron2."""
        matcher = IgnoreBandMatcher(thresholds=[0.4, 0.5], labels=labels, low_quality=low_quality)
        grid = square_anchors(16, 3)
        for result in [
            matcher(grid, make_instances([])),
            matcher(without_grid(grid), make_instances([])),
            matcher(torch.zeros(0, 3)),
        ]:
            assert result[0].tolist() == [0, 0, 0] and result[0].dtype == torch.int64
            assert result[1].tolist() == [labels[0]] * 3 and result[1].dtype == torch.int8

    def test_no_anchors(self):
        """An empty feature map has no labels; beside another level it changes nothing."""
        matcher, instances = IgnoreBandMatcher(**PAPER), make_instances([[0, 0, 16, 16]])
        empty = make_anchors([(0, 4)], [8], [[16]])
        for result in [matcher(empty, instances), matcher(without_grid(empty), instances), matcher(torch.zeros(2, 0))]:
            assert [len(tensor) for tensor in result] == [0, 0]
        beside = make_anchors([(0, 4), (2, 2)], [8, 8], [[16]], [[1.0]])
        assert matcher(beside, instances)[1].tolist() == matcher(square_anchors(16, 2, 2), instances)[1].tolist()


class TestArguments:
    @pytest.mark.parametrize("thresholds", [[], [0.0, 0.5], [-0.1], [0.5, 0.4], [float("nan")]])
    def test_thresholds(self, thresholds):
        with pytest.raises(ValueError, match=r"MODEL\.RETINANET\.IOU_THRESHOLDS .* ascending"):
            IgnoreBandMatcher(thresholds=thresholds, labels=[0] * (len(thresholds) + 1))

    @pytest.mark.parametrize("labels", [[0, 1], [0, -1, 1, 1], [0, 2, 1], [0, -1, 0.5], []])
    def test_labels(self, labels):
        with pytest.raises(ValueError, match=r"MODEL\.RETINANET\.IOU_LABELS .* that is 3"):
            IgnoreBandMatcher(thresholds=[0.4, 0.5], labels=labels)

    def test_low_quality(self):
        with pytest.raises(
            ValueError, match=r"MODEL\.FOCAL\.MATCHER\.LOW_QUALITY .* 'all'.* none, detectron1, detectron2"
        ):
            IgnoreBandMatcher(**PAPER, low_quality="all")

    @pytest.mark.parametrize("matrix", [torch.zeros(3), torch.tensor([[0.5, -0.1]]), torch.tensor([[float("nan")]])])
    def test_matrix(self, matrix):
        with pytest.raises(ValueError, match=r"\(G, R\) matrix of IoU"):
            IgnoreBandMatcher(**PAPER)(matrix)

    def test_half_precision_matrix(self):
        matrix = torch.tensor([[0.75, 0.25, 0.4375]], dtype=torch.float16)
        assert IgnoreBandMatcher(**PAPER)(matrix)[1].tolist() == [1, 0, -1]

    def test_neither_argument_is_changed(self):
        thresholds, labels = [0.4, 0.5], [0, -1, 1]
        matrix = torch.tensor([[0.75, 0.25]])
        IgnoreBandMatcher(thresholds=thresholds, labels=labels)(matrix)
        assert (thresholds, labels, matrix.tolist()) == ([0.4, 0.5], [0, -1, 1], [[0.75, 0.25]])


def test_from_config():
    """Every key of the matcher's is read."""
    cfg = get_cfg()
    add_focal_config(cfg)
    stock = build_matcher(cfg)
    assert (stock.thresholds, stock.labels, stock.low_quality) == ([0.4, 0.5], [0, -1, 1], "detectron2")
    cfg.MODEL.RETINANET.IOU_THRESHOLDS, cfg.MODEL.RETINANET.IOU_LABELS = [0.3], [-1, 1]
    cfg.MODEL.FOCAL.MATCHER.LOW_QUALITY = "none"
    own = build_matcher(cfg)
    assert isinstance(own, IgnoreBandMatcher)
    assert (own.thresholds, own.labels, own.low_quality) == ([0.3], [-1, 1], "none")


@pytest.mark.gpu
@pytest.mark.parametrize("low_quality", MODES)
def test_on_a_gpu(low_quality):
    """On a GPU as on a CPU, with a grid, without and from a matrix."""
    anchors = make_anchors([(40, 60), (20, 30)], [8, 16], [[32, 40.3], [64, 80.6]], device="cuda")
    generator = torch.Generator().manual_seed(0)
    corner, size = torch.rand(2, 500, 2, generator=generator)
    boxes = torch.cat([corner * 400, corner * 400 + 100 ** (size * 1.2)], dim=1)
    boxes = torch.cat([boxes, boxes.round(), torch.tensor(ODD_BOXES)])
    rule = PAPER | {"low_quality": low_quality}
    matcher, instances, iou = (
        IgnoreBandMatcher(**rule),
        make_instances(boxes).to("cuda"),
        iou_matrix(anchors, boxes.cuda()),
    )
    for result in [matcher(anchors, instances), matcher(without_grid(anchors), instances), matcher(iou)]:
        assert all(tensor.is_cuda for tensor in result)
        assert_same([tensor.cpu() for tensor in result], iou.cpu(), rule)
