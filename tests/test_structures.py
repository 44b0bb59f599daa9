"""Anchors and DenseTargets against loops over single anchors."""

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, Instances
from torch import nn

from focal_plugin import IGNORED, NEGATIVE, POSITIVE, Anchors, DenseTargets
from focal_plugin.structures import unravel
from tests.losses.batches import stacked

# (H, W) of the levels, their strides, and sizes such that they have 4, 2 and 2 anchors a location
GRIDS, STRIDES, SIZES, RATIOS = [(3, 5), (2, 3), (1, 1)], [8, 16, 32], [[16, 20], [32], [64]], [[0.5, 2.0]]
K = 7


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 1, 5, 3), (1, 1)])
def test_unravel(shape):
    indices = torch.randperm(torch.Size(shape).numel())
    for some in (indices, indices[:0], indices[None]):
        expected = torch.unravel_index(some, shape)
        assert len(expected) == len(shape) and all(map(torch.equal, unravel(some, shape), expected))


def test_unravel_without_places():
    assert [len(x) for x in unravel(torch.zeros(0, dtype=torch.int64), (2, 0, 3))] == [0, 0, 0]


def make_generator(sizes=SIZES, ratios=RATIOS, strides=STRIDES, offset=0.0):
    return DefaultAnchorGenerator(sizes=sizes, aspect_ratios=ratios, strides=strides, offset=offset)


def make_features(grids=GRIDS, batch=2):
    return [torch.zeros(batch, 3, h, w) for h, w in grids]


def places(anchors):
    """(level, a, y, x) of each of the R anchors, one after another."""
    return [
        (level, a, y, x)
        for level, ((height, width), num) in enumerate(zip(anchors.grid_sizes, anchors.num_cell_anchors))
        for y in range(height)
        for x in range(width)
        for a in range(num)
    ]


class TestAnchors:
    @pytest.mark.parametrize("offset", [0.0, 0.5, 0.25])
    def test_from_generator(self, offset):
        """Each anchor is its location's cell anchor, moved there."""
        anchors = Anchors.from_generator(make_generator(offset=offset), make_features())
        assert anchors.grid_sizes == GRIDS and anchors.strides == STRIDES and anchors.offset == offset
        assert anchors.num_cell_anchors == [4, 2, 2] == [len(cell) for cell in anchors.cell_anchors]
        assert len(anchors) == 3 * 5 * 4 + 2 * 3 * 2 + 2 == sum(len(boxes) for boxes in anchors.boxes)
        assert anchors.device == torch.device("cpu")
        flat = torch.cat(anchors.boxes)
        for index, (level, a, y, x) in enumerate(places(anchors)):
            shift = torch.tensor([x, y, x, y]) * STRIDES[level] + offset * STRIDES[level]
            torch.testing.assert_close(flat[index], anchors.cell_anchors[level][a] + shift)

    def test_other_numbers_of_levels_and_anchors(self):
        generator = make_generator(sizes=[[10]], ratios=[[1.0]], strides=[4])
        one = Anchors.from_generator(generator, [torch.zeros(1, 1, 4, 6)])
        assert (len(one), one.num_cell_anchors, one.grid_sizes) == (24, [1], [(4, 6)])

    def test_a_generator_without_a_grid(self):
        """Anchors of a generator that has no strides say so, and know their shapes all the same."""

        class Random(nn.Module):
            def forward(self, features):
                return [Boxes(torch.rand(f.shape[-2] * f.shape[-1] * 3, 4)) for f in features]

        anchors = Anchors.from_generator(Random(), make_features())
        assert anchors.strides is None and anchors.cell_anchors is None
        assert anchors.num_cell_anchors == [3, 3, 3] and len(anchors) == (15 + 6 + 1) * 3

    def test_flatten_levels(self):
        """Value by value: level after level, within a level as (N, A, H, W)."""
        anchors = Anchors.from_generator(make_generator(), make_features())
        values = torch.arange(3 * len(anchors)).view(3, -1)  # (N, R)
        expected = []
        where = places(anchors)
        for level in range(3):
            order = sorted((place, r) for r, place in enumerate(where) if place[0] == level)  # by (a, y, x)
            expected += [values[image, r].item() for image in range(3) for _, r in order]
        assert anchors.flatten_levels(values).tolist() == expected


def make_instances(boxes, classes):
    boxes, classes = torch.tensor(boxes, dtype=torch.float32), torch.tensor(classes, dtype=torch.int64)
    return Instances((64, 64), gt_boxes=Boxes(boxes.reshape(-1, 4)), gt_classes=classes)


def random_batch(counts, seed, codes=(IGNORED, NEGATIVE, NEGATIVE, POSITIVE)):
    """A batch of images with so many boxes, and a matcher's verdict drawn at random (no positives without boxes)."""
    generator = torch.Generator().manual_seed(seed)
    anchors = Anchors.from_generator(make_generator(), make_features())
    instances, matches = [], []
    for count in counts:
        boxes = torch.rand(count, 4, generator=generator).tolist()
        instances.append(make_instances(boxes, torch.randint(K, (count,), generator=generator).tolist()))
        drawn = torch.tensor(codes)[torch.randint(len(codes), (len(anchors),), generator=generator)].to(torch.int8)
        if count == 0:
            drawn[drawn == POSITIVE] = NEGATIVE
        matches.append((torch.randint(max(count, 1), (len(anchors),), generator=generator), drawn))
    return anchors, matches, instances


BATCHES = [[3], [2, 5], [0, 4], [4, 0], [1, 0, 0, 6], [0], [0, 0]]


class TestDenseTargets:
    @pytest.mark.parametrize("counts", BATCHES)
    @pytest.mark.parametrize("seed", range(3))
    def test_from_matches(self, counts, seed):
        """Every label, and every positive with its anchor and box, looked up one at a time."""
        anchors, matches, instances = random_batch(counts, seed)
        targets = DenseTargets.from_matches(anchors, stacked(matches), instances, K)
        flat, expected = torch.cat(anchors.boxes), []
        assert [tuple(labels.shape) for labels in targets.labels] == [
            (len(counts), a, h, w) for a, (h, w) in zip([4, 2, 2], GRIDS)
        ]
        assert all(labels.dtype == torch.int64 for labels in targets.labels)
        for image, (matched, codes) in enumerate(matches):
            for r, (level, a, y, x) in enumerate(places(anchors)):
                label = targets.labels[level][image, a, y, x]
                if codes[r] == POSITIVE:
                    gt = instances[image][matched[r].item()]
                    assert label == gt.gt_classes.item()
                    expected.append(((level, image, a, y, x), flat[r], gt.gt_boxes.tensor[0]))
                else:
                    assert label == (K if codes[r] == NEGATIVE else IGNORED)

        expected.sort(key=lambda positive: positive[0])
        assert targets.num_classes == K
        assert targets.num_positives == len(expected) == len(targets.anchors) == len(targets.gt_boxes)
        positions = [
            (level, *(i.item() for i in torch.unravel_index(position, targets.labels[level].shape)))
            for level, positives in enumerate(targets.positives)
            for position in positives
        ]
        assert positions == [place for place, _, _ in expected]
        for i, (_, anchor, box) in enumerate(expected):
            assert torch.equal(targets.anchors[i], anchor) and torch.equal(targets.gt_boxes[i], box)

    @pytest.mark.parametrize("counts", BATCHES)
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_gather(self, counts, memory_format):
        """The positives' numbers out of predictions whose channel is a·C + c."""
        anchors, matches, instances = random_batch(counts, seed=5)
        targets = DenseTargets.from_matches(anchors, stacked(matches), instances, K)
        shapes = [labels.shape for labels in targets.labels]
        dense = [torch.rand(n, a * 4, h, w).to(memory_format=memory_format) for n, a, h, w in shapes]
        rows = targets.gather(dense)
        assert rows.shape == (targets.num_positives, 4)
        expected = [
            dense[level][image, a * 4 + c, y, x].item()
            for level, positives in enumerate(targets.positives)
            for image, a, y, x in (
                [i.item() for i in torch.unravel_index(position, shapes[level])] for position in positives
            )
            for c in range(4)
        ]
        assert rows.flatten().tolist() == expected

    def test_gather_passes_gradients_to_the_positives_alone(self):
        anchors, matches, instances = random_batch([3, 2], seed=1)
        targets = DenseTargets.from_matches(anchors, stacked(matches), instances, K)
        dense = [torch.rand(n, a * 4, h, w, requires_grad=True) for n, a, h, w in (t.shape for t in targets.labels)]
        targets.gather(dense).sum().backward()
        for level, labels in zip(dense, targets.labels):
            positive = (labels >= 0) & (labels < K)  # (N, A, H, W)
            expected = positive.unsqueeze(2).expand(-1, -1, 4, -1, -1).reshape(level.shape).float()
            assert torch.equal(level.grad, expected)

    def test_gather_of_other_places(self):
        """The rows of any anchors, out of (N, A·C, H, W) and out of (N, A, C, H, W)."""
        anchors, matches, instances = random_batch([3, 2], seed=1)
        targets = DenseTargets.from_matches(anchors, stacked(matches), instances, K)
        dense = [torch.rand(n, a * 5, h, w) for n, a, h, w in (t.shape for t in targets.labels)]
        places = [torch.tensor([7, 3]), torch.zeros(0, dtype=torch.int64), torch.tensor([1])]
        expected = []
        for level, labels, indices in zip(dense, targets.labels, places):
            n, a, h, w = labels.shape
            rows = level.view(n, a, 5, h, w).permute(0, 1, 3, 4, 2).reshape(-1, 5)
            expected += [rows[i] for i in indices.tolist()]
        assert torch.equal(targets.gather(dense, places), torch.stack(expected))
        views = [level.view(len(level), -1, 5, *level.shape[2:]) for level in dense]
        assert torch.equal(targets.gather(views, places), torch.stack(expected))

    def test_the_grid_is_the_anchors_themselves(self):
        anchors, matches, instances = random_batch([3, 2], seed=1)
        targets = DenseTargets.from_matches(anchors, stacked(matches), instances, K)
        assert targets.grid is anchors and targets.quality is None

    def test_quality(self):
        """IoUs by hand; nothing, a point and a wild box among them."""
        empty = torch.zeros(6, 4)
        gt_boxes = torch.tensor([[0.0, 0, 4, 4]] * 4 + [[2.0, 2, 2, 2]] * 2)
        targets = DenseTargets([], K, [], empty, gt_boxes)
        boxes = torch.tensor(
            [[0.0, 0, 4, 4], [2, 0, 6, 4], [5, 5, 6, 6], [-1e6, 0, 1e6, 4], [2, 2, 2, 2], [0, 0, 4, 4]]
        ).requires_grad_()
        quality = targets.with_quality(boxes).quality
        torch.testing.assert_close(quality, torch.tensor([1, 1 / 3, 0, 2e-6, 0, 0]))
        assert not quality.requires_grad and targets.quality is None

    def test_quality_of_nothing(self):
        targets = DenseTargets([], K, [], torch.zeros(0, 4), torch.zeros(0, 4))
        assert targets.with_quality(torch.zeros(0, 4)).quality.shape == (0,)

    @pytest.mark.parametrize("code, label", [(IGNORED, IGNORED), (NEGATIVE, K)])
    def test_no_positives(self, code, label):
        """All ignored or all background: nothing to gather, on any level."""
        anchors, matches, instances = random_batch([2, 0], seed=0, codes=[code])
        targets = DenseTargets.from_matches(anchors, stacked(matches), instances, K)
        assert all((labels == label).all() for labels in targets.labels)
        assert targets.num_positives == 0 and [len(p) for p in targets.positives] == [0, 0, 0]
        assert targets.anchors.shape == targets.gt_boxes.shape == (0, 4)
        assert targets.gather([torch.zeros(2, a * 4, h, w) for a, (h, w) in zip([4, 2, 2], GRIDS)]).shape == (0, 4)

    def test_all_positive(self):
        anchors, matches, instances = random_batch([1, 3], seed=0, codes=[POSITIVE])
        targets = DenseTargets.from_matches(anchors, stacked(matches), instances, K)
        assert targets.num_positives == 2 * len(anchors)
        assert all(((labels >= 0) & (labels < K)).all() for labels in targets.labels)

    @pytest.mark.gpu
    def test_on_a_gpu(self):
        """On a GPU as on a CPU."""
        anchors, matches, instances = random_batch([3, 0, 5], seed=2)
        expected = DenseTargets.from_matches(anchors, stacked(matches), instances, K)
        on_gpu = Anchors.from_generator(make_generator().cuda(), [feature.cuda() for feature in make_features()])
        targets = DenseTargets.from_matches(
            on_gpu,
            [x.cuda() for x in stacked(matches)],
            [gt.to("cuda") for gt in instances],
            K,
        )
        for name in ["labels", "positives"]:
            for mine, theirs in zip(getattr(targets, name), getattr(expected, name)):
                assert mine.is_cuda and torch.equal(mine.cpu(), theirs)
        assert torch.equal(targets.anchors.cpu(), expected.anchors)
        assert torch.equal(targets.gt_boxes.cpu(), expected.gt_boxes)
