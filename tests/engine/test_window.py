"""Gradient accumulation: a batch in parts has the normaliser, the losses and the gradients of the batch at once."""

import pytest
import torch
from torch import nn

from focal_plugin import NumPositives, build_normalizer
from focal_plugin.engine.window import counted_together, divide_gradients, split


@pytest.mark.parametrize("length", [1, 2, 5, 16])
@pytest.mark.parametrize("parts", [1, 2, 3, 16])
def test_split_keeps_order_and_balances(length, parts):
    batch = list(range(length))
    result = split(batch, parts)
    assert [item for part in result for item in part] == batch
    sizes = [len(part) for part in result]
    assert len(sizes) == min(parts, length) and max(sizes) - min(sizes) <= 1 and min(sizes) > 0


class Model(nn.Module):
    """A loss sum over a normaliser, as FocalRetinaNet's."""

    def __init__(self, cfg):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.normalizer = build_normalizer(cfg)

    def forward(self, batch):
        loss_sum = sum((self.weight * x).square() for x in batch)
        return loss_sum / self.normalizer(sum(batch), torch.device("cpu"))


@pytest.fixture(params=["ema", "num_fg", "num_fg_sync"])
def cfg(request):
    from detectron2.config import get_cfg

    from focal_plugin import add_focal_config

    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.MODEL.FOCAL.NORMALIZER = request.param
    return cfg


@pytest.mark.parametrize("batch", [[3, 1, 4, 1, 5], [0, 0, 0, 7], [0, 0]])
def test_a_window_is_one_batch(cfg, batch):
    whole, parted = Model(cfg), Model(cfg)
    for _ in range(3):  # the running mean of "ema" must move once a window
        whole.weight.grad = parted.weight.grad = None
        expected = whole(batch)
        expected.backward()

        total = 0.0
        with counted_together(parted) as window:
            first, second = split(batch, 2)
            loss = parted(first)
            loss.backward()
            window.closing = True
            last = parted(second)
            divide_gradients(parted, window.rest)
            last.backward()
            total = loss.detach() / window.rest + last.detach()
        torch.testing.assert_close(total, expected.detach())
        torch.testing.assert_close(parted.weight.grad, whole.weight.grad)
    assert dict(parted.state_dict()) == dict(whole.state_dict())


@pytest.mark.parametrize("count", [1, 40, 3000])
def test_float16_holds_the_gradients_of_each_part(count):
    """A part is divided by a number like the batch's at once: the scale of the gradients has to fit all of them."""
    normalizer, scale = NumPositives(), 2.0**14
    model = nn.Module()
    model.normalizer = normalizer
    with counted_together(model) as window:
        first, second = (torch.ones(count, dtype=torch.float16, requires_grad=True) for _ in range(2))
        (first.float().sum().square() / model.normalizer(count, torch.device("cpu")) / count * scale).backward()
        window.closing = True
        (second.float().sum().square() / model.normalizer(count, torch.device("cpu")) / count * scale).backward()
    assert first.grad.isfinite().all() and 1 / 4 < first.grad.norm() / second.grad.norm() < 4
    assert (first.grad / window.rest).allclose(second.grad, rtol=2**-10)


def test_the_normalizer_is_put_back_when_a_step_fails(cfg):
    model = Model(cfg)
    normalizer, names = model.normalizer, list(model.state_dict())
    with pytest.raises(RuntimeError), counted_together(model):
        raise RuntimeError
    assert model.normalizer is normalizer and list(model.state_dict()) == names


def test_a_model_without_a_normalizer():
    with counted_together(nn.Linear(1, 1)) as window:
        assert window is None
