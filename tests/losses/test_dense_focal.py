import math
from importlib.util import find_spec

import pytest
import torch
from fvcore.nn import sigmoid_focal_loss as fvcore_sigmoid_focal_loss
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from focal_plugin.losses import dense_focal
from focal_plugin.losses.dense_focal import dense_focal_loss
from tests.interpreter import INTERPRETED, SLOW_IN_INTERPRETER
from tests.launches import compiled

# In the interpreter, this file tests the GPU's kernel on the CPU; see tests/kernels/test_in_interpreter.py.
ON_A_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "cuda without triton")]
BACKENDS = ["triton"] if INTERPRETED else ["cpu", *ON_A_GPU]

# Relative error of the loss; relative and absolute error of a gradient. One in float16 is rounded before and after its
# factor, and has nothing below 2^-24. Triton's interpreter cuts where a GPU rounds to bfloat16.
TOLERANCES = {
    torch.float64: (1e-12, 1e-11, 1e-30),
    torch.float32: (1e-6, 1e-5, 1e-12),
    torch.bfloat16: (1e-6, 2**-7 if INTERPRETED else 2**-8, 1e-12),
    torch.float16: (1e-6, 2**-10, 2**-24),
}


@pytest.fixture(params=BACKENDS)
def device(request, monkeypatch):
    if request.param == "triton":
        monkeypatch.setattr(dense_focal, "_uses_triton", lambda logits: True)
    if request.param == "cuda without triton":
        monkeypatch.setattr(dense_focal, "dense_focal_triton", None)
    return "cuda" if request.param.startswith("cuda") else "cpu"


def oracle(logits, labels, alpha, gamma):
    """Equation 5 and its derivative (appendix B) on one-hot targets in float64: the sum, and the gradients."""
    total, gradients = 0.0, []
    for x, codes in zip(logits, labels):
        x, codes = x.detach().double().cpu(), codes.cpu().unsqueeze(2)
        y = torch.where(codes == torch.arange(x.shape[2]).view(-1, 1, 1), 1.0, -1.0).double()
        alpha_1 = torch.as_tensor(alpha, dtype=torch.float64).reshape(-1, 1, 1)
        alpha_t = torch.ones_like(x) if alpha == -1 else torch.where(y == 1, alpha_1, 1 - alpha_1)
        p_t, not_p_t, log_p_t = torch.sigmoid(y * x), torch.sigmoid(-y * x), F.logsigmoid(y * x)
        weight = torch.where(codes == -1, 0.0, alpha_t * not_p_t**gamma)
        total += -(weight * log_p_t).sum()
        gradients.append(weight * y * (gamma * p_t * log_p_t - not_p_t))
    return total, gradients


def check(logits, labels, alpha=0.25, gamma=2.0):
    """Compare with the oracle; returns the loss and the gradients."""
    logits = [x.detach().requires_grad_() for x in logits]
    loss = dense_focal_loss(logits, labels, alpha, gamma)
    gradients = torch.autograd.grad(loss, logits)
    expected, expected_gradients = oracle(logits, labels, alpha, gamma)
    rtol, gradient_rtol, gradient_atol = TOLERANCES[logits[0].dtype]
    assert loss.dtype == torch.promote_types(logits[0].dtype, torch.float32) and loss.shape == ()
    torch.testing.assert_close(loss.double().cpu(), torch.as_tensor(expected), rtol=rtol, atol=1e-30)
    for x, gradient, wanted in zip(logits, gradients, expected_gradients):
        assert gradient.dtype == x.dtype and gradient.shape == x.shape
        torch.testing.assert_close(gradient.double().cpu(), wanted, rtol=gradient_rtol, atol=gradient_atol)
    with torch.no_grad():
        assert dense_focal_loss(logits, labels, alpha, gamma) == loss
    return loss, gradients


def draw(shape, seed=0, dtype=torch.float32, device="cpu", scale=3.0, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale + mean).to(dtype).to(device)


def draw_labels(logits, seed=1):
    """A third of the anchors each: background, ignored, positive."""
    n, a, k, h, w = logits.shape
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(3, (n, a, h, w), generator=generator)
    classes = torch.randint(k, (n, a, h, w), generator=generator)
    return torch.where(kind == 0, k, torch.where(kind == 1, -1, classes)).to(logits.device)


N, A, K, H, W = 2, 3, 5, 4, 6
ALPHAS = [[0.1, 0.3, 0.5, 0.7, 1.0], 0.25][: 1 if INTERPRETED else 2]  # the kernel gets one a class in any case
GAMMAS = [0.0, 0.1, 0.5, 1.0, 2.0, 5.0]
NUMBERS_OF_LEVELS = [1, 8, 9, 17]  # a launch of the GPU's kernel takes eight
if INTERPRETED:
    GAMMAS = [0.5, 2.0, *(pytest.param(gamma, marks=SLOW_IN_INTERPRETER) for gamma in (0.0, 1.0))]
    NUMBERS_OF_LEVELS = [pytest.param(9, marks=SLOW_IN_INTERPRETER)]
LAYOUTS = {
    "channels first": lambda x: x.flatten(1, 2).contiguous().unflatten(1, (A, K)),
    "channels last": lambda x: x.flatten(1, 2).contiguous(memory_format=torch.channels_last).unflatten(1, (A, K)),
    "classes before anchors": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "images innermost": lambda x: x.permute(4, 2, 3, 1, 0).contiguous().permute(4, 3, 1, 2, 0),
    "part of the channels": lambda x: F.pad(x.flatten(1, 2), (0, 0, 0, 0, 0, 4))[:, : A * K].unflatten(1, (A, K)),
    "part of the channels, last": lambda x: (
        F.pad(x.flatten(1, 2), (0, 0, 0, 0, 0, 4))
        .contiguous(memory_format=torch.channels_last)[:, : A * K]
        .unflatten(1, (A, K))
    ),
    "objectness between the classes": lambda x: F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, 1:],
    "every other row and column": lambda x: x.repeat_interleave(2, 3).repeat_interleave(2, 4)[..., ::2, 1::2],
    "expanded": lambda x: x[:1].expand(N, -1, -1, -1, -1),
}
# Of those that are a program for each few anchors, one.
SLOW_LAYOUTS = {"images innermost", "every other row and column", "part of the channels", "part of the channels, last"}
LAYOUTS_OF_ALL = [pytest.param(name, marks=SLOW_IN_INTERPRETER * (name in SLOW_LAYOUTS)) for name in LAYOUTS]


@pytest.mark.parametrize("layout", LAYOUTS_OF_ALL)
@pytest.mark.parametrize("alpha", ALPHAS, ids=str)
def test_any_strides(device, layout, alpha):
    shape = (N, A, K, 2, 3) if INTERPRETED else (N, A, K, H, W)  # some layouts are a program for each few anchors
    logits = LAYOUTS[layout](draw(shape, device=device))
    assert logits.shape == shape
    check([logits], [draw_labels(logits)], alpha)


def test_labels_of_any_strides(device):
    logits = draw((N, A, K, H, W), device=device)
    labels = draw_labels(logits).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    check([logits], [labels])


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_any_gamma_and_dtype(device, dtype, gamma, layout):
    logits = LAYOUTS[layout](draw((N, A, K, H, W), dtype=dtype, device=device))
    check([logits], [draw_labels(logits)], 0.25, gamma)


@pytest.mark.parametrize("alpha", [-1, 0.0, 0.25, 0.5, 1.0])
def test_any_alpha(device, alpha):
    logits = draw((N, A, K, H, W), dtype=torch.float64, device=device)
    check([logits], [draw_labels(logits)], alpha)


def test_alpha_a_class_as_a_tensor(device):
    logits = draw((N, A, K, H, W), device=device)
    labels, alpha = [draw_labels(logits)], [0.1, 0.2, 0.3, 0.4, 0.9]
    expected = dense_focal_loss([logits], labels, alpha)
    assert dense_focal_loss([logits], labels, torch.tensor(alpha, device=device)) == expected
    assert dense_focal_loss([logits], labels, torch.tensor(alpha, dtype=torch.float64)) == expected


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 0.9, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(device, gamma, dtype):
    """The well classified ones, of either sign, are what gives NaN where γ < 1."""
    values = torch.tensor([0.0, 1e-3, 1.0, 5.0, 15.0, 17.0, 20.0, 50.0, 88.0, 104.0, 1e3, 1e4], dtype=dtype)
    logits = torch.cat([values, -values]).to(device).view(1, 1, 1, 1, -1).repeat(1, 3, 1, 1, 1)
    labels = torch.ones((1, 3, 1, 24), dtype=torch.int64, device=device)  # background
    labels[:, 1], labels[:, 2] = 0, -1
    loss, gradients = check([logits], [labels], 0.25, gamma)
    assert loss.isfinite() and gradients[0].isfinite().all()


def test_extreme_positives_and_ignored_leave_no_trace(device):
    """They are not subtracted from a sum in which they drown the rest."""
    logits = torch.full((1, 3, 1, 8, 8), -4.0, device=device)
    logits[:, 1:] = 1e4
    labels = torch.tensor([1, 0, -1], device=device).view(1, 3, 1, 1).repeat(1, 1, 8, 8)
    check([logits], [labels])


@pytest.mark.parametrize(
    "gamma", [0.0, 1e-30, 0.5, 2.0, 1e30] if INTERPRETED else [0.0, 1e-30, 1e-5, 0.5, 1.0, 1.5, 2.0, 5.0, 100.0, 1e30]
)
@pytest.mark.parametrize("logit", [*([] if INTERPRETED else [1e10, 1e30, 1e38]), 3e38, torch.finfo(torch.float32).max])
@pytest.mark.parametrize("label", [0, 1])
def test_the_largest_logits(device, gamma, logit, label):
    """The gradient is that of a certain error, or 0, and the loss finite."""
    for x in (logit, -logit):
        logits = torch.full((1, 1, 1, 1, 1), x, device=device, requires_grad=True)
        loss = dense_focal_loss([logits], [torch.full((1, 1, 1, 1), label, device=device)], 0.25, gamma)
        (gradient,) = torch.autograd.grad(loss * 0.5, logits)
        wrong = (x > 0) == (label == 1)  # label 1 is the background here
        weight = 0.75 if label else 0.25
        assert loss.item() == pytest.approx(weight * logit if wrong else 0, rel=1e-6)
        assert gradient.item() == pytest.approx((0.5 * weight if x > 0 else -0.5 * weight) if wrong else 0, rel=1e-6)


@pytest.mark.parametrize("gamma", [pytest.param(0.0, marks=SLOW_IN_INTERPRETER), 0.5, 2.0])
def test_what_an_ignored_anchor_holds_does_not_matter(device, gamma):
    logits = draw((N, A, K, H, W), device=device)
    labels = draw_labels(logits)
    ignored = (labels == -1).unsqueeze(2).expand_as(logits)
    loss, (gradient,) = check([logits], [labels], gamma=gamma)
    bad = torch.tensor([math.nan, math.inf, -math.inf], device=device).repeat(H * W // 3).view(H, W)
    poisoned = torch.where(ignored, bad, logits).requires_grad_()
    result = dense_focal_loss([poisoned], [labels], gamma=gamma)
    assert result == loss
    assert torch.equal(torch.autograd.grad(result, poisoned)[0], gradient)


@pytest.mark.parametrize("logit", [-4.59512] if INTERPRETED else [-20.0, -8.0, -4.59512, -3.0, -1.0, 0.0, 0.7, 3.0])
def test_errors_do_not_add_up_over_equal_logits(device, logit):
    """As they are before training, when rounding errs the same way everywhere."""
    logits = torch.full((1, 2, 8, 40, 40) if INTERPRETED else (2, 9, 8, 64, 64), logit, device=device)
    check([logits], [torch.full_like(logits[:, :, 0], 8, dtype=torch.int64)])


@pytest.mark.parametrize("code", [K, -1, 0], ids=["no positives", "all ignored", "all positives"])
@pytest.mark.parametrize("alpha", ALPHAS, ids=str)
def test_one_label_for_all(device, code, alpha):
    logits = draw((N, A, K, H, W), device=device)
    loss, (gradient,) = check([logits], [torch.full((N, A, H, W), code, device=device)], alpha)
    if code == -1:
        assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 3, 1, 4, 5),
        (1, 1, 1, 1, 1),
        (1, 1, 20, 3, 3),
        (3, 1, 2, 1, 7),
        pytest.param((1, 4, 33, 2, 1), marks=SLOW_IN_INTERPRETER),
    ],
)
def test_sizes_of_one(device, shape, layout):
    n, a, k, h, w = shape
    logits = draw((n, a * k, h, w), device=device).contiguous(memory_format=layout).view(shape)
    check([logits], [draw_labels(logits)])
    check([logits], [draw_labels(logits)], [0.3] * k)


def test_several_levels_of_which_some_are_empty(device):
    shapes = [(2, 3, 4, 5, 6), (2, 3, 4, 0, 6), (2, 1, 4, 1, 1)]
    logits = [draw(shape, seed, device=device) for seed, shape in enumerate(shapes)]
    check(logits, [draw_labels(x) for x in logits])


@pytest.mark.parametrize("shape", [(0, 3, 4, 5, 6), (2, 0, 4, 5, 6), (2, 3, 4, 0, 0)])
def test_nothing_at_all(device, shape):
    logits = torch.zeros(shape, device=device)
    loss, _ = check([logits], [torch.zeros((shape[0], shape[1], *shape[3:]), dtype=torch.int64, device=device)])
    assert loss == 0


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("alpha", [-1, 0.25])
def test_agrees_with_fvcore(device, alpha, gamma):
    logits = draw((N, A, K, H, W), device=device, mean=-4.6, scale=1.5)
    labels = draw_labels(logits)
    valid = labels != -1
    onehot = F.one_hot(labels[valid], K + 1)[:, :-1]
    expected = fvcore_sigmoid_focal_loss(logits.permute(0, 1, 3, 4, 2)[valid], onehot, alpha, gamma, "sum")
    torch.testing.assert_close(dense_focal_loss([logits], [labels], alpha, gamma), expected, rtol=1e-5, atol=0)


def test_gamma_0_is_the_cross_entropy_and_alpha_one_half_is_half_of_it(device):
    logits = draw((N, A, K, H, W), device=device)
    labels = draw_labels(logits).clamp(min=0)
    onehot = F.one_hot(labels, K + 1)[..., :-1].permute(0, 1, 4, 2, 3).float()
    expected = F.binary_cross_entropy_with_logits(logits, onehot, reduction="sum")
    torch.testing.assert_close(dense_focal_loss([logits], [labels], -1, 0.0), expected)
    torch.testing.assert_close(dense_focal_loss([logits], [labels], 0.5, 0.0), expected / 2)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.5])
@pytest.mark.parametrize("alpha", [0.25, [0.2, 0.9]], ids=["one alpha", "alpha a class"])
def test_gradcheck(device, gamma, alpha):
    logits = draw((1, 2, 2, 2, 2), dtype=torch.float64, device=device).requires_grad_()
    labels = torch.tensor([[[[0, 1], [2, -1]], [[2, 2], [1, 0]]]], device=device)
    # The fast mode, for the interpreter, checks a random projection of the Jacobian.
    assert torch.autograd.gradcheck(
        lambda x: dense_focal_loss([x], [labels], alpha, gamma), logits, fast_mode=INTERPRETED
    )


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_backward_multiplies(device, dtype):
    """Also by the small factor of a loss that is a mean, whose product with a float16 would be lost in float16."""
    logits = draw((N, A, K, H, W), dtype=dtype, device=device, mean=-5.0).requires_grad_()
    labels = draw_labels(logits)
    (dense_focal_loss([logits], [labels]) / 3000 * 65536).backward()
    _, (expected,) = oracle([logits], [labels], 0.25, 2.0)
    rtol = 2 * TOLERANCES[dtype][1]
    torch.testing.assert_close(logits.grad.double().cpu(), expected / 3000 * 65536, rtol=rtol, atol=1e-7)


def test_backward_twice_through_one_graph(device):
    logits = draw((N, A, K, H, W), device=device).requires_grad_()
    loss = dense_focal_loss([logits], [draw_labels(logits)])
    first = torch.autograd.grad(3 * loss, logits, retain_graph=True)[0]
    wanted = first.clone()
    first.zero_()  # what was handed out is the caller's
    assert torch.equal(torch.autograd.grad(3 * loss, logits)[0], wanted)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, logits)


def test_the_gradient_is_written_once_for_a_single_backward(device):
    """Forward keeps the logits themselves, or the gradient that the leaf's .grad becomes."""
    logits = draw((N, A, K, H, W), device=device).requires_grad_()
    loss = dense_focal_loss([logits], [draw_labels(logits)])
    (kept,) = {tensor.data_ptr() for tensor in loss.grad_fn.saved_tensors}
    (loss / 7).backward()
    assert kept == (logits if dense_focal._uses_triton(logits) else logits.grad).data_ptr()


@pytest.mark.parametrize("number", NUMBERS_OF_LEVELS)
def test_any_number_of_levels(device, number):
    sizes = [(1 + i % 3, 2 + i % 4) for i in range(number)]
    logits = [draw((N, A, K, *size), seed=i, device=device) for i, size in enumerate(sizes)]
    loss, _ = check(logits, [draw_labels(level) for level in logits])
    assert loss > 0


def test_there_is_no_second_derivative(device):
    logits = draw((N, A, K, H, W), device=device).requires_grad_()
    loss = dense_focal_loss([logits], [draw_labels(logits)])
    with pytest.raises(RuntimeError, match=r"no second derivative.*sigmoid_focal_loss"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_only_levels_that_ask_for_it_get_a_gradient(device):
    frozen, trained = draw((N, A, K, H, W), device=device), draw((N, A, K, H, W), 1, device=device).requires_grad_()
    loss = dense_focal_loss([frozen, trained], [draw_labels(frozen), draw_labels(trained)])
    assert [saved is None for saved in loss.grad_fn.saved_tensors] == [True, False]
    loss.backward()
    assert frozen.grad is None
    _, gradients = check([frozen, trained], [draw_labels(frozen), draw_labels(trained)])
    assert torch.equal(trained.grad, gradients[1])


def test_no_gradient_where_none_can_be_asked_for(device):
    logits = draw((N, A, K, H, W), device=device).requires_grad_()
    with torch.no_grad():
        assert dense_focal_loss([logits], [draw_labels(logits)]).grad_fn is None
    with torch.inference_mode():
        assert dense_focal_loss([logits], [draw_labels(logits)]).isfinite()
    assert not dense_focal_loss([logits.detach()], [draw_labels(logits)]).requires_grad


def test_leaves_its_arguments_alone(device):
    logits = draw((N, A, K, H, W), device=device)
    labels = draw_labels(logits)
    before = logits.clone(), labels.clone()
    check([logits], [labels])
    assert torch.equal(logits, before[0]) and torch.equal(labels, before[1])


def test_through_a_heads_output_and_under_autocast(device):
    """The views of a convolution's output, as the detector makes them."""
    conv = torch.nn.Conv2d(3, A * K, 3, padding=1).to(device)
    features = draw((N, 3, H, W), device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        output = conv(features)
        assert output.dtype == torch.bfloat16
        logits = output.view(N, A, K, H, W)
        labels = draw_labels(logits)
        loss = dense_focal_loss([logits], [labels], 0.25, 0.5)
    expected, (gradient,) = oracle([logits], [labels], 0.25, 0.5)
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-6, atol=0)
    output.retain_grad()
    loss.backward()
    torch.testing.assert_close(
        output.grad.double().cpu().view_as(gradient), gradient, rtol=TOLERANCES[torch.bfloat16][1], atol=1e-9
    )
    assert conv.weight.grad.isfinite().all()


class OnOneDevice(TorchDispatchMode):
    """Refuses operations on tensors of several devices, which many of a GPU's are not able to take."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        assert len({x.device for x in tensors}) <= 1, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_no_operation_mixes_devices(gamma):
    """Not even with a number's tensor on the CPU. The meta device stands for a GPU."""
    scratch, gradient = torch.empty(3, 8, device="meta"), torch.empty(8, device="meta")
    with OnOneDevice():
        loss = dense_focal.dense_focal_torch._focal(scratch, 0.25, gamma, 1.0, gradient)
    assert loss.device == gradient.device


@pytest.mark.skipif(INTERPRETED, reason="of the PyTorch path alone")
@pytest.mark.parametrize("size", [1, 7, 24, 100, 121])
@pytest.mark.parametrize("layout", ["channels first", "channels last", "classes before anchors", "expanded"])
@pytest.mark.parametrize("alpha", ALPHAS, ids=str)
def test_blocks_of_any_size(monkeypatch, size, layout, alpha):
    monkeypatch.setattr(dense_focal.dense_focal_torch, "_block_size", lambda device: size)
    logits = LAYOUTS[layout](draw((N, A, K, H, W)))
    check([logits], [draw_labels(logits)], alpha)


@pytest.mark.skipif(INTERPRETED, reason="large")
@pytest.mark.parametrize("mean", [-4.6, -8.0], ids=["untrained", "trained"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_real_level(device, mean, layout):
    logits = draw((1, 9 * 80, 50, 76), device=device, mean=mean, scale=1.5).contiguous(memory_format=layout)
    logits = logits.view(1, 9, 80, 50, 76)
    labels = torch.full((1, 9, 50, 76), 80, device=device)
    labels[:, :, 10:13, 20:22], labels[:, :, 13, 20:22] = 17, -1
    check([logits], [labels])


def test_refuses_what_does_not_fit():
    logits, labels = torch.zeros(N, A, K, H, W), torch.zeros(N, A, H, W, dtype=torch.int64)
    for arguments, message in [
        (([], []), "0 levels of logits and 0 of labels"),
        (([logits], []), "1 levels of logits and 0 of labels"),
        (([logits.flatten(1, 2)], [labels]), r"Level 0 .*\(2, 15, 4, 6\)"),
        (([logits, logits], [labels, labels[..., :1]]), r"Level 1 .*\(2, 3, 4, 1\)"),
        (([logits], [labels], 1.5), r"alpha is 1.5"),
        (([logits], [labels], -0.5), r"alpha is -0.5"),
        (([logits], [labels], math.nan), r"alpha is nan"),
        (([logits], [labels], [0.5] * 4), r"alpha has shape \(4,\).*\(5,\)"),
        (([logits], [labels], [0.5, 0.5, 0.5, 0.5, 2.0]), r"alpha is \[0.5.*2.0\]"),
        (([logits], [labels], 0.25, -1.0), "gamma is -1.0"),
        (([logits], [labels], 0.25, math.inf), "gamma is inf"),
        (([logits], [labels.to("meta")]), "labels on meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            dense_focal_loss(*arguments)
    for arguments, message in [
        (([logits.long()], [labels]), "logits of torch.int64"),
        (([logits], [labels.int()]), "labels of torch.int32"),
        (([logits, logits.double()], [labels, labels]), "Level 1 .*float64"),
        (([logits, logits[:, :, :2]], [labels, labels]), "Level 1 has 2 classes"),
    ]:
        with pytest.raises(TypeError, match=message):
            dense_focal_loss(*arguments)


@pytest.mark.skipif(INTERPRETED, reason="a GPU does not look")
@pytest.mark.parametrize("code", [-2, K + 1])
def test_refuses_labels_out_of_range_on_the_cpu(code):
    logits, labels = torch.zeros(N, A, K, H, W), torch.full((N, A, H, W), K)
    labels[1, 2, 3, 4] = code
    with pytest.raises(ValueError, match=f"Level 1 has labels from {code} to {code}; .*5 for background"):
        dense_focal_loss([logits, logits], [torch.full_like(labels, K), labels])


@pytest.mark.skipif(not INTERPRETED, reason="a CPU looks")
def test_labels_out_of_range_are_background_and_ignored_on_a_gpu(device):
    logits, labels = draw((N, A, K, H, W)), torch.full((N, A, H, W), K)
    strange, plain = labels.clone(), labels.clone()
    strange[0, 0], plain[0, 0] = K + 7, K
    strange[0, 1], plain[0, 1] = -9, -1
    assert dense_focal_loss([logits], [strange]) == dense_focal_loss([logits], [plain])


@pytest.mark.skipif(INTERPRETED or find_spec("triton") is None, reason="needs Triton's compiler")
@pytest.mark.parametrize(
    "dtype, gamma, layout, sizes",
    [
        (torch.float32, 2.0, torch.contiguous_format, [(8, 8), (4, 3)]),
        (torch.bfloat16, 0.5, torch.channels_last, [(8, 8), (4, 3)]),
        (torch.float16, 0.0, torch.channels_last, [(1, 1)]),
        (torch.float16, 2.0, torch.contiguous_format, [(8, 8), (4, 3)]),
        (torch.float64, 1.0, torch.contiguous_format, [(1, 1)] * 9),
    ],
)
def test_the_kernels_compile_for_a_gpu(tmp_path, monkeypatch, dtype, gamma, layout, sizes):
    """Their types, which the interpreter does not check, at a launch. No GPU is needed."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(dense_focal, "_uses_triton", lambda logits: True)
    classes_last = layout == torch.channels_last
    k = 1 if sizes[0] == (1, 1) else 16
    levels = [draw((N, A * k, *size), dtype=dtype).contiguous(memory_format=layout) for size in sizes]
    levels = [level.unflatten(1, (A, k)).requires_grad_() for level in levels]
    with compiled(monkeypatch) as kernels:
        loss = dense_focal_loss(levels, [draw_labels(level) for level in levels], 0.25, gamma)
        forward = list(kernels["_kernel"].values())
        torch.autograd.grad(loss, levels)
        backward = list(kernels["_kernel"].values())[len(forward) :]
    assert len(forward) == len(backward) == (2 if len(levels) > 8 else 1)  # a launch takes eight levels
    for texts in (*forward, *backward):
        assert texts["cubin"]
        if dtype.itemsize == 2 and k > 1:
            # Eight logits are one load and eight gradients one store. Logits that are not aligned are read one by one.
            assert "ld.global.v4.b32" in texts["ptx"]
            assert ("st.global.v4.b32" in texts["ptx"]) == (texts in backward)
            assert ("ld.global.b16" in texts["ptx"]) == (not classes_last)
