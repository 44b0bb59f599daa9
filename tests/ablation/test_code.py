"""The source of a user's modules is in the report, and runs of different code are never in one table."""

import json
import sys

import pytest

from focal_plugin import ConfigError
from focal_plugin.ablation.code import check_code, read_code, record_code, recorded_code, short_hash
from focal_plugin.ablation.rows import find_base, find_tables
from focal_plugin.ablation.runs import plan


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of modules that this test imports."""
    before = set(sys.modules)
    (tmp_path / "code").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield tmp_path / "code"
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in sys.modules[name].__file__:
            del sys.modules[name]


@pytest.fixture
def module(folder):
    """A user's module, the helper that it imports, and the words of a command line that name it."""
    (folder / "my_part.py").write_text("import my_helper, os\n")
    (folder / "my_helper.py").write_text("SCALE = 1  # ``` \n")
    (folder / "other.py").write_text("")  # nobody imports it
    return ["MODEL.FOCAL.IMPORTS", "['my_part']"]


def write_package(folder):
    package = folder / "my_package"
    (package / "deep").mkdir(parents=True)
    for name, text in {
        "__init__": "from . import losses",
        "losses": "def f():\n    from .deep.tool import x\nfrom my_package import config as c\nimport numpy, my_top",
        "config": "from focal_plugin import losses, no_such\nfrom __future__ import annotations",
        "deep/__init__": "",
        "deep/tool": "from ..losses import f\nfrom .... import x",
        "unused": "",
    }.items():
        (package / f"{name}.py").write_text(text)
    (folder / "my_top.py").write_text("import my_package.no_such, my_package")


def test_modules_and_what_they_import_from_beside_them(folder, module):
    write_package(folder)
    __import__("my_part")
    sys.modules["my_package.losses"] = type(sys)("my_package.losses")
    sys.modules["my_package.losses"].__file__ = str(folder / "my_package" / "losses.py")
    assert set(read_code(["my_part"])) == {"my_part", "my_helper"}
    of_package = {f"my_package{name}" for name in ("", ".losses", ".config", ".deep", ".deep.tool")}
    assert set(read_code(["my_package.losses"])) == of_package | {"my_top"}
    assert read_code(["my_part"])["my_helper"] == "SCALE = 1  # ``` \n"
    del sys.modules["my_package.losses"]
    assert read_code([]) == read_code(["focal_plugin.retinanet"]) == read_code(["builtins"]) == {}
    assert {name.partition(".")[0] for name in read_code(["tabulate"])} == {"tabulate"}  # not all of site-packages


@pytest.fixture
def table(tmp_path):
    return tmp_path / "table"


@pytest.fixture
def runs(rows, tiny_config, table, module):
    """Three runs with a user's module, of which the first two have begun."""
    found = plan(find_tables([str(rows.folder)])[0].rows, find_base(tiny_config), module, 1, table)
    __import__("my_part")
    for run in found:
        run.prepare()
        record_code(run)
    for run in found[:2]:
        (run.folder / "job.json").write_text("[{}]")
    return found


@pytest.mark.parametrize("change", [{"my_helper": "SCALE = 2"}, {"my_part": "import os"}, {"my_part": "import other"}])
def test_other_code_is_never_mixed_in(runs, folder, change):
    check_code(runs, to_run=True)
    before = read_code(["my_part"])
    for name, text in change.items():
        (folder / f"{name}.py").write_text(text)
    with pytest.raises(ConfigError) as error:
        check_code(runs, to_run=True)
    text = str(error.value)
    assert "hold runs of other code, which are not overwritten. Delete them or choose another --output." in text
    for name, content in change.items():
        assert f"{name} was {short_hash(before[name])} and is now {short_hash(content)}" in text
    if "my_part" in change:
        assert f"my_helper was {short_hash(before['my_helper'])} and is now not imported" in text
    assert [str(run.folder) in text for run in runs] == [True, True, False]
    check_code(runs, to_run=False)  # what was run may be reported

    record_code(runs[1])
    assert recorded_code(runs[1]) == before  # of a run that has begun
    record_code(runs[2])
    (runs[2].folder / "job.json").write_text("[{}]")
    assert recorded_code(runs[2]) == read_code(["my_part"]) != before
    with pytest.raises(ConfigError, match="hold runs of other code"):
        check_code(runs, to_run=False)


def test_runs_of_a_version_that_did_not_record_it(runs, folder):
    for run in runs:
        (run.folder / "code-ablation.json").unlink()
    (folder / "my_part.py").write_text("")
    check_code(runs, to_run=True)
    record_code(runs[0])
    assert recorded_code(runs[0]) == {}


def test_code_that_is_edited_while_it_runs(ablation, rows, module, folder, table, train_net, capfd):
    """What was run is in the report, and nothing else is run."""
    (rows.folder / "gamma_2.yaml").unlink()
    text = (folder / "my_helper.py").read_text()
    train_net.write_text(f"open({str(folder / 'my_helper.py')!r}, 'w').write('SCALE = 2')\n" + train_net.read_text())
    assert ablation(*module, "--jobs", 1) == 1
    error = capfd.readouterr().err
    assert "gamma_0 seed 1: AP" in error and "gamma_1 seed 1 is not started: my_helper was" in error
    assert not (table / "gamma_1/seed1/starts").exists()

    code = json.loads((table / "report.json").read_text())["code"]
    assert code["my_helper"] == {"sha256": short_hash(text), "text": text} and set(code) == {"my_part", "my_helper"}
    page, markdown = (table / "report.html").read_text(), (table / "report.md").read_text()
    assert "SCALE = 1" in page and short_hash(text) in page
    assert f"- my_helper {short_hash(text)}\n" in markdown and "````python\nSCALE = 1  # ```\n````" in markdown
