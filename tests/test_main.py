"""The front door: every command by name, its modules imported when it is called, its help under its own name."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from focal_plugin import __main__ as front
from focal_plugin.commands import train
from focal_plugin.engine import Trainer

ROOT = Path(__file__).parents[1]
NAMES = {
    "train",
    "eval",
    "predict",
    "export",
    "convert",
    "doctor",
    "analysis",
    "ablation",
    "replay",
    "quickstart",
    "data",
}


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_one_help_page(capsys, flag):
    assert front.main([flag], "focal") == 0
    page = capsys.readouterr().out
    listed = page.split("commands:\n")[1].split("\n\n")[0]
    assert {line.split()[0] for line in listed.splitlines()} == NAMES == set(front.COMMANDS)
    assert page.startswith("usage: focal COMMAND")
    assert "focal train --config-file quickstart/trees.yaml" in page
    assert str(ROOT / "configs") in page
    assert max(map(len, page.splitlines())) <= 120


def test_no_command(capsys):
    assert front.main([], "focal") == 2
    assert capsys.readouterr().err == front.help_page("focal")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("pridict", "Near it: predict."),
        ("evaluate", "Near it: eval."),
        ("xyz", "The commands: quickstart, data, doctor, "),
    ],
)
def test_an_unknown_command(capsys, name, hint):
    assert front.main([name, "--help"], "focal") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"focal: there is no command {name!r}. {hint}")
    assert error.endswith(". See `focal --help`.\n") and error.count("\n") == 1


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_command_has_its_own_help(capsys, name):
    with pytest.raises(SystemExit) as end:
        front.main([name, "--help"], "focal")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: focal {name} ")


@pytest.mark.parametrize(
    "module",
    ["analysis", "ablation", "data", "deploy.predict", "deploy.export", "deploy.convert", "data.quickstart"]
    + ["engine.replay"],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_each_module_is_still_a_program(capsys, monkeypatch, module):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"focal_plugin.{module}", run_name="__main__")
    assert not end.value.code
    page = capsys.readouterr().out
    named = module not in ("data.quickstart", "engine.replay")  # which are called by argparse after their file
    assert page.startswith(f"usage: python -m focal_plugin.{module} " if named else f"usage: {module} ")


def test_a_command_takes_its_words_and_gives_its_exit_code(monkeypatch):
    called = []
    monkeypatch.setattr(train, "main", lambda *args: called.append(args) or 3)
    assert front.main(["train", "--config-file", "my.yaml", "SEED", "1"], "focal") == 3
    assert called == [(["--config-file", "my.yaml", "SEED", "1"], "focal train")]


def test_a_command_finds_the_modules_of_the_current_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "main", lambda words, prog: None)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert front.main(["train"], "focal") is None
    assert sys.path.count(str(tmp_path)) == 1


def run(*words, code=None):
    command = [sys.executable, *(["-c", code] if code else ["-m", "focal_plugin", *words])]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def test_python_m_focal_plugin():
    result = run("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: python -m focal_plugin COMMAND")


def test_modules_are_imported_when_their_command_is_called():
    """The public names need the rooms of the paper and some beside it, and the front door no others."""
    code = """
import sys
import focal_plugin
before = set(sys.modules)
from focal_plugin import __main__ as front
for words in ([], ["--help"], ["no-such"]):
    front.main(words, "focal")
print(*(name for name in sys.modules if name not in before and name.startswith("focal_plugin")), file=sys.stderr)
for room in ("ablation", "analysis", "deploy", "engine", "train"):
    assert f"focal_plugin.{room}" not in sys.modules, room
"""
    result = run(code=code)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1] == "focal_plugin.__main__"


# Training, evaluation and checks


def test_eval(tiny_config, monkeypatch):
    given = []
    monkeypatch.setattr(train, "launch", lambda process, *args, **kwargs: given.append((process, kwargs["args"])))
    words = ["--config-file", tiny_config, "--resume", "SEED", "1"]
    assert front.main(["eval", *words], "focal") == 0
    assert front.main(["train", *words], "focal") == 0
    (process, (evaluated,)), (_, (trained,)) = given
    assert process is train.run
    assert (evaluated.eval_only, trained.eval_only) == (True, False)
    assert evaluated.resume and evaluated.config_file == tiny_config and evaluated.opts == ["SEED", "1"]


def test_run_takes_another_trainer(tiny_config, monkeypatch):
    class MyTrainer(Trainer):
        def __init__(self, cfg, *args):
            raise InterruptedError(cfg.SEED)

    args = train.build_parser().parse_args(["--config-file", tiny_config, "SEED", "7"])
    monkeypatch.setattr(train, "start_run", lambda cfg, args: None)
    with pytest.raises(InterruptedError, match="7"):
        train.run(args, MyTrainer)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--config-file", "no.yaml"], "--config-file no.yaml: there is no such file"),
        (["NO.SUCH.KEY", "1"], "there is no key NO.SUCH.KEY"),
        (["MODEL.RETINANET.NUM_CLASSES", "3"], "MODEL.RETINANET.NUM_CLASSES is 3"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "nowhere.pth, which is no file"),
        (["MODEL.FOCAL.IMPORTS", "['no_such_module']"], "MODEL.FOCAL.IMPORTS names 'no_such_module'"),
        (["DATASETS.LOCAL", "[{'name': 'x', 'format': 'yolov8'}]"], "has format 'yolov8'"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_mistake_is_a_sentence_not_a_traceback(tiny_config, loggers, capsys, command, words, text):
    assert front.main([command, "--config-file", tiny_config, *words], "focal") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and text in error and "Traceback" not in error


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("no", name="numpy"), FileNotFoundError(2, "no", "a.png"), KeyError()]
)
def test_an_error_of_python_has_its_traceback(tiny_config, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(train, "launch", fail)
    with pytest.raises(type(error)):
        front.main(["train", "--config-file", tiny_config], "focal")


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ([], 0, "first loss"),
        (["MODEL.RETINANET.NUM_CLASSES", "3"], 1, "NUM_CLASSES"),
        (["--weights", "nowhere.pth"], 1, "nowhere.pth"),
        (["--num-images", "-1"], 2, "--num-images"),
    ],
)
def test_doctor(tiny_config, capsys, words, code, text):
    assert front.main(["doctor", "--config-file", tiny_config, *words], "focal") == code
    assert text in "".join(capsys.readouterr())


def test_doctor_takes_the_words_of_training_and_those_of_the_analysis(monkeypatch):
    given = []
    monkeypatch.setattr(train, "analyse", given.append)
    words = ["--config-file", "my.yaml", "--num-gpus", "8", "--resume", "--num-images", "3", "SEED", "1"]
    front.main(["doctor", *words], "focal")
    front.main(["train", "--doctor", "--config-file", "my.yaml"], "focal")
    assert given == [
        ["doctor", "--config-file", "my.yaml", "--resume", "--num-gpus", "8", "--num-images", "3", "SEED", "1"],
        ["doctor", "--config-file", "my.yaml"],
    ]


def test_quickstart_says_what_it_needs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        front.main(["quickstart", "--output", str(tmp_path / "trees")], "focal")
    assert end.value.code == 1
    assert "pip install --no-deps deepforest==2.1.0" in capsys.readouterr().err
    assert not (tmp_path / "trees").exists()


@pytest.mark.parametrize(("name", "hidden"), [("eval", True), ("doctor", True), ("train", False)])
def test_helps_offer_what_makes_sense(capsys, name, hidden):
    with pytest.raises(SystemExit):
        front.main([name, "--help"], "focal")
    text = " ".join(capsys.readouterr().out.split())
    assert ("--eval-only" in text, "--doctor" in text) == (not hidden, not hidden)
    assert ("take the last checkpoint in OUTPUT_DIR" in text) == hidden and "--resume" in text
