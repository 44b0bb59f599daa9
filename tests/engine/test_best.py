"""The best weights are kept, and a run that gets no better ends: the same run however often it is interrupted."""

import math
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import TrainerBase
from detectron2.utils.events import get_event_storage

from focal_plugin.config import ConfigError
from focal_plugin.config.load import load_config
from focal_plugin.engine import AtomicCheckpointer, StepTrainer, Trainer
from focal_plugin.engine.best import BestHook, EarlyStop, check_metric
from focal_plugin.engine.evaluate import EvaluationHook
from tests.engine import pair
from tests.engine.same import assert_same, final, metrics
from tests.engine.test_processes import run_pair


class Recorder:
    """In place of a checkpointer."""

    save_dir, model = "output", "the trained one"

    def __init__(self):
        self.saved = []

    def save_weights(self, name, model, **notes):
        assert name == "model_best" and model == "the trained one"
        self.saved.append((notes["iteration"], notes["value"]))


class Counting(TrainerBase):
    def run_step(self):
        self.steps = self.iter + 1


def run(values, patience=0, metric="bbox/AP", state=None, start=0, period=1):
    """Train as many steps as there are values, of which each evaluation gives one; what was saved, and the trainer."""
    trainer, checkpointer, finished = Counting(), Recorder(), []
    trainer.steps = start
    end = len(values) * period
    evaluation = EvaluationHook(
        period, lambda: {"bbox": {"AP": values[min((trainer.iter + 1) // period, len(values)) - 1]}}
    )
    hook = BestHook(
        metric,
        patience,
        evaluation=evaluation,
        checkpointer=checkpointer,
        finish=lambda: finished.append(trainer.iter),
    )
    trainer.register_hooks([evaluation, hook])
    if state:
        hook.load_state_dict(state)
    with suppress(EarlyStop):
        trainer.train(start, end)
    return SimpleNamespace(saved=checkpointer.saved, trainer=trainer, hook=hook, finished=finished)


NAN = math.nan


@pytest.mark.parametrize(
    ("values", "saved"),
    [
        ([1.0, 2.0, 3.0], [(0, 1.0), (1, 2.0), (2, 3.0)]),
        ([3.0, 2.0, 3.0, 3.0], [(0, 3.0)]),
        ([NAN, NAN, 0.0, NAN, math.inf, 1.0], [(2, 0.0), (5, 1.0)]),
        ([NAN], []),
        ([-1.0, -2.0, -0.5], [(0, -1.0), (2, -0.5)]),
    ],
)
def test_the_best_is_saved(values, saved):
    """The last evaluation counts, too; an equal value is no better, and NaN never is."""
    found = run(values)
    assert found.saved == saved and found.trainer.iter == len(values) and not found.finished


@pytest.mark.parametrize(
    ("values", "patience", "steps"),
    [
        ([1, 1, 1, 1, 1, 1], 2, 3),
        ([1, 0, 2, 1, 1, 9], 2, 5),
        ([NAN, NAN, NAN, 5], 3, 3),
        ([1, 2, 3, 4], 1, 4),
        ([1, 1, 1, 1], 0, 4),
        ([5, 4, 3], 2, 3),  # in the evaluation after the last step nothing is left to stop
    ],
)
def test_patience(values, patience, steps):
    found = run([float(value) for value in values], patience)
    assert found.trainer.steps == found.trainer.iter == steps
    assert found.finished == ([steps - 1] if steps < len(values) else [])


def test_other_periods_than_one():
    found = run([1.0, 1.0, 1.0, 1.0], 1, period=3)
    assert found.trainer.steps == 6 and found.finished == [5] and found.saved == [(2, 1.0)]


def test_of_losses_the_least_is_best():
    trainer = Counting()
    losses = [3.0, 4.0, 2.0]
    evaluation = EvaluationHook(1, lambda: {"validation": {"total_loss": losses[min(trainer.iter, 2)]}})
    checkpointer = Recorder()
    hook = BestHook("validation/total_loss", 0, evaluation=evaluation, checkpointer=checkpointer, finish=None)
    trainer.register_hooks([evaluation, hook])
    trainer.train(0, 3)
    assert checkpointer.saved == [(0, 3.0), (2, 2.0)]


def test_a_state_goes_on():
    state = run([2.0, 1.0]).hook.state_dict()
    assert state == {"metric": "bbox/AP", "value": 2.0, "steps": 1, "waited": 1}
    found = run([0.0, 0.0, 1.5, 3.0], patience=3, state=state, start=2)
    assert found.saved == [(3, 3.0)] and found.hook.steps == 4
    assert run([0.0] * 9, patience=3, state=state, start=2).trainer.steps == 4
    ended = run([0.0] * 9, patience=1, state=state, start=2)  # with less patience it had ended before
    assert ended.trainer.steps == ended.trainer.iter == 2 and ended.trainer.max_iter == 2 and not ended.finished


def test_a_state_of_another_metric(caplog):
    state = {"metric": "bbox/AP50", "value": 90.0, "steps": 7, "waited": 4}
    assert run([1.0], state=state).saved == [(0, 1.0)]
    assert "TEST.BEST_METRIC was bbox/AP50" in caplog.text


def test_a_metric_that_no_evaluation_gives():
    with pytest.raises(ConfigError, match=r"is 'bbox/AP5', which the evaluation has\s+not given; .*bbox/AP"):
        run([1.0, 2.0], metric="bbox/AP5")


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["TEST.PATIENCE", "2", "TEST.EVAL_PERIOD", "1"], r"PATIENCE is 2, and TEST\.BEST_METRIC is empty"),
        (["TEST.PATIENCE", "2", "TEST.BEST_METRIC", "bbox/AP"], r"PATIENCE is 2, and TEST\.EVAL_PERIOD is 0"),
        (["TEST.PATIENCE", "-1"], r"PATIENCE is -1; expected a whole number ≥ 0"),
        (["TEST.BEST_METRIC", "validation/total_loss"], r"DATASETS\.VALIDATION is empty"),
        (["TEST.BEST_METRIC", "bbox/AP", "DATASETS.TEST", "()"], r"DATASETS\.TEST is empty"),
        (["TEST.BEST_METRIC", "AP50"], r"is 'AP50'; expected .*bbox/AP50"),
        (["TEST.BEST_METRIC", "bbox/mAP"], r"is 'bbox/mAP'; expected .*bbox/AP"),
        (["TEST.BEST_METRIC", "bbox/AP", "DATASETS.TEST", "('shapes_test', 'shapes_train')"], r"shapes_test/bbox/AP"),
        (["TEST.BEST_METRIC", "bbox/AP-disc"], None),
        (["TEST.BEST_METRIC", "segm/AP"], None),
        (["TEST.BEST_METRIC", "bbox_EMA/AP50"], r"is 'bbox_EMA/AP50', and MODEL\.FOCAL\.EMA\.DECAY is 0"),
        (["TEST.BEST_METRIC", "bbox_EMA/AP50", "MODEL.FOCAL.EMA.DECAY", "0.9"], None),
        (
            ["TEST.BEST_METRIC", "bbox_EMA/AP5", "MODEL.FOCAL.EMA.DECAY", "0.9"],
            r"is 'bbox_EMA/AP5'; expected .*bbox/AP",
        ),
        (["TEST.BEST_METRIC", "bbox_TTA/AP"], r"'bbox_TTA/AP', and test-time .*after .* such as bbox/AP\."),
        (["TEST.BEST_METRIC", "shapes_EMA/bbox/AP", "DATASETS.TEST", "('shapes_EMA', 'shapes_TTA')"], None),
        (["TEST.BEST_METRIC", "shapes_TTA/bbox/AP", "DATASETS.TEST", "('shapes_EMA', 'shapes_TTA')"], None),
        (["TEST.BEST_METRIC", "shapes_test/bbox/AP", "DATASETS.TEST", "('shapes_test', 'shapes_train')"], None),
        (["TEST.BEST_METRIC", "validation/loss_cls", "DATASETS.VALIDATION", "('shapes_test',)"], None),
    ],
)
def test_mistakes_are_found_before_training(tiny_config, opts, message):
    if message is None:
        check_metric(load_config(tiny_config, opts), by_type=True)
        return
    with pytest.raises(ConfigError, match=message):
        check_metric(load_config(tiny_config, opts), by_type=True)


class Interruption(BaseException):
    """Ends a run as nothing in it expects."""


@pytest.fixture
def scored(monkeypatch):
    """Evaluations that are quick, and give the values of a list by the number of steps; how many there were."""
    calls = []

    def use(values):
        def test(cfg, model):
            steps = len(get_event_storage().history("lr").values())
            step = min(get_event_storage().iter, len(values) - 1)
            calls.append(step)
            return {"bbox": {"AP": values[step]}} if steps else {}

        monkeypatch.setattr(Trainer, "test", staticmethod(test))
        return calls

    return use


WORDS = ["TEST.EVAL_PERIOD", 1, "TEST.BEST_METRIC", "bbox/AP", "TEST.PATIENCE", 3, "SOLVER.MAX_ITER", 9]
VALUES = [1.0, 3.0, 2.0, 5.0, 4.0, 4.0, 4.5, 9.0, 9.0, 9.0]  # ends after 7 steps; the best is after 4


@pytest.mark.slow
def test_an_early_stop_that_was_interrupted_is_the_early_stop(train_net, tmp_path, monkeypatch, scored, capfd):
    """Value and patience survive a kill; model_best.pth is of its step; the run that is over stays so."""
    scored(VALUES)
    train_net("OUTPUT_DIR", tmp_path / "whole", *WORDS)
    assert "stopping after 7 steps, since bbox/AP was not better in 3 evaluations" in capfd.readouterr().out
    before, take_step = [3, 6], StepTrainer.run_step

    def run_step(trainer):
        if before and trainer.iter == before[0]:
            raise Interruption(before.pop(0))
        take_step(trainer)

    broken = ["--resume", "OUTPUT_DIR", tmp_path / "broken", *WORDS, "SOLVER.CHECKPOINT_PERIOD", 1]
    monkeypatch.setattr(StepTrainer, "run_step", run_step)
    for _ in list(before):
        with pytest.raises(Interruption):
            train_net(*broken)
    train_net(*broken)

    best = final(tmp_path / "whole", "model_best.pth")
    assert {name: best[name] for name in ("iteration", "metric", "value")} == {
        "iteration": 3,
        "metric": "bbox/AP",
        "value": 5.0,
    }
    assert set(best) == {"model", "config", "iteration", "metric", "value"}
    assert_same(best["model"], final(tmp_path / "broken", "model_0000003.pth")["model"])
    assert (tmp_path / "whole/last_checkpoint").read_text() == "model_final.pth"
    assert final(tmp_path / "whole")["iteration"] == 6
    assert [line["iteration"] for line in metrics(tmp_path / "whole")] == [0, 1, 2, 3, 4, 5, 6, 7]

    def assert_same_end():
        one, other = (final(tmp_path / name) for name in ("broken", "whole"))
        for state in (one, other):
            del state["trainer"]["hooks"]["CheckpointHook"]["metrics"]["bytes"], state["config"]
        assert_same(one, other)
        assert_same(metrics(tmp_path / "broken"), metrics(tmp_path / "whole"))
        assert_same(final(tmp_path / "broken", "model_best.pth")["model"], best["model"])

    assert_same_end()
    capfd.readouterr()
    train_net(*broken)  # once more: it is over, and evaluated again
    assert "stopping after 7 steps" in capfd.readouterr().out
    assert_same_end()
    train_net(*broken, "TEST.PATIENCE", 4)  # more patience: it goes on
    assert final(tmp_path / "broken")["iteration"] == 8 and final(tmp_path / "broken", "model_best.pth")["value"] == 9.0


def test_killed_in_an_evaluation_the_patience_counts_it_once(train_net, tmp_path, monkeypatch, scored):
    scored(VALUES)
    test, killed = Trainer.test, []

    def fails_once(cfg, model):
        if get_event_storage().iter == 5 and not killed:
            killed.append(True)
            raise Interruption
        return test(cfg, model)

    monkeypatch.setattr(Trainer, "test", staticmethod(fails_once))
    words = ["--resume", "OUTPUT_DIR", tmp_path, *WORDS, "SOLVER.CHECKPOINT_PERIOD", 2]
    with pytest.raises(Interruption):
        train_net(*words)
    train_net(*words)
    assert final(tmp_path)["iteration"] == 6
    assert [line["bbox/AP"] for line in metrics(tmp_path)] == VALUES[:8]


def test_a_checkpoint_that_is_best_is_not_resumed_from(train_net, tmp_path, scored):
    scored([5.0, 1.0, 1.0])
    words = ["OUTPUT_DIR", tmp_path, "TEST.EVAL_PERIOD", 1, "TEST.BEST_METRIC", "bbox/AP"]
    train_net(*words, "SOLVER.MAX_ITER", 2)
    assert final(tmp_path, "model_best.pth")["iteration"] == 0
    (tmp_path / "last_checkpoint").unlink()
    assert AtomicCheckpointer(None, str(tmp_path)).last_whole_checkpoint().endswith("model_final.pth")


def test_all_processes_stop_at_the_same_step(tmp_path):
    """The main process alone knows the results."""
    first, second = run_pair(tmp_path / "pair", pair.stop_early, str(tmp_path))
    assert first == second == {"steps": 4, "waited": 2, "value": 2.0}
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["iteration"] == 1
