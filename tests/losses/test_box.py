import math

import pytest
import torch
import torchvision
from detectron2.modeling.box_regression import Box2BoxTransform

from focal_plugin import CIoUBoxLoss, DIoUBoxLoss, GIoUBoxLoss, SmoothL1BoxLoss

TRANSFORM = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
ANCHORS = torch.tensor([[0.0, 0.0, 10.0, 20.0], [5.0, 5.0, 37.0, 37.0]])
BOXES = torch.tensor([[1.0, 2.0, 21.0, 22.0], [5.0, 5.0, 37.0, 37.0]])
LOSSES = [SmoothL1BoxLoss(), SmoothL1BoxLoss(beta=0.1), GIoUBoxLoss(), DIoUBoxLoss(), CIoUBoxLoss()]


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_smooth_l1_by_hand(beta):
    # centres (5, 10) and (11, 12), sizes (10, 20) and (20, 20); the second box is its anchor
    deltas = [0.6, 0.1, math.log(2.0), 0.0]
    expected = sum(0.5 * d * d / beta if d < beta else d - beta / 2 for d in deltas)
    loss = SmoothL1BoxLoss(beta=beta)(torch.zeros(2, 4), ANCHORS, BOXES, TRANSFORM)
    torch.testing.assert_close(loss, torch.tensor([expected, 0.0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "loss, oracle",
    [
        (GIoUBoxLoss(), torchvision.ops.generalized_box_iou_loss),
        (DIoUBoxLoss(), torchvision.ops.distance_box_iou_loss),
        (CIoUBoxLoss(), torchvision.ops.complete_box_iou_loss),
    ],
)
def test_iou_losses_against_torchvision(loss, oracle):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(50, 2, generator=generator) * 100
    anchors = torch.cat([corners, corners + 1 + torch.rand(50, 2, generator=generator) * 60], dim=1)
    deltas = torch.randn(50, 4, generator=generator) * 0.3
    boxes = anchors + torch.tensor([-2.0, -1.0, 3.0, 4.0])
    expected = oracle(TRANSFORM.apply_deltas(deltas, anchors), boxes)
    torch.testing.assert_close(loss(deltas, anchors, boxes, TRANSFORM), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: str(loss))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_perfect_deltas_cost_nothing(loss, dtype):
    deltas = TRANSFORM.get_deltas(ANCHORS, BOXES).to(dtype)
    result = loss(deltas, ANCHORS, BOXES, TRANSFORM)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.zeros(2), rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: str(loss))
def test_no_positives(loss):
    deltas = torch.zeros(0, 4, requires_grad=True)
    result = loss(deltas, torch.zeros(0, 4), torch.zeros(0, 4), TRANSFORM)
    assert result.shape == (0,)
    result.sum().backward()
    assert deltas.grad.shape == (0, 4)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: str(loss))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_no_finite_loss(loss, value):
    """It reaches the check of the losses, which says where it comes from; the other boxes keep theirs."""
    deltas = torch.zeros(2, 4)
    deltas[0, 0] = value
    result = loss(deltas, ANCHORS, BOXES, TRANSFORM)
    assert not result[0].isfinite()
    assert result[1] == loss(torch.zeros(2, 4), ANCHORS, BOXES, TRANSFORM)[1]


@pytest.mark.parametrize("beta", [-1, math.nan, math.inf])
def test_a_beta_that_is_none_is_refused(beta):
    with pytest.raises(ValueError, match=rf"MODEL\.RETINANET\.SMOOTH_L1_LOSS_BETA is {beta}"):
        SmoothL1BoxLoss(beta=beta)
