"""The moving average of the weights: its numbers, what is evaluated, and the files with it."""

import copy
import json
from itertools import pairwise

import pytest
import torch
from detectron2.engine import HookBase
from torch import nn

from focal_plugin.config import ConfigError
from focal_plugin.deploy.convert.__main__ import main as convert
from focal_plugin.engine import AtomicCheckpointer, StepTrainer
from focal_plugin.engine.average import WeightAverage
from tests.engine.same import assert_same, final, metrics

EMA = ["MODEL.FOCAL.EMA.DECAY", 0.3]


class Net(nn.Module):
    """A weight, a frozen one, and statistics."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(2, 3), nn.BatchNorm1d(3)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, batch):
        inputs = torch.stack([image["image"] for image in batch])  # (N, 2)
        return {"loss": ((self.norm(self.layer(inputs)) - self.frozen) ** 2).mean() * (1 + inputs.abs().max()) / 100}


class Watch(HookBase):
    """The weights after each step."""

    def __init__(self):
        self.weights = []

    def after_step(self):
        self.weights.append({name: value.detach().clone() for name, value in self.trainer.model.named_parameters()})


def train(model, decay, steps, values=None, **kwargs):
    """The average and the weights after each step. ``values``: one of each step's pixels."""
    average, watch = WeightAverage(model, decay), Watch()
    batches = torch.randn(steps, 4, 2, generator=torch.Generator().manual_seed(1))
    for step, value in (values or {}).items():
        batches[step, 0, 0] = value
    loader = [[{"image": pixels, "file_name": "a.png"} for pixels in batch] for batch in batches]
    trainer = StepTrainer(model, loader, torch.optim.AdamW(model.parameters(), 0.1), average=average, **kwargs)
    trainer.register_hooks([watch])
    trainer.train(0, steps)
    return average, watch.weights


@pytest.mark.parametrize("decay", [0.01, 0.4, 0.999])
@pytest.mark.parametrize("steps", [0, 1, 12])
def test_the_average(decay, steps):
    torch.manual_seed(0)
    model = Net()
    start = copy.deepcopy(model.state_dict())
    average, weights = train(model, decay, steps)
    model.frozen.data += 1  # as if weights were loaded later
    expected, found = (weights or [start])[0], average.averaged()
    expected = {name: value.double() for name, value in expected.items()}
    for n, step in enumerate(weights[1:], start=1):
        d = min(decay, n / (n + 9))
        expected = {name: d * value + (1 - d) * step[name] for name, value in expected.items()}
    for name, value in found.named_parameters():
        torch.testing.assert_close(
            value.double(), model.frozen.double() if name == "frozen" else expected[name].double()
        )
    assert not found.training and all(map(torch.equal, found.buffers(), model.buffers()))
    assert average.state_dict()["updates"] == steps


@pytest.mark.parametrize(("value", "kwargs"), [(torch.nan, {"max_skips": 1}), (1e4, {"precision": torch.float16})])
def test_a_step_that_changes_no_weight_changes_no_average(value, kwargs):
    """One with a NaN that is skipped, and one whose gradients overflow in float16."""
    torch.manual_seed(0)
    average, weights = train(Net(), 0.9, 5, values={2: value}, **kwargs)
    changed = [not torch.equal(one["layer.weight"], other["layer.weight"]) for one, other in pairwise(weights)]
    assert changed == [True, False, True, True] and average.updates == 4


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_a_decay_that_is_none(decay):
    with pytest.raises(ConfigError, match=rf"MODEL.FOCAL.EMA.DECAY .* is {decay}; expected a number in \[0, 1\)"):
        WeightAverage(Net(), decay)


def test_a_run_with_an_average(train_net, tmp_path, capfd):
    """It trains as a run without; the average is judged beside the weights, and is a model of its own."""
    words, without = ["SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.BASE_LR", 0.02], ["DATASETS.TEST", "()"]
    train_net("OUTPUT_DIR", tmp_path / "plain", *words, *without)
    results = train_net("OUTPUT_DIR", tmp_path / "run", *words, *EMA, "TEST.EVAL_PERIOD", 2)
    assert "as they are trained. Evaluating their average (MODEL.FOCAL.EMA)" in capfd.readouterr().out
    assert_same(final(tmp_path / "run")["model"], final(tmp_path / "plain")["model"])
    assert not (tmp_path / "plain/model_ema_final.pth").exists() and "ema" not in final(tmp_path / "plain")
    assert [line["iteration"] for line in metrics(tmp_path / "run") if "bbox_EMA/AP" in line] == [1, 4]
    assert (tmp_path / "run/inference_EMA/evaluation.json").exists()

    # The file of the average alone has what was judged. That the other's weights are those as trained is said.
    last, average = (str(tmp_path / f"run/{name}.pth") for name in ("model_final", "model_ema_final"))
    found = train_net("--eval-only", "MODEL.WEIGHTS", average, "OUTPUT_DIR", tmp_path / "judged")
    assert json.dumps(found["bbox"]) == json.dumps(results["bbox_EMA"])
    detections = [
        (tmp_path / folder / "coco_instances_results.json").read_text()
        for folder in ("judged/inference", "run/inference_EMA", "run/inference")
    ]
    assert detections[0] == detections[1] != detections[2]
    assert "convert ema" not in capfd.readouterr().out
    AtomicCheckpointer(Net()).load(last)
    assert f"{last}: its weights as they are trained. It also has their average" in capfd.readouterr().out

    assert convert(["ema", last, str(tmp_path / "average.pth")]) == 0
    assert_same(final(tmp_path, "average.pth")["model"], dict(torch.load(average, weights_only=True)["model"]))
    assert convert(["ema", str(tmp_path / "run/model_0000001.pth"), str(tmp_path / "early.pth")]) == 0
    assert convert(["ema", str(tmp_path / "plain/model_final.pth"), str(tmp_path / "none.pth")]) == 2
    assert "has no average of its weights; expected a checkpoint of a training" in capfd.readouterr().err

    # Resumed from a checkpoint without one.
    train_net("--resume", "OUTPUT_DIR", tmp_path / "plain", *EMA, "SOLVER.MAX_ITER", 5, *without)
    assert "model_final.pth has no average of the weights (MODEL.FOCAL.EMA): it begins here." in capfd.readouterr().out
    state = final(tmp_path / "plain")
    assert state["ema"]["updates"] == 1
    assert_same(state["ema"]["weights"], {name: state["model"][name] for name in state["ema"]["weights"]})


def test_a_lazy_run_with_an_average(train_net, lazy_config, tmp_path):
    results = train_net("train.ema.decay=0.3", config=lazy_config)
    assert {"bbox", "bbox_EMA"} <= results.keys() and final(tmp_path / "output")["ema"]["updates"] == 3
    assert (tmp_path / "output_EMA/coco_instances_results.json").exists()
    assert (tmp_path / "output/model_ema_final.pth").exists()


def test_the_best_average(train_net, tmp_path):
    """It is what the metric judges; and a run that ends early writes its average too."""
    words = ["TEST.EVAL_PERIOD", 1, "TEST.BEST_METRIC", "bbox_EMA/AP", "TEST.PATIENCE", 1, "SOLVER.BASE_LR", 0.0]
    train_net("OUTPUT_DIR", tmp_path / "run", *words, *EMA)
    assert final(tmp_path / "run")["iteration"] < 3
    best, average = final(tmp_path / "run", "model_best.pth"), final(tmp_path / "run", "model_ema_final.pth")
    assert best["metric"] == "bbox_EMA/AP" and (tmp_path / "run/inference_EMA").exists()
    weights = final(tmp_path / "run")["ema"]["weights"]
    assert_same({name: average["model"][name] for name in weights}, weights)
    assert_same({name: best["model"][name] for name in weights}, weights)  # the rate is 0
