"""Components that break their contract: each mistake ends in an error that says what was found and what expected."""

import copy
from contextlib import contextmanager

import pytest
import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from torch import nn

from focal_plugin import (
    ANCHOR_MATCHER_REGISTRY,
    BIAS_INIT_REGISTRY,
    BOX_LOSS_REGISTRY,
    CLS_LOSS_REGISTRY,
    DENSE_HEAD_REGISTRY,
    ElementwiseLoss,
    FocalBoxPredictor,
    FocalRetinaNetHead,
    IgnoreBandMatcher,
    NumPositives,
    PriorBiasInit,
    SigmoidFocalLoss,
    SmoothL1BoxLoss,
    build_box_loss,
    build_cls_loss,
    build_dense_head,
    build_matcher,
)
from focal_plugin.contracts import fill_bias
from focal_plugin.matchers.batch import match_images
from tests.small_retinanet import CLASSES, small_config

ANCHORS = 2
CELLS = 8 * 12 + 4 * 6 + 2 * 3 + 2 + 1  # of images of 64×80, padded to 64×96
BUILD = {
    "HEAD": (DENSE_HEAD_REGISTRY, lambda cfg: build_dense_head(cfg, [])),
    "CLS_LOSS": (CLS_LOSS_REGISTRY, build_cls_loss),
    "BOX_LOSS": (BOX_LOSS_REGISTRY, build_box_loss),
    "MATCHER": (ANCHOR_MATCHER_REGISTRY, build_matcher),
}


def config():
    cfg = small_config()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[size] for size in (16, 32, 64, 128, 256)]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[1.0, 2.0]]
    return cfg


@pytest.fixture(scope="module")
def built():
    return build_model(config())


@pytest.fixture
def model(built):
    """A model whose components a test may replace."""
    return copy.deepcopy(built)


def batch():
    """An image with two boxes, and one without."""
    boxes = [torch.tensor([[8.0, 8, 60, 50], [30, 20, 50, 40]]), torch.zeros(0, 4)]
    instances = [Instances((64, 80), gt_boxes=Boxes(b), gt_classes=torch.arange(len(b))) for b in boxes]
    return [{"image": torch.rand(3, 64, 80) * 255, "instances": i} for i in instances]


def broken(base, change):
    """A subclass of a component: ``change`` is what becomes of its results."""

    class Broken(base):
        if issubclass(base, nn.Module):

            def forward(self, *args):
                return change(super().forward(*args))
        else:

            def __call__(self, *args):
                return change(super().__call__(*args))

    return Broken


class DenseHead(FocalRetinaNetHead):
    takes_targets = False

    def forward(self, features):
        return super().forward(features)


@contextmanager
def registered(registry, component, name="Mine"):
    """A component of this test alone; gives its name."""
    registry._do_register(name, component)
    try:
        yield name
    finally:
        registry._obj_map.pop(name)


def of_head(logits=lambda x: x, deltas=lambda x: x):
    return lambda outputs: ([logits(x) for x in outputs[0]], [deltas(x) for x in outputs[1]])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda o: {"logits": o[0], "deltas": o[1]}, r"a dict; expected \(logits, deltas\)"),
        (lambda o: (*o, o[0]), r"a tuple of 3; expected \(logits, deltas\)"),
        (lambda o: (o[0][:3], o[1]), "logits a list of 3; expected a list of 5 tensors"),
        (lambda o: (o[0], o[1][0]), r"deltas torch.float32 of shape \(2, 8, 8, 12\); expected a list of 5 tensors"),
        (of_head(logits=lambda x: torch.cat([x, x[:, :ANCHORS]], 1)), r"\(2, 8, 8, 12\) on level 0; expected \(2, 6,"),
        (of_head(logits=lambda x: x[:, :CLASSES]), r"logits .* \(2, 3, 8, 12\) on level 0; expected \(2, 6, 8, 12\)"),
        (of_head(logits=lambda x: x[..., ::2]), r"logits .* \(2, 6, 8, 6\) on level 0; expected \(2, 6, 8, 12\)"),
        (of_head(logits=lambda x: x.flatten(2)), r"logits .* \(2, 6, 96\) on level 0; expected \(2, 6, 8, 12\)"),
        (of_head(logits=lambda x: x.tolist()), r"logits a list of 2 on level 0; expected \(2, 6, 8, 12\)"),
        (of_head(deltas=lambda x: x[:, :4]), r"deltas .* \(2, 4, 8, 12\) on level 0; expected \(2, 8, 8, 12\)"),
        (of_head(deltas=lambda x: torch.cat([x, x], 1)), r"deltas .* \(2, 16, 8, 12\) on level 0; expected \(2, 8,"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_heads_outputs(change, message, training):
    cfg = config()
    with registered(DENSE_HEAD_REGISTRY, broken(DenseHead, change)) as cfg.MODEL.FOCAL.HEAD.NAME:
        model = build_model(cfg).train(training)
    with pytest.raises((TypeError, ValueError), match=f"The head Broken gave .*{message}"):
        model(batch())


def test_a_head_that_takes_targets_gives_the_positives_deltas(model):
    class Dense(nn.Module):
        takes_targets = True

        def forward(self, features, targets=None):
            return good(features)

    good, model.head = model.head, Dense()
    with pytest.raises(ValueError, match=r"was given the targets, and gave deltas a list of 5; expected .* \(P, 4\)"):
        model(batch())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: None, r"None; expected \(matched, labels\)"),
        (lambda m: m[1], r"torch.int8 of shape .*; expected \(matched, labels\)"),
        (lambda m: m[::-1], "matched torch.int8 .*; expected torch.int64"),
        (lambda m: (m[0].int(), m[1]), "matched torch.int32 .*; expected torch.int64"),
        (lambda m: (m[0], m[1] > 0), "labels torch.bool .*; expected torch.int8"),
        (lambda m: (m[0], m[1].long()), "labels torch.int64 .*; expected torch.int8"),
        (
            lambda m: (m[0][3:], m[1]),
            rf"matched torch.int64 of shape \({CELLS * 2 - 3},\); expected torch.int64 of shape \({CELLS * 2},\)",
        ),
        (
            lambda m: (m[0], m[1][3:]),
            rf"labels torch.int8 of shape \({CELLS * 2 - 3},\); expected torch.int8 of shape \({CELLS * 2},\)",
        ),
        (lambda m: ([m[0]], m[1]), "matched a list of 1; expected"),
        (lambda m: (m[0], m[1] * 2), r"the label -?2; expected -1 \(IGNORED\), 0 \(NEGATIVE\) or 1 \(POSITIVE\)"),
        (
            lambda m: (m[0] * 0 + 2, m[1]),
            "a positive anchor to box 2; expected the index of one of the image's 2 boxes",
        ),
        (lambda m: (m[0] * 0 - 1, m[1]), "a positive anchor to box -1; expected"),
    ],
)
def test_a_matchers_result(model, change, message):
    matcher = broken(IgnoreBandMatcher, change)(thresholds=[0.4, 0.5], labels=[0, -1, 1])
    model.anchor_matcher = matcher
    with pytest.raises((TypeError, ValueError), match=f"The anchor matcher Broken (gave|matched) {message}"):
        model(batch())


def test_a_matchers_numbers_are_looked_at_until_there_were_boxes(model):
    with_boxes, empty = batch()
    good, bad = model.anchor_matcher, broken(IgnoreBandMatcher, lambda m: (m[0] - 1, m[1]))
    model([empty])
    model.anchor_matcher = bad(thresholds=[0.4, 0.5], labels=[0, -1, 1])
    with pytest.raises(ValueError, match="box -1"):
        model([with_boxes])
    model.anchor_matcher = good
    model([with_boxes])
    assert model.matcher_seen  # from here on no step waits for a GPU


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: None, "None; expected one number"),
        (lambda x: x.item(), "a float; expected one number"),
        (lambda x: x.repeat(3), r"torch.float32 of shape \(3,\); expected one number, torch.float32 of shape \(\)"),
        (lambda x: x.view(1), r"torch.float32 of shape \(1,\); expected one number"),
        (lambda x: x.double(), r"torch.float64 of shape \(\); expected one number, torch.float32"),
        (lambda x: x.bfloat16(), r"torch.bfloat16 of shape \(\); expected one number, torch.float32"),
        (lambda x: x.detach(), "a loss without a gradient; expected one that is computed from the logits"),
    ],
)
def test_a_class_losss_result(model, change, message):
    model.cls_loss = broken(SigmoidFocalLoss, change)(alpha=0.25, gamma=2.0)
    with pytest.raises((TypeError, ValueError), match=f"The class loss Broken gave {message}"):
        model(batch())


def test_a_class_losss_result_in_fcos():
    cfg = config()
    cfg.MODEL.META_ARCHITECTURE = "FocalFCOS"
    model = build_model(cfg)
    model.cls_loss = broken(SigmoidFocalLoss, lambda x: x.repeat(3))(alpha=0.25, gamma=2.0)
    with pytest.raises(
        TypeError, match=r"The class loss Broken gave torch.float32 of shape \(3,\); expected one number"
    ):
        model(batch())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x.mean(), r"torch.float32 of shape \(\) for logits of shape \(2, 2, 3, 8, 12\)"),
        (lambda x: x.sum(-3, keepdim=True), r".*of shape \(2, 2, 1, 8, 12\) for logits"),  # would count K times
        (lambda x: x.sum(-3), r".*of shape \(2, 2, 8, 12\) for logits"),
        (lambda x: None, "None for logits"),
    ],
)
def test_an_elementwise_losss_result(model, change, message):
    class Broken(ElementwiseLoss):
        def elementwise(self, logits, targets):
            return change((logits - targets) ** 2)

    model.cls_loss = Broken()
    with pytest.raises(ValueError, match=f"The class loss Broken gave {message}.*; expected a loss for each logit"):
        model(batch())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: None, "None; expected one number a positive"),
        (lambda x: x.sum(), r"torch.float32 of shape \(\); expected one number a positive"),
        (lambda x: x[:, None].repeat(1, 4), r".*of shape \(\d+, 4\); expected one number a positive, .* \(\d+,\)"),
        (lambda x: x.double(), "torch.float64 .*; expected one number a positive, torch.float32"),
        (lambda x: x.detach(), "a loss without a gradient; expected one that is computed from the deltas"),
    ],
)
def test_a_box_losss_result(model, change, message):
    model.box_loss = broken(SmoothL1BoxLoss, change)()
    with pytest.raises((TypeError, ValueError), match=f"The box loss Broken gave {message}"):
        model(batch())


def test_what_is_no_mistake(model):
    """A model in float64, and a constant for a batch without boxes."""
    twin = build_model(config()).double()
    losses = twin(batch())
    assert all(loss.isfinite() for loss in losses.values())
    model.cls_loss = broken(SigmoidFocalLoss, lambda x: torch.zeros(()))(alpha=0.25, gamma=2.0)
    assert model(batch()[1:])["loss_cls"] == 0


@pytest.mark.parametrize("key", BUILD)
@pytest.mark.parametrize("kind", ["nothing", "keywords", "forgotten @configurable"])
def test_a_constructor_without_cfg(key, kind):
    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()

    class Keywords(nn.Module):
        def __init__(self, *, alpha=1.0):
            super().__init__()

    class Forgotten(Keywords):
        @classmethod
        def from_config(cls, cfg, *shape):
            return {}

    component = {"nothing": Nothing, "keywords": Keywords, "forgotten @configurable": Forgotten}[kind]
    registry, build = BUILD[key]
    arguments = r"cfg, input_shape" if key == "HEAD" else "cfg"
    with registered(registry, component) as name, pytest.raises(TypeError) as error:
        cfg = config()
        cfg.MODEL.FOCAL[key].NAME = name
        build(cfg)
    for part in (f"MODEL.FOCAL.{key}.NAME Mine is built with ({arguments})", "__init__()", f"(cls, {arguments})"):
        assert part in str(error.value)


def test_a_type_error_inside_a_constructor_is_its_own():
    class Mine:
        def __init__(self, cfg):
            len(3)

    cfg = config()
    with registered(BIAS_INIT_REGISTRY, Mine) as name, pytest.raises(TypeError, match=r"^object of type 'int' has no"):
        cfg.MODEL.FOCAL.BIAS_INIT.NAME = name
        build_model(cfg)


def test_a_configurable_component_builds():
    class Mine(nn.Module):
        @configurable
        def __init__(self, *, gamma):
            super().__init__()
            self.gamma = gamma

        @classmethod
        def from_config(cls, cfg):
            return {"gamma": cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA}

    cfg = config()
    with registered(CLS_LOSS_REGISTRY, Mine) as name:
        cfg.MODEL.FOCAL.CLS_LOSS.NAME = name
        assert build_cls_loss(cfg).gamma == cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA


def parameter(value):
    return lambda conv: setattr(conv, "bias", None if value is None else nn.Parameter(value))


FLOAT = r"torch\.float32 of shape \(6,\)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (parameter(torch.zeros(3)), rf"made the bias torch\.float32 of shape \(3,\); expected {FLOAT}"),
        (parameter(torch.zeros(6).double()), rf"made the bias torch\.float64 of shape \(6,\); expected {FLOAT}"),
        (parameter(None), rf"made the bias None; expected {FLOAT}"),
        (lambda conv: setattr(conv.bias, "data", torch.zeros(2, 3)), rf"made the bias .* \(2, 3\); expected {FLOAT}"),
        (lambda conv: setattr(conv.bias, "requires_grad", False), rf"made the bias {FLOAT}; expected .* a gradient"),
        (lambda conv: nn.init.constant_(conv.bias, float("nan")), "left a NaN or infinity in the bias"),
        (lambda conv: nn.init.constant_(conv.bias, float("-inf")), "left a NaN or infinity in the bias"),
        (lambda conv: torch.zeros(6), rf"gave {FLOAT}; expected nothing, and the classifier's bias filled in place"),
    ],
)
def test_a_bias_init(change, message):
    class Mine:
        def __call__(self, conv, num_anchors, num_classes):
            return change(conv)

    with pytest.raises(ValueError, match=rf"^MODEL\.FOCAL\.BIAS_INIT\.NAME: The bias init Mine {message}"):
        fill_bias(Mine(), nn.Conv2d(1, 6, 1), 2, 3)
    fill_bias(lambda conv, *_: nn.init.zeros_(conv.bias), nn.Conv2d(1, 6, 1), 2, 3)  # gives the bias itself


@pytest.mark.parametrize("architecture", ["FocalRetinaNet", "FocalFCOS"])
def test_a_bias_init_in_a_model(architecture):
    class Mine(PriorBiasInit):
        def __call__(self, conv, *numbers):
            nn.init.constant_(conv.bias, float("nan"))

    cfg = config()
    cfg.MODEL.META_ARCHITECTURE = architecture
    with registered(BIAS_INIT_REGISTRY, Mine) as cfg.MODEL.FOCAL.BIAS_INIT.NAME, pytest.raises(ValueError, match="NaN"):
        build_model(cfg)


def test_a_bias_init_in_stock_models():
    """RPN and the box predictor call it through the same check."""
    bad = broken(PriorBiasInit, lambda found: torch.zeros(3))()
    with pytest.raises(ValueError, match=r"BIAS_INIT\.NAME: The bias init Broken gave"):
        FocalBoxPredictor(
            ShapeSpec(channels=4),
            num_classes=2,
            cls_loss=SigmoidFocalLoss(),
            normalizer=NumPositives(),
            bias_init=bad,
            box2box_transform=Box2BoxTransform((1, 1, 1, 1)),
        )


def test_a_batch_of_matches_on_a_gpu():
    """There, ``match_batch`` gives the matches of all images; its shapes are known without waiting for it."""
    anchors = type("Five", (), {"device": torch.device("cuda"), "__len__": lambda self: 5})()

    class Mine:
        def match_batch(self, *args):
            return torch.zeros(1, 5), torch.zeros(1, 5, dtype=torch.int8)

    message = (
        r"^MODEL\.FOCAL\.MATCHER\.NAME: The anchor matcher Mine gave matched torch\.float32 .*int64 of shape \(1, 5\)"
    )
    with pytest.raises(TypeError, match=message):
        match_images(Mine(), anchors, [Instances((4, 4))])


@pytest.mark.parametrize(
    ("part", "key"),
    [("head", "HEAD"), ("cls_loss", "CLS_LOSS"), ("box_loss", "BOX_LOSS"), ("anchor_matcher", "MATCHER")],
)
def test_messages_begin_with_the_key(model, part, key):
    if part == "anchor_matcher":
        del model.anchor_matcher
    component = type("Mine", (nn.Module,), {"forward": lambda self, *args: None})()
    setattr(model, part, component)
    with pytest.raises((TypeError, ValueError), match=rf"^MODEL\.FOCAL\.{key}\.NAME: The .* Mine gave None; expected"):
        model(batch())
