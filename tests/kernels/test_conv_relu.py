"""Fused kernels need a GPU. Their gradients and the rule of when they are used are tested on a CPU, with stand-ins."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import nn
from torch._subclasses import FakeTensorMode

from focal_plugin.kernels import conv_relu as fused
from focal_plugin.kernels.conv_relu import FusedBlock, FusedStem, conv_relu, fuse_blocks, subnet
from focal_plugin.layers import fold_frozen_norms

BLOCKS = {
    "basic": lambda norm: BasicBlock(8, 8, norm=norm),
    "basic, projected": lambda norm: BasicBlock(8, 16, stride=2, norm=norm),
    "bottleneck": lambda norm: BottleneckBlock(8, 8, bottleneck_channels=8, norm=norm),
    "bottleneck, projected": lambda norm: BottleneckBlock(8, 16, bottleneck_channels=8, stride=2, norm=norm),
    "groups": lambda norm: BottleneckBlock(8, 8, bottleneck_channels=8, num_groups=2, dilation=2, norm=norm),
    "stem": lambda norm: BasicStem(3, 8, norm=norm),
}


@pytest.fixture
def stand_in(monkeypatch):
    """The fused operators in float64 on the CPU, where the real ones do not run."""

    def conv_relu(x, weight, bias, *geometry):
        return F.conv2d(x, weight, bias, *geometry).relu()

    def conv_add_relu(x, weight, residual, alpha, bias, *geometry):
        return (F.conv2d(x, weight, bias, *geometry) + alpha * residual).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", conv_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", conv_add_relu)
    monkeypatch.setattr(fused, "_fused_dtype", lambda conv, xs: torch.float64)


def randomize(module):
    torch.manual_seed(0)
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 1.5) if "var" in name else nn.init.normal_(value, std=0.5)
    return module


def assert_same(ours, theirs, *inputs):
    """Outputs, and gradients of parameters and inputs."""
    mine, reference = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    y, expected = ours(*mine), theirs(*reference)
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(expected)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(mine, reference):
        torch.testing.assert_close(a.grad, b.grad)
    return y


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN", ""])
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_compute_what_detectron2s_compute(block, norm):
    """On a CPU, to the last bit."""
    norm = (lambda channels: nn.GroupNorm(2, channels)) if norm == "GN" else norm
    theirs = randomize(BLOCKS[block](norm))
    ours = fuse_blocks(copy.deepcopy(theirs))
    assert type(ours) in (FusedBlock, FusedStem)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.stride == theirs.stride and ours.out_channels == theirs.out_channels
    x = torch.randn(2, 3 if block == "stem" else 8, 16, 12)
    assert ours(x).equal(theirs(x))
    assert_same(ours, theirs, x)
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) == (reference.grad is None)
        torch.testing.assert_close(mine.grad, reference.grad)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
def test_gradients_of_the_fused_operators(stand_in, block, trains):
    theirs = fold_frozen_norms(randomize(BLOCKS[block]("FrozenBN")).double()).requires_grad_(trains)
    ours = fuse_blocks(copy.deepcopy(theirs))
    assert_same(ours, theirs, torch.randn(2, 3 if block == "stem" else 8, 16, 12, dtype=torch.float64))
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        # Weights' gradients are summed in float32, the parameters' format where the operators are used.
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("levels", [1, 3])
def test_gradients_of_a_subnet_over_several_levels(stand_in, levels, bias):
    layers = [nn.Conv2d(4, 4, 3, padding=1, bias=bias), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1, bias=bias), nn.ReLU()]
    theirs = nn.Sequential(*layers).double()
    ours = copy.deepcopy(theirs)
    xs = [torch.randn(2, 4, 8 >> level, 6 >> level, dtype=torch.float64) for level in range(levels)]

    def all_levels(model):
        return lambda *xs: torch.cat([y.flatten() for y in model(xs)])

    assert_same(all_levels(lambda xs: subnet(ours, xs)), all_levels(lambda xs: [theirs(x) for x in xs]), *xs)
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-5, atol=1e-5)


def frozen(**kwargs):
    return fold_frozen_norms(nn.Sequential(Conv2d(4, 8, 3, norm=FrozenBatchNorm2d(8), **kwargs)))[0]


CHANGES = {
    "nothing": lambda conv, state: None,
    "in place": lambda conv, state: conv.norm.running_mean.add_(3),
    "loaded": lambda conv, state: conv.load_state_dict({name: value + 1 for name, value in state.items()}),
    "moved": lambda conv, state: conv.norm._apply(lambda value: value * 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_norm_is_folded_into_is_kept_until_it_changes(stand_in, change):
    conv = frozen(bias=False).double()
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    before = fused._scale_and_shift(conv.norm, torch.float64)
    CHANGES[change](conv, conv.state_dict())
    first, second = (fused._scale_and_shift(conv.norm, torch.float64) for _ in range(2))
    assert all(a is b for a, b in zip(first, second))
    assert all(a is b for a, b in zip(first, before)) == (change == "nothing")
    torch.testing.assert_close(conv_relu(conv, [x])[0], conv(x).relu())


def test_without_gradients_nothing_is_kept(stand_in):
    conv = nn.Conv2d(4, 4, 1).double()
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        (y,) = conv_relu(conv, [x])
    assert not y.requires_grad and y.equal(conv(x).relu())
    (y,) = conv_relu(conv.requires_grad_(False), [x])
    assert y.grad_fn is None


@pytest.fixture
def nothing_known(monkeypatch):
    monkeypatch.setattr(fused, "_without_kernel", set())


@pytest.mark.parametrize(
    "message", ["GET was unable to find an engine to execute this computation", "cudnn_status: CUDNN_STATUS_BAD_PARAM"]
)
def test_layers_for_which_cudnn_has_no_kernel_are_logged_once(stand_in, nothing_known, monkeypatch, caplog, message):
    def refuse(*args):
        raise RuntimeError(message)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", refuse)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", refuse)
    theirs = fold_frozen_norms(randomize(BLOCKS["bottleneck"]("FrozenBN")).double())
    ours = fuse_blocks(copy.deepcopy(theirs))
    with caplog.at_level("INFO", logger=fused.__name__):
        for _ in range(2):
            assert_same(ours, theirs, torch.randn(2, 8, 6, 5, dtype=torch.float64))
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 3 and "weights of 8×8×1×1 in torch.float64" in logged[0]  # one for each convolution


@pytest.mark.parametrize("error, channels", [(torch.OutOfMemoryError("CUDA out of memory"), 4), (RuntimeError("x"), 5)])
def test_other_errors_are_the_users(stand_in, nothing_known, monkeypatch, error, channels):
    """No memory; and what PyTorch's own convolution cannot compute either."""

    def fail(*args):
        raise error

    monkeypatch.setattr(torch, "cudnn_convolution_relu", fail)
    with pytest.raises(RuntimeError, match=r"out of memory|to have 4 channels, but got 5"):
        conv_relu(nn.Conv2d(4, 4, 1).double(), [torch.randn(1, channels, 3, 3, dtype=torch.float64)])


class Special(nn.Conv2d):
    """A user's own, whose forward may do anything."""


def hooked():
    conv = nn.Conv2d(4, 8, 3)
    conv.register_forward_hook(lambda *_: None)
    return conv


@pytest.mark.parametrize(
    "conv, autocast, expected",
    [
        (lambda: nn.Conv2d(4, 8, 3), torch.float16, torch.float16),
        (lambda: nn.Conv2d(4, 8, 3, bias=False), torch.bfloat16, torch.bfloat16),
        (lambda: Conv2d(4, 8, 3), torch.float16, torch.float16),
        (lambda: frozen(bias=False), torch.float16, torch.float16),
        (lambda: frozen(bias=True), torch.float16, None),
        (lambda: Conv2d(4, 8, 3, norm=nn.BatchNorm2d(8)), torch.float16, None),
        (lambda: Conv2d(4, 8, 3, activation=F.silu), torch.float16, None),
        (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), torch.float16, None),
        (lambda: nn.Conv2d(4, 8, 3), None, None),  # float32
        (lambda: nn.Conv2d(4, 8, 3, dtype=torch.float16), None, torch.float16),
        (hooked, torch.float16, None),
        (lambda: Special(4, 8, 3), torch.float16, None),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_when_operators_are_fused(monkeypatch, conv, autocast, expected, memory_format):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with FakeTensorMode(), torch.device("cuda"):
        conv = conv()
        x = torch.empty(2, 4, 9, 7).to(conv.weight.dtype, memory_format=memory_format)
        conv.weight = nn.Parameter(conv.weight.detach().to(memory_format=memory_format))
        # PyTorch has no autocast for a GPU where there is none.
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: autocast is not None)
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: autocast)
        found = fused._fused_dtype(conv, [x])
        assert fused._fused_dtype(conv, [x[:0]]) is None  # no images
    assert found == (expected if memory_format == torch.channels_last else None)


def test_other_modules_are_left_alone():
    class Block(BottleneckBlock):
        """A user's own."""

    model = nn.Sequential(Block(8, 8, bottleneck_channels=4), nn.ReLU())
    assert [type(module) for module in fuse_blocks(model)] == [Block, nn.ReLU]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", BLOCKS)
def test_on_a_gpu(block, dtype):
    theirs = fold_frozen_norms(randomize(BLOCKS[block]("FrozenBN"))).cuda().to(memory_format=torch.channels_last)
    ours = fuse_blocks(copy.deepcopy(theirs))
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(2, 3 if block == "stem" else 8, 33, 30, device="cuda").to(memory_format=torch.channels_last)
    with torch.autocast("cuda", dtype):
        y, other = ours(x), theirs(x)
    assert y.dtype == dtype and ("ConvReLU" in str(y.grad_fn) or block == "stem")
    expected = exact(x.double())
    ulp = torch.finfo(dtype).eps * expected.abs().max().item()
    assert (y - expected).abs().max() <= max((other - expected).abs().max().item(), 4 * ulp)
    weights = torch.randn_like(expected)
    for output in (y, other, expected):
        (output * weights.to(output.dtype)).sum().backward()
    for mine, twin, reference in zip(ours.parameters(), theirs.parameters(), exact.parameters(), strict=True):
        allowed = 1.5 * (twin.grad - reference.grad).abs().max().item() + 4 * ulp
        assert (mine.grad - reference.grad).abs().max() <= allowed
