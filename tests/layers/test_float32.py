import copy
import pickle

import pytest
import torch
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from focal_plugin.engine import StepTrainer
from focal_plugin.layers.float32 import compute_top_blocks_in_float32


class Backbone(nn.Module):
    """The levels above a pyramid, from an image that stands for C5."""

    def __init__(self, top_block):
        super().__init__()
        self.top_block = top_block

    def forward(self, batch):
        return {"loss": sum(level.float().sum() for level in self.top_block(torch.stack(batch)))}


def dirty_memory():
    """Leave NaN where the next tensors will be."""
    for size in (16, 256, 2048, 20_000):
        for _ in range(4):
            torch.full((size,), float("nan"))


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (3, 5)])
def test_gradients_are_those_of_float32(size):
    top_block = LastLevelP6P7(16, 16, "res5")
    images = list(torch.randn(2, 16, *size))
    top_block.zero_grad()
    Backbone(top_block)(images)["loss"].backward()
    expected = [parameter.grad.clone() for parameter in top_block.parameters()]

    batches = iter([images] * 20)
    model = compute_top_blocks_in_float32(Backbone(top_block))
    trainer = StepTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.0), precision=torch.bfloat16)
    for batch in batches:
        model.zero_grad()
        dirty_memory()
        trainer.forward_backward(batch)
        for parameter, grad in zip(top_block.parameters(), expected):
            torch.testing.assert_close(parameter.grad, grad, rtol=0.02, atol=0.02)


def test_copies_stand_on_their_own():
    model = Backbone(LastLevelP6P7(8, 8, "res5"))
    compute_top_blocks_in_float32(model)
    x = [torch.randn(8, 4, 4)]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        nn.init.zeros_(twin.top_block.p7.weight)
        nn.init.ones_(twin.top_block.p7.bias)
        levels = twin.to(torch.bfloat16).top_block(torch.stack(x).bfloat16())
        assert (levels[1] == 1).all()
        assert [level.dtype for level in levels] == [torch.bfloat16] * 2


def test_blocks_without_convolutions_stay_as_they_are():
    model = Backbone(LastLevelMaxPool())
    compute_top_blocks_in_float32(model)
    assert type(model.top_block) is LastLevelMaxPool
