import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import DatasetMapperTTA, GeneralizedRCNNWithTTA, build_model
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, Instances
from torch import nn

from focal_plugin.commands import train
from focal_plugin.config.load import load_config
from focal_plugin.deploy import DenseTTA, Predictor, with_tta


class BrightBoxes(DenseDetector):
    """Finds the box around what is bright in the first channel (class 0) and in the second (class 1), if anything."""

    def __init__(self, limit=100):
        nn.Module.__init__(self)
        self.test_nms_thresh, self.max_detections_per_image = 0.5, limit
        self.seen = []  # the shapes of the images, batch by batch

    def forward(self, batched_inputs):
        assert not torch.is_grad_enabled()
        self.seen.append([tuple(inputs["image"].shape[1:]) for inputs in batched_inputs])
        return [{"instances": self.find(inputs["image"])} for inputs in batched_inputs]

    def find(self, image):
        boxes, classes = [], []
        for k in range(2):
            ys, xs = np.nonzero(image[k].numpy() > 127)
            if len(xs):
                boxes.append([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
                classes.append(k)
        boxes = torch.tensor(np.array(boxes, dtype=np.float32).reshape(-1, 4))
        scores = torch.full((len(boxes),), 0.5) + torch.tensor(classes) * 0.1 + image.shape[1] / 10000
        return Instances(
            tuple(image.shape[1:]), pred_boxes=Boxes(boxes), scores=scores, pred_classes=torch.tensor(classes).long()
        )


def picture(height=80, width=120):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0, 16:40, 8:56] = 255
    image[1, 40:72, 64:112] = 255
    return image


def tta(model, sizes, flip, max_size=1000, batch_size=1):
    return DenseTTA(model=model, mapper=DatasetMapperTTA(sizes, max_size, flip), batch_size=batch_size).eval()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("sizes", [[80], [40, 80], [40, 160, 100]])
def test_all_looks_agree_in_the_coordinates_of_the_image(sizes, flip):
    model = BrightBoxes()
    (output,) = tta(model, sizes, flip)([{"image": picture(), "height": 80, "width": 120}])
    found = output["instances"]
    assert [shape for (shape,) in model.seen] == [(s, s * 3 // 2) for s in sizes for _ in range(1 + flip)]
    assert found.image_size == (80, 120)
    assert found.pred_classes.tolist() == [1, 0]  # once each, the better one first
    expected = torch.tensor([[64.0, 40, 112, 72], [8, 16, 56, 40]])
    torch.testing.assert_close(found.pred_boxes.tensor, expected, rtol=0, atol=2.5)  # of an image half as large
    torch.testing.assert_close(found.scores, torch.tensor([0.6, 0.5]) + max(sizes) / 10000)


def test_boxes_are_those_of_the_original_size():
    """The image comes at half the size of the original."""
    (output,) = tta(BrightBoxes(), [80], True)([{"image": picture(), "height": 160, "width": 240}])
    assert output["instances"].image_size == (160, 240)
    expected = torch.tensor([[128.0, 80, 224, 144], [16, 32, 112, 80]])
    torch.testing.assert_close(output["instances"].pred_boxes.tensor, expected)


def test_looks_go_through_the_model_in_batches_up_to_the_longest_side_allowed():
    model = BrightBoxes()
    outputs = tta(model, [40, 80], True, max_size=90, batch_size=3)([{"image": picture()}, {"image": picture(40, 40)}])
    assert [len(batch) for batch in model.seen] == [3, 1, 3, 1]
    assert model.seen[0] + model.seen[1] == [(40, 60), (40, 60), (60, 90), (60, 90)]
    assert [output["instances"].image_size for output in outputs] == [(80, 120), (40, 40)]


def test_the_models_limit_of_detections_holds():
    (output,) = tta(BrightBoxes(limit=1), [40, 80], True)([{"image": picture()}])
    assert output["instances"].pred_classes.tolist() == [1]


def test_nothing_found():
    (output,) = tta(BrightBoxes(), [40, 80], True)([{"image": torch.zeros(3, 64, 64, dtype=torch.uint8)}])
    assert len(output["instances"]) == 0 and output["instances"].pred_boxes.tensor.shape == (0, 4)


@pytest.fixture
def model(tiny_config, weights):
    cfg = load_config(tiny_config, ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(weights)["model"])
    return model


def image_tensor():
    return torch.randint(0, 256, (3, 64, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_one_look_is_the_model_itself(model):
    inputs = [{"image": image_tensor(), "height": 128, "width": 192}]
    (found,) = (output["instances"] for output in tta(model, [64], False)(inputs))
    with torch.no_grad():
        (expected,) = (output["instances"] for output in model(inputs))
    assert len(expected) > 10
    assert found.pred_classes.equal(expected.pred_classes) and found.scores.equal(expected.scores)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=1e-3)


def test_a_flipped_image_has_flipped_boxes(model):
    """With the flip among the looks, left and right are the same to it; without, they are not."""
    image = image_tensor()
    outputs = {}
    for flip in (False, True):
        one, other = (
            output["instances"] for output in tta(model, [64, 48], flip)([{"image": image}, {"image": image.flip(2)}])
        )
        boxes = other.pred_boxes.tensor
        mirrored = torch.stack([96 - boxes[:, 2], boxes[:, 1], 96 - boxes[:, 0], boxes[:, 3]], dim=1)
        outputs[flip] = one, other, mirrored
    one, other, mirrored = outputs[True]
    assert len(one) > 10
    torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=1e-4)
    best = one.scores - torch.cat([one.scores[1:], one.scores[-1:]]) > 1e-3  # those whose place is beyond rounding
    best &= one.scores - torch.cat([one.scores[:1] + 1, one.scores[:-1]]) < -1e-3
    assert best.sum() > 3
    torch.testing.assert_close(one.pred_boxes.tensor[best], mirrored[best], rtol=0, atol=0.05)
    one, other, _ = outputs[False]
    assert one.scores[:5].sub(other.scores[:5]).abs().max() > 1e-3


def test_the_keys_of_test_aug_are_read(tiny_config, weights, tmp_path):
    opts = ["TEST.AUG.MIN_SIZES", (32, 64), "TEST.AUG.MAX_SIZE", 64, "TEST.AUG.FLIP", False]
    predictor = Predictor(tiny_config, weights, opts=opts, tta=True, optimize=False)
    assert isinstance(predictor.model, DenseTTA)
    mapper = predictor.model.mapper
    assert (tuple(mapper.min_sizes), mapper.max_size, mapper.flip) == ((32, 64), 64, False)
    assert Predictor(tiny_config, weights, opts=[*opts, "TEST.AUG.ENABLED", True]).model.mapper.flip is False
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    predictor.model.model = BrightBoxes()
    predictor(image)
    assert predictor.model.model.seen == [[(32, 32)], [(64, 64)]]  # from the image's own size


def test_eval_only_gives_the_results_with_and_without(tiny_config, weights):
    """The only look being that of the plain evaluation, its results are the same."""
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", weights, "TEST.AUG.ENABLED", True, "TEST.AUG.FLIP", False]
    cfg = load_config(tiny_config, [*opts, "TEST.AUG.MIN_SIZES", (64,)])
    results = train.evaluate(cfg, resume=False)
    assert sorted(results) == ["bbox", "bbox_TTA"]
    assert results["bbox_TTA"] == pytest.approx(results["bbox"], nan_ok=True, abs=1e-3)
    plain, augmented = (
        json.loads((Path(cfg.OUTPUT_DIR) / folder / "coco_instances_results.json").read_text())
        for folder in ("inference", "inference_TTA")
    )
    assert len(plain) > 10
    assert [d["category_id"] for d in plain] == [d["category_id"] for d in augmented]
    boxes, others = ([x for d in found for x in d["bbox"]] for found in (plain, augmented))
    assert boxes == pytest.approx(others, abs=1e-3)


def test_what_cannot_be_is_refused(tiny_config):
    cfg = load_config(tiny_config, ["MODEL.DEVICE", "cpu"])
    with pytest.raises(ValueError, match="Linear"):
        with_tta(cfg, nn.Linear(1, 1))
    cfg.TEST.AUG.MIN_SIZES = ()
    with pytest.raises(ValueError, match=r"TEST\.AUG\.MIN_SIZES"):
        with_tta(cfg, BrightBoxes())


def test_two_stage_models_get_detectron2s_own(monkeypatch):
    class TwoStage(GeneralizedRCNN):
        def __init__(self):
            nn.Module.__init__(self)

    cfg = get_cfg()
    cfg.MODEL.KEYPOINT_ON = True
    with pytest.raises(ValueError, match=r"MODEL\.KEYPOINT_ON"):
        with_tta(cfg, TwoStage())
    wrapped = with_tta(get_cfg(), TwoStage())
    assert isinstance(wrapped, GeneralizedRCNNWithTTA) and not wrapped.training
