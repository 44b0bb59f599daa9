"""What a GPU's host asks Triton to compile and launch, without a GPU."""

import random
from importlib.util import find_spec

import pytest
import torch

from tests.interpreter import INTERPRETED
from tests.launches import compiled

pytestmark = pytest.mark.skipif(INTERPRETED or find_spec("triton") is None, reason="needs Triton's compiler")

A, K = 3, 16
LAYOUTS = {"channels last": torch.channels_last, "channels first": torch.contiguous_format}
KERNELS = {"_best_pairs", "_labels", "_label", "_gather", "_kernel", "_keep_best"}


def step_and_detect(n, height, width, boxes, regions, positives, layout, candidates=900):
    """Launch all kernels for n images, whose finest features are (height, width), with so many boxes each."""
    from focal_plugin.kernels import dense_focal_triton, ignore_band_triton, nms_triton, targets_triton

    shapes = [(n, A, -(-height // s), -(-width // s)) for s in (1, 2, 4, 8, 16)]
    sizes = [a * h * w for _, a, h, w in shapes]
    anchors = torch.rand(sum(sizes), 4)
    gt_boxes, ignored = [torch.rand(g, 4) for g in boxes], [torch.rand(m, 4) for m in regions]
    thresholds, codes = (0.4, 0.5), (0, -1, 1)
    tensors = (ignore_band_triton._padded(each, torch.device("cpu")) for each in (gt_boxes, ignored))
    bands = torch.tensor(thresholds), torch.tensor(codes, dtype=torch.int32)
    (padded, counts), (padded_regions, region_counts) = tensors
    matched, codes = ignore_band_triton.match_ignore_bands(
        anchors, padded, counts, padded_regions, region_counts, *bands, "detectron2", 0.5
    )
    first = torch.zeros(n, dtype=torch.int64)
    classes = torch.zeros(sum(boxes), dtype=torch.int64)
    labels, *_ = targets_triton.label(codes, matched, first, classes, shapes, K)
    at = torch.zeros(positives, dtype=torch.int64)
    targets_triton.gather(at, matched, first, torch.rand(sum(boxes), 4), anchors, shapes)
    labels = [level.view(shape) for level, shape in zip(labels.split([n * size for size in sizes]), shapes)]
    logits = [torch.zeros(n, A * K, *shape[2:], dtype=torch.float16) for shape in shapes]
    logits = [level.contiguous(memory_format=layout).unflatten(1, (A, K)) for level in logits]
    dense_focal_triton.loss(logits, labels, 0.25, 2.0)
    dense_focal_triton.gradients(logits, labels, 0.25, 2.0, [True] * len(logits), torch.ones(()))
    nms_triton.batched_nms(torch.rand(n, candidates, 6), 0.5, 100)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_and_boxes_of_other_numbers_and_sizes_compile_nothing_anew(layout, monkeypatch):
    """In multi-scale training. Triton compiles a kernel for each kind of each number and pointer, unless told not to.

    The loss kernel is compiled for loss and gradient. Channels first, rows of logits begin at multiples of 16 bytes in
    all levels, in some or in none, which it makes use of.
    """
    draw = random.Random(0)
    with compiled(monkeypatch, really=False) as kernels:
        for turn in range(60):
            n = draw.choice([1, 2, 3, 8])
            boxes = [draw.choice([0, 1, 2, 7, 16, 30]) for _ in range(n)]
            regions = [draw.choice([0, 0, 0, 1, 2, 16]) for _ in range(n)]
            sizes = (128, 128) if turn == 0 else (draw.randint(4, 40), draw.randint(4, 40))
            positives, candidates = draw.choice([1, 5, 16, 40]), draw.choice([1, 100, 512, 999])
            step_and_detect(n, *sizes, boxes, regions, positives, LAYOUTS[layout], candidates)
    numbers = {name: len(found) for name, found in kernels.items()}
    loss = 2 if layout == "channels last" else 6
    assert numbers == {**dict.fromkeys(KERNELS, 1), "_kernel": loss}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_launched_compiles(layout, monkeypatch, tmp_path):
    """With the types and constants of a launch."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with compiled(monkeypatch) as kernels:
        step_and_detect(2, 8, 12, boxes=[3, 0], regions=[0, 1], positives=5, layout=LAYOUTS[layout])
    assert kernels.keys() == KERNELS
    assert all(text["cubin"] for texts in kernels.values() for text in texts.values())
