"""Exported files that take batches, are float16, or leave decoding to the page on serving."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from focal_plugin.config.load import load_config
from focal_plugin.deploy import export, export_formats
from focal_plugin.deploy.export_check import (
    FLOAT16,
    Candidates,
    ExportError,
    compare_detections,
    compare_maps,
    find_candidates,
    split_images,
)
from focal_plugin.deploy.export_formats import FORMATS
from focal_plugin.deploy.export_graph import ImageInput
from focal_plugin.deploy.export_metadata import describe
from tests.deploy.tiny_detector import crop, detect, tiny_model

ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(photo, tmp_path_factory):
    """A model, the path of its file for batches, and how it is run; made once for each of the arguments."""
    done = {}

    def get(format, raw=False, precision="float32"):
        key = format, raw, precision
        if key not in done:
            model, path = tiny_model(), str(tmp_path_factory.mktemp("export") / "detector")
            opts = ["DATASETS.TEST", (), "DATASETS.TRAIN", (), "INPUT.MIN_SIZE_TEST", 0]
            cfg = load_config(str(ROOT / "configs/Base-FocalRetinaNet.yaml"), opts)
            about = describe(cfg, model, raw, ImageInput(batch=True), precision)
            how = {"raw": raw, "precision": precision, "batch": True, "metadata": about}
            export.export_model(model, path, format, {"a photo": crop(photo, 150, 170)}, **how)
            done[key] = model, path, FORMATS[format][1](path)
        return done[key]

    return get


def batch_of(model, photo, height, width, what):
    """A batch of crops of a photo (p) and of images without a detection (-)."""
    empty = model.pixel_mean.expand(3, height, width)
    crops = (crop(photo, height, width, top=90 * i) for i in range(len(what)))
    return torch.stack([image if letter == "p" else empty for image, letter in zip(crops, what)])


@pytest.mark.parametrize("format", ["torchscript", *(pytest.param(x, marks=SLOW) for x in ("onnx", "torch-export"))])
@pytest.mark.parametrize(
    "height, width, what", [(201, 333, "p-pp"), (96, 320, "-p"), (150, 150, "p"), (64, 80, "-"), (160, 150, "---")]
)
def test_a_batch_has_the_detections_of_each_of_its_images(exported, photo, format, height, width, what):
    model, _, run = exported(format)
    images = batch_of(model, photo, height, width, what)
    with torch.no_grad():
        together = [found["instances"] for found in model([{"image": image} for image in images])]
    *found, counts = run(images)
    assert counts.dtype == found[2].dtype == np.int64 and counts.shape == (len(what),)
    assert [count > 0 for count in counts] == [letter == "p" for letter in what]
    parts = zip(*(np.split(x, np.cumsum(counts)[:-1]) for x in found))
    for image, expected, (boxes, scores, classes) in zip(images, together, parts, strict=True):
        np.testing.assert_array_equal(classes, expected.pred_classes)
        np.testing.assert_allclose(scores, expected.scores, atol=1e-4)
        np.testing.assert_allclose(boxes, expected.pred_boxes.tensor, atol=1e-2)
        np.testing.assert_array_equal(classes, detect(model, image)[2])


@pytest.mark.parametrize("format", ["onnx", "torchscript", pytest.param("torch-export", marks=SLOW)])
@pytest.mark.parametrize("count", [1, 3])
def test_raw_heads(exported, photo, format, count):
    model, _, run = exported(format, raw=True)
    images = batch_of(model, photo, 75, 130, "p" * count)
    padded = nn.functional.pad((images - model.pixel_mean) / model.pixel_std, (0, 144 - 130, 0, 80 - 75))
    with torch.no_grad():
        logits, deltas = model.head(list(model.backbone(padded).values()))
    found = run(images)
    assert [x.shape for x in found] == [(count, c, h, w) for c in (6, 8) for h, w in ((10, 18), (5, 9))]
    for a, b in zip(found, [*logits, *deltas], strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-3)


def test_what_the_file_says_of_itself(exported):
    session = onnxruntime.InferenceSession(exported("onnx", raw=True)[1])
    assert [output.name for output in session.get_outputs()] == ["logits_p3", "logits_p4", "deltas_p3", "deltas_p4"]
    assert session.get_inputs()[0].shape[1] == 3
    assert all(isinstance(session.get_inputs()[0].shape[i], str) for i in (0, 2, 3))  # of any length
    about = session.get_modelmeta().custom_metadata_map
    assert about["input_layout"] == "NCHW" and about["precision"] == "float32" and about["batch"] == "true"
    thresholds = ("score_thresh", "topk_candidates", "nms_thresh", "detections_per_image")
    assert [json.loads(about[key]) for key in thresholds] == [0.1, 200, 0.5, 40]
    assert json.loads(about["pixel_mean"]) == [103.0, 116.0, 123.0]


def test_a_batch_of_another_layout_and_dtype(photo, tmp_path):
    model, path = tiny_model(), str(tmp_path / "x")
    how = {"layout": "NHWC", "dtype": "uint8", "batch": True}
    export.export_model(model, path, "torchscript", {"a photo": crop(photo, 150, 170)}, **how)
    images = batch_of(model, photo, 120, 140, "pp")
    found = FORMATS["torchscript"][1](path)(images.permute(0, 2, 3, 1).byte())
    for image, part in zip(images, split_images(found, 2), strict=True):
        compare_detections(find_candidates(model, image), part, model)


# The comparison


def test_a_file_that_mixes_up_images_is_not_kept(photo, tmp_path, monkeypatch):
    """Each result is right for some image of the batch, and a batch of one is right."""

    class Mixing(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.model, self.image_input = module, module.model, module.image_input

        def forward(self, images):
            return self.module(images.flip(0))

    def write_mixing(module, *args):
        return export_formats.write_torchscript(Mixing(module), *args)

    monkeypatch.setitem(FORMATS, "torchscript", (write_mixing, *FORMATS["torchscript"][1:]))
    for raw in (False, True):
        with pytest.raises(ExportError, match=r"On a photo, a batch of 3, 187 × 226: "):
            images = {"a photo": crop(photo, 150, 170)}
            export.export_model(tiny_model(), tmp_path / "x", "torchscript", images, raw=raw, batch=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("counts", [[2, 1], [3], [1, 1, 1], [[2], [1]]])
def test_counts_are_those_of_the_images(counts):
    found = np.zeros((3, 4)), np.arange(3.0), np.arange(3), np.array(counts)
    if counts == [2, 1]:
        assert [scores.tolist() for _, scores, _ in split_images(found, 2)] == [[0, 1], [2]]
    else:
        with pytest.raises(ExportError, match="the counts of 2 images and 3 boxes are"):
            split_images(found, 2)


def candidates(*rows):
    """Of an image of 100 × 100 pixels."""
    boxes, scores, classes = found_things(*rows)
    boxes = torch.from_numpy(boxes)
    flags = torch.ones(len(rows), dtype=torch.bool)
    return Candidates(boxes, boxes.clamp(0, 100), torch.from_numpy(scores), torch.from_numpy(classes), flags)


def found_things(*rows):
    rows = np.array(rows, dtype=np.float32).reshape(-1, 6)
    return rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64)


A, B = [0, 0, 40, 40, 0.9, 0], [50, 50, 70, 60, 0.885, 0]
BESIDE_A = [0, 12, 40, 52, 0.885, 0]  # NMS drops it for A (their IoU is 0.54), or A for it in float16


@pytest.mark.parametrize(
    "found, same",
    [
        ((A, B), True),
        (([0.4, 0, 40, 39.6, 0.909, 0], B), True),
        (([0.6, 0, 40, 40, 0.9, 0], B), False),
        (([*A[:4], 0.88, 0], B), False),
        (([*B[:4], 0.895, 0], [*A[:4], 0.891, 0]), True),
        ((B, A), False),  # scores have to be in order
        ((BESIDE_A, B), True),
        ((A, BESIDE_A, B), True),
        ((A,), False),
        ((A, B, [80, 80, 90, 90, 0.3, 0]), False),
        ((A, B, [80, 80, 90, 90, 0.11, 0]), True),  # at the threshold
    ],
)
def test_what_counts_as_the_same_in_float16(found, same):
    expected = candidates(A, B, BESIDE_A)
    model = tiny_model()
    if same:
        compare_detections(expected, found_things(*found), model, FLOAT16)
    else:
        with pytest.raises(ExportError):
            compare_detections(expected, found_things(*found), model, FLOAT16)


def test_maps_of_float16():
    expected = [np.array([3.0, -8.0])]
    compare_maps(expected, [np.array([3.07, -8.0])], ["logits"], FLOAT16)
    for other in ([3.09, -8.0], [np.inf, -8.0], [np.nan, -8.0]):
        with pytest.raises(ExportError, match="logits differs"):
            compare_maps(expected, [np.array(other)], ["logits"], FLOAT16)


# float16


@pytest.mark.slow
def test_a_float16_file_has_half_the_weights_and_the_same_detections(exported, photo):
    model, path, run = exported("onnx", precision="float16")
    file = onnx.load(path)
    kinds = {weight.data_type for weight in file.graph.initializer if "conv" in weight.name or "bbox" in weight.name}
    assert kinds == {onnx.TensorProto.FLOAT16}
    session = onnxruntime.InferenceSession(path)
    types = [x.type for x in [*session.get_inputs(), *session.get_outputs()]]
    assert types == ["tensor(float)"] * 3 + ["tensor(int64)"] * 2
    (nms,) = (node for node in file.graph.node if node.op_type == "NonMaxSuppression")
    values = {value.name: value.type.tensor_type.elem_type for value in file.graph.value_info}
    assert [values[name] for name in nms.input[:2]] == [onnx.TensorProto.FLOAT] * 2
    images = batch_of(model, photo, 201, 333, "p-p")
    for image, part in zip(images, split_images(run(images), 3), strict=True):
        compare_detections(find_candidates(model, image, FLOAT16), part, model, FLOAT16)
    assert session.get_modelmeta().custom_metadata_map["precision"] == "float16"


@pytest.mark.slow
def test_a_float16_file_is_half_as_large(photo, tmp_path):
    """With a network whose weights outweigh the graph."""
    sizes = []
    for precision in ("float32", "float16"):
        model = tiny_model()
        wide = [nn.Conv2d(16, 2000, 1), nn.Conv2d(2000, 16, 1)]
        torch.manual_seed(0)
        for conv in wide:
            nn.init.normal_(conv.weight, std=0.02)
        model.head.cls_subnet = nn.Sequential(*model.head.cls_subnet, *wide)
        path = tmp_path / precision
        images = {"a photo": crop(photo, 96, 96)}
        export.export_model(model, path, "onnx", images, raw=True, precision=precision)
        weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        sizes.append(os.path.getsize(path))
        assert weights > 0.8 * sizes[0]
    assert 0.5 < sizes[1] / sizes[0] < 0.6


@pytest.mark.slow
def test_numbers_beyond_float16_are_refused(photo, tmp_path):
    """The model is the same in float32, where one layer's results are multiplied and the next layer's divided."""
    model = tiny_model()
    with torch.no_grad():
        model.backbone.bottom_up.stem.weight *= 2**15
        model.backbone.bottom_up.stem.norm.bias *= 2**15
        model.backbone.bottom_up.stem.norm.running_mean *= 2**15
        model.backbone.bottom_up.s3.weight /= 2**15
    images = {"a photo": crop(photo, 96, 96)}
    export.export_model(model, tmp_path / "x", "onnx", images, raw=True)
    with pytest.raises(ExportError, match=r"96 × 96: .*_p\d differs by up to (inf|nan). With --precision float32 it"):
        export.export_model(model, tmp_path / "y", "onnx", images, raw=True, precision="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


# Mistakes


@pytest.mark.parametrize(
    "how, message",
    [
        ({"batch": True, "layout": "CHW"}, "--input-layout CHW has no N for --batch: use NCHW."),
        ({"batch": True, "layout": "HWC"}, "--input-layout HWC has no N for --batch: use NHWC."),
        ({"precision": "bfloat16"}, "--precision is 'bfloat16'; expected one of float32, float16."),
        ({"precision": "float16"}, "--precision float16 is for --format onnx, not torchscript."),
    ],
)
def test_options_that_do_not_fit(how, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        export.export_model(tiny_model(), tmp_path / "x", "torchscript", {"black": torch.zeros(3, 64, 64)}, **how)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words, message",
    [
        (["--batch", "--input-layout", "HWC"], "error: --input-layout HWC has no N for --batch: use NHWC.\n"),
        (["--precision", "float16"], "error: --precision float16 is for --format onnx, not torchscript.\n"),
    ],
)
def test_options_of_the_command_that_do_not_fit(words, message, tiny_config, weights, tmp_path, capsys):
    words = [*words, "--config-file", tiny_config, "--weights", weights, "--format", "torchscript"]
    assert export.main([*words, "--output", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.endswith(message)
    assert not (tmp_path / "x").exists()


# The page


def serve(code, path, images, tmp_path):
    """The lines that a script of the page prints for images, without this package."""
    blocked = "import sys; sys.modules |= dict.fromkeys(['focal_plugin', 'torch', 'torchvision', 'detectron2']); "
    (tmp_path / "script.py").write_text(blocked + "\n" + code)
    names = [f"{i}.png" for i in range(len(images))]
    for name, image in zip(names, images):
        cv2.imwrite(str(tmp_path / name), image.numpy().transpose(1, 2, 0))
    words = [sys.executable, "script.py", path, *names]
    return subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.splitlines()


def check_lines(lines, model, images):
    """Compare with the model's detections in all images together, in a batch that it pads itself."""
    with torch.no_grad():
        together = model([{"image": image, "height": image.shape[1], "width": image.shape[2]} for image in images])
    rows = []
    for i, found in enumerate(together):
        found = found["instances"]
        columns = found.pred_classes.tolist(), found.scores.tolist(), found.pred_boxes.tensor.tolist()
        rows += [([f"{i}.png", str(cls)], [score, *box]) for cls, score, box in zip(*columns)]
    assert len(rows) == len(lines) > 10
    for line, (words, numbers) in zip(lines, rows, strict=True):
        found = line.split()
        assert found[:2] == words
        np.testing.assert_allclose([float(x) for x in found[2:]], numbers, atol=0.02)


def scripts():
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_page_serves_batches_of_images_of_any_size(exported, photo, tmp_path):
    model, path, _ = exported("onnx")
    empty = model.pixel_mean.expand(3, 60, 150)
    images = [crop(photo, 150, 200), empty, crop(photo, 90, 220, top=200), crop(photo, 190, 100, top=300)]
    check_lines(serve(scripts()[0], path, images, tmp_path), model, images)


def test_the_page_decodes_raw_outputs(exported, photo, tmp_path):
    model, path, _ = exported("onnx", raw=True)
    images = [crop(photo, 150, 203, top=top) for top in (0, 200, 400)]
    check_lines(serve(scripts()[1], path, images, tmp_path), model, images)
