"""Every element-by-element loss against its formula in float64, through DenseTargets and through the model."""

from types import SimpleNamespace

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

import focal_plugin
from focal_plugin import (
    AlphaBalancedBCELoss,
    BCELoss,
    ElementwiseLoss,
    FocalLossStar,
    HingeLoss,
    QualityFocalLoss,
    SigmoidFocalLoss,
    VarifocalLoss,
    add_focal_config,
    build_cls_loss,
)
from focal_plugin.config.load import load_config
from focal_plugin.losses import elementwise
from tests.losses.batches import BATCHES, draw_logits, draw_targets, elements, views

CLASS_ALPHA = [0.1, 0.5, 0.9]


def log_p(x):
    return -torch.log1p(torch.exp(-x))


def bce(x, y):
    return -(y * log_p(x) + (1 - y) * log_p(-x))


def alpha_t(y, alpha):
    return y * alpha + (1 - y) * (1 - alpha)


def star(x, y, gamma, beta):
    return torch.log1p(torch.exp(-(gamma * x * (2 * y - 1) + beta))) / gamma


def of_class(k):
    return torch.tensor(CLASS_ALPHA, dtype=torch.float64)[k]


# What each loss makes of logits x, targets y and classes k.
LOSSES = {
    "cross entropy": (BCELoss(), lambda x, y, k: bce(x, y)),
    "balanced": (AlphaBalancedBCELoss(alpha=0.9), lambda x, y, k: alpha_t(y, 0.9) * bce(x, y)),
    "balanced by class": (
        AlphaBalancedBCELoss(alpha=CLASS_ALPHA),
        lambda x, y, k: alpha_t(y, of_class(k)) * bce(x, y),
    ),
    "focal": (
        SigmoidFocalLoss(alpha=0.25, gamma=1.5),
        lambda x, y, k: alpha_t(y, 0.25) * (y - torch.sigmoid(x)).abs() ** 1.5 * bce(x, y),
    ),
    "focal by class": (
        SigmoidFocalLoss(alpha=CLASS_ALPHA),
        lambda x, y, k: alpha_t(y, of_class(k)) * (y - torch.sigmoid(x)) ** 2 * bce(x, y),
    ),
    "star": (
        FocalLossStar(alpha=0.25, gamma=2, beta=1),
        lambda x, y, k: alpha_t(y, 0.25) * star(x, y, 2, 1),
    ),
    "star by class": (
        FocalLossStar(alpha=CLASS_ALPHA, gamma=4),
        lambda x, y, k: alpha_t(y, of_class(k)) * star(x, y, 4, 0),
    ),
    "hinge": (
        HingeLoss(margin=0.7),
        lambda x, y, k: (0.7 - torch.where(y == 1, torch.sigmoid(x), 1 - torch.sigmoid(x))).clamp(min=0),
    ),
    "quality": (QualityFocalLoss(beta=1.5), lambda x, y, k: (y - torch.sigmoid(x)).abs() ** 1.5 * bce(x, y)),
    "varifocal": (
        VarifocalLoss(alpha=0.6, gamma=1.5),
        lambda x, y, k: torch.where(y > 0, y * bce(x, y), -0.6 * torch.sigmoid(x) ** 1.5 * log_p(-x)),
    ),
}
all_losses = pytest.mark.parametrize("name", LOSSES)


# The losses with an alpha for each of three classes go with batches of three.
pairs = [
    (name, batch)
    for name in LOSSES
    for batch, kwargs in BATCHES.items()
    if not ("by class" in name and kwargs.get("num_classes", 3) != 3)
]


@pytest.mark.parametrize("block_size", [0, 60, 2**22])
@pytest.mark.parametrize("name, batch", pairs)
def test_loss_and_gradient_are_the_formulas(name, batch, block_size, monkeypatch):
    monkeypatch.setattr(elementwise, "_BLOCK_SIZE", block_size)
    loss, formula = LOSSES[name]
    targets = draw_targets(**BATCHES[batch])
    logits = draw_logits(targets)
    found = loss(views(logits, targets), targets)
    expected = formula(*elements(logits, targets, soft=loss.needs_quality)).sum()
    # an alpha of each class is kept in float32
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)
    for mine, wanted in zip(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits)):
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-9)


class Scaled(ElementwiseLoss):
    """A user's loss, with a parameter that is learnt."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def elementwise(self, logits, targets):
        return ((logits - targets) * self.scale) ** 2


@pytest.mark.parametrize("block_size", [0, 2**22])
def test_a_parameter_of_a_loss_learns(block_size, monkeypatch):
    monkeypatch.setattr(elementwise, "_BLOCK_SIZE", block_size)
    targets = draw_targets([2, 0, 3])
    logits = draw_logits(targets, torch.float32)
    loss = Scaled()
    found = loss(views(logits, targets), targets)
    (gradient,) = torch.autograd.grad(found, [loss.scale])
    torch.testing.assert_close(gradient, 2 * found / loss.scale)  # of s²·x


class Noisy(ElementwiseLoss):
    """A user's loss that draws random numbers."""

    def elementwise(self, logits, targets):
        return torch.rand_like(logits) * (nn.functional.dropout(logits, 0.3) - targets) ** 2


@pytest.mark.parametrize("block_size", [0, 2**22])
def test_a_loss_may_draw_random_numbers(block_size, monkeypatch):
    """Backward computes each block again with the numbers that forward drew, and leaves the generator alone."""
    monkeypatch.setattr(elementwise, "_BLOCK_SIZE", block_size)
    targets = draw_targets([2, 0, 3])
    logits = draw_logits(targets)
    found = []
    for checkpoint in (elementwise.checkpoint, lambda function, *args, **_: function(*args)):
        monkeypatch.setattr(elementwise, "checkpoint", checkpoint)
        torch.manual_seed(0)
        loss = Noisy()(views(logits, targets), targets)
        after_forward = torch.get_rng_state()
        found.append((loss, *torch.autograd.grad(loss, logits)))
        assert torch.equal(torch.get_rng_state(), after_forward)
    assert all(map(torch.equal, *found))


def test_the_graph_keeps_no_copies_of_the_logits():
    """A level is larger than a block: what lives from forward to backward is the logits."""
    labels = torch.full((1, 9, 80, 80), 80)
    targets = SimpleNamespace(labels=[labels], positives=[torch.empty(0, dtype=torch.int64)])
    logits = torch.zeros(1, 9, 80, 80, 80, requires_grad=True)
    assert logits.numel() > elementwise._BLOCK_SIZE
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        FocalLossStar(beta=1.0)([logits], targets)
    kept.pop(logits.untyped_storage().data_ptr())  # whose views are what backward starts from
    assert sum(kept.values()) < 0.1 * logits.nbytes


@all_losses
def test_all_ignored_is_nothing(name):
    loss, _ = LOSSES[name]
    targets = draw_targets(**BATCHES["all ignored"])
    logits = draw_logits(targets, torch.float32)
    total = loss(views(logits, targets), targets)
    assert total.item() == 0 and total.dtype == torch.float32 and total.shape == ()
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(total, logits))


@all_losses
def test_gradcheck(name):
    loss, _ = LOSSES[name]
    targets = draw_targets([1, 2], grids=[(2, 2), (1, 1)])
    logits = draw_logits(targets)
    assert torch.autograd.gradcheck(lambda *x: loss(views(x, targets), targets), logits)


@all_losses
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_low_precision_and_extreme_logits(name, dtype, scale):
    loss, _ = LOSSES[name]
    targets = draw_targets([3, 2])
    logits = [x.detach().clamp(-1, 1).mul(scale).to(dtype).requires_grad_() for x in draw_logits(targets)]
    total = loss(views(logits, targets), targets)
    gradients = torch.autograd.grad(total, logits)
    assert total.dtype == torch.float32 and total.isfinite()
    assert all(gradient.isfinite().all() and gradient.dtype == dtype for gradient in gradients)
    exact = loss([x.detach().double() for x in views(logits, targets)], targets)
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-6)


@all_losses
def test_channels_last_is_the_same(name):
    loss, _ = LOSSES[name]
    targets = draw_targets([3, 2])
    logits = draw_logits(targets, torch.float32)
    last = [x.detach().to(memory_format=torch.channels_last) for x in logits]
    torch.testing.assert_close(loss(views(last, targets), targets), loss(views(logits, targets), targets))


@pytest.mark.parametrize("name", ["cross entropy", "balanced", "balanced by class", "focal", "focal by class"])
def test_one_pass_is_element_by_element(name):
    loss, _ = LOSSES[name]
    targets = draw_targets([3, 2])
    logits = draw_logits(targets)
    one_pass = loss(views(logits, targets), targets)
    torch.testing.assert_close(one_pass, ElementwiseLoss.forward(loss, views(logits, targets), targets))


@pytest.mark.parametrize(
    "loss, factor, same",
    [
        (SigmoidFocalLoss(alpha=-1, gamma=0), 1, BCELoss()),
        (SigmoidFocalLoss(alpha=0.9, gamma=0), 1, AlphaBalancedBCELoss(alpha=0.9)),
        (AlphaBalancedBCELoss(alpha=0.5), 2, BCELoss()),
        (AlphaBalancedBCELoss(alpha=[0.9] * 3), 1, AlphaBalancedBCELoss(alpha=0.9)),
        (SigmoidFocalLoss(alpha=[0.25] * 3), 1, SigmoidFocalLoss(alpha=0.25)),
        (FocalLossStar(alpha=[0.25] * 3), 1, FocalLossStar(alpha=0.25)),
        (FocalLossStar(alpha=-1, gamma=1, beta=0), 1, BCELoss()),
        (FocalLossStar(alpha=0.5, gamma=1, beta=0), 2, BCELoss()),
        (QualityFocalLoss(beta=2), 1, SigmoidFocalLoss(alpha=-1, gamma=2)),
        (QualityFocalLoss(beta=0), 1, BCELoss()),
        (VarifocalLoss(alpha=1, gamma=0), 1, BCELoss()),
    ],
    ids=lambda value: repr(value) if isinstance(value, torch.nn.Module) else str(value),
)
def test_limits(loss, factor, same):
    """One loss is a multiple of another; those on soft targets where every box is perfect."""
    targets = draw_targets([3, 2])
    targets = targets.with_quality(targets.gt_boxes)
    logits = views(draw_logits(targets), targets)
    torch.testing.assert_close(factor * loss(logits, targets), same(logits, targets), rtol=1e-6, atol=1e-9)


def test_a_margin_of_1_is_one_minus_p():
    targets = draw_targets([3, 2])
    logits = draw_logits(targets)
    x, y, _ = elements(logits, targets)
    expected = (y - torch.sigmoid(x)).abs().sum()
    torch.testing.assert_close(HingeLoss(margin=1)(views(logits, targets), targets), expected)


@pytest.mark.parametrize("loss", [QualityFocalLoss(), VarifocalLoss()], ids=lambda loss: type(loss).__name__)
def test_soft_targets_must_be_there(loss):
    targets = draw_targets([2])
    logits = views(draw_logits(targets), targets)
    with pytest.raises(ValueError, match=f"{type(loss).__name__} needs the quality.*with_quality"):
        loss(logits, focal_plugin.DenseTargets(targets.labels, 3, targets.positives, targets.anchors, targets.gt_boxes))


@pytest.mark.parametrize("alpha", [-0.5, 1.5, float("nan"), [0.5, 1.5], [0.5, -1], []])
@pytest.mark.parametrize("loss", [SigmoidFocalLoss, AlphaBalancedBCELoss, FocalLossStar])
def test_a_weight_must_be_a_weight(loss, alpha):
    with pytest.raises(ValueError, match=r"ALPHA \(alpha\) is .*expected"):
        loss(alpha=alpha)


@pytest.mark.parametrize(
    "loss, numbers, key",
    [
        (SigmoidFocalLoss, {"gamma": -0.5}, "MODEL.RETINANET.FOCAL_LOSS_GAMMA"),
        (SigmoidFocalLoss, {"gamma": float("nan")}, "MODEL.RETINANET.FOCAL_LOSS_GAMMA"),
        (SigmoidFocalLoss, {"gamma": float("inf"), "alpha": CLASS_ALPHA}, "MODEL.RETINANET.FOCAL_LOSS_GAMMA"),
        (FocalLossStar, {"gamma": 0}, "MODEL.RETINANET.FOCAL_LOSS_GAMMA"),
        (FocalLossStar, {"beta": float("nan")}, "MODEL.FOCAL.CLS_LOSS.BETA"),
        (HingeLoss, {"margin": 0}, "MODEL.FOCAL.CLS_LOSS.HINGE_MARGIN"),
        (HingeLoss, {"margin": 1.5}, "MODEL.FOCAL.CLS_LOSS.HINGE_MARGIN"),
        (QualityFocalLoss, {"beta": 0.5}, "MODEL.RETINANET.FOCAL_LOSS_GAMMA"),
        (VarifocalLoss, {"alpha": -1}, "MODEL.RETINANET.FOCAL_LOSS_ALPHA"),
        (VarifocalLoss, {"gamma": -1}, "MODEL.RETINANET.FOCAL_LOSS_GAMMA"),
    ],
)
def test_what_the_function_refuses_is_refused_when_the_loss_is_made(loss, numbers, key):
    name = next(iter(numbers))
    with pytest.raises(ValueError, match=rf"{key} \({name}.*\) is {numbers[name]}; expected"):
        loss(**numbers)


@pytest.mark.parametrize("value", ["2", None, [2.0]])
@pytest.mark.parametrize("loss", [SigmoidFocalLoss, FocalLossStar, VarifocalLoss])
def test_a_gamma_that_is_no_number(loss, value):
    with pytest.raises(TypeError, match=r"MODEL\.RETINANET\.FOCAL_LOSS_GAMMA \(gamma.*\) is .*expected a number"):
        loss(gamma=value)


@pytest.mark.parametrize("alpha", ["0.25", None, ["0.25", "0.5"]])
def test_an_alpha_that_is_no_number(alpha):
    with pytest.raises(TypeError, match=r"ALPHA \(alpha\) is .*expected"):
        SigmoidFocalLoss(alpha=alpha)


def test_an_alpha_a_class_is_no_part_of_a_checkpoint():
    loss = SigmoidFocalLoss(alpha=CLASS_ALPHA)
    assert loss.state_dict() == {}
    assert "alpha=[0.1" in repr(loss)
    assert loss.to("meta").alpha.is_meta  # it goes where the model goes


# Configs


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.MODEL.RETINANET.NUM_CLASSES = 3
    cfg.MODEL.RETINANET.FOCAL_LOSS_ALPHA = 0.4
    cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA = 3.0
    cfg.MODEL.FOCAL.CLS_LOSS.BETA = 1.0
    cfg.MODEL.FOCAL.CLS_LOSS.HINGE_MARGIN = 0.6
    return cfg


@pytest.mark.parametrize(
    "name, attributes",
    [
        ("BCELoss", {"alpha": -1, "gamma": 0}),
        ("AlphaBalancedBCELoss", {"alpha": 0.4, "gamma": 0}),
        ("SigmoidFocalLoss", {"alpha": 0.4, "gamma": 3}),
        ("FocalLossStar", {"alpha": 0.4, "gamma": 3, "beta": 1}),
        ("HingeLoss", {"margin": 0.6}),
        ("QualityFocalLoss", {"beta": 3}),
        ("VarifocalLoss", {"alpha": 0.6, "gamma": 3}),
    ],
)
def test_keys(cfg, name, attributes):
    cfg.MODEL.FOCAL.CLS_LOSS.NAME = name
    loss = build_cls_loss(cfg)
    assert type(loss).__name__ == name
    assert {key: getattr(loss, key) for key in attributes} == attributes
    for key, value in attributes.items():
        assert f"{key}={float(value)}" in repr(loss)


def test_varifocal_without_alpha(cfg):
    cfg.MODEL.FOCAL.CLS_LOSS.NAME = "VarifocalLoss"
    cfg.MODEL.RETINANET.FOCAL_LOSS_ALPHA = -1
    assert build_cls_loss(cfg).alpha == 1


@pytest.mark.parametrize("name", sorted(name for name, _ in focal_plugin.CLS_LOSS_REGISTRY))
def test_a_config_with_a_gamma_that_is_none_makes_no_loss(cfg, name):
    """But for the losses that have no γ."""
    cfg.MODEL.FOCAL.CLS_LOSS.NAME = name
    cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA = -1.0
    if name in ("AlphaBalancedBCELoss", "BCELoss", "HingeLoss", "OHEMLoss", "SampledBCELoss"):
        build_cls_loss(cfg)
        return
    with pytest.raises(ValueError, match=r"MODEL\.RETINANET\.FOCAL_LOSS_GAMMA \(.*\) is -1\.0; expected"):
        build_cls_loss(cfg)


@pytest.mark.parametrize("name", ["AlphaBalancedBCELoss", "SigmoidFocalLoss", "FocalLossStar"])
def test_an_alpha_for_each_class(cfg, name):
    cfg.MODEL.FOCAL.CLS_LOSS.NAME = name
    cfg.MODEL.FOCAL.CLS_LOSS.CLASS_ALPHA = [0.1, 0.2, 1]
    torch.testing.assert_close(build_cls_loss(cfg).alpha, torch.tensor([0.1, 0.2, 1.0]))


# Through the model


def batch():
    generator = torch.Generator().manual_seed(3)
    boxes = [torch.tensor([[4.0, 4, 30, 40], [20, 30, 60, 62]]), torch.zeros(0, 4)]
    return [
        {
            "image": torch.randint(255, (3, 64, 64), generator=generator, dtype=torch.uint8),
            "instances": Instances((64, 64), gt_boxes=Boxes(b), gt_classes=torch.arange(len(b)) % 2),
        }
        for b in boxes
    ]


def build(config, name, *opts):
    return build_model(load_config(config, ["MODEL.FOCAL.CLS_LOSS.NAME", name, "MODEL.DEVICE", "cpu", *opts])).train()


def record(model):
    """The targets that the model's classification loss gets."""
    seen = []
    model.cls_loss.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    return seen


@pytest.mark.parametrize("name", ["QualityFocalLoss", "VarifocalLoss"])
def test_quality_is_the_iou_of_the_predicted_boxes(tiny_config, name):
    model = build(tiny_config, name)
    torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.05)  # boxes that are not their anchors
    seen, deltas = record(model), []
    model.box_loss.register_forward_pre_hook(lambda module, args: deltas.append(args[0]))
    with EventStorage():
        losses = model(batch())
    (targets,), (deltas,) = seen, deltas
    boxes = model.box2box_transform.apply_deltas(deltas, targets.anchors)
    expected = torchvision.ops.box_iou(boxes, targets.gt_boxes).diagonal()
    assert targets.num_positives >= 3 and expected.min() > 0 and expected.max() < 1
    torch.testing.assert_close(targets.quality, expected.detach(), rtol=1e-5, atol=1e-6)
    assert not targets.quality.requires_grad
    losses["loss_cls"].backward()
    assert model.head.cls_score.weight.grad.abs().sum() > 0
    assert model.head.bbox_pred.weight.grad is None or not model.head.bbox_pred.weight.grad.any()


def test_no_loss_pays_for_a_quality_that_it_does_not_want(tiny_config):
    model = build(tiny_config, "BCELoss")
    seen = record(model)
    with EventStorage():
        model(batch())
    assert seen[0].quality is None


@pytest.mark.parametrize("name", sorted(name for name, _ in focal_plugin.CLS_LOSS_REGISTRY))
@pytest.mark.parametrize("empty", [False, True])
def test_every_loss_trains(tiny_config, name, empty):
    """Two images, one of them without boxes, or both."""
    model = build(tiny_config, name)
    images = batch()[1:] * 2 if empty else batch()
    with EventStorage():
        losses = model(images)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_cls"] > 0 or name == "HingeLoss"  # which is content with π for the background
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
