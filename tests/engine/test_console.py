"""The screen shows little and early; the files hold everything."""

import io
import logging
import sys
from types import SimpleNamespace

import pytest

from focal_plugin.engine.console import EarlyWriter, off_screen


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
