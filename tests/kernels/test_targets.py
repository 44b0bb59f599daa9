"""The kernels that make targets, against ``DenseTargets.from_matches``: in Triton's interpreter, and on a GPU."""

from importlib.util import find_spec

import pytest
import torch

from focal_plugin import IGNORED, NEGATIVE, POSITIVE, Anchors, DenseTargets
from focal_plugin.kernels import targets as module
from focal_plugin.kernels.targets import dense_targets
from tests.interpreter import INTERPRETED
from tests.losses.batches import stacked
from tests.test_structures import BATCHES, K, make_features, make_generator, random_batch

# In the interpreter, this file runs the kernels on the CPU; see test_in_interpreter.py.
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=needs_triton)]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("in the interpreter")
    monkeypatch.setattr(module, "_uses_triton", lambda anchors: True)
    return request.param


def assert_same(anchors, matches, instances, device):
    expected = DenseTargets.from_matches(anchors, matches, instances, K)
    there = Anchors.from_generator(make_generator().to(device), [feature.to(device) for feature in make_features()])
    targets = dense_targets(there, tuple(x.to(device) for x in matches), instances, K)
    assert targets.num_classes == K and targets.grid is there
    for name in ("labels", "positives"):
        for mine, reference in zip(getattr(targets, name), getattr(expected, name), strict=True):
            assert mine.device.type == device and mine.dtype == torch.int64 and mine.cpu().equal(reference)
    for name in ("anchors", "gt_boxes"):
        assert getattr(targets, name).cpu().equal(getattr(expected, name))


@pytest.mark.parametrize("counts", BATCHES)
@pytest.mark.parametrize("codes", [(IGNORED, NEGATIVE, NEGATIVE, POSITIVE), (POSITIVE,), (NEGATIVE,), (IGNORED,)])
def test_as_without_triton(device, counts, codes):
    anchors, matches, instances = random_batch(counts, seed=5, codes=codes)
    assert_same(anchors, stacked(matches), instances, device)


def test_more_labels_than_a_program_has(device, monkeypatch):
    monkeypatch.setattr(module.targets_triton, "_BLOCK", 16)
    module.targets_triton._table.cache_clear()
    anchors, matches, instances = random_batch([4, 0, 9], seed=1)
    assert_same(anchors, stacked(matches), instances, device)
    module.targets_triton._table.cache_clear()


def test_a_cpu_has_no_use_for_it(monkeypatch):
    monkeypatch.setattr(module, "targets_triton", None if module.targets_triton is None else object())
    anchors, matches, instances = random_batch([2], seed=0)
    assert len(dense_targets(anchors, stacked(matches), instances, K).labels) == 3


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")
@pytest.mark.parametrize("kernel", ["_label", "_gather"])
def test_the_kernels_compile_for_a_gpu(kernel, tmp_path, monkeypatch):
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(module.targets_triton, kernel)
    constants = {"LEVELS": 5, "FIELDS": 5, "POSITIVE": POSITIVE, "IGNORED": IGNORED, "BLOCK": 1024}
    types = {"codes_ptr": "*i8", "table_ptr": "*i32", "is_positive_ptr": "*i1", "counts_ptr": "*i32"}
    types |= dict.fromkeys(("boxes_ptr", "anchors_ptr", "of_anchors_ptr", "of_boxes_ptr"), "*fp32")
    types |= dict.fromkeys(("R", "K", "P", "N"), "i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*i64") for name in function.arg_names}
    values = {(i,): constants[name] for i, name in enumerate(signature) if name in constants}
    compiled = compile_kernel(ASTSource(function, signature, values), target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
