"""Setting up and importing: quietly where all is there, and else with a word on what to do."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_python(code, *options, **env):
    command = [sys.executable, *options, "-c", textwrap.dedent(code)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)


def test_import_is_quiet_and_changes_nothing_else():
    """Not Detectron2's defaults and catalogs, and not what the user is warned of. What is printed is all of stderr."""
    code = """
        import importlib, pkgutil, runpy, torch, warnings

        def deprecations():
            with warnings.catch_warnings(record=True) as caught:
                torch.jit.script(torch.nn.Identity())
            return [warning.category for warning in caught]

        as_ever = deprecations()
        runpy.run_path("focal_plugin/_detectron2.py")  # what focal_plugin begins with
        from detectron2.config import get_cfg, global_cfg
        from detectron2.data import DatasetCatalog
        before = get_cfg(), global_cfg.clone(), list(DatasetCatalog)
        import focal_plugin
        for module in pkgutil.walk_packages(focal_plugin.__path__, "focal_plugin."):
            importlib.import_module(module.name)
        assert before == (get_cfg(), global_cfg, list(DatasetCatalog))

        import detectron2.engine, detectron2.evaluation, detectron2.model_zoo
        assert deprecations() == as_ever
    """
    result = run_python(code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("folder", ["", "detectron2"], ids=["nothing", "only a folder of that name"])
def test_without_detectron2_the_import_says_what_to_do(tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    result = run_python("import focal_plugin", "-S", PYTHONPATH=str(tmp_path))  # -S: no site-packages
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: focal_plugin needs Detectron2")
    assert "make setup" in message


def test_a_broken_detectron2_is_not_taken_for_a_missing_one(tmp_path):
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("import what_detectron2_needs")
    result = run_python("import focal_plugin", PYTHONPATH=str(tmp_path))
    assert result.stderr.strip().endswith("No module named 'what_detectron2_needs'")


# Set-up


def set_up(tmp_path, python):
    env = {**os.environ, "PYTHON": str(python), "VENV": str(tmp_path / "venv"), "DETECTRON2": "default"}
    env["STAMP"] = str(tmp_path / "venv" / ".setup-0")
    return subprocess.run(["sh", "requirements/install.sh"], cwd=ROOT, env=env, capture_output=True, text=True)


def fake_python(path, version, has_venv):
    """A stand-in for an interpreter of another version, as far as the set-up asks it."""
    exits = {
        "platform": f"echo {version}",
        "version_info": f"exit {int(version < '3.11')}",
        "ensurepip": f"exit {1 - has_venv}",
    }
    cases = "\n".join(f"*{word}*) {command};;" for word, command in exits.items())
    path.write_text(f'#!/bin/sh\ncase "$2" in\n{cases}\n*) exit 9;;\nesac\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "version, has_venv, word",
    [("3.10.4", True, "3.11 or later"), ("3.12.1", False, "python3-venv"), (None, True, "does not run")],
    ids=["old", "no venv", "not there"],
)
def test_set_up_says_what_python_it_needs(tmp_path, version, has_venv, word):
    python = tmp_path / "python3"
    if version:
        fake_python(python, version, has_venv)
    result = set_up(tmp_path, python)
    assert result.returncode != 0
    assert word in result.stderr
    assert "PYTHON=" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_set_up_leaves_a_venv_alone_that_it_did_not_make(tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "mine").touch()
    result = set_up(tmp_path, sys.executable)
    assert result.returncode != 0
    assert "did not make it" in result.stderr
    assert [path.name for path in (tmp_path / "venv").iterdir()] == ["mine"]
