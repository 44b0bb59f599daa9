import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from torch import nn
from torchvision.ops import nms

from focal_plugin.anchors.foreign import TorchvisionAnchorGenerator
from focal_plugin.config.load import load_config
from focal_plugin.deploy import export, export_formats
from focal_plugin.deploy.export_check import Candidates, ExportError, compare_detections, expected_maps, find_candidates
from focal_plugin.deploy.export_formats import FORMATS, quiet
from focal_plugin.deploy.export_graph import class_wise_nms, offset_nms
from focal_plugin.files.write import process_name
from tests.deploy.tiny_detector import crop, detect, tiny_model

SERVING = Path(__file__).parents[2] / "docs" / "export.md"
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def exported(photo, tmp_path_factory):
    """A model, the path of its file, and how it is run; made once for each of the arguments."""
    done = {}

    def get(format, num_classes=3, norm="", raw=False):
        key = format, num_classes, norm, raw
        if key not in done:
            model, path = tiny_model(num_classes, norm), str(tmp_path_factory.mktemp("export") / "detector")
            images = {"a photo": crop(photo, 150, 170)}
            export.export_model(model, path, format, images, raw=raw, metadata={"classes": ["a", "b"], "order": "BGR"})
            done[key] = model, path, FORMATS[format][1](path)
        return done[key]

    return get


SLOW = [("onnx", 1, "GN"), ("torch-export", 3, ""), ("torch-export", 1, "GN")]  # some ten seconds each
CASES = [
    pytest.param(format, *case, marks=[pytest.mark.slow] * ((format, *case) in SLOW))
    for format in FORMATS
    for case in [(3, ""), (1, "GN")]
]


@pytest.mark.parametrize("format, num_classes, norm", CASES)
@pytest.mark.parametrize("height, width", [(201, 333), (320, 96)])
def test_the_file_detects_what_the_model_does_in_images_of_any_size(
    exported, photo, format, num_classes, norm, height, width
):
    model, _, run = exported(format, num_classes, norm)
    image = crop(photo, height, width, top=100)
    expected, found = detect(model, image), run(image)
    assert len(expected[0]) > 10 and len(set(expected[2])) >= min(num_classes, 2)  # else this test would see nothing
    np.testing.assert_array_equal(found[2], expected[2])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-4)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-2)
    assert found[2].dtype == np.int64


@pytest.mark.parametrize("format", ["onnx", "torchscript", pytest.param("torch-export", marks=pytest.mark.slow)])
def test_an_image_without_detections(exported, format):
    model, _, run = exported(format)
    image = model.pixel_mean.expand(3, 64, 80).contiguous()  # 0 after normalisation
    assert len(detect(model, image)[0]) == 0
    assert [x.shape for x in run(image)] == [(0, 4), (0,), (0,)]


@pytest.mark.parametrize(
    "format, layout, dtype, raw",
    [
        pytest.param("onnx", "NHWC", "uint8", False, marks=pytest.mark.slow),
        ("torchscript", "HWC", "uint8", False),
        ("torchscript", "NCHW", "float32", True),
        pytest.param("torch-export", "NHWC", "uint8", False, marks=pytest.mark.slow),
        pytest.param("onnx", "CHW", "uint8", True, marks=pytest.mark.slow),
    ],
)
def test_images_of_another_layout_and_dtype(format, layout, dtype, raw, photo, tmp_path):
    model, path = tiny_model(), str(tmp_path / "detector")
    images = {"a photo": crop(photo, 150, 170)}
    export.export_model(model, path, format, images, raw=raw, layout=layout, dtype=dtype)
    image = crop(photo, 201, 333)
    dimensions = {"N": 1, "C": 3, "H": 201, "W": 333}
    array = np.einsum(f"chw->{layout.lower().replace('n', '')}", image.numpy()).astype(dtype)
    given = torch.from_numpy(array.reshape([dimensions[side] for side in layout]))
    found = FORMATS[format][1](path)(given)
    if raw:
        for a, b in zip(expected_maps(model, image[None]), found, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
        return
    compare_detections(find_candidates(model, image), found, model)
    assert len(found[0]) > 3
    if format == "onnx":
        (input_,) = onnxruntime.InferenceSession(path).get_inputs()
        assert input_.type == f"tensor({dtype})" and input_.shape[0] == 1 and input_.shape[3] == 3


def test_metadata_and_names_are_in_the_file(exported):
    session = onnxruntime.InferenceSession(exported("onnx")[1])
    assert session.get_modelmeta().custom_metadata_map == {"classes": '["a", "b"]', "order": "BGR"}
    assert [output.name for output in session.get_outputs()] == ["boxes", "scores", "classes"]
    for load, argument in [(torch.jit.load, "_extra_files"), (torch.export.load, "extra_files")]:
        extra = {"classes": "", "order": ""}
        with open(exported("torchscript" if load is torch.jit.load else "torch-export", raw=True)[1], "rb") as file:
            load(file, **{argument: extra})
        texts = {key: value.decode() if isinstance(value, bytes) else value for key, value in extra.items()}
        assert texts == {"classes": '["a", "b"]', "order": "BGR"}


@pytest.mark.parametrize(
    "format", ["torchscript", *(pytest.param(x, marks=pytest.mark.slow) for x in ("onnx", "torch-export"))]
)
def test_torchvisions_anchors(format, photo, tmp_path):
    """Their steps depend on the image's size: here the second level's, of one cell less than the first has."""
    anchors = TorchvisionAnchorGenerator(sizes=[[24], [64]], aspect_ratios=[[0.6, 1.5]], strides=[8, 16])
    model, path = tiny_model(anchor_generator=anchors), str(tmp_path / "x")
    model.backbone = Narrowing(model.backbone)
    export.export_model(model, path, format, {"a photo": crop(photo, 150, 170)})
    image = crop(photo, 333, 201)
    compare_detections(find_candidates(model, image), FORMATS[format][1](path)(image), model)


class Narrowing(nn.Module):
    """A backbone whose second level misses its last row and column."""

    padding_constraints, size_divisibility = {}, 16

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images):
        p3, p4 = self.backbone(images).values()
        return {"p3": p3, "p4": p4[..., :-1, :-1]}


# NMS


def boxes_of_classes(images, count, num_classes, seed=0):
    """Boxes in clusters, so that many overlap, some outside of a large image; one in ten is no candidate."""
    rng = np.random.default_rng(seed)
    centers = rng.choice([-300.0, 5.0, 1500.0, 4000.0], (images, count, 2)) + rng.normal(0, 4, (images, count, 2))
    sides = rng.uniform(12, 20, (images, count, 2))
    boxes = np.concatenate([centers - sides / 2, centers + sides / 2], axis=2).astype(np.float32)
    scores = rng.permutation(images * count).astype(np.float32).reshape(images, count) / max(count * images, 1)
    scores[rng.random(scores.shape) < 0.1] = -1  # of the others, no two are the same
    classes = rng.integers(0, num_classes, (images, count))
    return torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(classes)


def nms_of_each_class(boxes, scores, classes, threshold):
    """The scores and indices that NMS keeps, image by image and class by class, best first; then −1."""
    kept = torch.full_like(scores, -1)
    for image in range(len(scores)):
        for cls in classes[image].unique():
            places = ((classes[image] == cls) & (scores[image] >= 0)).nonzero().squeeze(1)
            places = places[nms(boxes[image, places].double(), scores[image, places].double(), threshold)]
            kept[image, places] = scores[image, places]
    scores, order = kept.sort(dim=1, descending=True)
    return scores.numpy(), np.where(scores < 0, -1, order)


@pytest.mark.parametrize(
    "images, count, num_classes", [(1, 0, 3), (2, 0, 1), (1, 1, 1), (3, 100, 1), (1, 2000, 80), (2, 1000, 1200)]
)
def test_images_and_classes_do_not_suppress_each_other(images, count, num_classes):
    boxes, scores, classes = boxes_of_classes(images, count, num_classes)
    expected = nms_of_each_class(boxes, scores, classes, 0.5)
    for limit in (10_000, 20, 1):
        values, order = offset_nms(boxes, scores, classes, num_classes, 0.5, limit)
        np.testing.assert_array_equal(values, expected[0][:, :limit])
        np.testing.assert_array_equal(np.where(values < 0, -1, order), expected[1][:, :limit])
    assert count < 100 or (expected[0] >= 0).sum() < (scores >= 0).sum()


def test_onnx_suppresses_class_by_class(tmp_path):
    class Suppress(nn.Module):
        def forward(self, boxes, scores, classes):
            return class_wise_nms(boxes, scores, classes, 80, 0.5, 100)

    path, any_length = str(tmp_path / "nms.onnx"), dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    table = {torch.ops.focal_plugin.class_wise_nms.default: export_formats._class_wise_nms_in_onnx}
    with quiet():
        torch.onnx.export(
            Suppress(),
            boxes_of_classes(2, 20, 80),
            path,
            dynamo=True,
            input_names=["boxes", "scores", "classes"],
            dynamic_shapes=(any_length, any_length, any_length),
            custom_translation_table=table,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path)
    for images, count in ((1, 0), (1, 1), (2, 1), (1, 2000), (3, 500)):
        boxes, scores, classes = boxes_of_classes(images, count, 80, seed=1)
        inputs = {"boxes": boxes.numpy(), "scores": scores.numpy(), "classes": classes.numpy()}
        expected, (values, order) = nms_of_each_class(boxes, scores, classes, 0.5), session.run(None, inputs)
        np.testing.assert_array_equal(values, expected[0][:, :100])
        np.testing.assert_array_equal(np.where(values < 0, -1, order), expected[1][:, :100])


# The comparison


@pytest.mark.parametrize("value", [0.0, 60.0, pytest.param(255.0, marks=pytest.mark.slow)])
def test_an_image_that_is_flat_in_part(value, photo, tmp_path):
    """Detections there have equal logits: which of them drops the other is a matter of how a library sorts."""
    image = crop(photo, 150, 170)
    image[:, :, 80:] = value
    for format in ("torchscript", *["onnx"] * (value == 255)):
        export.export_model(tiny_model(), tmp_path / format, format, {"a photo": image})  # compares, and may raise


@pytest.mark.parametrize(
    "format", ["torchscript", *(pytest.param(x, marks=pytest.mark.slow) for x in ("onnx", "torch-export"))]
)
def test_a_saturated_model_whose_scores_are_all_equal(format, photo, tmp_path):
    """The limit of detections falls between equal scores, and some that it keeps are dropped as empty."""
    model, path, image = tiny_model(), str(tmp_path / "x"), crop(photo, 150, 170)
    with torch.no_grad():
        model.head.cls_score.weight *= 1e3
    boxes, scores, classes = detect(model, image)
    assert set(scores) == {1.0} and len(set(classes)) == 3 and len(scores) < model.max_detections_per_image
    export.export_model(model, path, format, {"a photo": image})  # compares, and may raise
    found = FORMATS[format][1](path)(image)  # which of the equal scores are kept, and their order, is the model's too
    np.testing.assert_array_equal(found[2], classes)
    np.testing.assert_allclose(found[0], boxes, atol=1e-2)


def found_things(*rows):
    rows = np.array(rows, dtype=np.float32).reshape(-1, 6)
    return rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64)


def candidates(*rows, optional=()):
    """Of an image of 100 × 100 pixels."""
    boxes, scores, classes = map(torch.from_numpy, found_things(*rows))
    required = torch.tensor([row not in optional for row in rows], dtype=torch.bool)
    return Candidates(boxes, boxes.clamp(0, 100), scores, classes, required)


A, B = [0, 0, 10, 10, 0.9, 0], [5, 5, 30, 20, 0.5, 1]
A2, A3 = [0, 1, 10, 11, 0.89996, 0], [0, 1, 10, 11, 0.8, 0]  # NMS drops them for A; A2 may drop A, as it is as good
LEAST = [1, 1, 9, 9, 0.10003, 2]
OUTSIDE = [100, 0, 120, 10, 0.95, 0]


@pytest.mark.parametrize(
    "expected, found",
    [
        ((A, B), (A, B)),
        ((), ()),
        ((A, B), ([0, 0, 10.005, 10, 0.9008, 0], B)),
        ((A, [*B[:4], 0.89995, 1]), ([*B[:4], 0.89995, 1], A)),
        ((A, B, LEAST), (A, B)),
        ((A, B), (A, B, LEAST)),
        ((A, B, A2, A3), (A, B)),
        ((A, B, A2, A3), (A2, B)),
        ((OUTSIDE, A, B), (A, B)),
    ],
)
def test_what_counts_as_the_same(expected, found):
    compare_detections(candidates(*expected), found_things(*found), tiny_model())


@pytest.mark.parametrize(
    "found, message",
    [
        ((A,), "is missing: class 1, score 0.5000"),
        ((A, B, [50, 50, 60, 60, 0.4, 0]), "its detection 2 is none of the model's: class 0, score 0.4000"),
        ((A, A2, B), "its detections 0 and 1, both of class 0, overlap"),
        ((B, A), "not in the order"),
        (([*A[:5], 1], B), "its detection 0 is none of the model's: class 1"),
        (([0, 0, 10.1, 10, 0.9, 0], B), "class 0"),
        (([0, 0, 10, 10, 0.905, 0], B), "class 0"),
        ((A, A, B), "its detection 1 "),
        (([0, 0, 10, 10, np.nan, 0], B), "class 0"),
        ((), "is missing: class 0, score 0.9000"),
    ],
)
def test_what_counts_as_different(found, message):
    with pytest.raises(ExportError, match=message):
        compare_detections(candidates(A, B, A2, OUTSIDE), found_things(*found), tiny_model())


def test_what_a_limit_leaves_out():
    model = tiny_model(max_detections_per_image=1)
    compare_detections(candidates(A, B), found_things(A), model)
    compare_detections(candidates(A, [*A[:5], 1]), found_things([*A[:5], 1]), model)  # as good as the other
    for found in ([A, B], [B]):
        with pytest.raises(ExportError):
            compare_detections(candidates(A, B), found_things(*found), model)
    model = tiny_model()
    compare_detections(candidates(A, B, optional=[B]), found_things(A), model)
    compare_detections(candidates(A, B, optional=[B]), found_things(A, B), model)


@pytest.mark.parametrize("clip", [False, True])
def test_the_models_own_detections_pass_and_it_stays_as_it_is(clip, photo):
    model, image = tiny_model(clip_before_nms=clip), crop(photo, 201, 333)
    before = detect(model, image)
    compare_detections(find_candidates(model, image), before, model)
    for a, b in zip(before, detect(model, image), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ExportError):  # those with another threshold do not
        compare_detections(find_candidates(model, image), detect(tiny_model(test_nms_thresh=0.3), image), model)


def test_a_levels_limit_among_equal_scores(photo):
    """The image is flat on the right: far more equal logits than the limit lets through."""
    model, image = tiny_model(test_topk_candidates=30), crop(photo, 150, 170)
    image[:, :, 60:] = 255
    found = find_candidates(model, image)
    scores = found.scores[~found.required]
    assert 0 < (found.scores > scores.min()).sum() < len(found.scores) and len(scores) > 30
    compare_detections(found, detect(model, image), model)


@pytest.mark.parametrize("raw", [False, True])
def test_a_file_that_computes_something_else_is_not_kept(raw, photo, tmp_path, monkeypatch):
    def write_another(module, *args):
        with torch.no_grad():
            module.model.head.bbox_pred.bias += 0.05
        return export_formats.write_torchscript(module, *args)

    monkeypatch.setitem(FORMATS, "torchscript", (write_another, *FORMATS["torchscript"][1:]))
    images = {"a photo": crop(photo, 150, 170)}
    with pytest.raises(ExportError, match=r"is not kept. On a photo, 150 × 170: .*"):
        export.export_model(tiny_model(), tmp_path / "made" / "x.ts", "torchscript", images, raw=raw)
    assert list((tmp_path / "made").iterdir()) == []


def test_a_model_that_finds_nothing_cannot_be_compared(photo, tmp_path):
    with pytest.raises(ExportError, match="detects nothing in a photo"):
        images = {"a photo": crop(photo, 64, 64)}
        export.export_model(tiny_model(test_score_thresh=1.0), tmp_path / "x", "torchscript", images)
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused(photo, tmp_path):
    images, path = {"a photo": crop(photo, 64, 64)}, tmp_path / "x"
    cfg = load_config(str(CONFIGS / "Base-FocalRetinaNet.yaml"), ["MODEL.RESNETS.DEPTH", 18, "MODEL.DEVICE", "cpu"])
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.META_ARCHITECTURE = 64, "RetinaNet"
    with pytest.raises(ExportError, match=r"A RetinaNet cannot be exported.*META_ARCHITECTURE FocalRetinaNet"):
        export.export_model(build_model(cfg), path, "onnx", images)
    with pytest.raises(ExportError, match="A Linear cannot"):
        export.export_model(nn.Linear(1, 1), path, "onnx", images)
    with pytest.raises(ExportError, match="Anchors of Identity"):
        export.export_model(tiny_model(anchor_generator=nn.Identity()), path, "onnx", images)
    with pytest.raises(ValueError, match="'coreml'; expected one of onnx"):
        export.export_model(tiny_model(), path, "coreml", images)
    with pytest.raises(ValueError, match="--opset 18 is for"):
        export.export_model(tiny_model(), path, "torchscript", images, opset=18)
    with pytest.raises(ExportError, match="no image"):
        export.export_model(tiny_model(), path, "onnx", {})
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="left as it is"):
        export.export_model(tiny_model(), path, "torchscript", images)
    assert path.read_text() == "mine"


def test_what_the_exporter_cannot_express_is_said(photo, tmp_path):
    model = tiny_model()
    model.head.register_forward_hook(lambda module, args, output: 1 / 0)
    with pytest.raises(ExportError, match="torch-export cannot express this model: ZeroDivisionError"):
        export.export_model(model, tmp_path / "x", "torch-export", {"a photo": crop(photo, 64, 64)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["torchscript", pytest.param("torch-export", marks=pytest.mark.slow)])
def test_a_full_disk_is_said(format, photo, tmp_path):
    """In a process of its own, since PyTorch's writer would end it."""
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        try:
            export.export_model(tiny_model(), tmp_path / "x", format, {"a photo": crop(photo, 64, 64)})
        except OSError as error:
            said = error.errno == errno.EFBIG and "could not be written, and nothing is left of it" in str(error)
            os._exit(0 if said else 2)
        except BaseException:
            os._exit(1)
        os._exit(3)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert list(tmp_path.iterdir()) == []


def test_what_killed_exports_leave_is_removed(photo, tmp_path):
    """By the next one, unless it is of a process that lives."""
    host = process_name().rpartition("-")[0]
    living, dead = tmp_path / f".export-{process_name()}-a", tmp_path / f".export-{host}-{2**22 + 1}-b"
    living.mkdir()
    dead.mkdir()
    export.export_model(tiny_model(), tmp_path / "x", "torchscript", {"a photo": crop(photo, 64, 64)}, raw=True)
    assert living.exists() and not dead.exists()


def test_sigterm_leaves_nothing(photo, tmp_path, monkeypatch):
    def told(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(9)

    monkeypatch.setitem(FORMATS, "torchscript", (told, *FORMATS["torchscript"][1:]))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what this process does at it, outside
    try:
        with pytest.raises(SystemExit, match="143"):
            export.export_model(tiny_model(), tmp_path / "x", "torchscript", {"a photo": crop(photo, 64, 64)})
    finally:
        signal.signal(signal.SIGTERM, before)
    assert list(tmp_path.iterdir()) == []


# Larger models, and the command


def shipped_model(config, *opts):
    cfg = load_config(str(CONFIGS / config), ["MODEL.DEVICE", "cpu", "MODEL.RETINANET.SCORE_THRESH_TEST", 0.3, *opts])
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for conv in (*model.head.cls_subnet, model.head.cls_score):
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight)
    model.head.cls_score.bias.data.fill_(-3.0)
    return model


R18 = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.FPN.OUT_CHANNELS", 32]
LARGER = {
    "P6 and P7, norms of levels": (
        *("Base-FocalRetinaNet.yaml", *R18, "MODEL.RETINANET.NUM_CLASSES", 2, "MODEL.RETINANET.NORM", "GN"),
        *("MODEL.FOCAL.HEAD.NORM_SHARING", "per_level"),
    ),
    "timm": ("quickstart/trees.yaml", "MODEL.RETINANET.SCORE_THRESH_TEST", 0.05),
}


@pytest.mark.parametrize(
    "name, format",
    [
        pytest.param(name, format, marks=[pytest.mark.slow] * (format != "torchscript" or name == "timm"))
        for name in LARGER
        for format in FORMATS
    ],
)
def test_larger_models(name, format, photo, tmp_path):
    model, path = shipped_model(*LARGER[name]), tmp_path / "x"
    export.export_model(model, path, format, {"a photo": crop(photo, 240, 290)})
    image = crop(photo, 333, 201)
    compare_detections(find_candidates(model, image), FORMATS[format][1](str(path))(image), model)


@pytest.fixture
def trained(tiny_config, tmp_path):
    """A config, its weights, and a model that detects something with them."""
    cfg = load_config(tiny_config, ["MODEL.DEVICE", "cpu"])
    torch.manual_seed(0)
    model = build_model(cfg)
    for conv in (*model.head.cls_subnet, model.head.cls_score):
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight)
    DetectionCheckpointer(model, str(tmp_path)).save("weights")
    return ["--config-file", tiny_config, "--weights", str(tmp_path / "weights.pth")]


def test_the_command_compares_on_the_test_set_and_says_what_is_around_the_model(trained, tmp_path, capsys):
    output = tmp_path / "raw.ts"
    words = [*trained, "--format", "torchscript", "--raw", "--output", str(output), "--input-layout"]
    words += ["NHWC", "--batch", "--input-dtype", "uint8", "INPUT.MAX_SIZE_TEST", "100"]
    assert export.main(words) == 0
    assert "same as the model on 4 images, scores to 0.001" in capsys.readouterr().out
    inputs = ["input_format", "input_layout", "input_dtype", "batch"]
    keys = ["classes", *inputs, "min_size", "max_size", "strides", "cell_anchors", "anchor_offset"]
    extra = dict.fromkeys(keys, "")
    torch.jit.load(str(output), _extra_files=extra)
    about = {key: value.decode() for key, value in extra.items()}
    assert [about.pop(key) for key in inputs] == ["BGR", "NHWC", "uint8", "true"]
    about = {key: json.loads(value) for key, value in about.items()}
    assert about["classes"] == ["square", "disc"]
    assert (about["min_size"], about["max_size"], about["anchor_offset"]) == (64, 100, 0.0)
    assert about["strides"] == [8, 16, 32, 64, 128]
    assert np.shape(about["cell_anchors"]) == (5, 6, 4)

    before = output.read_bytes()
    assert export.main(words) == 2
    assert "exists and is left as it is" in capsys.readouterr().err
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--image", "broken.png"], "does not open: broken.png"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["DATASETS.TEST", "()"], "give --image"),
        (["DATASETS.TEST", "('unheard_of',)"], "unheard_of of DATASETS.TEST cannot be read"),
        (["MODEL.META_ARCHITECTURE", "RetinaNet"], "A RetinaNet cannot be exported"),
        (["--image", "broken.png", "MODEL.META_ARCHITECTURE", "RetinaNet"], "A RetinaNet cannot be exported"),
    ],
)
def test_mistakes_are_said(trained, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("broken.png").write_text("no image")
    assert export.main([*trained, "--format", "onnx", "--output", "x.onnx", *words]) == 2
    assert message in capsys.readouterr().err
    assert not Path("x.onnx").exists()


@pytest.mark.parametrize("module", ["onnxscript", "onnxruntime"])
def test_without_onnx_it_says_what_to_install(module, photo, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: pytest.fail("went on without onnxscript"))
    with pytest.raises(ImportError, match=r"pip install -e .\[export\]"):
        if module == "onnxruntime":
            export_formats.run_onnx("x")
        else:
            export.export_model(tiny_model(), tmp_path / "x", "onnx", {"a photo": crop(photo, 64, 64)})


@pytest.mark.parametrize("min_size", [64, 0, 150])
def test_the_page_on_serving_runs_without_this_package(min_size, exported, photo, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", SERVING.read_text().split("## What goes in")[0], re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) < 30
    model, path, _ = exported("onnx")
    file = onnx.load(path)
    about = {"classes": ["cat", "dog", "cow"], "min_size": min_size, "max_size": 400, "input_format": "BGR"}
    onnx.helper.set_model_props(file, {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()})
    onnx.save(file, tmp_path / "detector.onnx")
    image = crop(photo, 150, 200)
    cv2.imwrite(str(tmp_path / "image.png"), image.numpy().transpose(1, 2, 0))
    blocked = "import sys; sys.modules |= dict.fromkeys(['focal_plugin', 'torch', 'torchvision', 'detectron2']); "
    (tmp_path / "serve.py").write_text(blocked + "\n" + code)
    words = [sys.executable, "serve.py", "detector.onnx", "image.png"]
    lines = subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.splitlines()
    if min_size == 64:  # resized: not the same to the last digit
        assert len(lines) > 0 and all(line.split()[0] in about["classes"] for line in lines)
        return
    expected = list(zip(*detect(model, image), strict=True))
    assert len(lines) == len(expected)
    for line, (box, score, cls) in zip(lines, expected, strict=True):
        name, *numbers = line.split()
        assert name == about["classes"][cls]
        np.testing.assert_allclose([float(x) for x in numbers], [score, *box], atol=0.02)


def test_boxes_are_clipped_before_nms_where_the_model_does_so(photo, tmp_path):
    """Small images, so that many boxes reach beyond the border and suppress each other otherwise once they are cut."""
    plain, clipping = (
        tiny_model(clip_before_nms=flag, test_nms_thresh=0.3, max_detections_per_image=1000) for flag in (False, True)
    )
    image = crop(photo, 96, 96)
    assert len(detect(plain, image)[0]) != len(detect(clipping, image)[0])
    export.export_model(clipping, tmp_path / "model.ts", "torchscript", {"a photo": image})  # compares, and may raise
    assert (tmp_path / "model.ts").exists()


def test_a_model_of_grey_images(trained, tmp_path):
    grey = ["INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", "[100.0]", "MODEL.PIXEL_STD", "[50.0]"]
    torch.save({"model": build_model(load_config(trained[1], grey)).state_dict()}, tmp_path / "grey.pth")
    words = ["--weights", str(tmp_path / "grey.pth"), "--format", "torchscript", "--raw", "--output"]
    assert export.main([*trained, *words, str(tmp_path / "x.ts"), *grey]) == 0
    assert (tmp_path / "x.ts").exists()
