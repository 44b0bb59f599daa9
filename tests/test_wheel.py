"""An installed wheel works on its own: in another environment, in a folder that is no checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from focal_plugin import __version__
from focal_plugin.__main__ import COMMANDS
from tests.conftest import write_shapes

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")

# Prints where the package is and, as JSON, the help of each command.
HELPS = """
import contextlib, io, json
import focal_plugin
from focal_plugin.__main__ import COMMANDS, main
pages = {}
for name in COMMANDS:
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        main([name, "--help"], "focal")
    pages[name] = page.getvalue()
print(json.dumps([focal_plugin.__file__, pages]))
"""


def run(*command, cwd, **env):
    """What a command prints, which must succeed; no variable leads it to the checkout."""
    base = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    base |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONNOUSERSITE": "1", **env}
    result = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=base, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a source distribution of a copy of the checkout, whose folders stay free of what a build leaves."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("focal_plugin", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source)
    code = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    run(sys.executable, "-c", code, cwd=source)
    (sdist,) = (source / "dist").iterdir()
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    run(sys.executable, "-m", "pip", "wheel", *options, sdist, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel in a new environment, which sees what it needs in the environment of the tests; a folder to work in."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    options = ["--no-deps", "--no-index", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=folder)
    # Only now, so that pip does not see another focal_plugin. The .pth files of these folders, such as that of an
    # editable installation, have no effect from here.
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    seen = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (site / "tests_environment.pth").write_text("\n".join(seen) + "\n")
    work = folder / "work"
    work.mkdir()
    return SimpleNamespace(site=site, python=python, focal=folder / "venv" / "bin" / "focal", work=work)


def files_of(folder):
    """The files below a folder of the checkout, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*.*") if "__pycache__" not in path.parts}


def test_the_wheel_has_all_modules_and_configs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {f"focal_plugin/{name}" for name in files_of(ROOT / "focal_plugin")}
    assert names == expected | {f"focal_plugin/configs/{name}" for name in files_of(ROOT / "configs")}
    assert "focal_plugin/ablation/template.html" in names
    assert "focal_plugin/analysis/labels/hardest.html" in names


@pytest.mark.slow
def test_each_command_has_its_help(installed):
    place, pages = json.loads(run(installed.python, "-c", HELPS, cwd=installed.work))
    assert Path(place).is_relative_to(installed.site)
    assert pages.keys() == COMMANDS.keys()
    for name, page in pages.items():
        assert page.startswith(f"usage: focal {name} ")
    page = run(installed.focal, "--help", cwd=installed.work)
    assert page.startswith("usage: focal COMMAND")
    assert str(installed.site / "focal_plugin" / "configs") in page


@pytest.mark.slow
def test_train_evaluate_predict_and_report(installed):
    """In two processes on the CPU, on a shipped config that only the installed package has."""
    work, focal = installed.work, installed.focal
    entries = [write_shapes(work / "data", "shapes_train", 6, seed=0), write_shapes(work / "data", "shapes_test", 4, 1)]
    changes = [
        *["DATASETS.LOCAL", str(entries), "DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_test',)"],
        *["MODEL.FOCAL.TIMM.WEIGHTS", "", "MODEL.RETINANET.NUM_CLASSES", 2, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.001],
        *["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", 64, "TEST.EVAL_PERIOD", 0, "SOLVER.MAX_ITER", 2],
    ]
    words = ["--config-file", "quickstart/trees.yaml", *changes, "OUTPUT_DIR", "output"]
    trained = run(focal, "train", "--num-gpus", 2, "--dist-url", "auto", *words, cwd=work)
    assert "2 processes of 1 thread" in trained and "Results on shapes_test" in trained

    assert (work / "output" / "inference" / "evaluation.html").stat().st_size > 10_000

    weights = work / "output" / "model_final.pth"
    config = ["--config-file", "output/config.yaml"]
    assert "Results on shapes_test" in run(focal, "eval", *config, "MODEL.WEIGHTS", weights, cwd=work)

    run(focal, "predict", *config, "--weights", weights, "data/shapes_test/", "--output", "found", cwd=work)
    assert len(json.loads((work / "found" / "images.json").read_text())["images"]) == 4

    rows = ["paper/table1b_gamma_0.yaml", "paper/table1b_gamma_2.yaml", "--data", "quickstart", "--output", "table"]
    report = run(focal, "ablation", *rows, "--jobs", 1, *changes, cwd=work)
    assert (work / "table" / "report.md").read_text() in report
    assert "- Config: each row's own keys on configs/quickstart/trees.yaml" in report
    assert f"focal_plugin {__version__}" in report
    summary = json.loads((work / "table" / "report.json").read_text())
    assert [row["num_finished"] for row in summary["rows"]] == [1, 1]
    assert all(row["paper"]["AP"] > 30 for row in summary["rows"])
    assert (work / "table" / "report.html").stat().st_size > 10_000
