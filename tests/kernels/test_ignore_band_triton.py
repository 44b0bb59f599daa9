"""The GPU's kernels against Detectron2's matcher, bit for bit: in Triton's interpreter, and as they are compiled."""

import re
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from focal_plugin.matchers.ignore_regions import ignore_covered
from tests.interpreter import INTERPRETED, SLOW_IN_INTERPRETER
from tests.matchers.grid_cases import (
    ODD_BOXES,
    Boxes,
    anchors_and_boxes,
    iou_matrix,
    make_anchors,
    match_by_matrix,
    square_anchors,
)

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
# In the interpreter, this file runs the kernels on the CPU; see test_in_interpreter.py.
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="in the interpreter")
ON_A_GPU = pytest.param("cuda", marks=pytest.mark.gpu)

PAPER = {"thresholds": [0.4, 0.5], "labels": [0, -1, 1]}
MODES = ["none", "detectron1", "detectron2"]
EMPTY = torch.zeros(0, 4)


def match(anchors, images, thresholds, labels, low_quality="detectron2", regions=(), min_ioa=0.0, device="cpu"):
    """Match (G_i, 4) boxes of some images, with padding that must not matter."""
    from focal_plugin.kernels.ignore_band_triton import match_ignore_bands

    def padded(boxes):
        most = max(map(len, boxes), default=0)
        rows = [torch.cat([b, torch.tensor([-1e3, -1e3, 1e3, 1e3]).expand(most - len(b), 4)]) for b in boxes]
        counts = torch.tensor([len(b) for b in boxes], dtype=torch.int32)
        return torch.stack(rows).to(device), counts.to(device)

    regions = list(regions) or [EMPTY] * len(images)
    bands = torch.tensor(thresholds), torch.tensor(labels, dtype=torch.int32)
    flat = torch.cat(anchors.boxes).to(device)
    arguments = (flat, *padded(images), *padded(regions), *(band.to(device) for band in bands))
    matched, found = match_ignore_bands(*arguments, low_quality, min_ioa)
    assert matched.dtype == torch.int64 and found.dtype == torch.int8
    return matched.cpu(), found.cpu()


def assert_as_detectron2(anchors, images, rule, device="cpu"):
    matched, labels = match(anchors, images, **rule, device=device)
    for i, boxes in enumerate(images):
        expected, expected_labels = match_by_matrix(iou_matrix(anchors, boxes), **rule)
        if not len(boxes):  # background, whatever the first band is
            expected_labels = torch.zeros_like(expected_labels)
        assert torch.equal(labels[i], expected_labels)
        assert torch.equal(matched[i], expected)


@st.composite
def rules(draw):
    values = st.one_of(st.floats(0.01, 1), st.sampled_from([0.25, 0.5, 1.0]))
    thresholds = sorted(draw(st.lists(values, min_size=1, max_size=3)))
    number = len(thresholds) + 1
    labels = draw(st.lists(st.sampled_from([-1, 0, 1]), min_size=number, max_size=number))
    return {"thresholds": thresholds, "labels": labels, "low_quality": draw(st.sampled_from(MODES))}


@in_interpreter
@settings(max_examples=20)
@given(anchors_and_boxes(), rules(), st.integers(0, 12))
def test_ties_odd_boxes_and_all_rules(case, rule, cut):
    """Two images of different numbers of boxes, and one without."""
    anchors, boxes = case
    thresholds = torch.tensor(rule["thresholds"]).tolist()  # as float32 has them
    assert_as_detectron2(anchors, [boxes, EMPTY, boxes[:cut]], {**rule, "thresholds": thresholds})


@in_interpreter
@pytest.mark.parametrize("low_quality", MODES)
@pytest.mark.parametrize("number, size", [(9, (40, 60)), pytest.param(60, (100, 150), marks=SLOW_IN_INTERPRETER)])
def test_many_boxes(number, size, low_quality):
    """RetinaNet's own anchors; most boxes tiny, so that nearly all need a low-quality match."""
    check_many_boxes(number, size, low_quality, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("low_quality", MODES)
def test_thousands_of_boxes_on_a_gpu(low_quality):
    check_many_boxes(3000, (100, 150), low_quality, "cuda")


def check_many_boxes(number, size, low_quality, device):
    height, width = size
    sizes = [[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)]
    strides = [8, 16, 32, 64, 128]
    anchors = make_anchors([(-(-height // s), -(-width // s)) for s in strides], strides, sizes)
    generator = torch.Generator().manual_seed(0)
    corner, extent = torch.rand(2, number, 2, generator=generator)
    corner = corner * torch.tensor([width + 10.0, height + 10.0]) - 5
    boxes = torch.cat([corner, corner + 600 ** (extent**2)], dim=1)
    images = [torch.cat([boxes, torch.tensor(ODD_BOXES)]), boxes.round(), EMPTY]
    thresholds = torch.tensor(PAPER["thresholds"]).tolist()
    assert_as_detectron2(anchors, images, {**PAPER, "thresholds": thresholds, "low_quality": low_quality}, device)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=in_interpreter), ON_A_GPU])
@pytest.mark.parametrize("images", [[], [EMPTY], [EMPTY, EMPTY]])
def test_nothing_to_match(images, device):
    anchors = square_anchors(16, width=5)
    matched, labels = match(anchors, images, [0.5], [1, 0], device=device) if images else (EMPTY, EMPTY)
    assert not labels.any() and not matched.any()


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=in_interpreter), ON_A_GPU])
@pytest.mark.parametrize("min_ioa", [0.25, 0.5, 1.0])
def test_ignore_regions(min_ioa, device):
    """As ``ignore_covered``, of the background alone; an image without boxes has regions, too."""
    anchors = make_anchors([(7, 9), (4, 5)], [8, 16], [[16, 24], [32, 48]])
    boxes = torch.tensor([[4.0, 4, 20, 20], [30, 30, 60, 60]])
    regions = [torch.tensor([[0.0, 0, 30, 30], [40, 0, 64, 20]]), EMPTY, torch.tensor([[0.0, 0, 64, 56]])]
    images = [boxes, boxes, EMPTY]
    _, before = match(anchors, images, **PAPER, device=device)
    _, found = match(anchors, images, **PAPER, regions=regions, min_ioa=min_ioa, device=device)
    for labels, expected, areas in zip(found, before, regions):
        assert torch.equal(labels, ignore_covered(expected, anchors, Boxes(areas), min_ioa))
    assert not torch.equal(found, before)


def test_shapes_do_not_depend_on_the_boxes():
    """On fake tensors, which know no values."""
    from focal_plugin.kernels.ignore_band_triton import match_ignore_bands

    with FakeTensorMode():
        integers = torch.empty(2, dtype=torch.int32)
        arguments = (torch.empty(90, 4), torch.empty(2, 7, 4), integers, torch.empty(2, 0, 4), integers)
        bands = torch.empty(2), torch.empty(3, dtype=torch.int32)
        matched, labels = match_ignore_bands(*arguments, *bands, "detectron2", 0.5)
    assert matched.shape == labels.shape == (2, 90)
    assert (matched.dtype, labels.dtype) == (torch.int64, torch.int8)


@pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", ["_best_pairs", "_labels"])
def test_no_product_and_sum_are_rounded_as_one(kernel, capability, tmp_path, monkeypatch):
    """In the machine code's text: with a contraction, IoUs would differ from PyTorch's in their last bit."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from focal_plugin.kernels import ignore_band_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(ignore_band_triton, kernel)
    constants = {"BLOCK": 256, "NUM_BANDS": 2, "MODE": 2, "IGNORED": -1, "NEGATIVE": 0, "POSITIVE": 1}
    types = dict.fromkeys(("anchors_ptr", "boxes_ptr", "regions_ptr", "thresholds_ptr", "best_ptr"), "*fp32")
    types |= dict.fromkeys(("counts_ptr", "region_counts_ptr", "band_labels_ptr", "best_of_box_ptr"), "*i32")
    types |= {"matched_ptr": "*i64", "labels_ptr": "*i8", "min_ioa": "fp32"}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in function.arg_names}
    values = {(i,): constants[name] for i, name in enumerate(signature) if signature[name] == "constexpr"}

    def ptx(fusion):
        source = ASTSource(function, signature, values)
        target = GPUTarget("cuda", capability, 32)
        return triton.compile(source, target=target, options={"enable_fp_fusion": fusion}).asm["ptx"]

    assert "fma.rn.f32" in ptx(True)  # so that the next line can fail
    code = ptx(False)
    assert "fma" not in code
    rounded = re.findall(r"\b(?:mul|add|sub|div)((?:\.\w+)*)\.f32", code)
    assert rounded and all(".rn" in modifiers for modifiers in rounded)
