"""What a training step and inference ask of a GPU, proven without one.

On fake tensors, which have shapes and devices but no values.

An operator whose result has a shape that depends on values raises there, and so does reading a value: on a GPU both
make the host wait.
"""

from importlib.util import find_spec

import pytest
import torch
from detectron2.structures import Boxes, ImageList, Instances
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from focal_plugin import Anchors, FocalRetinaNet, IgnoreBandMatcher, retinanet, structures
from focal_plugin.kernels import padded
from tests.small_retinanet import small_config

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")

COUNTS = [3, 0, 2, 1, 0]  # of positives, what the one reading says


class Operators(TorchDispatchMode):
    """Counts the operators that launch something: views and allocations do not."""

    FREE = ("view", "expand", "slice", "select", "split", "unbind", "permute", "transpose", "unsqueeze", "squeeze")
    FREE += ("empty", "detach", "alias", "as_strided", "t.", "_unsafe_view", "lift_fresh", "device")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2]
        if not name.startswith(self.FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def fake_labels(codes, matched, first, classes, shapes, num_classes):
    """One launch, of a kernel that a test of its own covers."""
    labels = torch.empty(codes.numel(), dtype=torch.int64, device=codes.device)
    return labels, labels == 1, torch.empty(len(shapes), dtype=torch.int32, device=codes.device)


def fake_positives(at, matched, first, boxes, anchors, shapes):
    """One launch."""
    return at + 1, anchors.new_empty(len(at), 4), anchors.new_empty(len(at), 4)


@pytest.fixture(params=["IgnoreBandMatcher", "ATSSMatcher"])
def step(request, monkeypatch):
    """A model on a fake GPU, and a batch of two sizes of images, one without boxes and one with a crowd."""
    from focal_plugin.kernels import dense_focal_triton, targets_triton

    readings = []
    monkeypatch.setattr(structures, "read_counts", lambda counts: readings.append(counts.shape) or COUNTS)
    # Kernels launched by hand do not run on fake tensors. Theirs is one float for each of a number of programs.
    launch = lambda logits, *args: [torch.empty(7, device=logits[0].device)]  # noqa: E731
    monkeypatch.setattr(dense_focal_triton, "_launch", launch)
    monkeypatch.setattr(targets_triton, "label", fake_labels)
    monkeypatch.setattr(targets_triton, "gather", fake_positives)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with FakeTensorMode():
        with torch.device("cuda"):
            cfg = small_config()
            cfg.MODEL.FOCAL.MATCHER.NAME = request.param
            model = FocalRetinaNet(cfg).train()
        yield model, [image(64, 96, boxes=3), image(96, 64, boxes=0), image(64, 64, boxes=1, crowds=1)], readings


def image(height, width, boxes, crowds=0):
    instances = Instances((height, width))
    instances.gt_boxes, instances.gt_classes = Boxes(torch.empty(boxes, 4)), torch.empty(boxes, dtype=torch.int64)
    pixels = torch.empty(3, height, width, dtype=torch.uint8)
    return {"image": pixels, "instances": instances, "ignore_boxes": Boxes(torch.empty(crowds, 4)) if crowds else None}


def test_a_step_reads_the_counts_of_positives_and_nothing_else(step):
    """Forward. Labels come from the sizes alone, before the backbone, from the second batch of a size on."""
    model, batch, readings = step
    order = []
    model.backbone.register_forward_pre_hook(lambda *_: order.append("backbone"))
    label = model.label_anchors
    model.label_anchors = lambda *args: order.append("labels") or label(*args)
    for _ in range(2):
        logits, deltas, targets = model.predict(batch)
        losses = model.losses(logits, deltas, targets)
    assert order == ["backbone", "labels", "labels", "backbone"]
    assert readings == [(5,)] * 2
    assert deltas.shape == (sum(COUNTS), 4) and deltas.device.type == "cuda"
    assert [len(level) for level in targets.positives] == COUNTS
    assert {name: loss.shape for name, loss in losses.items()} == {"loss_cls": (), "loss_box_reg": ()}


def test_labels_take_few_launches(step):
    """Their number does not depend on the number of boxes. It was 3,300 a step, nearly all of them here."""
    model, batch, _ = step
    features = model.features(model.preprocess_image(batch).tensor)
    with Operators() as operators:
        model.label_batch(features, batch)
    assert operators.names.count("match_ignore_bands") == (type(model.anchor_matcher) is IgnoreBandMatcher)
    # ATSS looks for the nearest locations level by level.
    assert len(operators.names) < (70 if type(model.anchor_matcher) is IgnoreBandMatcher else 320), operators.names


@pytest.fixture
def inference(monkeypatch):
    """A model on a fake GPU, whose anchors are there already; a batch of two images; the tensors that are read."""
    readings = []

    def read(rows, counts, sizes):
        readings.append((rows, counts, sizes))
        return [Instances(size) for size in sizes]

    monkeypatch.setattr(padded, "to_instances", read)
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            model = FocalRetinaNet(small_config()).eval()
        images = ImageList(torch.empty(2, 3, 96, 128, device="cuda"), [(96, 100), (64, 128)])
        monkeypatch.setattr(model, "preprocess_image", lambda batch: images)
        anchors = Anchors.from_generator(model.anchor_generator, model.features(images.tensor))
        monkeypatch.setattr(retinanet, "cached_anchors", lambda *_: anchors)
        yield model, [{"height": 192, "width": 200}, {}], readings


@pytest.mark.parametrize("clip", [False, True])
def test_inference_reads_the_numbers_of_detections_and_nothing_else(inference, clip):
    model, batch, readings = inference
    model.clip_before_nms = clip
    outputs = model(batch)
    ((rows, counts, sizes),) = readings
    assert (rows.shape, rows.dtype, rows.device.type) == ((2, 100, 6), torch.float32, "cuda")
    assert (counts.shape, counts.dtype, counts.device.type) == ((2,), torch.int32, "cuda")
    assert sizes == [output["instances"].image_size for output in outputs] == [(192, 200), (64, 128)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_detections_take_few_launches(inference, memory_format):
    """From the head's outputs on, for all images. It was 261 launches and 15 readings for a single image."""
    model, batch, _ = inference
    features = model.features(model.preprocess_image(batch).tensor)
    outputs = [[level.contiguous(memory_format=memory_format) for level in part] for part in model.head(features)]
    with Operators() as operators:
        candidates = model.padded_candidates(features, *outputs)
        padded.detections(*candidates, torch.empty(2, 6, device="cuda"), iou_thresh=0.5, max_detections=100)
    assert operators.names.count("batched_nms") == 1
    assert len(operators.names) < (120 if memory_format == torch.channels_last else 140), operators.names


@pytest.mark.parametrize("name", ["candidates", "forward_inference"])
def test_a_subclass_detects_in_its_own_way(inference, name):
    """On a GPU as on a CPU."""
    model = inference[0]
    assert padded.is_usable(model, FocalRetinaNet)
    model.__class__ = type("Own", (FocalRetinaNet,), {name: lambda self, *args: None})
    assert not padded.is_usable(model, FocalRetinaNet)
    assert not padded.is_usable(FocalRetinaNet(small_config()), FocalRetinaNet)  # on a CPU


@pytest.mark.gpu
@pytest.mark.parametrize("matcher", ["IgnoreBandMatcher", "ATSSMatcher"])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_gpu_is_waited_for_once(matcher, dtype, monkeypatch):
    """Forward and backward, from the second batch of a size on: PyTorch raises an error where anything else waits."""
    cfg = small_config()
    cfg.MODEL.DEVICE, cfg.MODEL.FOCAL.MATCHER.NAME = "cuda", matcher
    torch.manual_seed(0)
    model = FocalRetinaNet(cfg).cuda().to(memory_format=torch.channels_last).train()
    batch = [image(64, 96, boxes=3), image(96, 64, boxes=0), image(64, 64, boxes=1, crowds=1)]
    for each in batch:
        each["image"] = torch.randint(0, 256, each["image"].shape, dtype=torch.uint8).pin_memory()
        corners = torch.rand(len(each["instances"]), 2) * 20
        each["instances"].gt_boxes = Boxes(torch.cat([corners, corners + 30], dim=1))
        each["instances"].gt_classes.zero_()
    read, readings = structures.read_counts, []

    def read_once(counts):
        torch.cuda.set_sync_debug_mode("default")
        readings.append(read(counts))
        torch.cuda.set_sync_debug_mode("error")
        return readings[-1]

    def step():
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            losses = model(batch)
        sum(losses.values()).backward()

    step()
    step()
    monkeypatch.setattr(structures, "read_counts", read_once)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(readings) == 1 and sum(readings[0]) > 0
