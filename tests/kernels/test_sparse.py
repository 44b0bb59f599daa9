import copy
from itertools import pairwise

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn

from focal_plugin import DenseTargets, FocalRetinaNetHead, PriorBiasInit
from focal_plugin.kernels.sparse import Cells, convs_at

SHAPES = [(2, 8, 12, 9), (2, 8, 5, 7), (2, 8, 1, 1)]


def stack(num_convs, channels=8, outputs=6):
    sizes = [channels] * num_convs + [outputs]
    return [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(sizes)]


def dense(convs, features):
    """Whole maps: ReLU between any two convs."""
    maps = []
    for x in features:
        for i, conv in enumerate(convs):
            x = conv(x if i == 0 else x.relu())
        maps.append(x)
    return maps


def places_of(kind):
    """(level, image, y, x) of the wanted cells."""
    everywhere = [
        (level, image, y, x)
        for level, (n, _, h, w) in enumerate(SHAPES)
        for image in range(n)
        for y in range(h)
        for x in range(w)
    ]
    return {
        "none": [],
        "one": [(0, 1, 6, 4)],
        "corners": [(0, 0, 0, 0), (0, 0, 11, 8), (0, 1, 0, 8), (1, 0, 4, 0), (2, 1, 0, 0)],
        "repeated": [(1, 1, 2, 3), (0, 0, 5, 5), (1, 1, 2, 3), (0, 0, 5, 6)],
        "everywhere": everywhere,
    }[kind]


def numbers_of(cells, places):
    numbers = [cells.numbers(level, *(torch.tensor([v]) for v in rest)) for level, *rest in places]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *numbers])


@pytest.mark.parametrize("num_convs", [1, 2, 5])
@pytest.mark.parametrize("kind", ["none", "one", "corners", "repeated", "everywhere"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_as_whole_maps(num_convs, kind, memory_format):
    places, convs = places_of(kind), [conv.double() for conv in stack(num_convs)]
    features = [torch.randn(s).double().to(memory_format=memory_format).requires_grad_() for s in SHAPES]
    leaves = [*features, *(p for conv in convs for p in conv.parameters())]

    cells = Cells(features)
    ours = convs_at(convs, features, cells, numbers_of(cells, places))
    maps = dense(convs, features)
    theirs = torch.stack([maps[level][image, :, y, x] for level, image, y, x in places]) if places else ours * 0
    assert ours.shape == (len(places), 6)
    torch.testing.assert_close(ours, theirs)

    weights = torch.randn_like(ours)
    grads = torch.autograd.grad((ours * weights).sum(), leaves)
    if not places:
        assert all((grad == 0).all() for grad in grads)
        return
    expected = torch.autograd.grad((theirs * weights).sum(), leaves, materialize_grads=True)
    for ours, theirs in zip(grads, expected):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck():
    convs = [conv.double() for conv in stack(2, channels=2, outputs=3)]
    feature = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    parameters = [p for conv in convs for p in conv.parameters()]
    cells = Cells([feature])
    numbers = cells.numbers(0, torch.tensor([0, 0]), torch.tensor([0, 2]), torch.tensor([1, 2]))
    assert torch.autograd.gradcheck(lambda x, *_: convs_at(convs, [x], cells, numbers), (feature, *parameters))


def test_gives_up_where_whole_maps_are_cheaper():
    features, convs = [torch.randn(s) for s in SHAPES], stack(2)
    cells = Cells(features)
    assert cells.num_inside == 2 * (12 * 9 + 5 * 7 + 1)
    numbers = numbers_of(cells, [(0, 1, 6, 4)])  # one output cell, 9 of the second conv's inputs, 25 of the first's
    assert convs_at(convs, features, cells, numbers, max_share=9 / cells.num_inside) is not None
    assert convs_at(convs, features, cells, numbers, max_share=8.9 / cells.num_inside) is None


def test_under_autocast():
    features, convs = [torch.randn(s) for s in SHAPES], stack(2)
    cells = Cells(features)
    numbers = numbers_of(cells, places_of("corners"))
    with torch.autocast("cpu", torch.bfloat16):
        ours = convs_at(convs, features, cells, numbers)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), convs_at(convs, features, cells, numbers), rtol=0.05, atol=0.05)
    ours.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for conv in convs for p in conv.parameters())


def head(norm=""):
    shapes = [ShapeSpec(channels=16, stride=s) for s in (8, 16)]
    return FocalRetinaNetHead(
        input_shape=shapes, num_classes=3, num_anchors=2, conv_dims=[16, 16], norm=norm, bias_init=PriorBiasInit()
    )


def targets_of(labels):
    """Targets whose positives are the anchors with a class; boxes do not matter here."""
    positives = [((x >= 0) & (x < 3)).flatten().nonzero().squeeze(1) for x in labels]
    count = sum(map(len, positives))
    return DenseTargets(labels, 3, positives, anchors=torch.zeros(count, 4), gt_boxes=torch.zeros(count, 4))


@pytest.mark.parametrize("norm", ["", "GN", "BN"])
@pytest.mark.parametrize("share", [0, 0.003, 1])
def test_the_head_with_targets(norm, share):
    """The logits and the positives' rows of the deltas are those without targets, and so are the gradients."""
    torch.manual_seed(1)
    ours = head(norm if norm != "GN" else lambda channels: nn.GroupNorm(4, channels))
    for p in ours.bbox_pred.parameters():
        nn.init.normal_(p, std=0.1)
    theirs = copy.deepcopy(ours)
    features = [torch.randn(2, 16, 14, 20), torch.randn(2, 16, 7, 10)]
    labels = [torch.where(torch.rand(2, 2, *x.shape[-2:]) < share, 1, 3) for x in features]
    targets = targets_of(labels)

    logits, deltas = ours(features, targets)
    logits_expected, deltas_expected = theirs(features)
    deltas_expected = targets.gather(deltas_expected)
    assert deltas.shape == (targets.num_positives, 4)
    for a, b in zip(logits, logits_expected):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(deltas, deltas_expected)

    for rows in (deltas, deltas_expected):
        rows.sin().sum().backward()
    for (name, a), b in zip(ours.bbox_subnet.named_parameters(), theirs.bbox_subnet.parameters()):
        assert a.grad is not None, f"{name} has no gradient: DistributedDataParallel would wait for it"
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
