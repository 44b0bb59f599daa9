"""A step is Detectron2's step, on the CPU too, at any precision, at once or in parts."""

import copy
import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils.events import EventStorage
from torch import nn

from focal_plugin.engine import StepTrainer
from focal_plugin.engine.batch_file import load_batch
from focal_plugin.engine.step import amp_precision, data_parallel, largest_gradient


class Model(nn.Module):
    """Two losses of a two-layer network; the mean over the images of the batch."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.dtypes = set()

    def forward(self, batch):
        out = self.layers(torch.stack([image["image"] for image in batch]))  # (N, 2)
        self.dtypes.add(out.dtype)
        return {"loss_cls": out[:, 0].float().square().mean(), "loss_box_reg": out[:, 1].float().abs().mean()}


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [[{"image": torch.randn(4, generator=generator), "file_name": f"{i}.png"} for i in range(6)] for _ in "1234"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def make(model, batches, cls=StepTrainer, momentum=0.9, **kwargs):
    return cls(model, batches, torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum), **kwargs)


def run(trainer, steps=4):
    """Its storage after ``steps`` steps."""
    trainer.train(0, steps)
    return trainer.storage


@pytest.mark.parametrize("accumulate", [1, 2, 3, 6])
def test_the_steps_of_detectron2(model, batches, accumulate):
    twin = copy.deepcopy(model)
    ours = run(make(model, batches, accumulate=accumulate))
    theirs = run(make(twin, batches, SimpleTrainer))
    for mine, reference in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(mine, reference)
    for name in ("total_loss", "loss_cls", "loss_box_reg"):
        values, expected = (storage.history(name).values() for storage in (ours, theirs))
        assert values == [(pytest.approx(value, rel=1e-5), iteration) for value, iteration in expected]
    assert ours.histories().keys() == theirs.histories().keys()


def test_losses_are_written_every_so_many_steps_and_checked_in_all(model, batches):
    ours = run(make(model, batches, gather_metric_period=2))
    theirs = run(make(copy.deepcopy(model), batches, SimpleTrainer, gather_metric_period=2))
    assert ours.histories().keys() == theirs.histories().keys()
    for name, history in theirs.histories().items():
        assert [step for _, step in ours.history(name).values()] == [step for _, step in history.values()] == [1, 3]
    batches[2][0]["image"][0] = math.nan
    with pytest.raises(FloatingPointError, match="at iteration 2"):
        run(make(model, batches, gather_metric_period=2))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_mixed_precision_on_a_cpu(model, batches, precision, accumulate):
    twin = copy.deepcopy(model)
    trainer = make(model, batches, precision=precision, accumulate=accumulate)
    if precision == torch.float16:  # at its usual scale it skips the first steps until nothing overflows
        trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    run(trainer)
    run(make(twin, batches))
    assert model.dtypes == {precision} and twin.dtypes == {torch.float32}
    for mine, reference in zip(model.parameters(), twin.parameters()):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, reference, rtol=0.05, atol=0.02)


def test_float16_skips_a_step_whose_gradients_overflow(model, batches):
    trainer = make(model, batches, precision=torch.float16)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = copy.deepcopy(model.state_dict())
    run(trainer, 1)
    torch.testing.assert_close(model.state_dict(), before)
    assert trainer.grad_scaler.get_scale() == 2.0**119


def test_a_model_with_one_loss(model, batches):
    class Sum(Model):
        def forward(self, batch):
            return sum(super().forward(batch).values())

    storage = run(make(Sum(), batches))
    assert len(storage.history("total_loss").values()) == 4
    assert "loss_cls" not in storage.histories()


@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.GradScaler")
@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("theirs", [SimpleTrainer, AMPTrainer])
def test_states_are_detectron2s(model, batches, precision, theirs):
    ours = make(model, batches, precision=precision)
    run(ours)
    reference = make(copy.deepcopy(model), batches, theirs)
    saved, known = ours.state_dict(), reference.state_dict()
    assert ("grad_scaler" in saved) == (precision == torch.float16)
    assert saved.keys() - {"grad_scaler"} == known.keys() - {"grad_scaler"}
    if theirs is SimpleTrainer or precision == torch.float16:  # an AMPTrainer insists on a scaler
        reference.load_state_dict(saved)
        assert reference.iter == ours.iter
    ours.load_state_dict(known)  # as fresh as theirs
    assert ours.iter == 0


def test_a_loss_that_is_not_finite_leaves_the_weights_alone(model, batches):
    batches[2][3]["image"] = torch.full((4,), float("nan"))
    weights = []
    trainer = make(model, batches)
    trainer.after_backward = lambda: weights.append(copy.deepcopy(model.state_dict()))
    with pytest.raises(FloatingPointError, match=r"iteration 2, learning rate 0\.1") as error:
        run(trainer)
    assert "3.png" in str(error.value) and "SOLVER.BASE_LR" in str(error.value)
    torch.testing.assert_close(model.state_dict(), weights[-1])


class Batch(nn.Module):
    """Has running statistics, of the images and of a normaliser's kind."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 1)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, batch):
        images = torch.stack([image["image"] for image in batch])
        self.mean.mul_(0.9).add_(0.1 * len(batch))
        out = self.last(self.norm(images))
        return {"loss_cls": out.square().mean(), "loss_box_reg": (images[:, :1] * out).abs().mean()}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_is_skipped(batches, bad, accumulate, caplog):
    """As if its images had not been there; momentum, which goes on in a step of nothing, does not go on either."""
    model = Batch()
    twin = copy.deepcopy(model)
    spoilt = copy.deepcopy(batches)
    spoilt[1][0]["image"][2] = bad
    spoilt[2][5]["image"][0] = bad
    trainer = make(model, spoilt, max_skips=2, accumulate=accumulate)
    storage = run(trainer)
    run(make(twin, [batches[0], batches[3]], accumulate=accumulate), 2)
    for (name, mine), reference in zip(model.state_dict().items(), twin.state_dict().values()):
        assert torch.equal(mine, reference), name
    assert [step for _, step in storage.history("total_loss").values()] == [0, 3]
    skipped = [record.message for record in caplog.records if "is skipped" in record.message]
    assert ["A pixel of 0.png" in message for message in skipped] == [True, False]
    assert "A pixel of 5.png" in skipped[1] and "skipped: 2 of 2" in skipped[1] and "iteration 2" in skipped[1]
    assert trainer.state_dict()["skips"] == 2


def test_no_more_steps_may_be_skipped(model, batches):
    for batch in batches[1:]:
        batch[0]["image"][:] = math.nan
    trainer = make(model, batches, max_skips=2)
    with pytest.raises(FloatingPointError, match="iteration 3"):
        run(trainer)
    resumed = make(model, batches[1:], max_skips=2)
    resumed.load_state_dict(trainer.state_dict())
    with pytest.raises(FloatingPointError, match="iteration 0"):
        run(resumed, 1)


class Root(Model):
    """The square root of 0: its gradient is infinite."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(4))

    def forward(self, batch):
        roots = [(self.scale * image["image"]).sqrt().sum() for image in batch]
        return {"loss_cls": self.layers[0].weight.sum() * 0 + sum(roots)}


def test_a_gradient_that_is_not_finite(batches, tmp_path):
    for image in batches[0]:
        image["image"].abs_()
    model = Root()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match="A gradient became infinite or NaN at iteration 0") as error:
        run(make(model, batches, output_dir=str(tmp_path)), 1)
    assert "the gradient of the weight scale is not finite" in str(error.value)
    assert "loss_cls 0" in str(error.value) and "0.png, 1.png" in str(error.value)
    torch.testing.assert_close(model.state_dict(), before)
    content = load_batch(error.value.reports[0].batch_file)
    assert [image["file_name"] for image in content["batch"]] == [f"{i}.png" for i in range(6)]
    assert all(torch.equal(kept["image"], image["image"]) for kept, image in zip(content["batch"], batches[0]))
    torch.testing.assert_close(content["model"], before)


def test_float16_gradients_that_overflow_at_the_least_scale(batches):
    """The scale falls while it can; what then overflows does so for another reason."""
    for image in (image for batch in batches for image in batch):
        image["image"].abs_()
    trainer = make(Root(), batches, precision=torch.float16)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with pytest.raises(FloatingPointError, match="A gradient became infinite or NaN at iteration 2"):
        run(trainer)
    assert trainer.grad_scaler.get_scale() == 1.0


@pytest.mark.parametrize("values", [[0.0, -3.0], [math.nan, 1.0], [math.inf], [-math.inf, 2.0], []])
def test_the_largest_gradient(values):
    model = nn.ParameterList([nn.Parameter(torch.zeros(())) for _ in [*values, 0]])
    for parameter, value in zip(model, values):
        parameter.grad = torch.tensor(value)
    largest = float(largest_gradient(model))
    if all(map(math.isfinite, values)):
        assert largest == max(map(abs, values), default=0)
    else:
        assert not math.isfinite(largest)


@pytest.mark.parametrize("kind", ["value", "norm"])
def test_parameters_without_a_gradient_are_clipped_like_others(model, batches, kind):
    """Detectron2 clips each parameter by itself: also those of a level that no head sees."""
    twin = copy.deepcopy(model)
    model.unused = nn.Linear(2, 2)
    before = copy.deepcopy(model.unused.state_dict())
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED, cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = True, kind
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.01
    sgd = maybe_add_gradient_clipping(cfg, torch.optim.SGD)
    for one in (model, twin):
        optimizer = sgd(one.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        run(StepTrainer(one, batches, optimizer))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(twin.parameters()))
    for mine, reference in zip(model.layers.parameters(), twin.layers.parameters()):
        assert torch.equal(mine, reference)
    for name, value in model.unused.state_dict().items():
        assert torch.equal(value, before[name])  # no weight decay either, as in PyTorch


def test_eval_mode_is_refused(model, batches):
    trainer = make(model, batches)
    model.eval()
    with pytest.raises(AssertionError, match="eval mode"), EventStorage():
        trainer.run_step()


@pytest.mark.parametrize(
    ("enabled", "name", "device", "expected"),
    [
        (False, "float16", "cuda", None),
        (True, "", "cuda", torch.float16),
        (True, "", "cuda:1", torch.float16),
        (True, "", "cpu", torch.bfloat16),
        (True, "bfloat16", "cuda", torch.bfloat16),
        (True, "float16", "cpu", torch.float16),
    ],
)
def test_precision(enabled, name, device, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": True}, raising=False)
    assert amp_precision(enabled, name, device) == expected


@pytest.mark.parametrize("name, expected", [("", None), ("bfloat16", torch.bfloat16)])
def test_a_cpu_without_bfloat16_uses_it_only_when_told_to(name, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False}, raising=False)
    assert amp_precision(True, name, "cpu") == expected


def test_unknown_precision():
    with pytest.raises(ValueError, match=r"SOLVER\.AMP\.DTYPE is 'fp8'.*float16, bfloat16"):
        amp_precision(True, "fp8", "cpu")


def test_one_process_needs_no_wrapper(model):
    assert data_parallel(model) is model


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_on_a_gpu(model, batches, precision, accumulate):
    twin = copy.deepcopy(model)
    run(make(twin, batches))
    for image in (image for batch in batches for image in batch):
        image["image"] = image["image"].cuda()
    trainer = make(model.cuda(), batches, precision=precision, accumulate=accumulate)
    if precision == torch.float16:
        trainer.grad_scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    run(trainer)
    for mine, reference in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(mine.cpu(), reference, rtol=0.05, atol=0.02)
