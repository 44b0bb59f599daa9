"""The network's input is Detectron2's, bit for bit."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, Instances
from torch import nn
from torch._subclasses import FakeTensorMode

from focal_plugin import FocalRetinaNet
from focal_plugin.kernels.batch_images import batch_images, padded_size
from focal_plugin.matchers.batch import to_device
from tests.small_retinanet import small_config


class Model(DenseDetector):
    def __init__(self, divisibility=32, constraints=None, channels=3, device="cpu"):
        nn.Module.__init__(self)
        self.register_buffer("pixel_mean", torch.tensor([103.53, 116.28, 123.675])[:channels].view(-1, 1, 1))
        self.register_buffer("pixel_std", torch.tensor([57.375, 57.12, 58.395])[:channels].view(-1, 1, 1))
        self.__dict__["backbone"] = SimpleNamespace(size_divisibility=divisibility, padding_constraints=constraints)
        self.to(device)


def batch(sizes, dtype=torch.uint8, channels=3):
    return [{"image": torch.randint(0, 256, (channels, *size)).to(dtype)} for size in sizes]


def assert_same(model, images):
    expected, found = DenseDetector.preprocess_image(model, images), batch_images(model, images)
    assert found.image_sizes == expected.image_sizes
    assert found.tensor.dtype == expected.tensor.dtype and found.tensor.is_contiguous()
    assert torch.equal(found.tensor, expected.tensor)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("sizes", [[(64, 96)], [(1, 1)], [(33, 7)], [(64, 96), (64, 96)], [(50, 96), (64, 31), (1, 1)]])
def test_equals_detectron2(sizes, dtype):
    assert_same(Model(), batch(sizes, dtype))


@pytest.mark.parametrize("divisibility", [0, 1, 32])
@pytest.mark.parametrize("constraints", [None, {}, {"square_size": 128}, {"size_divisibility": 64, "square_size": 0}])
def test_pads_as_detectron2(divisibility, constraints):
    model = Model(divisibility, constraints)
    for sizes in ([(64, 96)], [(50, 96), (65, 31)]):
        assert_same(model, batch(sizes))
        padded = DenseDetector.preprocess_image(model, batch(sizes)).tensor.shape[-2:]
        assert padded_size(sizes, divisibility, constraints) == tuple(padded)


def test_the_mean_stays_as_it_is():
    """Where nothing is padded, the mean has the shape of the batch."""
    model = Model(divisibility=1, channels=1)
    before = model.pixel_mean.clone()
    assert_same(model, batch([(1, 1)], channels=1))
    assert torch.equal(model.pixel_mean, before)


def test_gradients_reach_the_images():
    gradients = []
    for preprocess in (DenseDetector.preprocess_image, batch_images):
        images = [{"image": image["image"].requires_grad_()} for image in batch([(3, 5), (4, 2)], torch.float32)]
        tensor = preprocess(Model(), images).tensor
        (tensor * torch.arange(float(tensor.numel())).view_as(tensor)).sum().backward()
        gradients.append([image["image"].grad for image in images])
    for expected, found in zip(*gradients):
        torch.testing.assert_close(found, expected)


def test_it_needs_no_values():
    """On fake tensors, whose values cannot be read: a GPU is not waited for."""
    with FakeTensorMode():
        model = Model(device="cuda")
        tensor = batch_images(model, [{"image": torch.empty(3, 50, 96)}, {"image": torch.empty(3, 64, 31)}]).tensor
    assert tensor.shape == (2, 3, 64, 96) and tensor.device.type == "cuda"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_what_goes_to_a_gpu_is_copied_without_a_wait(device, monkeypatch):
    """The host would read what comes from a GPU before it is there."""
    with FakeTensorMode():
        model, asynchronous, move = Model(device=device), [], torch.Tensor.to
        instances = Instances((50, 96), gt_boxes=Boxes(torch.empty(2, 4)), gt_classes=torch.empty(2, dtype=torch.int64))

        def to(x, *args, non_blocking=False, **kwargs):
            if args and args[0] != torch.float32:  # Boxes make theirs float32, which they are
                asynchronous.append(non_blocking)
            return move(x, *args, non_blocking=non_blocking, **kwargs)

        monkeypatch.setattr(torch.Tensor, "to", to)
        batch_images(model, [{"image": torch.empty(3, 50, 96)}])
        to_device(instances, torch.device(device))
    assert asynchronous == [device == "cuda"] * 3


def test_the_model_uses_it():
    model = FocalRetinaNet(small_config()).eval()
    images = batch([(50, 96), (64, 31)])
    expected = DenseDetector.preprocess_image(model, images)
    assert torch.equal(model.preprocess_image(images).tensor, expected.tensor)
    assert FocalRetinaNet.preprocess_image is batch_images


@pytest.mark.gpu
def test_on_a_gpu_it_equals_detectron2_and_waits_for_nothing():
    model = Model(device="cuda")
    images = [{"image": image["image"].pin_memory()} for image in batch([(50, 96), (64, 31), (64, 96)])]
    expected = DenseDetector.preprocess_image(model, images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = batch_images(model, images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.tensor, expected.tensor)
