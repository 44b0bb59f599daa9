"""A run that was interrupted and resumed is the run that was not, bit for bit."""

import io
import json
import random
import re

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage

from focal_plugin.engine import AtomicCheckpointer, StepTrainer, Trainer
from focal_plugin.engine.metrics import MetricsWriter, load_storage_state, storage_state
from focal_plugin.engine.rng import rng_state, seeded, set_rng_state
from tests.engine.same import assert_same, assert_same_run, final, metrics


class Interruption(BaseException):
    """Ends a run as nothing in it expects."""


@pytest.fixture
def interrupted(train_net, monkeypatch):
    """Run train_net with an interruption before each of the given steps, resuming after each, until it is done."""

    def run(*words, before=(), **settings):
        left = list(before)
        take_step = StepTrainer.run_step

        def run_step(trainer):
            if left and trainer.iter == left[0]:
                raise Interruption(left.pop(0))
            take_step(trainer)

        monkeypatch.setattr(StepTrainer, "run_step", run_step)
        for _ in before:
            with pytest.raises(Interruption):
                train_net("--resume", *words, **settings)
        train_net("--resume", *words, **settings)

    return run


NO_TEST = ["DATASETS.TEST", "()"]
AUGMENTED = "[{'name': 'RandomBrightness', 'intensity_min': 0.5, 'intensity_max': 1.5}]"
ALL_AT_ONCE = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16", "SOLVER.ACCUMULATE", 2]
ALL_AT_ONCE += ["MODEL.FOCAL.CLS_LOSS.NAME", "SampledBCELoss", "INPUT.AUGMENTATIONS", AUGMENTED, "TEST.EVAL_PERIOD", 2]


@pytest.mark.parametrize(
    ("words", "before"),
    [
        ([*NO_TEST, "DATALOADER.NUM_WORKERS", 2], [3, 5]),
        ([*NO_TEST, "SEED", -1, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"], [1, 4]),
        (ALL_AT_ONCE, [4]),
    ],
    ids=["workers", "without a seed", "all at once"],
)
def test_a_resumed_run_is_the_run(interrupted, train_net, tmp_path, words, before):
    words = [*words, "SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.BASE_LR", 0.02]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    interrupted("OUTPUT_DIR", broken, *words, before=before)
    if "SEED" in words:
        (line,) = [line for line in (broken / "config.yaml").read_text().splitlines() if line.startswith("SEED")]
        words += ["SEED", line.split()[1]]
    train_net("OUTPUT_DIR", whole, *words)
    assert_same_run(broken, whole)
    if words[: len(ALL_AT_ONCE)] == ALL_AT_ONCE:
        assert [line["iteration"] for line in metrics(whole)] == [0, 3, 4, 5, 6]
        assert final(whole)["trainer"]["_trainer"]["grad_scaler"]["_growth_tracker"] > 0


def test_a_resumed_lazy_run_without_a_seed(interrupted, train_net, lazy_config, tmp_path):
    words = ["train.max_iter=6", "train.checkpointer.period=2", "dataloader.evaluator=null"]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    settings = {"config": lazy_config}
    interrupted(f"train.output_dir={broken}", "train.seed=-1", *words, before=[3], **settings)
    (seed,) = re.findall(r"^  seed: (\d+)$", (broken / "config.yaml").read_text(), re.MULTILINE)
    train_net(f"train.output_dir={whole}", f"train.seed={seed}", *words, **settings)
    assert_same_run(broken, whole)


def test_the_order_does_not_depend_on_workers(train_net, tmp_path):
    words = [*NO_TEST, "INPUT.AUGMENTATIONS", AUGMENTED, "SOLVER.CHECKPOINT_PERIOD", 2]
    for workers in (0, 1, 2):
        train_net("OUTPUT_DIR", tmp_path / str(workers), "DATALOADER.NUM_WORKERS", workers, *words)
    assert_same_run(tmp_path / "1", tmp_path / "0")
    assert_same_run(tmp_path / "2", tmp_path / "0")


def test_killed_between_the_two_checkpoints_of_the_last_step(train_net, tmp_path, monkeypatch):
    words = ["SOLVER.CHECKPOINT_PERIOD", 2, *NO_TEST]
    save = AtomicCheckpointer.save

    def killed(checkpointer, name, **kwargs):
        if name == "model_final":
            raise Interruption
        save(checkpointer, name, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(Interruption):
        patched.setattr(AtomicCheckpointer, "save", killed)
        train_net("OUTPUT_DIR", tmp_path / "broken", *words)
    train_net("--resume", "OUTPUT_DIR", tmp_path / "broken", *words)
    train_net("OUTPUT_DIR", tmp_path / "whole", *words)
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


def test_nothing_is_left_to_do(train_net, tmp_path, monkeypatch):
    """Killed in the evaluation after the last step: resumed, it evaluates what it has."""
    words = ["OUTPUT_DIR", tmp_path / "broken"]

    def killed(*args):
        raise Interruption

    with monkeypatch.context() as patched, pytest.raises(Interruption):
        patched.setattr(Trainer, "test", staticmethod(killed))
        train_net(*words)
    train_net("--resume", *words)
    train_net("OUTPUT_DIR", tmp_path / "whole")
    assert_same_run(tmp_path / "broken", tmp_path / "whole")
    assert [line["iteration"] for line in metrics(tmp_path / "broken")] == [0, 3, 4]


def test_killed_in_an_evaluation_on_the_way(train_net, tmp_path, monkeypatch):
    """The evaluation of a step that is saved already is made up for."""
    words = ["TEST.EVAL_PERIOD", 1, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_ITER", 3]
    test, count = Trainer.test, iter(range(1, 9))

    def killed(*args):
        if next(count) == 2:
            raise Interruption
        return test(*args)

    with monkeypatch.context() as patched, pytest.raises(Interruption):
        patched.setattr(Trainer, "test", staticmethod(killed))
        train_net("OUTPUT_DIR", tmp_path / "broken", *words)
    train_net("--resume", "OUTPUT_DIR", tmp_path / "broken", *words)
    train_net("OUTPUT_DIR", tmp_path / "whole", *words)
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


def test_a_checkpoint_of_detectron2s(train_net, tmp_path, capfd):
    """Weights, optimizer and step are taken from it; that the rest is not there is said."""
    words = [*NO_TEST, "OUTPUT_DIR", tmp_path]
    train_net(*words, "SOLVER.MAX_ITER", 2)
    saved = final(tmp_path)
    del saved["trainer"]["hooks"]["CheckpointHook"]
    torch.save(saved, tmp_path / "model_final.pth")
    capfd.readouterr()
    train_net("--resume", *words)
    assert "begin from the start" in capfd.readouterr().out
    assert final(tmp_path)["iteration"] == 3


def test_another_batch_size_goes_on_after_as_many_images(train_net, tmp_path):
    words = [*NO_TEST, "OUTPUT_DIR", tmp_path]
    train_net(*words, "SOLVER.MAX_ITER", 3)
    train_net("--resume", *words, "SOLVER.IMS_PER_BATCH", 3, "SOLVER.MAX_ITER", 4)
    assert final(tmp_path)["trainer"]["hooks"]["CheckpointHook"]["loader"]["images"] == 3 * 2 + 3


def test_random_numbers_go_on():
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist()

    draw()  # leaves the second of a pair of normal numbers for later, in both Python and NumPy
    state = rng_state()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    first = draw(), draw()
    set_rng_state(torch.load(buffer, weights_only=True))
    assert (draw(), draw()) == first


def test_random_numbers_of_a_seed():
    def draw(*numbers):
        with seeded(*numbers):
            return random.random(), np.random.rand(), float(torch.rand(()))

    before = rng_state()
    values = [draw(*numbers) for numbers in ((0, 0), (0, 1), (1, 0), (2**31, 2**40))]
    assert len({value for one in values for value in one}) == 12
    assert draw(0, 1) == values[1]
    assert_same(rng_state(), before)


def test_the_numbers_of_metrics_json_go_on(tmp_path):
    path = tmp_path / "metrics.json"

    def put(storage, steps):
        for storage.iter in steps:
            storage.put_scalar("loss", storage.iter**2)
            storage.put_scalar("lr", storage.iter / 10, smoothing_hint=False)
            storage.put_scalar("time", 1.0)

    with EventStorage() as storage:
        put(storage, range(30))
        writer = MetricsWriter(str(path))
        writer.write()
        state = {"storage": storage_state(storage), "metrics": writer.state_dict()}
        put(storage, range(30, 35))
        writer.write()
        writer.close()
    expected = path.read_text().splitlines()
    path.write_text(path.read_text() + '{"iteration": 36, "lo')
    with EventStorage(30) as storage:
        load_storage_state(storage, state["storage"])
        writer = MetricsWriter(str(path))
        writer.load_state_dict(state["metrics"])
        assert path.read_text().splitlines() == expected[:1]
        writer.write()  # nothing new
        put(storage, range(30, 35))
        writer.write()
        writer.close()
    assert path.read_text().splitlines() == expected
    assert json.loads(expected[1]) == {"iteration": 34, "loss": np.median(np.arange(15, 35) ** 2), "lr": 3.4, "time": 1}
