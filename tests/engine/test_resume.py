"""A run that was interrupted and resumed is the run that was not, bit for bit."""

import io
import json
import random
import re

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage

from focal_plugin.config import ConfigError
from focal_plugin.engine import AtomicCheckpointer, StepTrainer, Trainer
from focal_plugin.engine.metrics import MetricsWriter, load_storage_state, storage_state
from focal_plugin.engine.rng import rng_state, seeded, set_rng_state
from focal_plugin.evaluation.curves import read_metrics
from tests.engine.same import assert_same, assert_same_run, final, metrics


def test_as_many_checkpoints_are_kept_however_often_a_run_resumes(train_net, lazy_config, tmp_path):
    words = ["dataloader.evaluator=null", f"train.output_dir={tmp_path}", "train.checkpointer={period:1,max_to_keep:2}"]
    for steps in (2, 4, 6):
        train_net("--resume", *words, f"train.max_iter={steps}", config=lazy_config)
    names = ["model_0000004.pth", "model_0000005.pth", "model_final.pth"]
    assert sorted(path.name for path in tmp_path.glob("model_*.pth")) == names


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
ALL_AT_ONCE += ["MODEL.FOCAL.EMA.DECAY", 0.3]
ADAMW = ["SOLVER.OPTIMIZER", "adamw", "SOLVER.LR_FACTORS", "[{'head': 0.5}]", "MODEL.FOCAL.EMA.DECAY", 0.3]
ALL_AT_ONCE += ["MODEL.FOCAL.CLS_LOSS.NAME", "SampledBCELoss", "INPUT.AUGMENTATIONS", AUGMENTED, "TEST.EVAL_PERIOD", 2]


@pytest.mark.parametrize(
    ("words", "before"),
    [
        ([*NO_TEST, "DATALOADER.NUM_WORKERS", 2], [3, 5]),
        pytest.param(
            [*NO_TEST, "SEED", -1, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", *ADAMW], [1, 4], marks=pytest.mark.slow
        ),
        (ALL_AT_ONCE, [4]),
    ],
    ids=["workers", "without a seed, AdamW", "all at once"],
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
        assert [line["iteration"] for line in metrics(whole)] == [0, 1, 3, 4, 5, 6]
        assert final(whole)["trainer"]["_trainer"]["grad_scaler"]["_growth_tracker"] > 0
        assert "bbox_EMA/AP" in metrics(whole)[-1]
    if "MODEL.FOCAL.EMA.DECAY" in words:
        assert_same(final(broken, "model_ema_final.pth"), final(whole, "model_ema_final.pth"))
        assert 0 < final(whole)["ema"]["updates"] <= 6


def test_a_resumed_lazy_run_without_a_seed(interrupted, train_net, lazy_config, tmp_path):
    words = ["train.max_iter=6", "train.checkpointer.period=2", "dataloader.evaluator=null"]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    settings = {"config": lazy_config}
    interrupted(f"train.output_dir={broken}", "train.seed=-1", *words, before=[3], **settings)
    (seed,) = re.findall(r"^  seed: (\d+)$", (broken / "config.yaml").read_text(), re.MULTILINE)
    train_net(f"train.output_dir={whole}", f"train.seed={seed}", *words, **settings)
    assert_same_run(broken, whole)


def test_an_evaluation_does_not_change_training(train_net, tmp_path):
    """It draws random numbers, as many as there are processes that load images."""
    words = ["MODEL.FOCAL.CLS_LOSS.NAME", "SampledBCELoss", "INPUT.AUGMENTATIONS", AUGMENTED]
    periods = {"none": (0, 0), "often": (1, 0), "workers": (1, 2)}
    for name, (period, workers) in periods.items():
        words += ["TEST.EVAL_PERIOD", period, "DATALOADER.NUM_WORKERS", workers]
        train_net("OUTPUT_DIR", tmp_path / name, *words)
    states = {name: final(tmp_path / name) for name in periods}
    rng = {name: state["trainer"]["hooks"]["CheckpointHook"]["processes"] for name, state in states.items()}
    for name in ("often", "workers"):
        assert_same(states[name]["model"], states["none"]["model"])
        assert_same(rng[name], rng["none"])


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


def lr(output):
    """The learning rate of each step that is in metrics.json."""
    return {line["iteration"]: line["lr"] for line in metrics(output) if "lr" in line}


def group(output):
    return final(output)["trainer"]["_trainer"]["optimizer"]["param_groups"][0]


def test_what_the_user_says_on_resume_holds(train_net, tmp_path, capfd):
    """Of keys whose values the optimizer's and the schedule's state hold, too; the log names each, old and new."""
    words = [*NO_TEST, "OUTPUT_DIR", tmp_path]
    train_net(*words, "SOLVER.MAX_ITER", 2)
    assert (group(tmp_path)["momentum"], group(tmp_path)["initial_lr"]) == (0.9, 0.001)
    capfd.readouterr()
    changed = ["SOLVER.BASE_LR", 0.002, "SOLVER.MOMENTUM", 0.5, "SOLVER.WEIGHT_DECAY", 0.01, "SOLVER.NESTEROV", True]
    train_net("--resume", *words, *changed, "SOLVER.MAX_ITER", 5, "SOLVER.STEPS", (4,))
    found = group(tmp_path)
    assert {name: found[name] for name in ("momentum", "nesterov", "initial_lr", "weight_decay")} == {
        "momentum": 0.5,
        "nesterov": True,
        "initial_lr": 0.002,
        "weight_decay": 0.01,
    }
    assert found["lr"] == pytest.approx(0.0002)  # after STEPS
    assert lr(tmp_path)[4] == pytest.approx(0.0002)
    screen = capfd.readouterr().out
    for change in ("SOLVER.BASE_LR 0.001 → 0.002", "SOLVER.MOMENTUM 0.9 → 0.5", "SOLVER.STEPS [] → [4]"):
        assert change in screen
    assert "OUTPUT_DIR" not in screen.partition("this one holds")[2].splitlines()[0]
    train_net("--resume", *words, *changed, "SOLVER.MAX_ITER", 6, "SOLVER.STEPS", (4,))
    assert "this one holds: SOLVER.MAX_ITER 5 → 6." in capfd.readouterr().out


def test_the_first_step_after_a_change_has_the_new_rate(train_net, tmp_path, monkeypatch):
    words = [*NO_TEST, "OUTPUT_DIR", tmp_path]
    train_net(*words, "SOLVER.MAX_ITER", 2)
    rates = []
    run_step = StepTrainer.run_step

    def noted(trainer):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        run_step(trainer)

    monkeypatch.setattr(StepTrainer, "run_step", noted)
    train_net("--resume", *words, "SOLVER.BASE_LR", 0.004, "SOLVER.MAX_ITER", 4)
    assert rates == pytest.approx([0.004, 0.004])


def test_what_a_lazy_config_says_on_resume_holds(train_net, lazy_config, tmp_path, capfd):
    words = ["dataloader.evaluator=null", f"train.output_dir={tmp_path}"]
    train_net(*words, "train.max_iter=2", config=lazy_config)
    train_net("--resume", *words, "train.max_iter=3", "optimizer.lr=0.005", config=lazy_config)
    found = final(tmp_path)["trainer"]["optimizer"]["param_groups"][0]
    assert found["initial_lr"] == 0.005
    assert "optimizer.lr 0.001 → 0.005" in capfd.readouterr().out
    with pytest.raises(ConfigError, match=r"train\.seed is 3, and .*model_final\.pth is of a run with 1"):
        train_net("--resume", *words, "train.seed=3", "train.max_iter=4", config=lazy_config)
    with pytest.raises(ConfigError, match=r"another kind of optimizer, by betas, momentum.*optimizer\._target_ torch"):
        train_net("--resume", *words, "optimizer._target_=torch.optim.AdamW", "train.max_iter=4", config=lazy_config)


def test_what_cannot_hold_on_resume_is_refused(train_net, tmp_path):
    """And the folder is as it was."""
    words = [*NO_TEST, "OUTPUT_DIR", tmp_path]
    train_net(*words, "SOLVER.MAX_ITER", 2)
    before = (tmp_path / "config.yaml").read_bytes(), (tmp_path / "metrics.json").read_bytes()
    for key, value, message in (
        ("SEED", 2, r"SEED is 2, and .*model_final\.pth is of a run with 1, whose random numbers go on"),
        ("MODEL.RETINANET.NUM_CONVS", 2, r"is of another model: head\.\S+ is missing.*NUM_CONVS 1 → 2"),
        ("MODEL.FPN.OUT_CHANNELS", 8, r"is of another model: .*expected \(.*MODEL\.FPN\.OUT_CHANNELS 16 → 8"),
        ("SOLVER.BIAS_LR_FACTOR", 2.0, r"its trainer: .*group.*SOLVER\.BIAS_LR_FACTOR 1\.0 → 2\.0"),
        ("SOLVER.MAX_ITER", 1, r"model_final\.pth has 2 steps, and SOLVER\.MAX_ITER .*is 1: nothing is left to train"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_net("--resume", *words, key, value)
        assert ((tmp_path / "config.yaml").read_bytes(), (tmp_path / "metrics.json").read_bytes()) == before
    train_net("--resume", *words, "SOLVER.MAX_ITER", 3)  # as before


def test_keys_of_the_start_are_marked(train_net, tmp_path, capfd):
    """They hold no more: what they had to do with is in the checkpoint."""
    words = [*NO_TEST, "OUTPUT_DIR", tmp_path]
    train_net(*words, "SOLVER.MAX_ITER", 1)
    changed = ["MODEL.WEIGHTS", "elsewhere.pth", "MODEL.RETINANET.PRIOR_PROB", 0.02]
    train_net("--resume", *words, *changed, "SOLVER.MAX_ITER", 2)
    screen = capfd.readouterr().out
    assert "MODEL.WEIGHTS (empty) → elsewhere.pth (not read any more: the checkpoint has the weights)" in screen
    assert "PRIOR_PROB 0.01 → 0.02 (not read any more: the bias is trained)" in screen


def test_weights_of_another_shape_name_the_keys(train_net, tmp_path, capfd):
    train_net(*NO_TEST, "OUTPUT_DIR", tmp_path / "one", "SOLVER.MAX_ITER", 1)
    words = [*NO_TEST, "OUTPUT_DIR", tmp_path / "two", "SOLVER.MAX_ITER", 1, "MODEL.FPN.OUT_CHANNELS", 8]
    train_net(*words, "MODEL.WEIGHTS", tmp_path / "one/model_final.pth")
    assert "is of a run with other values of MODEL.FPN.OUT_CHANNELS 16 → 8" in capfd.readouterr().out


def test_last_checkpoint_is_gone(train_net, tmp_path, capfd):
    words = [*NO_TEST, "SOLVER.CHECKPOINT_PERIOD", 1]
    train_net(*words, "OUTPUT_DIR", tmp_path / "broken", "SOLVER.MAX_ITER", 3)
    (tmp_path / "broken/last_checkpoint").unlink()
    train_net("--resume", *words, "OUTPUT_DIR", tmp_path / "broken", "SOLVER.MAX_ITER", 5)
    assert "last_checkpoint is gone or unreadable. Going on from" in capfd.readouterr().out
    train_net(*words, "OUTPUT_DIR", tmp_path / "whole", "SOLVER.MAX_ITER", 5)
    assert_same(final(tmp_path / "broken")["model"], final(tmp_path / "whole")["model"])
    assert metrics(tmp_path / "broken")[0] == metrics(tmp_path / "whole")[0]


def test_a_broken_last_checkpoint_is_written_again(train_net, tmp_path):
    """All steps are done, and the checkpoint of the last one is not whole."""
    words = [*NO_TEST, "SOLVER.CHECKPOINT_PERIOD", 1, "OUTPUT_DIR", tmp_path]
    train_net(*words)
    whole = final(tmp_path)["model"]
    (tmp_path / "model_final.pth").write_bytes((tmp_path / "model_final.pth").read_bytes()[:-99])
    train_net("--resume", *words)
    assert_same(final(tmp_path)["model"], whole)


def test_damaged_text_files(train_net, tmp_path):
    """A disk may give back anything: what can be done without them is done."""
    words = [*NO_TEST, "SEED", -1, "OUTPUT_DIR", tmp_path]
    train_net(*words, "SOLVER.MAX_ITER", 2)
    before = (tmp_path / "config.yaml").read_bytes()
    for damaged in (b"\xff\xfe" + before, b""):  # the seed is in the checkpoint, too
        (tmp_path / "config.yaml").write_bytes(damaged)
        train_net("--resume", *words, "SOLVER.MAX_ITER", 3)
        assert re.findall(b"^SEED: .*$", (tmp_path / "config.yaml").read_bytes(), re.MULTILINE) == re.findall(
            b"^SEED: .*$", before, re.MULTILINE
        )
    (tmp_path / "metrics.json").write_bytes(b"\xff\xfe\n" + (tmp_path / "metrics.json").read_bytes())
    assert read_metrics(str(tmp_path / "metrics.json"))
