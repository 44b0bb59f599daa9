"""The optimiser that a config describes: torch's, with Detectron2's settings of parameters."""

import copy

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import CycleBatchNormList
from detectron2.layers.batch_norm import LayerNorm
from detectron2.solver import build_lr_scheduler
from detectron2.solver import build_optimizer as build_detectron2s
from torch import nn

from focal_plugin import add_focal_config
from focal_plugin.config import ConfigError
from focal_plugin.engine import StepTrainer
from focal_plugin.engine.optimizer import build_optimizer


class Net(nn.Module):
    """Layers, norms of all kinds, a parameter of its own, and a part that is frozen."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
        self.stem = nn.Conv2d(3, 3, 1).requires_grad_(False)
        norms = nn.GroupNorm(2, 4), LayerNorm(4), CycleBatchNormList(2, num_features=4)
        self.head = nn.Sequential(nn.Conv2d(4, 4, 1), *norms)


def config(*opts):
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.merge_from_list([*opts])
    return cfg


def settings(optimizer, model):
    """The group of each parameter that is trained, without the others in it, by name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        rest = {key: value for key, value in group.items() if key != "params"}
        found |= {names[parameter]: rest for parameter in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return found


@pytest.mark.parametrize(
    "opts",
    [
        [],
        ["SOLVER.BIAS_LR_FACTOR", 2.0, "SOLVER.WEIGHT_DECAY_BIAS", 0.0, "SOLVER.NESTEROV", True],
        ["SOLVER.WEIGHT_DECAY_NORM", 0.1, "SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.MOMENTUM", 0.5],
    ],
)
def test_sgd_is_detectron2s(opts):
    cfg, model = config(*opts), Net()
    ours, theirs = build_optimizer(cfg, model), build_detectron2s(cfg, model)
    for group in ours.param_groups:
        assert len(group.pop("param_names")) == len(group["params"])
    assert type(ours).__name__ == type(theirs).__name__ and ours.param_groups == theirs.param_groups


@pytest.mark.parametrize("of_biases", [None, 0.3])
def test_adamw_decays_by_kind(of_biases):
    opts = ["SOLVER.OPTIMIZER", "adamw", "SOLVER.WEIGHT_DECAY", 0.05, "SOLVER.WEIGHT_DECAY_NORM", 0.01]
    model = Net()
    optimizer = build_optimizer(config(*opts, "SOLVER.WEIGHT_DECAY_BIAS", of_biases), model)
    norms = ("backbone.1.", "head.1.", "head.2.", "head.3.")
    for name, group in settings(optimizer, model).items():
        is_bias = of_biases is not None and name.endswith(".bias")
        assert group["weight_decay"] == (of_biases if is_bias else 0.01 if name.startswith(norms) else 0.05), name
        assert group["betas"] == (0.9, 0.999) and group["lr"] == 0.001


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_rates_by_part(kind):
    factors = [{"backbone": 0.1, "scale": 4}, {"*.2.weight": 3.0}, {"head.[12].*": 0}]
    opts = ["SOLVER.OPTIMIZER", kind, "SOLVER.BASE_LR", 0.5, "SOLVER.BIAS_LR_FACTOR", 2.0, "SOLVER.STEPS", (5,)]
    model = Net()
    cfg = config(*opts, "SOLVER.LR_FACTORS", factors, "SOLVER.WARMUP_ITERS", 4, "SOLVER.MAX_ITER", 10)
    optimizer = build_optimizer(cfg, model)
    expected = {
        "scale": 2.0,
        "backbone.0.weight": 0.05,
        "backbone.0.bias": 0.1,
        "backbone.1.weight": 0.05,
        "backbone.1.bias": 0.1,
        "backbone.2.weight": 1.5,
        "backbone.2.bias": 0.1,
        "head.0.weight": 0.5,
        "head.0.bias": 1.0,
        "head.1.weight": 0,
        "head.1.bias": 0,
        "head.2.weight": 0,
        "head.2.bias": 0,
        "head.3.weight": 0.5,
        "head.3.bias": 1.0,
    }
    assert {name: group["lr"] for name, group in settings(optimizer, model).items()} == pytest.approx(expected)
    schedule = build_lr_scheduler(cfg, optimizer)
    for step in range(9):
        optimizer.step()
        schedule.step()
        now = 0.1 if step + 1 >= 5 else min((step + 1) / 4 * (1 - 0.001) + 0.001, 1)
        for name, group in settings(optimizer, model).items():
            assert group["lr"] == pytest.approx(expected[name] * now, rel=1e-6), (name, step)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("backbon", "'backbon' fits no parameter of the model. Expected a part (backbone, stem, head)"),
        ("stem", "'stem' fits nothing that is trained: all of it is frozen"),
        ("head.0.weights", "'head.0.weights' fits no parameter"),
    ],
)
def test_a_pattern_that_fits_nothing(pattern, says):
    with pytest.raises(ConfigError) as error:
        build_optimizer(config("SOLVER.LR_FACTORS", [{"head": 2.0}, {pattern: 0.5}]), Net())
    assert str(error.value).startswith(f"SOLVER.LR_FACTORS: {says}")


class Line(nn.Module):
    """A loss with gradients far from 0."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, batch):
        return {"loss": (self.layer(torch.stack([image["image"] for image in batch])) - 5).square().mean()}


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_steps_of_adamw_in_float16(clipped, parts):
    """In micro-batches, too. Gradients are divided by the loss scale before they are clipped."""
    opts = ["SOLVER.OPTIMIZER", "adamw", "SOLVER.BASE_LR", 0.01, "SOLVER.WEIGHT_DECAY", 0.5]
    cfg = config(*opts, "SOLVER.CLIP_GRADIENTS.ENABLED", clipped, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.3)
    model, batch = Line(), [{"image": torch.rand(3)} for _ in range(4)]
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    trainer = StepTrainer(model, [batch] * 3, build_optimizer(cfg, model), precision=torch.float16, accumulate=parts)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    trainer.train(0, 3)
    StepTrainer(twin, [batch] * 3, build_optimizer(cfg, twin)).train(0, 3)
    for mine, theirs, before in zip(model.parameters(), twin.parameters(), start.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3)
        assert (mine - before).abs().min() > 0.01 and mine.grad.abs().max() < (0.31 if clipped else 9)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_state_goes_to_the_parameters_it_is_of(kind):
    """Also where another division into parts has as many parameters in each."""
    model = nn.ModuleDict({name: Line() for name in ("one", "two", "three")})

    def trainer(*opts):
        optimizer = build_optimizer(config("SOLVER.OPTIMIZER", kind, "SOLVER.LR_FACTORS", [dict(opts)]), model)
        return StepTrainer(model, [], optimizer)

    state = trainer(("two", 0.5)).state_dict()
    trainer(("two", 0.25)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"in other groups, by learning rate"):
        trainer(("three", 0.5)).load_state_dict(state)
