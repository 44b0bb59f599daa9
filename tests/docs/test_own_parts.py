"""The parts of ``docs/own_parts.md`` do what they say, alone and together."""

import importlib
import sys

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from focal_plugin import NEGATIVE, POSITIVE, Anchors, load_config, registry
from focal_plugin.layers import AnchorDeltas
from tests.docs.pages import PAGES, blocks, commands

PAGE = PAGES["docs/own_parts.md"]
REGISTRIES = [getattr(registry, name) for name in dir(registry) if name.endswith("_REGISTRY")]


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """The page's module, and beside it the page's config."""
    ((code,), (config,)) = blocks(PAGE, "python"), blocks(PAGE, "yaml")
    (tmp_path / "my_parts.py").write_text(code)
    (tmp_path / "my_parts.yaml").write_text(config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for each in REGISTRIES:  # registered for this test
        monkeypatch.setattr(each, "_obj_map", dict(each._obj_map))
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)
    yield importlib.import_module("my_parts")
    sys.modules.pop("my_parts", None)


def instances(boxes):
    found = Instances((64, 64), gt_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)))
    found.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
    return found


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("k", [1, 4, 100])
def test_the_matcher(parts, count, k):
    torch.manual_seed(count)
    corners = torch.rand(30 + count, 2) * 40
    boxes = torch.cat([corners, corners + 5 + torch.rand(30 + count, 2) * 20], dim=1)
    anchors, truth = boxes[:30], boxes[30:].tolist()
    matched, labels = parts.TopMatcher(k=k)(Anchors([anchors], [(5, 6)], [1]), instances(truth))
    assert (matched.shape, matched.dtype, labels.shape, labels.dtype) == ((30,), torch.int64, (30,), torch.int8)
    owners = {}  # of each positive: the box that it overlaps best among those that chose it
    for g, box in enumerate(truth):
        overlaps = [iou(anchor, box) for anchor in anchors.tolist()]
        for i in sorted(range(30), key=lambda i: -overlaps[i])[:k]:
            if overlaps[i] > owners.get(i, (0, None))[0]:
                owners[i] = overlaps[i], g
    assert labels.tolist() == [POSITIVE if i in owners else NEGATIVE for i in range(30)]
    assert {i: int(matched[i]) for i in owners} == {i: g for i, (_, g) in owners.items()}


def test_the_box_loss(parts):
    anchors = torch.tensor([[0.0, 0, 10, 20], [5, 5, 15, 15]])
    boxes = torch.tensor([[1.0, 2, 11, 22], [5, 5, 25, 10]])
    transform = AnchorDeltas(weights=(1.0, 1.0, 1.0, 1.0))
    loss, exact = parts.CornerLoss(), transform.get_deltas(anchors, boxes)
    torch.testing.assert_close(loss(exact, anchors, boxes, transform), torch.zeros(2), atol=1e-5, rtol=0)
    # Where the anchors are: 1/10 and 2/20 of a side at each corner; 10/20 and 5/5 at the second corner of the other.
    torch.testing.assert_close(loss(torch.zeros(2, 4), anchors, boxes, transform), torch.tensor([0.4, 1.5]))
    assert loss(exact[:0], anchors[:0], boxes[:0], transform).shape == (0,)


def test_the_bias_init(parts):
    conv = torch.nn.Conv2d(4, 6, 1)
    parts.RareFirst(rare=0.5, others=0.25)(conv, 2, 3)
    torch.testing.assert_close(conv.bias.detach().sigmoid(), torch.tensor([0.5, 0.25, 0.25] * 2))


def test_all_of_them_train(parts):
    """By the page's config, which both commands name. The commands themselves need data and minutes."""
    assert [words[:3] for words in commands(PAGE)] == [
        ["focal", "doctor", "--config-file"],
        ["focal", "train", "--config-file"],
    ]
    assert {words[3] for words in commands(PAGE)} == {"my_parts.yaml"}
    model = build_model(load_config("my_parts.yaml", ["MODEL.DEVICE", "cpu"]))
    kinds = [type(part).__name__ for part in (model.anchor_matcher, model.box_loss, model.head)]
    assert kinds == ["TopMatcher", "CornerLoss", "SharedHead"]
    assert model.anchor_matcher.k == 12 and len(model.head.subnet) == 2 * 3
    torch.testing.assert_close(model.head.cls_score.bias.sigmoid().min(), torch.tensor(0.001))
    batch = [{"image": torch.zeros(3, 64, 64), "instances": instances([[8.0, 8, 40, 40]])}]
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    assert losses["loss_box_reg"] > 0 and all(p.grad is not None for p in model.head.parameters())
    with torch.no_grad():
        assert len(model.eval()(batch)) == 1
