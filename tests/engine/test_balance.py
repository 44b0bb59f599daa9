"""What the hook writes is what the batch, the loss and the gradients say, however the step is computed."""

import copy
import json
import pickle

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.solver.build import maybe_add_gradient_clipping
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from focal_plugin.config.load import load_config
from focal_plugin.engine import StepTrainer, Trainer
from focal_plugin.engine.balance import BalanceHook

PARTS = {
    "backbone": ("backbone.",),
    "cls_subnet": ("head.cls_subnet.", "head.cls_score."),
    "bbox_subnet": ("head.bbox_subnet.", "head.bbox_pred."),
}


@pytest.fixture
def cfg(tiny_config):
    return load_config(tiny_config, ["MODEL.DEVICE", "cpu", "MODEL.FOCAL.NORMALIZER", "num_fg"])


@pytest.fixture
def batch(cfg):
    cfg.SOLVER.IMS_PER_BATCH = 4
    return next(iter(Trainer.build_train_loader(cfg)))


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def make(model, batches, period=20, optimizer=None, **kwargs):
    trainer = StepTrainer(model, batches, optimizer or sgd(model), **kwargs)
    trainer.register_hooks([BalanceHook(model, period)])
    return trainer


def run(trainer, steps=1):
    """Of the last step, what is in the storage."""
    trainer.train(0, steps)
    return {name: values.latest() for name, values in trainer.storage.histories().items()}


def expected(model, batch):
    """The numbers by hand: one-hot targets, the focal loss written out in float64, one backward pass."""
    seen = []
    handle = model.cls_loss.register_forward_hook(lambda module, args, total: seen.append(args))
    trainer = StepTrainer(model, [batch], torch.optim.SGD(model.parameters(), lr=0.0))
    trainer.train(0, 1)
    handle.remove()
    ((logits, targets),) = seen
    background, total = 0.0, 0.0
    for level, labels in zip(logits, targets.labels):
        x = level.detach().double()
        onehot = F.one_hot(labels.clamp(min=0), 3)[..., :2].movedim(-1, 2).double()  # (N, A, K, H, W)
        p = torch.where(onehot == 1, x.sigmoid(), 1 - x.sigmoid())
        loss = -torch.where(onehot == 1, 0.25, 0.75) * (1 - p) ** 2 * p.log()
        background += loss.sum(dim=2)[labels == 2].sum().item()
        total += loss.sum(dim=2)[labels >= 0].sum().item()
    numbers = {f"positives/p{3 + i}": len(p) / len(batch) for i, p in enumerate(targets.positives)}
    numbers["background_share"] = background / total
    for part, prefixes in PARTS.items():
        gradients = [p.grad for name, p in model.named_parameters() if name.startswith(prefixes) and p.grad is not None]
        numbers[f"grad_norm/{part}"] = sum(g.double().square().sum().item() for g in gradients) ** 0.5
    return numbers


def assert_close(found, numbers):
    """A share is a difference of float32 sums, so that its last digits are absolute ones."""
    assert {name: found[name] for name in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_the_numbers_of_a_step(cfg, batch, accumulate):
    model = build_model(cfg)
    numbers = expected(copy.deepcopy(model), batch)
    assert sum(numbers[f"positives/p{level}"] for level in range(3, 8)) > 0
    found = run(make(model, [batch], accumulate=accumulate))
    assert_close(found, numbers)


def test_float16_gradients_are_unscaled(cfg, batch):
    model = build_model(cfg)
    numbers = expected(copy.deepcopy(model), batch)
    trainer = make(model, [batch], precision=torch.float16)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    found = run(trainer)
    assert {name: found[name] for name in numbers} == pytest.approx(numbers, rel=0.05)


def test_gradients_that_overflow_are_left_out(cfg, batch):
    model = build_model(cfg)
    trainer = make(model, [batch], precision=torch.float16)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    found = run(trainer)
    assert "grad_norm/cls_subnet" not in found and 0 < found["background_share"] < 1


def test_norms_are_those_before_clipping(cfg, batch):
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = True, 1e-6
    model = build_model(cfg)
    numbers = expected(copy.deepcopy(model), batch)
    optimizer = maybe_add_gradient_clipping(cfg, sgd(model))
    found = run(make(model, [batch], optimizer=optimizer))
    assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) <= 1e-6
    assert_close(found, numbers)


def test_only_on_its_steps(cfg, batch, monkeypatch):
    model, calls = build_model(cfg), []
    forward = model.cls_loss.forward
    monkeypatch.setattr(model.cls_loss, "forward", lambda *args: calls.append(trainer.iter) or forward(*args))
    trainer = make(model, [batch] * 7, period=3)
    run(trainer, 7)
    steps = [iteration for _, iteration in trainer.storage.history("background_share").values()]
    assert steps == [0, 2, 5]
    assert calls == sorted([*range(7), *steps])


def test_a_loss_that_samples_has_no_share(cfg, batch):
    cfg.MODEL.FOCAL.CLS_LOSS.NAME = "OHEMLoss"
    found = run(make(build_model(cfg), [batch]))
    assert "background_share" not in found and "positives/p3" in found and "grad_norm/cls_subnet" in found


def test_a_loss_with_soft_targets(cfg, batch):
    cfg.MODEL.FOCAL.CLS_LOSS.NAME = "QualityFocalLoss"
    assert 0 < run(make(build_model(cfg), [batch]))["background_share"] < 1


def test_a_batch_without_boxes(cfg, batch):
    for image in batch:
        image["instances"] = image["instances"][:0]
    found = run(make(build_model(cfg), [batch]))
    assert found["background_share"] == 1 and found["positives/p3"] == 0


def test_detectron2s_retinanet_has_norms_alone(cfg, batch):
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    found = run(make(build_model(cfg), [batch]))
    assert found.keys() >= {"grad_norm/backbone", "grad_norm/cls_subnet", "grad_norm/bbox_subnet"}
    assert "background_share" not in found and "positives/p3" not in found


def test_in_distributed_data_parallel(cfg, batch, tmp_path):
    model = build_model(cfg)
    numbers = expected(copy.deepcopy(model), batch)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = run(make(DistributedDataParallel(model), [batch], accumulate=2))
    finally:
        torch.distributed.destroy_process_group()
    assert_close(found, numbers)


def test_the_trainer_writes_them(cfg, tmp_path):
    (tmp_path / "output").mkdir()
    cfg.DATASETS.TEST = ()
    trainer = Trainer(cfg)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "output" / "metrics.json").read_text().splitlines()]
    assert 0 < lines[0]["background_share"] < 1
    assert sum(lines[0][f"positives/p{i}"] for i in range(3, 8)) == pytest.approx(lines[0]["num_pos_anchors"])
    assert lines[0]["grad_norm/cls_subnet"] > 0
    copy.deepcopy(trainer.model), pickle.dumps(trainer.model)  # the model is no worse for being watched


def test_what_explains_a_skipped_step_is_not_counted(cfg, batch):
    """The step after it, without boxes, has no positives."""
    model, empty = build_model(cfg), [{**image, "instances": image["instances"][:0]} for image in batch]
    trainer = make(model, [batch, empty], period=1, max_skips=1)
    model.head.cls_score.bias.register_hook(lambda gradient: gradient / (trainer.iter != 0))  # infinite in step 0
    found = run(trainer, 2)
    assert trainer.skips == 1
    assert found["background_share"] == 1 and found["positives/p3"] == 0


def test_no_period():
    with pytest.raises(ValueError, match="period is 0"):
        BalanceHook(torch.nn.Identity(), 0)
