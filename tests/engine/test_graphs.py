"""Recordings of the network. CUDA graphs need a GPU; what surrounds them is tested with a stand-in on the CPU."""

import copy
import logging

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from focal_plugin import FocalRetinaNet
from focal_plugin.config import ConfigError
from focal_plugin.engine import StepTrainer, graphs
from focal_plugin.engine.graphs import GraphedNetwork, compile_network
from tests.small_retinanet import CLASSES, small_config

SIZES = [(64, 96), (96, 64), (64, 96), (64, 96), (96, 64), (96, 96)]


class Replay(torch.autograd.Function):
    """A module as CUDA graphs have it: outputs and gradients lie where those of the next call will lie."""

    @staticmethod
    def forward(ctx, recording, images, *parameters):
        recording.calls += 1
        with torch.enable_grad():
            recording.outputs = recording.module(images)
        for kept, output in zip(recording.kept, recording.outputs):
            kept.copy_(output)
        ctx.recording, ctx.parameters = recording, parameters
        return tuple(kept.detach() for kept in recording.kept)

    @staticmethod
    def backward(ctx, *grads):
        recording = ctx.recording
        found = torch.autograd.grad(recording.outputs, ctx.parameters, grads, allow_unused=True)
        for kept, gradient in zip(recording.gradients, found):
            kept.copy_(gradient)
        return None, None, *(kept.detach() for kept in recording.gradients)


class Recording:
    def __init__(self, module, images):
        self.module, self.calls = module, 0
        twin = copy.deepcopy(module)  # whose running statistics nobody looks at
        with torch.no_grad():
            self.kept = [output.clone() for output in twin(images)]
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.gradients = [torch.empty_like(parameter) for parameter in self.parameters]

    def __call__(self, images):
        return Replay.apply(self, images, *self.parameters)


def image(height, width, boxes, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(boxes, 2, generator=generator) * 32
    instances = Instances((height, width), gt_boxes=Boxes(torch.cat([corner, corner + 30], dim=1)))
    instances.gt_classes = torch.randint(CLASSES, (boxes,), generator=generator)
    pixels = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    return {"image": pixels, "instances": instances}


def batches(sizes=SIZES, images=2):
    return [[image(h, w, boxes=2, seed=i * images + n) for n in range(images)] for i, (h, w) in enumerate(sizes)]


def build(device="cpu", norm=""):
    torch.manual_seed(0)
    cfg = small_config()
    cfg.MODEL.DEVICE, cfg.MODEL.RETINANET.NORM = device, norm
    cfg.MODEL.FPN.OUT_CHANNELS = 32 if norm == "GN" else 8  # one channel a group
    cfg.MODEL.RESNETS.NORM = "BN" if norm == "BN" else "FrozenBN"
    return FocalRetinaNet(cfg).to(device, memory_format=torch.channels_last).train()


def train(model, data, lr=1e-4, **kwargs):
    """Return the losses of each step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    trainer, losses = StepTrainer(model, data, optimizer, **kwargs), []
    for trainer.iter in range(len(data)):
        with EventStorage() as storage:
            trainer.run_step()
            losses.append({name: storage.history(name).latest() for name in ("loss_cls", "loss_box_reg")})
    return losses


def assert_same_training(ours, theirs, losses, expected, **tolerance):
    for mine, reference in zip(losses, expected, strict=True):
        assert mine == pytest.approx(reference, rel=tolerance.get("rtol", 1e-4))
    tensors = zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True)
    for (name, mine), reference in tensors:
        torch.testing.assert_close(mine, reference, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize(
    "accumulate, norm",
    [(1, ""), (1, "BN"), (2, "GN"), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, "GN"), (2, "BN")])],
)
def test_training_is_the_same(accumulate, norm):
    model, twin, recordings = build(norm=norm), build(norm=norm), []
    record = lambda *args: recordings.append(Recording(*args)) or recordings[-1]  # noqa: E731
    model.compiled = GraphedNetwork(model, record=record)
    data = batches(images=2 * accumulate)  # BN needs more than one value on the smallest level
    losses = train(model, data, accumulate=accumulate)
    assert_same_training(model, twin, losses, train(twin, data, accumulate=accumulate))
    # The first batch of a size tells the sizes of the features. (Of micro-batches, the second is the second of a size.)
    assert [recording.calls for recording in recordings] == ([2, 1] if accumulate == 1 else [5, 3, 1])


def test_sizes_beyond_the_most_are_computed_as_before(caplog):
    model, twin, recordings = build(), build(), []
    record = lambda *args: recordings.append(Recording(*args)) or recordings[-1]  # noqa: E731
    model.compiled = GraphedNetwork(model, max_sizes=1, record=record)
    data = batches([(64, 64), (64, 64), (64, 96), (64, 96), (64, 96), (96, 96), (96, 96)])
    with caplog.at_level(logging.INFO, logger="focal_plugin.engine.graphs"):
        losses = train(model, data)
    assert_same_training(model, twin, losses, train(twin, data))
    assert [recording.calls for recording in recordings] == [1]
    logged = [record.getMessage() for record in caplog.records if "MODEL.FOCAL.COMPILE" in record.getMessage()]
    assert len(logged) == 2 and "recorded for 1 sizes" in logged[1] and "(2, 3, 64, 96)" in logged[1]


def test_copies_have_recordings_of_their_own():
    model = build()
    model.compiled = GraphedNetwork(model, record=Recording)
    assert copy.deepcopy(model).compiled is None
    assert list(model.state_dict()) == list(build().state_dict())


def test_evaluation_needs_no_recording():
    model = build()
    model.compiled = GraphedNetwork(model, record=lambda *_: pytest.fail("recorded"))
    model.eval()
    with torch.no_grad():
        assert len(model([image(64, 96, 0)] * 2)) == 2


@pytest.mark.parametrize(
    "device, compiled, old, expected",
    [
        ("cpu", False, False, False),
        ("cuda:1", False, True, True),
        ("cuda", True, True, False),
        ("cuda", True, False, True),
    ],
)
def test_where_batches_are_pinned(monkeypatch, device, compiled, old, expected):
    """A thread does that, and old versions of PyTorch record only where no other thread uses the GPU."""
    monkeypatch.setattr(graphs, "_RECORDS_BESIDE_THREADS", not old)
    assert graphs.pins_batches(device, compiled) == expected


def test_what_cannot_be_recorded_is_an_error(monkeypatch):
    with pytest.raises(ConfigError, match=r"MODEL.FOCAL.COMPILE is True for FocalRetinaNet on cpu"):
        compile_network(build())
    with pytest.raises(ConfigError, match=r"MODEL.FOCAL.COMPILE is True for Linear on cpu"):
        compile_network(nn.Linear(1, 1))
    model = build()
    model.backbone.extra = nn.SyncBatchNorm(4)
    monkeypatch.setattr(FocalRetinaNet, "device", torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"backbone.extra is a SyncBatchNorm"):
        compile_network(model)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("norm", ["", "BN", "GN"])
@pytest.mark.parametrize("precision", [None, torch.float16])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_on_a_gpu(norm, precision, accumulate, monkeypatch):
    """Losses, weights and running statistics are as without; recording counts for no step."""

    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, twin = build("cuda", norm), build("cuda", norm)
    data = batches(images=2 * accumulate)
    compile_network(model)
    torch.cuda.manual_seed(3)
    losses = train(model, data, accumulate=accumulate, precision=precision)
    state = torch.cuda.get_rng_state()
    torch.cuda.manual_seed(3)
    expected = train(twin, data, accumulate=accumulate, precision=precision)
    assert state.equal(torch.cuda.get_rng_state())
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if precision is None else {"rtol": 2e-2, "atol": 2e-3}
    assert_same_training(model, twin, losses, expected, **tolerance)
    assert len(model.compiled.replays) == (2 if accumulate == 1 else 3)
