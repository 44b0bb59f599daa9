"""NMS on a GPU against torchvision's, and inference there against a CPU's: in Triton's interpreter, and compiled."""

import math
import re
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torchvision.ops import batched_nms as torchvision_nms
from torchvision.ops.boxes import _batched_nms_coordinate_trick, _batched_nms_vanilla

from tests.deploy import test_optimize
from tests.interpreter import INTERPRETED, SLOW_IN_INTERPRETER

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
# In the interpreter, this file runs the kernels on the CPU; see test_in_interpreter.py.
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="in the interpreter")
DEVICES = [pytest.param("cpu", marks=in_interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]

# The same box twice, boxes without area and without extent, one inside another, one outside of the image.
ODD = [[0, 0, 10, 10], [0, 0, 10, 10], [5, 5, 5, 9], [7, 7, 7, 7], [7, 7, 7, 7], [1, 1, 9, 9], [-50, -30, -10, -1]]


def image(boxes, scores, classes):
    """Rows (C, 6) in the order of torchvision's stable sort."""
    order = scores.sort(descending=True, stable=True).indices
    return torch.cat([boxes, scores[:, None], classes[:, None].float()], dim=1)[order]


def random_image(count, classes=3, seed=0):
    """With equal scores, whole numbers and negative coordinates among others."""
    generator = torch.Generator().manual_seed(seed)
    corner, size = torch.rand(2, count, 2, generator=generator)
    boxes = torch.cat([corner * 300 - 40, corner * 300 - 40 + size * 120], dim=1)
    boxes[::3] = boxes[::3].round()
    scores = torch.rand(count, generator=generator)
    scores[::4] = (scores[::4] * 10).round() / 10
    return image(boxes, scores, torch.randint(0, classes, (count,), generator=generator))


def keep(images, iou_thresh=0.5, max_detections=100, device="cpu", **kwargs):
    """Run the kernel on (C_i, 6) rows of some images, padded with boxes that must not matter."""
    from focal_plugin.kernels.nms_triton import batched_nms

    most = max(map(len, images))
    padding = torch.tensor([-1e4, -1e4, 1e4, 1e4, -math.inf, 0])
    rows = torch.stack([torch.cat([x, padding.expand(most - len(x), 6)]) for x in images]).to(device)
    index, counts = batched_nms(rows, iou_thresh, max_detections, **kwargs)
    assert index.shape == (len(images), min(max_detections, most)) and index.dtype == torch.int64
    assert counts.dtype == torch.int32
    return [row[:count].cpu() for row, count in zip(index, counts.tolist())]


def assert_as_torchvision(images, iou_thresh=0.5, max_detections=100, device="cpu", oracle=torchvision_nms, **kwargs):
    for rows, found in zip(images, keep(images, iou_thresh, max_detections, device, **kwargs), strict=True):
        boxes, scores, classes = rows[:, :4], rows[:, 4], rows[:, 5].long()
        assert found.equal(oracle(boxes, scores, classes, iou_thresh)[:max_detections])


@st.composite
def images(draw):
    """Few coordinates, so that boxes coincide, touch and have IoUs of exactly the threshold."""
    sides = st.sampled_from([-8.0, -1.5, 0.0, 0.1, 1.0, 3.0, 4.0, 6.0, 8.0, 100.0])
    boxes = draw(st.lists(st.tuples(sides, sides, sides, sides), max_size=12))
    boxes = torch.tensor(boxes + [tuple(map(float, box)) for box in ODD[: draw(st.integers(0, len(ODD)))]]).view(-1, 4)
    boxes = torch.cat([boxes[:, :2].minimum(boxes[:, 2:]), boxes[:, :2].maximum(boxes[:, 2:])], dim=1)
    numbers = st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=len(boxes), max_size=len(boxes))
    classes = st.lists(st.integers(0, draw(st.integers(0, 2))), min_size=len(boxes), max_size=len(boxes))
    return image(boxes, torch.tensor(draw(numbers)), torch.tensor(draw(classes)))


@in_interpreter
@settings(max_examples=30)
@given(
    st.lists(images(), min_size=1, max_size=3), st.sampled_from([0.0, 0.25, 0.5, 0.6, 1.0]), st.sampled_from([1, 3, 99])
)
def test_ties_odd_boxes_and_empty_images(batch, iou_thresh, max_detections):
    assert_as_torchvision(batch, iou_thresh, max_detections)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("iou_thresh", [0.3, 0.5, 0.6])
def test_hundreds_of_candidates(iou_thresh, device):
    batch = [random_image(900), random_image(1, seed=1), random_image(300, classes=1, seed=2), torch.zeros(0, 6)]
    assert_as_torchvision(batch, iou_thresh, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_detections", [0, 7, pytest.param(300, marks=SLOW_IN_INTERPRETER)])
def test_more_candidates_than_are_in_registers_at_a_time(max_detections, device):
    """With few left of each block, many overlap with those of the blocks before."""
    batch = [random_image(2500, classes=1), random_image(1100, seed=1)]
    options = {"iou_thresh": 0.1, "max_detections": max_detections, "device": device}
    assert_as_torchvision(batch, **options, oracle=_batched_nms_coordinate_trick)


@pytest.mark.gpu
@pytest.mark.parametrize("number", [1000, 5000, 20000])
def test_thousands_of_candidates_on_a_gpu(number):
    oracle = _batched_nms_coordinate_trick if number <= 5000 else _by_class
    batch = [random_image(number, classes=80, seed=seed) for seed in range(3)]
    assert_as_torchvision(batch, max_detections=1000, device="cuda", oracle=oracle)


@pytest.mark.parametrize("device", DEVICES)
def test_classes_are_compared_beyond_the_limit_of_offsets(device):
    """Where a class's offset is smaller than a box's way out of the image, the two differ."""
    far = image(torch.tensor([[0.0, 0, 9, 9], [-10, -10, -1, -1]]), torch.tensor([0.9, 0.8]), torch.tensor([0, 1]))
    batch = [far, random_image(300)]
    assert_as_torchvision(batch, device=device, oracle=_batched_nms_coordinate_trick)
    assert_as_torchvision(batch, device=device, oracle=_by_class, offset_limit=1)
    assert [len(keep([far], device=device, offset_limit=limit)[0]) for limit in (1, 2)] == [2, 1]


def _by_class(boxes, scores, classes, iou_thresh):
    """Class by class as torchvision does, in the order of the rows, which are sorted."""
    return _batched_nms_vanilla(boxes, scores, classes, iou_thresh).sort().values


@pytest.mark.parametrize("device", DEVICES)
def test_a_coordinate_that_is_not_a_number_is_torchvisions_too(device):
    """Of an image with one, nothing is suppressed."""
    rows = random_image(20)
    rows[5, 2] = math.nan
    rows[7, [0, 1, 2, 3, 5]] = rows[6, [0, 1, 2, 3, 5]]
    assert_as_torchvision([rows, random_image(20, seed=1)], device=device)
    assert len(keep([rows], device=device)[0]) == 20


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.6, 0.7, 1.0, 0.0, -0.1])
def test_a_threshold_in_single_precision_decides_as_one_in_double(threshold):
    """About the numbers next to it."""
    from focal_plugin.kernels.nms_triton import _round_down

    nearest = np.float32(threshold)
    for iou in (nearest, np.nextafter(nearest, np.float32(2)), np.nextafter(nearest, np.float32(-2))):
        assert (float(iou) > threshold) == bool(iou > np.float32(_round_down(threshold)))


def small_model(device):
    model = test_optimize.small_model("FocalRetinaNet").to(device)
    model.head.cls_score.weight.data *= 0.04  # else many scores are nearly equal
    model.test_topk_candidates = 150  # so that torchvision uses offsets on a CPU, too
    return model


def inputs():
    """Images of three sizes, two of them resized."""
    batch = test_optimize.images()
    batch[0] |= {"height": 301, "width": 500}
    batch[2] |= {"height": 31, "width": 47}
    return batch


@in_interpreter
@torch.no_grad()
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("score_thresh", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("max_detections", [5, pytest.param(100, marks=SLOW_IN_INTERPRETER)])
def test_detections_are_those_of_a_cpu(clip, score_thresh, max_detections):
    """Bit for bit, from the images to the boxes in the original images."""
    from focal_plugin.kernels import padded

    model = small_model("cpu")
    model.clip_before_nms, model.test_score_thresh, model.max_detections_per_image = clip, score_thresh, max_detections
    expected, found = model(inputs()), padded.forward(model, inputs())
    for a, b in zip(expected, found, strict=True):
        assert_same(a["instances"], b["instances"])
    assert any(len(x["instances"]) for x in expected) == (score_thresh < 1)


@in_interpreter
def test_boxes_outside_of_the_image_are_left_out():
    """As Detectron2's postprocessing does, and those after them move up."""
    from focal_plugin.kernels import padded

    boxes = torch.tensor([[[-9.0, 0, -1, 8], [0, 0, 9, 9], [70, 0, 90, 9], [30, 30, 80, 40]]])
    scores, classes = torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.tensor([[2, 0, 1, 1]])
    where = padded.frames([(48, 64)], [(96, 128)])
    rows, counts = padded.detections(boxes, scores, classes, where, iou_thresh=0.5, max_detections=100)
    (found,) = padded.to_instances(rows, counts, [(96, 128)])
    assert found.pred_boxes.tensor.tolist() == [[0, 0, 18, 18], [60, 60, 128, 80]]
    assert found.scores.equal(scores[0, [1, 3]]) and found.pred_classes.tolist() == [0, 1]
    assert found.image_size == (96, 128)


@in_interpreter
def test_boxes_that_are_not_finite_are_an_error_as_in_detectron2():
    from focal_plugin.kernels import padded

    boxes = torch.tensor([[[0.0, 0, 9, 9], [0, 0, math.inf, 9]]]).repeat(2, 1, 1)
    scores = torch.tensor([[0.9, -math.inf], [0.9, 0.8]])
    where = padded.frames([(48, 64)] * 2, [(48, 64)] * 2)
    rows, counts = padded.detections(boxes, scores, torch.zeros(2, 2), where, iou_thresh=0.5, max_detections=100)
    assert counts.tolist() == [1, -1]  # what is no candidate does not matter
    with pytest.raises(AssertionError, match="infinite or NaN"):
        padded.to_instances(rows, counts, [(48, 64)] * 2)


def assert_same(a, b):
    assert a.image_size == b.image_size and list(a.get_fields()) == list(b.get_fields())
    assert b.pred_boxes.tensor.is_contiguous() and b.scores.is_contiguous() and b.pred_classes.is_contiguous()
    assert a.pred_classes.equal(b.pred_classes) and a.pred_classes.dtype == b.pred_classes.dtype
    assert a.scores.equal(b.scores) and a.pred_boxes.tensor.equal(b.pred_boxes.tensor)


def test_shapes_do_not_depend_on_the_boxes():
    """On fake tensors, which know no values."""
    from focal_plugin.kernels.nms_triton import batched_nms

    with FakeTensorMode():
        for count, size in [(700, 100), (9, 9)]:
            index, counts = batched_nms(torch.empty(2, count, 6), 0.5, 100)
            assert (index.shape, index.dtype) == ((2, size), torch.int64)
            assert (counts.shape, counts.dtype) == ((2,), torch.int32)


@pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")
@pytest.mark.parametrize("capability", [80, 90])
def test_no_product_and_sum_are_rounded_as_one(capability, tmp_path, monkeypatch):
    """In the machine code's text, as in test_ignore_band_triton.py."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from focal_plugin.kernels.nms_triton import _BLOCK, _keep_best

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"candidates_ptr": "*fp32", "keep_ptr": "*i64", "threshold": "fp32", "BLOCK": "constexpr"}
    types |= {"counts_ptr": "*i32"}
    signature = {name: types.get(name, "i32") for name in _keep_best.arg_names}
    values = {(_keep_best.arg_names.index("BLOCK"),): _BLOCK}

    def ptx(fusion):
        source, target = ASTSource(_keep_best, signature, values), GPUTarget("cuda", capability, 32)
        return triton.compile(source, target=target, options={"enable_fp_fusion": fusion, "num_warps": 8}).asm["ptx"]

    assert "fma.rn.f32" in ptx(True)  # so that the next line can fail
    code = ptx(False)
    assert "fma" not in code
    rounded = re.findall(r"\b(?:mul|add|sub|div)((?:\.\w+)*)\.f32", code)
    assert rounded and all(".rn" in modifiers for modifiers in rounded)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("clip", [False, True])
def test_a_gpus_detections_are_a_cpus(clip, monkeypatch):
    """In float32, to rounding. No two scores of these images are so close that rounding could swap them."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    models = [small_model("cpu"), small_model("cpu").to("cuda")]
    for model in models:
        model.clip_before_nms = clip
    first, second, third = inputs()
    for expected, found in zip(*(model([first, third]) + model([second]) for model in models), strict=True):
        a, b = expected["instances"], found["instances"]
        assert b.scores.is_cuda and b.pred_boxes.tensor.is_cuda and b.pred_classes.is_cuda
        assert len(a) > 5 and a.pred_classes.equal(b.pred_classes.cpu()) and a.image_size == b.image_size
        torch.testing.assert_close(b.scores.cpu(), a.scores, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(b.pred_boxes.tensor.cpu(), a.pred_boxes.tensor, rtol=1e-3, atol=1e-2)


@pytest.mark.gpu
@torch.no_grad()
def test_a_gpu_is_read_once(monkeypatch):
    """By ``to_instances``: nothing waits for the GPU between the copied images and the numbers of detections."""
    from focal_plugin.kernels import padded

    model = small_model("cuda")
    images = model.preprocess_image(inputs())
    where = padded.frames(images.image_sizes, images.image_sizes).cuda()
    model.detect(images.tensor, where)  # compiles, and builds the anchors, on the host
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows, counts = model.detect(images.tensor, where)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(len(x) == count for x, count in zip(padded.to_instances(rows, counts, images.image_sizes), counts))
    assert rows.shape == (3, 100, 6) and 3 > rows[..., 5].max() >= 0
