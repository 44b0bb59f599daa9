"""SIGTERM and SIGINT: the step is finished and saved, the exit code says so, and the run goes on as if nothing was."""

import os
import signal
import time

import pytest

from focal_plugin.engine import StepTrainer
from focal_plugin.engine.signals import EXIT_CODES, SIGNALS, StopSignals
from tests.engine.same import assert_same_run


@pytest.mark.parametrize(("number", "code"), list(zip(SIGNALS, EXIT_CODES)))
def test_a_signal_in_the_middle_of_a_step(train_net, tmp_path, monkeypatch, capfd, number, code):
    words = ["DATASETS.TEST", "()", "SOLVER.MAX_ITER", 5, "DATALOADER.NUM_WORKERS", 2]
    forward_backward, before = StepTrainer.forward_backward, [signal.getsignal(each) for each in SIGNALS]

    def signalled(trainer, batch):
        if trainer.iter == 2:
            os.kill(os.getpid(), number)
        return forward_backward(trainer, batch)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(StepTrainer, "forward_backward", signalled)
        train_net("OUTPUT_DIR", tmp_path / "stopped", *words)
    assert ended.value.code == code == 128 + number
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert (tmp_path / "stopped/last_checkpoint").read_text() == "model_0000002.pth"
    out, err = capfd.readouterr()
    assert f"{signal.Signals(number).name}: finishing this step" in err
    assert "stopped after 3 steps" in out and "--resume goes on" in out
    train_net("--resume", "OUTPUT_DIR", tmp_path / "stopped", *words)
    train_net("OUTPUT_DIR", tmp_path / "whole", *words)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_a_signal_in_the_last_step(train_net, tmp_path, monkeypatch):
    """All steps are done, and saved; what comes after them is left to a resumed run."""
    forward_backward = StepTrainer.forward_backward

    def signalled(trainer, batch):
        if trainer.iter == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward_backward(trainer, batch)

    words = ["SOLVER.MAX_ITER", 2, "OUTPUT_DIR", tmp_path]
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(StepTrainer, "forward_backward", signalled)
        train_net(*words)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert not (tmp_path / "inference").exists()  # whoever sends SIGTERM does not wait for an evaluation
    assert "AP" in train_net("--resume", *words)["bbox"]


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_ends_it_at_once(first, second):
    child = os.fork()
    if not child:
        os.close(2)  # what it says is looked at above
        os.open(os.devnull, os.O_WRONLY)
        signals = StopSignals()
        signals.install()
        os.kill(os.getpid(), first)
        if signals.received != first or signals.agreed() != first:
            os._exit(1)
        os.kill(os.getpid(), second)
        os._exit(2)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == second


def test_a_signal_is_answered_at_once():
    """In a thread, while the main thread waits; before and after, signals are only noted."""
    before, answers = signal.set_wakeup_fd(-1), []
    with StopSignals().answered(answers.append):  # not installed
        pass
    signals = StopSignals()
    signals.install()
    try:
        with signals.answered(answers.append):
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 10
            while not answers and time.monotonic() < deadline:
                time.sleep(0.01)
        assert answers == [signal.SIGTERM] and signals.received == signal.SIGTERM
        assert signal.set_wakeup_fd(-1) == before == -1
        with pytest.raises(ValueError, match="of the evaluation"), signals.answered(answers.append):
            raise ValueError("of the evaluation")
        assert answers == [signal.SIGTERM] * 2  # an error after a signal: perhaps since another process has ended
    finally:
        signals.remove()


def test_an_error_in_an_evaluation_is_that_error():
    signals = StopSignals()
    signals.install()
    try:
        with pytest.raises(ValueError, match="of the evaluation"), signals.answered(pytest.fail):
            raise ValueError("of the evaluation")
    finally:
        signals.remove()


def test_signals_do_what_they_did_before():
    before = [signal.getsignal(number) for number in SIGNALS]
    signals = StopSignals()
    signals.install()
    assert [signal.getsignal(number) for number in SIGNALS] != before
    signals.remove()
    assert [signal.getsignal(number) for number in SIGNALS] == before
