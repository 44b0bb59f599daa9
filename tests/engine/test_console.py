"""The screen shows little and early; the files hold everything."""

import io
import logging
import sys
from types import SimpleNamespace

import pytest
from detectron2.engine import TrainerBase
from detectron2.utils.events import CommonMetricPrinter, get_event_storage

from focal_plugin.engine import StepTrainer
from focal_plugin.engine.console import EarlyWriter, off_screen, progress_bar
from focal_plugin.engine.evaluate import EvaluationHook
from tests.engine.same import metrics


@pytest.fixture
def log():
    """A logger with a child, a screen and a file."""
    screen, file = io.StringIO(), io.StringIO()
    parent, child = logging.getLogger("off_screen_test"), logging.getLogger("off_screen_test.child")
    parent.setLevel(logging.DEBUG)
    parent.propagate = False
    parent.handlers = [logging.StreamHandler(screen), logging.StreamHandler(file)]
    return SimpleNamespace(parent=parent, child=child, screen=screen, file=file)


def test_to_the_file_only(log, monkeypatch):
    monkeypatch.setattr(sys, "stdout", log.screen)
    with off_screen("off_screen_test"):
        log.parent.info("1")
        log.child.info("2")
        log.child.warning("3")
    log.child.info("4")
    assert log.screen.getvalue().split() == ["3", "4"]
    assert log.file.getvalue().split() == ["1", "2", "3", "4"]


def test_an_error_inside_ends_it(log, monkeypatch):
    monkeypatch.setattr(sys, "stdout", log.screen)
    with pytest.raises(RuntimeError), off_screen("off_screen_test"):
        raise RuntimeError
    log.parent.info("1")
    assert log.screen.getvalue().split() == log.file.getvalue().split() == ["1"]


@pytest.mark.parametrize(
    ("start", "end", "period", "expected"),
    [(0, 100, 20, [0, 4]), (50, 100, 20, [50, 54]), (0, 5, 20, [0]), (0, 1, 20, []), (0, 9, 5, [0]), (0, 9, 1, [])],
)
def test_early_lines(start, end, period, expected):
    """None that comes anyway, every ``period`` steps and at the end."""
    trainer = SimpleNamespace(iter=0, start_iter=start, max_iter=end)
    written = []
    hook = EarlyWriter([SimpleNamespace(write=lambda: written.append(trainer.iter))], period)
    hook.trainer = trainer
    for trainer.iter in range(start, end):
        hook.after_step()
    assert written == expected


def test_evaluations_are_written_at_once(train_net, tmp_path):
    """Each is in metrics.json, at its step, however often they are; before, the last before a writing was."""
    words = ["OUTPUT_DIR", tmp_path, "TEST.EVAL_PERIOD", 3, "SOLVER.MAX_ITER", 10, "TEST.BEST_METRIC", ""]
    train_net(*words)
    lines = metrics(tmp_path)
    assert [line["iteration"] for line in lines] == [0, 2, 4, 5, 8, 9, 10]
    assert [line["iteration"] for line in lines if "bbox/AP" in line] == [2, 5, 8, 10]
    assert all("total_loss" in line for line in lines[:-1])


def test_the_screen_is_not_written_after_evaluations(monkeypatch):
    writers, written = [CommonMetricPrinter(9), SimpleNamespace(write=lambda: written.append("file"))], []
    monkeypatch.setattr(CommonMetricPrinter, "write", lambda writer: written.append("screen"))
    hook = EarlyWriter(writers, 20, SimpleNamespace(last=2))
    hook.trainer = SimpleNamespace(iter=2, start_iter=0, max_iter=9)
    hook.after_step()
    assert written == ["file"]


@pytest.mark.parametrize("resumed", [False, True])
def test_the_rate_of_a_step_is_the_one_in_metrics_json(train_net, tmp_path, monkeypatch, resumed):
    used, take_step = {}, StepTrainer.run_step

    def run_step(trainer):
        used[trainer.iter] = max(group["lr"] for group in trainer.optimizer.param_groups)
        take_step(trainer)

    monkeypatch.setattr(StepTrainer, "run_step", run_step)
    words = ["OUTPUT_DIR", tmp_path, "DATASETS.TEST", "()", "SOLVER.WARMUP_ITERS", 2, "SOLVER.STEPS", "(3,)"]
    for steps in (4, 7) if resumed else (7,):
        train_net("--resume", *words, "SOLVER.MAX_ITER", steps)
    found = {line["iteration"]: line["lr"] for line in metrics(tmp_path)}
    assert len(found) >= 3 and len(set(used.values())) == 4
    assert found == {step: used[step] for step in found}


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self):
        return True


class Steps(TrainerBase):
    def run_step(self):
        get_event_storage().put_scalar("total_loss", 1.5)
        logging.getLogger("focal_plugin.test").debug("a detail")
        logging.getLogger("focal_plugin.test").info("a line")


def test_a_bar_on_a_terminal(monkeypatch, loggers):
    """It has the steps, the time left and the loss; log lines are whole, and details stay in the file."""
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    logger, handler = logging.getLogger("focal_plugin"), logging.StreamHandler(screen)
    handler.setLevel(logging.INFO)
    logger.handlers, logger.level, logger.propagate = [handler], logging.DEBUG, False
    evaluation = EvaluationHook(2, lambda: print("| AP |") or {})
    bar, trainer = progress_bar(evaluation), Steps()
    trainer.register_hooks([bar, evaluation])
    trainer.train(3, 7)
    text = screen.getvalue()
    assert logger.handlers == [handler]
    assert "a detail" not in text and text.count("a line\n") == 4
    assert all(line.endswith(("a line", "| AP |", "\r")) or "step" in line for line in text.split("\n") if line)
    assert "3/7 [" in text and "loss 1.5" in text and "?step/s" in text
    assert text.count("\r| AP |\n") == 3 and text.endswith("\r| AP |\n")  # no bar before it, and none is left


def test_no_bar_elsewhere():
    assert progress_bar(None) is None  # the tests' screen is a file
