"""A checkpoint is whole or not there, whatever happens while it is written; a broken one is passed over."""

import errno
import os
import random
import resource
import zipfile

import pytest
import torch
from torch import nn

from focal_plugin.config import ConfigError
from focal_plugin.engine import AtomicCheckpointer, sole_training
from focal_plugin.engine import checkpoint as module
from focal_plugin.engine.checkpoint import what_is_broken
from focal_plugin.files.safe_load import WeightsError
from focal_plugin.files.write import explained_full_disk, replace_file


class Counter:
    """Something to keep beside the weights."""

    def __init__(self, steps=0):
        self.steps = steps

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def make(folder, steps=0):
    model = nn.Linear(64, 64)
    nn.init.constant_(model.weight, steps)
    return AtomicCheckpointer(model, str(folder), counter=Counter(steps))


def save(folder, steps):
    make(folder, steps).save("model_final" if steps == 9 else f"model_{steps:07d}", iteration=steps)


def resume(folder):
    """The steps and weights that a run would go on with."""
    checkpointer = make(folder)
    rest = checkpointer.resume_or_load("", resume=True)
    steps = checkpointer.checkpointables["counter"].steps
    assert rest == {"iteration": steps} and bool((checkpointer.model.weight == steps).all())
    return steps


def test_the_last_one(tmp_path, caplog):
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth", "model_0000002.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    assert resume(tmp_path) == 2
    checkpointer = make(tmp_path)
    with caplog.at_level("WARNING"):
        checkpointer.resume_or_load(str(tmp_path / "model_0000001.pth"), resume=False)
    assert "holds an earlier run, whose checkpoints this one replaces" in caplog.text
    assert checkpointer.model.weight.unique().item() == 1 and checkpointer.checkpointables["counter"].steps == 0


def test_detectron2_reads_it(tmp_path):
    from detectron2.checkpoint import DetectionCheckpointer

    save(tmp_path, 3)
    theirs = DetectionCheckpointer(nn.Linear(64, 64), str(tmp_path))
    assert theirs.resume_or_load("")["iteration"] == 3
    assert theirs.model.weight.unique().item() == 3


def test_nothing_to_resume_from(tmp_path):
    checkpointer = make(tmp_path, 5)
    assert checkpointer.resume_or_load("", resume=True) == {}
    assert checkpointer.model.weight.unique().item() == 5


def test_a_checkpoint_of_another_project(tmp_path):
    model = nn.Linear(2, 2)
    torch.save({"meta": {"epoch": 12}, "state_dict": model.state_dict()}, tmp_path / "mmdetection.pth")
    with pytest.raises(WeightsError, match=r"mmdetection\.pth is no checkpoint of Detectron2's.*focal_plugin convert"):
        AtomicCheckpointer(model, str(tmp_path)).resume_or_load(str(tmp_path / "mmdetection.pth"), resume=False)


@pytest.mark.parametrize("resume", [True, False])
def test_weights_that_are_not_there(tmp_path, resume):
    with pytest.raises(
        FileNotFoundError, match=r"MODEL\.WEIGHTS .* is nowhere\.pth, which is no file \(current folder"
    ):
        make(tmp_path).resume_or_load("nowhere.pth", resume=resume)
    save(tmp_path, 2)
    if resume:  # then they do not matter
        assert make(tmp_path).resume_or_load("nowhere.pth", resume=True) == {"iteration": 2}


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    """One bit of the weights: PyTorch would load it."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda part: part.file_size)
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["iteration"] > 0


def lose(path):
    path.unlink()


def zeros(path):
    """What some file systems make of a file whose content never reached the disk."""
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [cut, empty, flip, lose, zeros])
@pytest.mark.parametrize("last", [3, 9])
def test_a_broken_one_is_passed_over(tmp_path, caplog, damage, last):
    for steps in (1, 2, last):
        save(tmp_path, steps)
    path = tmp_path / ("model_final.pth" if last == 9 else "model_0000003.pth")
    damage(path)
    assert resume(tmp_path) == 2
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert (
        str(path) in record.message and f"Going on from the one before: {tmp_path}/model_0000002.pth" in record.message
    )
    cut(tmp_path / "model_0000002.pth")
    assert resume(tmp_path) == 1
    cut(tmp_path / "model_0000001.pth")
    with pytest.raises(OSError, match=r"no checkpoint in .* is whole") as error:
        resume(tmp_path)
    assert "model_0000001.pth" in str(error.value) and "model_0000002.pth" in str(error.value)


def test_those_of_later_steps_are_of_another_run(tmp_path):
    save(tmp_path, 8)  # left there by a run before
    save(tmp_path, 9)
    save(tmp_path, 1)
    save(tmp_path, 2)
    cut(tmp_path / "model_0000002.pth")
    assert resume(tmp_path) == 1
    cut(tmp_path / "model_0000001.pth")
    assert resume(tmp_path) == 9  # of a shorter run, which this one went on with


@pytest.mark.parametrize("name", [b"", bytes(20), b"nothing.pth", b"\x93\xff.pth"])
def test_last_checkpoint_names_no_file(tmp_path, name):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "last_checkpoint").write_bytes(name)
    assert resume(tmp_path) == 2


@pytest.mark.parametrize("lost", [[], [9], [9, 3]])
def test_last_checkpoint_is_gone(tmp_path, caplog, lost):
    """The one with the most steps is taken, and that is said."""
    for steps in (1, 9, 3):  # model_final has 9
        save(tmp_path, steps)
    (tmp_path / "last_checkpoint").unlink()
    for steps in lost:
        cut(tmp_path / ("model_final.pth" if steps == 9 else f"model_{steps:07d}.pth"))
    assert resume(tmp_path) == {0: 9, 1: 3, 2: 1}[len(lost)]
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "Going on from" in record.message and ("last_checkpoint is gone" in record.message or lost)


@pytest.mark.parametrize("part", range(8))
def test_any_bit_flips(tmp_path, part):
    """Wherever it is in the file: the checkpoint is as it was, or that before it is used."""
    small = nn.Linear(2, 2)
    nn.init.constant_(small.weight, 1.0)
    for steps in (1, 2):
        AtomicCheckpointer(small, str(tmp_path), counter=Counter(steps)).save(f"model_{steps:07d}", iteration=steps)
    path = tmp_path / "model_0000002.pth"
    content = path.read_bytes()
    directory = content.index(b"PK\x01\x02")
    generator = random.Random(part)
    bits = list(range(8 * directory, 8 * len(content)))[part::8] if part else range(0, 8 * directory, 257)
    for bit in generator.sample(bits, min(len(bits), 150)):
        broken = bytearray(content)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        checkpointer = AtomicCheckpointer(nn.Linear(2, 2), str(tmp_path), counter=Counter())
        steps = checkpointer.resume_or_load("", resume=True)["iteration"]
        assert steps == checkpointer.checkpointables["counter"].steps and steps in (1, 2)
        assert bool((checkpointer.model.weight == 1).all())


def test_a_checkpoint_of_another_model(tmp_path):
    save(tmp_path, 1)
    other = AtomicCheckpointer(nn.Linear(64, 32), str(tmp_path), counter=Counter())
    with pytest.raises(
        ConfigError, match=r"model_0000001\.pth is of another model: weight is \(64, 64\), expected \(32, 64"
    ):
        other.resume_or_load("", resume=True)


class Killed(BaseException):
    """The process ends here."""


def interrupt(monkeypatch, where, call):
    """Let the ``call``-th call of a function of the operating system, or what follows it, not happen."""
    name, _, after = where.partition(" ")
    original, count = getattr(os, name), iter(range(1, 99))

    def killed(*args):
        if next(count) != call:
            return original(*args)
        if after:
            original(*args)
        raise Killed

    monkeypatch.setattr(module.os, name, killed)


@pytest.mark.parametrize("where", ["fsync", "fsync after", "replace", "replace after"])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_killed_while_saving(tmp_path, monkeypatch, where, call):
    """At any of the steps of saving, there is the checkpoint from before or the new one."""
    save(tmp_path, 1)
    with monkeypatch.context() as patched:
        interrupt(patched, where, call)
        try:
            save(tmp_path, 2)
            done = True
        except Killed:
            done = False
    named = (tmp_path / "last_checkpoint").read_text()
    assert what_is_broken(str(tmp_path / named)) == ""
    assert resume(tmp_path) == (2 if named == "model_0000002.pth" else 1)
    if done:
        assert named == "model_0000002.pth"
    with sole_training(str(tmp_path)):  # what was left is cleared away
        assert not list(tmp_path.glob("*.part"))


def test_killed_while_writing(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def write(file):
        file.write(b"aft")
        file.flush()
        raise Killed

    with pytest.raises(Killed):
        replace_file(str(path), write)
    assert path.read_text() == "before"


def test_an_error_without_a_number(tmp_path):
    def write(file):
        raise RuntimeError("unexpected pos 64 vs 0")

    with pytest.raises(OSError, match=r"file could not be written, and is as it was: unexpected pos") as error:
        replace_file(str(tmp_path / "file"), write)
    assert "None" not in str(error.value)


@pytest.fixture
def full_disk():
    """No file may grow beyond 8 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room(tmp_path, request):
    save(tmp_path, 1)
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match=r"model_0000002\.pth could not be written") as error:
        save(tmp_path, 2)
    assert error.value.errno == errno.EFBIG
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]
    assert resume(tmp_path) == 1


@pytest.mark.parametrize(("number", "explained"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)])
def test_what_is_said_of_a_full_disk(number, explained):
    with pytest.raises(OSError) as error, explained_full_disk("/out"):
        raise OSError(number, os.strerror(number))
    assert error.value.errno == number
    assert ("Make room, then go on with --resume" in str(error.value)) == explained
