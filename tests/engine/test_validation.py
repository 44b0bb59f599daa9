"""The losses on data that are not trained on: those of training, and training does not notice."""

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.utils.events import EventStorage

from focal_plugin.config import ConfigError
from focal_plugin.config.load import load_config
from focal_plugin.engine import StepTrainer, Trainer
from focal_plugin.engine.resume import CheckpointHook
from focal_plugin.engine.rng import rng_state
from focal_plugin.engine.validation import ValidationLoss, build_validation_loader
from tests.engine import pair
from tests.engine.same import assert_same, final, metrics
from tests.engine.test_processes import run_pair

VALIDATION = ["DATASETS.VALIDATION", "('shapes_test',)"]


def build(cfg):
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    return StepTrainer(model, [], torch.optim.SGD(model.parameters(), lr=0.01))


def state_of(model):
    """All that a model's forward pass may change, by value."""
    plain = {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int | float | str | None)
    }
    return {"plain": plain, "modules": [id(m) for m in model.modules()], "state": model.state_dict()} | {
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()}
    }


@pytest.mark.parametrize(
    "opts",
    [
        [],
        ["MODEL.FOCAL.NORMALIZER", "num_fg"],
        ["MODEL.META_ARCHITECTURE", "RetinaNet"],
        ["MODEL.RETINANET.NORM", "BN", "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0"],
        ["MODEL.FOCAL.CLS_LOSS.NAME", "SampledBCELoss"],
    ],
    ids=["ema", "num_fg", "Detectron2's", "BN", "sampled"],
)
def test_they_are_those_of_training_and_nothing_changes(tiny_config, opts):
    """Without batch norm and random numbers: the loss of one batch of all images, divided by its positives."""
    cfg = load_config(tiny_config, [*VALIDATION, *opts])
    trainer = build(cfg)
    loader = build_validation_loader(cfg)
    rng, before = rng_state(), state_of(trainer.model)
    with EventStorage() as storage:
        found = ValidationLoss(trainer, loader)()
        assert not storage.latest()
    assert_same(rng_state(), rng)
    after = state_of(trainer.model)
    for key in ("plain", "modules"):
        assert after[key] == before[key]
    assert_same(after["buffers"], before["buffers"])
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert found == ValidationLoss(trainer, loader)()
    assert found["total_loss"] == pytest.approx(found["loss_cls"] + found["loss_box_reg"])
    if "BN" in opts or "SampledBCELoss" in opts:
        return

    model, batch = trainer.model, [image for images in loader for image in images]  # all of one size: no padding
    if isinstance(model, RetinaNet):
        model._ema_update = lambda name, value, *_: float(value)
    else:
        model.normalizer = torch.nn.Module()
        model.normalizer.forward = lambda count, device: torch.tensor(float(count))
    with EventStorage(), torch.no_grad():
        expected = model.train()(batch)
    for name, loss in expected.items():
        assert found[name] == pytest.approx(float(loss), rel=1e-5)


def test_no_image_has_a_box(tiny_config):
    cfg = load_config(tiny_config, VALIDATION)
    trainer, loader = build(cfg), list(build_validation_loader(cfg))
    for (image,) in loader:
        image["instances"] = image["instances"][:0]
    found = ValidationLoss(trainer, loader)()
    assert found["loss_box_reg"] == 0 and found["loss_cls"] > 0


def test_two_processes_are_one(tiny_config, tmp_path):
    cfg = load_config(tiny_config, VALIDATION)
    one = ValidationLoss(build(cfg), build_validation_loader(cfg))()
    # the normaliser that waits for the other processes, which have other numbers of images
    first, second = run_pair(tmp_path / "pair", pair.validate, tiny_config)
    assert first == second == pytest.approx(one, rel=1e-6)


def test_training_is_the_same_with_it(train_net, tmp_path):
    """Bit for bit, with random numbers in the loss and running statistics; and it is as often as asked for."""
    words = ["TEST.EVAL_PERIOD", 1, "MODEL.FOCAL.CLS_LOSS.NAME", "SampledBCELoss", "MODEL.RETINANET.NORM", "BN"]
    train_net("OUTPUT_DIR", tmp_path / "without", *words)
    train_net("OUTPUT_DIR", tmp_path / "with", *words, *VALIDATION)
    one, other = (final(tmp_path / name) for name in ("with", "without"))
    assert_same(one["model"], other["model"])
    for key in ("_trainer", "iteration"):
        assert_same(one["trainer"][key], other["trainer"][key])
    hooks = [state["trainer"]["hooks"]["CheckpointHook"] for state in (one, other)]
    assert_same(hooks[0]["processes"], hooks[1]["processes"])
    lines = metrics(tmp_path / "with")
    seen = {line["iteration"]: line["validation/total_loss"] for line in lines if "validation/total_loss" in line}
    assert list(seen) == [0, 1, 2, 4] and len(set(seen.values())) > 1
    for line in lines:
        for name in [name for name in line if name.startswith("validation/")]:
            del line[name]
    assert_same(lines, metrics(tmp_path / "without"))


def test_data_without_ground_truth(tiny_config):
    DatasetCatalog.register("no_truth", lambda: [{"file_name": "a.png", "image_id": 0}])
    try:
        with pytest.raises(ConfigError, match=r"DATASETS\.VALIDATION names no_truth, where a\.png has no annotations"):
            build_validation_loader(load_config(tiny_config, ["DATASETS.VALIDATION", "('no_truth',)"]))
    finally:
        DatasetCatalog.remove("no_truth")


def test_what_a_signal_in_it_saves_is_the_model_of_training(train_net, tmp_path, monkeypatch):
    """While they are computed the model has another normaliser, and the checkpoint the mean of training's."""
    words = [*VALIDATION, "DATASETS.TEST", "()", "TEST.EVAL_PERIOD", 2]
    forward, interruptible, hooks = StepTrainer.forward, CheckpointHook.interruptible, []

    def noted(hook):
        hooks.append(hook)
        return interruptible(hook)

    def saving(trainer, model, batch):
        if not torch.is_grad_enabled():
            hooks[0]._save_once()  # what the answer to a signal does before the process ends
        return forward(trainer, model, batch)

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointHook, "interruptible", noted)
        patched.setattr(StepTrainer, "forward", saving)
        train_net("OUTPUT_DIR", tmp_path / "saved", *words)
    saved, whole = tmp_path / "saved", tmp_path / "whole"
    train_net("OUTPUT_DIR", whole, *words, "SOLVER.CHECKPOINT_PERIOD", 2)
    assert_same(*(final(folder, "model_0000001.pth")["model"] for folder in (saved, whole)))
