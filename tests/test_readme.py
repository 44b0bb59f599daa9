"""What the README and the pages print does what they say."""

import ast
import contextlib
import functools
import importlib
import io
import pkgutil
import re
import sys
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import focal_plugin
from focal_plugin import CLS_LOSS_REGISTRY, add_focal_config
from focal_plugin.__main__ import COMMANDS
from focal_plugin.__main__ import main as focal
from focal_plugin.analysis import __main__ as analysis
from focal_plugin.registry import CONFIG_KEYS
from tests.docs.pages import PAGES, ROOT, anchors, blocks, commands, links, section

README = PAGES["README.md"]


def small_config():
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.merge_from_file(ROOT / "configs/Base-FocalRetinaNet.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    cfg.MODEL.RETINANET.NUM_CLASSES = 2
    return cfg


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("page", ["README.md", "docs/components.md"])
def test_the_example_of_an_own_component_trains(page, tmp_path, monkeypatch):
    (code,) = [block for block in blocks(PAGES[page], "python") if "REGISTRY.register" in block]
    assert len([line for line in code.splitlines() if line.strip()]) < 15
    (name,) = re.findall(r"^class (\w+)", code, re.MULTILINE)
    (words,) = [words for words in commands(PAGES[page]) if name in words]
    (tmp_path / "my_losses.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    cfg = small_config()
    focal_plugin.merge_from_list(cfg, words[words.index("MODEL.FOCAL.IMPORTS") :])
    assert (["my_losses"], name) == (cfg.MODEL.FOCAL.IMPORTS, cfg.MODEL.FOCAL.CLS_LOSS.NAME)

    monkeypatch.setattr(CLS_LOSS_REGISTRY, "_obj_map", dict(CLS_LOSS_REGISTRY._obj_map))  # registered for this test
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    model = build_model(cfg)
    assert type(model.cls_loss).__name__ == name and model.cls_loss.smoothing == 0.2
    sure = model.cls_loss.elementwise(torch.tensor([-50.0]), torch.zeros(1))
    assert sure < 1e-6  # else 100,000 anchors of background outweigh all objects
    instances = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[8.0, 8, 40, 40]])), gt_classes=torch.tensor([1]))
    with EventStorage():
        losses = model([{"image": torch.zeros(3, 64, 64), "instances": instances}])
    sum(losses.values()).backward()
    assert model.head.cls_score.weight.grad.abs().sum() > 0


def test_every_shipped_component_is_listed():
    for registry_name, key in CONFIG_KEYS.items():
        rows = PAGES["docs/components.md"].splitlines()
        (row,) = [line for line in rows if line.startswith(f"| `{registry_name}_REGISTRY`")]
        registry = getattr(focal_plugin, f"{registry_name}_REGISTRY")
        shipped = [name for name, item in registry if item.__module__.startswith("focal_plugin.")]
        assert f"`{key}`" in row
        assert sorted(re.findall(r"`(\w+)`", row.split("|")[3])) == sorted(shipped)


def test_every_own_key_is_in_the_reference():
    def keys(node, stock, prefix=""):
        for key, value in node.items():
            if key not in stock:
                yield from keys(value, {}, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
            elif isinstance(value, dict):
                yield from keys(value, stock[key], f"{prefix}{key}.")

    ours = get_cfg()
    add_focal_config(ours)
    listed = re.findall(r"^\| `([A-Z0-9_]+(?:\.[A-Z0-9_]+)*)` \|", PAGES["docs/configuration.md"], re.MULTILINE)
    assert sorted(listed) == sorted(keys(ours, get_cfg()))


@pytest.mark.parametrize("page", PAGES)
def test_named_keys_exist(page):
    """Every key that a page names is one of ours or of Detectron2's: ``A.B.C``, ``A.{B, C}`` and ``A.B.*``."""
    cfg = get_cfg()
    add_focal_config(cfg)
    first = "|".join(key for key, value in cfg.items() if isinstance(value, dict))
    for name in re.findall(rf"\b((?:{first})(?:\.[A-Z0-9_]+)*\.(?:[A-Z0-9_]+|\{{[A-Z0-9_, ]+\}}|\*))", PAGES[page]):
        *path, last = name.split(".", name.partition("{")[0].count("."))
        for key in re.findall(r"\w+", last) or [None]:
            node = cfg
            for part in [*path, *([key] if key else [])]:
                if isinstance(node, CfgNode) and node.is_new_allowed():  # a component's own keys
                    break
                assert part in node, name
                node = node[part]


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    for path in re.findall(
        r"\b(?:configs|docs|focal_plugin|tests|requirements)/[\w./-]+\.(?:yaml|py|csv|md|txt)\b", PAGES[page]
    ):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in links(PAGES[page]):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if target.name == "own_loss.md":
            continue  # the site makes it from the notebook
        assert target.resolve().exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("start", ["README.md", "docs/index.md"])
def test_every_page_is_linked_from_the_start(start):
    linked = {((ROOT / start).parent / link.partition("#")[0]).resolve() for link in links(PAGES[start])}
    pages = {path.resolve() for path in (ROOT / "docs").glob("*.md")} - {(ROOT / "docs/index.md").resolve()}
    assert {path.name for path in pages - linked} == set()


def test_the_commands_are_listed():
    listed = re.search(r"the same as `python -m focal_plugin`: (.*?)which writes", README, re.DOTALL)[1]
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(COMMANDS)


@pytest.mark.parametrize("page", PAGES)
def test_imports_in_the_code_work(page):
    for code in blocks(PAGES[page], "python"):
        if "focal_plugin" not in code or code.startswith((" ", "@")):
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.startswith("focal_plugin"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])  # it names old paths too
def test_dotted_names_in_the_text_exist(page):
    for name in set(re.findall(r"`(focal_plugin(?:\.\w+)+)", PAGES[page])):
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_known(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(PAGES[page]):
        assert words[0] in {"focal", "make", "pip", "git", "python"}, words
        if words[0] == "focal":
            assert words[1] in {*COMMANDS, "--help"}, words
        if words[0] == "make":
            assert words[1] in targets, words
        if words[0] == "python":
            assert (ROOT / words[1]).is_file() or words[1:3] == ["-m", "focal_plugin"] or words[1] == "serve.py", words
    for name in re.findall(r"`focal (\w+)", PAGES[page]):
        assert name in COMMANDS, name


@functools.cache
def help_of(*words):
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
        focal([*words, "--help"], "focal")
    return output.getvalue()


@pytest.mark.parametrize("page", PAGES)
def test_flags_of_commands_are_known(page):
    for words in commands(PAGES[page]):
        if words[0] == "focal" and words[1] in COMMANDS:
            command = ["anchors" if word == "<what>" else word for word in words[1:3]]
            command = command if command[0] in ("analysis", "convert", "data") else command[:1]
            for flag in (word for word in words if word.startswith("--")):
                assert flag in help_of(*command), f"{flag} of {' '.join(words)}"


def test_the_analyses_and_their_flags_are_known():
    rows = re.findall(r"^\| `([a-z][\w-]+[^`]*)` \|(.*)", PAGES["docs/analysis.md"], re.MULTILINE)
    rows = [(words.split(), words + text) for words, text in rows if words.split()[0] in analysis._WHAT]
    assert {words[0] for words, _ in rows} == set(analysis._WHAT)
    for words, text in rows:
        for flag in re.findall(r"--[\w-]+", text):
            assert flag in help_of("analysis", words[0]), f"{flag} of {words[0]}"


OWN = {"my.yaml", "my_parts.yaml", "my_retinanet.yaml", "retinanet_tv.yaml"}  # of the reader
OWN |= {"output/quickstart/config.yaml", "output/x/config.yaml"}


@pytest.mark.parametrize("page", PAGES)
def test_configs_of_commands_exist(page):
    text = PAGES[page].replace("\\\n", " ")
    for name in re.findall(r"--config-file ([\w./-]+\.(?:yaml|py))", text):
        if name not in OWN and not (ROOT / "configs" / name).is_file():
            assert Path(model_zoo.get_config_file(name)).is_file()


def test_the_lines_of_python_run(tiny_config, tmp_path, monkeypatch, loggers, capsys):
    """As printed, on four steps of another data set."""
    (code,) = blocks(section(README, "In ten lines of Python"), "python")
    body = [line for line in code.splitlines() if line and not line.startswith(("from", "import"))]
    assert len(body) <= 10
    monkeypatch.chdir(tmp_path)
    Path("survey.png").symlink_to(tmp_path / "shapes_test/0.png")
    assert '"quickstart/trees.yaml"' in code
    exec(code.replace('"quickstart/trees.yaml"', repr(tiny_config)), {"__name__": "lines"})
    output = capsys.readouterr().out
    assert "'AP50'" in output and "pred_boxes" in output
    assert (tmp_path / "output/python/model_final.pth").is_file()


def test_the_two_halves_of_a_step_run(tiny_config, loggers):
    (code,) = blocks(PAGES["docs/analysis.md"], "python")
    names = {}
    exec(code.replace('"quickstart/trees.yaml"', repr(tiny_config)), names)
    assert set(names["losses"]) == {"loss_cls", "loss_box_reg"} and len(names["logits"]) == 5
    assert names["deltas"].shape == (names["targets"].num_positives, 4)


def test_the_options_of_the_table_in_training_are_shown():
    """Every flag of training is in the table; of Detectron2's parser, but for the two that are commands here."""
    from detectron2.engine import default_argument_parser

    flags = {option for action in default_argument_parser()._actions for option in action.option_strings}
    listed = set(re.findall(r"`(--[\w-]+)`", section(PAGES["docs/training.md"], "Commands")))
    assert flags - {"-h", "--help"} <= listed
