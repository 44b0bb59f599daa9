import inspect
import math

import fvcore.nn
import pytest
import torch
from torch.nn import functional as F

from focal_plugin.losses.functional import (
    quality_focal_loss,
    sigmoid_focal_loss,
    sigmoid_focal_loss_star,
    sigmoid_hinge_loss,
    varifocal_loss,
)

LOSSES = [sigmoid_focal_loss, sigmoid_focal_loss_star]
EXTREMES = torch.tensor([0.0, 1e-3, 1.0, 5.0, 15.0, 17.0, 20.0, 50.0, 88.0, 104.0, 1e3, 1e4])


def draw(shape=(7, 5), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(shape, generator=generator) * 4
    return inputs.to(dtype), torch.randint(2, shape, generator=generator).to(dtype)


def oracle(inputs, targets, alpha, gamma):
    """Equation 5 and its derivative (appendix B) in float64, for targets 0 and 1."""
    x, y = inputs.detach().double(), 2 * targets.double() - 1
    alpha_t = 1 if alpha == -1 else torch.where(y == 1, alpha, 1 - alpha)
    p_t, not_p_t, log_p_t = torch.sigmoid(y * x), torch.sigmoid(-y * x), F.logsigmoid(y * x)
    return -alpha_t * not_p_t**gamma * log_p_t, alpha_t * y * not_p_t**gamma * (gamma * p_t * log_p_t - not_p_t)


@pytest.mark.parametrize("ours", LOSSES, ids=lambda f: f.__name__)
def test_signature_is_fvcores(ours):
    theirs = inspect.signature(getattr(fvcore.nn, ours.__name__)).parameters
    parameters = inspect.signature(ours).parameters
    assert [(p.name, p.default, p.kind) for p in parameters.values()][: len(theirs)] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]
    assert [p.kind for p in parameters.values()][len(theirs) :] in ([], [inspect.Parameter.KEYWORD_ONLY])


@pytest.mark.parametrize("ours", LOSSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("alpha", [-1, 0, 0.25, 1])
@pytest.mark.parametrize("gamma", [0.5, 1, 2, 5])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("soft", [False, True])
def test_agrees_with_fvcore(ours, alpha, gamma, reduction, soft):
    inputs, targets = draw()
    if soft:
        targets = torch.rand(targets.shape, generator=torch.Generator().manual_seed(2))
    inputs.requires_grad_()
    theirs = getattr(fvcore.nn, ours.__name__)
    loss, expected = (f(inputs, targets, alpha, gamma, reduction) for f in (ours, theirs))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradient, wanted = (torch.autograd.grad(value.sum(), inputs)[0] for value in (loss, expected))
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [-1, 0.25])
@pytest.mark.parametrize("gamma", [0, 0.01, 0.1, 0.5, 0.9, 1, 2, 5])
def test_value_and_gradient_up_to_extreme_logits(dtype, alpha, gamma):
    inputs = torch.cat([EXTREMES, -EXTREMES]).to(dtype).repeat(2).requires_grad_()
    targets = torch.tensor([0, 1], dtype=dtype).repeat_interleave(2 * len(EXTREMES))
    loss = sigmoid_focal_loss(inputs, targets, alpha, gamma)
    gradient = torch.autograd.grad(loss.sum(), inputs)[0]
    expected, wanted = oracle(inputs, targets, alpha, gamma)
    tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 1e-12, "atol": 1e-30}
    torch.testing.assert_close(loss.double(), expected, **tolerance)
    torch.testing.assert_close(gradient.double(), wanted, **tolerance)


# From the smallest number to almost the largest of float32; in float64 none of the losses overflows there.
FAR = torch.tensor(
    [1e-45, 1e-38, 1e-3, 1.0, 20.0, 88.0, 16383.0, 16384.0, 16385.0, 1e10, 1e19, 1e30, 1e38, 3e38, 3.4e38]
)
FAR = torch.cat([FAR, -FAR, torch.zeros(1)])
FOCUS = [1e-30, 1e-5, 0.5, 1.0, 1.5, 2.0, 5.0, 100.0, 1e5, 1e30]
AT_ALL_NUMBERS = {
    "focal": (sigmoid_focal_loss, [{"alpha": 0.25, "gamma": gamma} for gamma in (0, *FOCUS)], (0.0, 0.3, 1.0)),
    "star": (
        sigmoid_focal_loss_star,
        [{"alpha": 0.25, "gamma": gamma, "beta": beta} for gamma in FOCUS for beta in (-5.0, 0.0, 1.0)],
        (0.0, 1.0),
    ),
    "hinge": (sigmoid_hinge_loss, [{"margin": margin} for margin in (1e-40, 0.5, 1.0)], (0.0, 1.0)),
    "quality": (quality_focal_loss, [{"beta": b} for b in (0, *(g for g in FOCUS if g >= 1))], (0.0, 1e-38, 0.3, 1.0)),
    "varifocal": (varifocal_loss, [{"gamma": gamma} for gamma in (0, *FOCUS)], (0.0, 1e-38, 0.3, 1.0)),
}


@pytest.mark.parametrize("name", AT_ALL_NUMBERS)
def test_values_and_gradients_at_all_numbers(name):
    """No logit is so large that a gradient is NaN, or a loss infinite that has a value."""
    function, settings, targets = AT_ALL_NUMBERS[name]
    for keywords in settings:
        for target in targets:
            results = []
            for dtype in (torch.float32, torch.float64):
                x = FAR.to(dtype).requires_grad_()
                loss = function(x, torch.full_like(x, target), **keywords)
                results.append((loss, torch.autograd.grad(loss.sum(), x)[0]))
            where = f"{keywords}, target {target}"
            for found, expected in zip(*results):
                assert found.isfinite().all(), where
                worst = {"rtol": 2e-5 * max(1, min(keywords.get("gamma", 1), 1e3)), "atol": 1e-7}
                if keywords.get("gamma", keywords.get("beta", 1)) <= 100:
                    torch.testing.assert_close(found.double(), expected, **worst)


@pytest.mark.parametrize("name", AT_ALL_NUMBERS)
@pytest.mark.parametrize("size", [1e39, 1e100, 1e300])
def test_gradients_at_the_largest_numbers_of_float64(name, size):
    function, settings, targets = AT_ALL_NUMBERS[name]
    for keywords in settings:
        for target in targets:
            x = torch.tensor([size, -size], dtype=torch.float64, requires_grad=True)
            loss = function(x, torch.full_like(x, target), **keywords)
            assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), x)[0].isfinite().all(), keywords


@pytest.mark.parametrize("gamma", [1e-45, 3e-39, 1e31])
def test_gammas_that_float32_cannot_divide_by(gamma):
    inputs, targets = draw()
    for function in (sigmoid_focal_loss, sigmoid_focal_loss_star, varifocal_loss):
        with pytest.raises(ValueError, match=r"gamma is .*1e-30, 1e30"):
            function(inputs, targets, gamma=gamma)


@pytest.mark.parametrize("gamma", [0.5, 1, 4])
@pytest.mark.parametrize("beta", [-1, 0, 1])
def test_star_and_its_gradient_up_to_extreme_logits(gamma, beta):
    x = torch.cat([EXTREMES, -EXTREMES]).double().requires_grad_()
    for target in (0.0, 1.0):
        loss = sigmoid_focal_loss_star(x, torch.full_like(x, target), 0.25, gamma, beta=beta)
        x_t = (2 * target - 1) * x
        alpha_t = 0.25 if target else 0.75
        expected = alpha_t * torch.logaddexp(torch.zeros_like(x), -(gamma * x_t + beta)) / gamma
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        # dFL*/dx = y (p*_t − 1), appendix B
        gradient = torch.autograd.grad(loss.sum(), x)[0]
        y = 2 * target - 1
        torch.testing.assert_close(gradient, -alpha_t * y * torch.sigmoid(-(gamma * x_t + beta)), rtol=1e-12, atol=0)


def test_limits():
    inputs, targets = draw()
    cross_entropy = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    torch.testing.assert_close(sigmoid_focal_loss(inputs, targets, gamma=0), cross_entropy)
    torch.testing.assert_close(sigmoid_focal_loss(inputs, targets, 0.5, 0), cross_entropy / 2)
    torch.testing.assert_close(sigmoid_focal_loss_star(inputs, targets), cross_entropy)
    torch.testing.assert_close(sigmoid_focal_loss_star(inputs, targets, 0.5), cross_entropy / 2)


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2, 3.5])
def test_gradcheck(gamma):
    inputs, targets = draw(dtype=torch.float64)
    inputs.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sigmoid_focal_loss(x, targets, 0.25, gamma), inputs)
    assert torch.autograd.gradgradcheck(lambda x: sigmoid_focal_loss(x, targets, 0.25, gamma), inputs)
    assert torch.autograd.gradcheck(lambda x: sigmoid_focal_loss_star(x, targets, 0.25, gamma + 1, beta=1), inputs)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(loss, dtype):
    inputs, targets = draw(dtype=dtype)
    inputs.requires_grad_()
    result = loss(inputs, targets, 0.25, 0.5)
    assert result.dtype == torch.float32
    assert torch.equal(result, loss(inputs.float(), targets.float(), 0.25, 0.5))
    gradient = torch.autograd.grad(result.sum(), inputs)[0]
    assert gradient.dtype == dtype and gradient.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_shapes_and_dtypes_of_targets(loss):
    inputs, targets = draw((2, 3, 4))
    expected = loss(inputs, targets, 0.25)
    assert expected.shape == (2, 3, 4)
    assert torch.equal(loss(inputs, targets.bool(), 0.25), expected)
    assert torch.equal(loss(inputs, targets.long(), 0.25), expected)
    empty = torch.zeros(0, 5)
    assert loss(empty, empty).shape == (0, 5) and loss(empty, empty, reduction="sum") == 0


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_refuses_what_makes_no_sense(loss):
    inputs, targets = draw()
    for arguments, keywords, message in [
        ((inputs, targets), {"reduction": "average"}, "reduction is 'average'"),
        ((inputs, targets[:1]), {}, r"\(7, 5\) and targets \(1, 5\).*one_hot"),
        ((inputs, targets[..., 0]), {}, "one_hot"),
        ((inputs, targets * 3), {}, r"outside \[0, 1\]"),
        ((inputs, targets * 2 - 1), {}, r"outside \[0, 1\]"),
        ((inputs, targets * math.nan), {}, r"outside \[0, 1\]"),
        ((inputs, targets), {"alpha": -0.5}, "alpha is -0.5"),
        ((inputs, targets), {"alpha": 1.1}, "alpha is 1.1"),
        ((inputs, targets), {"alpha": math.nan}, "alpha is nan"),
        ((inputs, targets), {"gamma": -1}, "gamma is -1"),
        ((inputs, targets), {"gamma": math.inf}, "gamma is inf"),
        ((inputs, targets), {"gamma": math.nan}, "gamma is nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            loss(*arguments, **keywords)
    with pytest.raises(TypeError, match=r"inputs are torch\.int64"):
        loss(inputs.long(), targets)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 1), (7, 5), ()])
def test_alpha_may_be_a_tensor(loss, shape):
    """Element by element what the number does."""
    inputs, targets = draw(dtype=torch.float64)
    alpha = torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = loss(inputs, targets, alpha)
    for i in range(7):
        for j in range(5):
            number = alpha.expand(7, 5)[i, j].item()
            torch.testing.assert_close(found[i, j], loss(inputs[i, j], targets[i, j], number))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_a_tensor_of_alphas_must_fit(loss):
    inputs, targets = draw()
    for alpha, message in [
        (torch.rand(7), r"shape \(7,\), which does not broadcast to \(7, 5\)"),
        (torch.rand(1, 7, 5), "does not broadcast"),
        (torch.tensor([0.1, 0.2, 0.3, 0.4, 1.5]), r"alpha is .*1\.5.*in \[0, 1\]"),
        (torch.tensor(-1.0), r"in \[0, 1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            loss(inputs, targets, alpha)


# The hinge, and the losses on soft targets


def draw_soft(dtype=torch.float64, seed=0):
    inputs, targets = draw((40,), seed, dtype)
    return inputs, targets * torch.rand(40, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("margin", [0.1, 0.5, 0.9, 1.0])
def test_hinge(margin):
    inputs, targets = draw(dtype=torch.float64)
    inputs.requires_grad_()
    p = 1 / (1 + torch.exp(-inputs))
    p_t = torch.where(targets == 1, p, 1 - p)
    loss = sigmoid_hinge_loss(inputs, targets, margin)
    torch.testing.assert_close(loss, torch.where(p_t < margin, margin - p_t, 0.0))
    gradient = torch.autograd.grad(loss.sum(), inputs)[0]  # −dp_t/dx where there is a loss
    torch.testing.assert_close(gradient, torch.where(p_t < margin, (1 - 2 * targets) * p * (1 - p), 0.0))
    assert (loss == 0).any() or margin == 1


@pytest.mark.parametrize("beta", [0, 1, 1.5, 2, 5])
def test_quality_focal_loss(beta):
    inputs, targets = draw_soft()
    p = 1 / (1 + torch.exp(-inputs))
    expected = -((targets - p).abs() ** beta) * (targets * p.log() + (1 - targets) * (1 - p).log())
    torch.testing.assert_close(quality_focal_loss(inputs, targets, beta), expected, rtol=1e-9, atol=1e-12)
    inputs.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: quality_focal_loss(x, targets, beta), inputs)


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2, 5])
@pytest.mark.parametrize("alpha", [0, 0.75, 1, 2])
def test_varifocal_loss(alpha, gamma):
    inputs, targets = draw_soft()
    p = 1 / (1 + torch.exp(-inputs))
    positive = -targets * (targets * p.log() + (1 - targets) * (1 - p).log())
    expected = torch.where(targets > 0, positive, -alpha * p**gamma * (1 - p).log())
    torch.testing.assert_close(varifocal_loss(inputs, targets, alpha, gamma), expected, rtol=1e-9, atol=1e-12)
    inputs.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: varifocal_loss(x, targets, alpha, gamma), inputs)


@pytest.mark.parametrize("gamma", [0, 1, 2, 3.5])
def test_hard_targets_are_the_focal_loss(gamma):
    inputs, targets = draw(dtype=torch.float64)
    zeros, ones = torch.zeros_like(targets), torch.ones_like(targets)
    focal, on_zeros = (sigmoid_focal_loss(inputs, each, gamma=gamma) for each in (targets, zeros))
    torch.testing.assert_close(quality_focal_loss(inputs, targets, gamma), focal)
    torch.testing.assert_close(varifocal_loss(inputs, zeros, 0.75, gamma), 0.75 * on_zeros)
    torch.testing.assert_close(varifocal_loss(inputs, ones, 0.75, gamma), sigmoid_focal_loss(inputs, ones, gamma=0))


def test_a_perfect_soft_prediction_has_no_quality_focal_loss():
    targets = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    inputs = targets.logit().requires_grad_()
    loss = quality_focal_loss(inputs, targets, 2)
    gradient = torch.autograd.grad(loss.sum(), inputs)[0]
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-30)
    torch.testing.assert_close(gradient, torch.zeros_like(loss), rtol=0, atol=1e-15)


SOFT = [sigmoid_hinge_loss, quality_focal_loss, varifocal_loss]


@pytest.mark.parametrize("loss", SOFT, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extremes_in_any_precision(loss, dtype):
    inputs = torch.cat([EXTREMES, -EXTREMES]).to(dtype).repeat(3).requires_grad_()
    targets = torch.tensor([0, 0.7, 1], dtype=dtype).repeat_interleave(2 * len(EXTREMES))
    targets = targets.round() if loss is sigmoid_hinge_loss else targets
    found = loss(inputs, targets)
    gradient = torch.autograd.grad(found.sum(), inputs)[0]
    assert found.dtype == torch.float32 and gradient.dtype == dtype
    assert found.isfinite().all() and gradient.isfinite().all()
    torch.testing.assert_close(found.double(), loss(inputs.double(), targets.double()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", SOFT, ids=lambda f: f.__name__)
def test_reductions_and_refusals(loss):
    inputs, targets = draw()
    each = loss(inputs, targets)
    assert each.shape == inputs.shape and loss(inputs[:0], targets[:0], reduction="sum") == 0
    torch.testing.assert_close(loss(inputs, targets, reduction="sum"), each.sum())
    torch.testing.assert_close(loss(inputs, targets, reduction="mean"), each.mean())
    with pytest.raises(ValueError, match="reduction is 'average'"):
        loss(inputs, targets, reduction="average")
    with pytest.raises(ValueError, match="one_hot"):
        loss(inputs, targets[..., 0])
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        loss(inputs, targets * 2)
    with pytest.raises(TypeError, match="floating"):
        loss(inputs.long(), targets)


@pytest.mark.parametrize(
    "loss, arguments",
    [
        (sigmoid_hinge_loss, {"margin": 0}),
        (sigmoid_hinge_loss, {"margin": 1.5}),
        (quality_focal_loss, {"beta": -1}),
        (quality_focal_loss, {"beta": 0.5}),
        (quality_focal_loss, {"beta": math.inf}),
        (varifocal_loss, {"alpha": -1}),
        (varifocal_loss, {"alpha": math.nan}),
        (varifocal_loss, {"gamma": -1}),
    ],
)
def test_numbers_out_of_range(loss, arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; expected"):
        loss(*draw(), **arguments)


def test_star_refuses_what_it_cannot_divide_by_or_shift():
    inputs, targets = draw()
    with pytest.raises(ValueError, match="gamma is 0"):
        sigmoid_focal_loss_star(inputs, targets, gamma=0)
    with pytest.raises(ValueError, match="beta is inf"):
        sigmoid_focal_loss_star(inputs, targets, beta=math.inf)
