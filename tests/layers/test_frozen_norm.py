import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.modeling.backbone import FPN, Backbone
from torch import nn

from focal_plugin import FocalRetinaNet
from focal_plugin.layers.frozen_norm import FrozenNormConv2d, fold_frozen_norms, folded
from tests.small_retinanet import small_config


def randomize(norm):
    generator = torch.Generator().manual_seed(0)
    for name, value in [*norm.named_buffers(), *norm.named_parameters()]:
        if value.is_floating_point():
            random = torch.rand(value.shape, generator=generator)
            value.data.copy_(random + 0.5 if name in ("running_var", "weight") else random - 0.5)
    return norm


def convolution(bias=False, groups=1, activation=None):
    torch.manual_seed(0)
    norm = randomize(FrozenBatchNorm2d(8))
    return Conv2d(4, 8, 3, stride=2, padding=1, bias=bias, groups=groups, norm=norm, activation=activation)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("activation", [None, torch.relu])
@pytest.mark.parametrize("shape", [(2, 4, 9, 7), (1, 4, 1, 1), (0, 4, 8, 8)])
def test_output_and_gradients_are_those_of_the_two_layers(bias, groups, activation, shape):
    theirs = convolution(bias, groups, activation).double()
    ours = fold_frozen_norms(copy.deepcopy(theirs))
    assert type(ours) is FrozenNormConv2d
    inputs = [torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    outputs = []
    for model, x in zip((theirs, ours), inputs):
        inputs[1].data.copy_(inputs[0])
        outputs.append(model(x.requires_grad_()))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for expected, actual in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


def test_in_full_precision_it_is_the_same_to_the_last_bit():
    theirs = convolution()
    ours = fold_frozen_norms(copy.deepcopy(theirs))
    x = torch.randn(2, 4, 9, 7)
    assert ours(x).equal(theirs(x))


def test_in_mixed_precision_the_norm_is_folded_and_closer_to_the_exact_result():
    theirs = convolution()
    ours = fold_frozen_norms(copy.deepcopy(theirs))
    x = torch.randn(2, 4, 33, 31)
    exact = theirs(x)
    exact.square().sum().backward()
    expected, theirs.weight.grad = theirs.weight.grad, None
    errors = []
    for model in (theirs, ours):
        calls = []
        hook = model.norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        hook.remove()
        assert len(calls) == (model is theirs)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        torch.testing.assert_close(model.weight.grad, expected, rtol=0.05, atol=0.02 * expected.abs().max().item())
        errors.append((y - exact).abs().mean().item())
    assert errors[1] < errors[0]


def test_modules_parameters_and_names_stay():
    model = nn.Sequential(convolution(), nn.ReLU())
    conv, parameters, state = model[0], list(model.parameters()), model.state_dict()
    assert fold_frozen_norms(model) is model
    assert type(conv) is Conv2d and type(model[0]) is FrozenNormConv2d  # whoever holds the old one sees no change
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(state)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(model.state_dict().values(), state.values()))


class Body(Backbone):
    """Two features, straight from the image."""

    def __init__(self):
        super().__init__()
        self._out_features, self._out_feature_channels = ["c3", "c4"], {"c3": 3, "c4": 3}
        self._out_feature_strides = {"c3": 8, "c4": 16}

    def forward(self, x):
        return {"c3": x[..., ::8, ::8], "c4": x[..., ::16, ::16]}


def test_a_pyramid_calls_the_new_convolutions():
    """Detectron2's FPN holds them in lists as well."""
    pyramid = fold_frozen_norms(FPN(Body(), ["c3", "c4"], 8, norm="FrozenBN"))
    convs = [module for module in pyramid.modules() if isinstance(module, Conv2d)]
    called = []
    for conv in convs:
        conv.register_forward_hook(lambda module, *_: called.append(module))
    pyramid(torch.rand(1, 3, 32, 32))
    assert len(convs) == 4 and {type(conv) for conv in convs} == {FrozenNormConv2d}
    assert set(called) == set(convs)


def test_the_callers_backbone_stays_as_it_is():
    """A backbone given in Python is used as it is; the one that a config asks for is built with folded norms."""
    model = build_model(small_config())
    assert any(type(module) is FrozenNormConv2d for module in model.backbone.modules())
    arguments = FocalRetinaNet.from_config(small_config())
    given = Body()
    given.conv = convolution()
    assert FocalRetinaNet(**{**arguments, "backbone": given}).backbone is given
    assert type(given.conv) is Conv2d


def test_a_checkpoint_loaded_afterwards_counts():
    model = fold_frozen_norms(convolution())
    other = convolution()
    nn.init.normal_(other.weight)
    other.norm.running_mean.add_(3)
    model.load_state_dict(other.state_dict())
    x = torch.rand(1, 4, 6, 6)
    torch.testing.assert_close(model(x), other(x))


class Special(Conv2d):
    """A user's own kind of convolution, whose forward may do anything."""


@pytest.mark.parametrize(
    "module",
    [
        Conv2d(4, 8, 3),
        Conv2d(4, 8, 3, norm=nn.BatchNorm2d(8)),
        Conv2d(4, 8, 3, norm=nn.GroupNorm(2, 8)),
        Special(4, 8, 3, norm=FrozenBatchNorm2d(8)),
        nn.Conv2d(4, 8, 3),
    ],
    ids=["no norm", "batch norm", "group norm", "derived", "PyTorch's"],
)
def test_other_convolutions_are_left_alone(module):
    kind = type(module)
    assert type(fold_frozen_norms(module)) is kind


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False), FrozenBatchNorm2d(8)])
def test_weight_and_bias_against_the_norm_itself(norm):
    conv, norm = nn.Conv2d(4, 8, 1).double(), randomize(norm).double().eval()
    x = torch.rand(2, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(nn.functional.conv2d(x, *folded(conv, norm)), norm(conv(x)))


def test_shapes_on_the_meta_device():
    ours = fold_frozen_norms(convolution()).to("meta")
    assert ours(torch.empty(2, 4, 9, 7, device="meta")).shape == (2, 8, 5, 4)
