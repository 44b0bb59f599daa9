"""What holds for the project as a whole: which way imports go, docstrings, requirements, config keys and configs."""

import ast
import configparser
import re
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from focal_plugin import add_focal_config
from focal_plugin.config.explain import flatten
from focal_plugin.config.load import load_config

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "focal_plugin"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# Those of the paper's tables are built in test_paper.py.
YAML_CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "paper")
LAZY_CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


def relative(path):
    return str(path.relative_to(ROOT))


@cache
def parse(path):
    return ast.parse(path.read_text(), relative(path))


def module_name(path):
    """``focal_plugin/losses/box.py`` → ``focal_plugin.losses.box``; a package's ``__init__.py`` → the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree, path):
    """The absolute names of the modules that the statements in ``tree`` import, as (statement, name)."""
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:  # `from .losses import functional` imports a module
                name = f"{base}.{alias.name}"
                is_module = any(ROOT.joinpath(*name.split(".")).with_suffix(s).exists() for s in ("", ".py"))
                yield node, name if is_module else base


def own_imports(path):
    return {name for _, name in imports(parse(path), path) if name.split(".")[0] == "focal_plugin"}


def outside_imports(path):
    names = {name.split(".")[0] for _, name in imports(parse(path), path)}
    return names - set(sys.stdlib_module_names) - {"focal_plugin"}


def part(name):
    """``focal_plugin.losses.box`` → ``losses``; the top package → ''. In ``config``, the keys stand apart."""
    if name in ("focal_plugin.config", "focal_plugin.config.keys"):
        return "config.keys"
    if name == "focal_plugin.config.workflow_keys":
        return "config.workflow_keys"
    return (name.split(".") + [""])[1]


# What each part of the package may import from the others. Nothing is above `__init__`, which is not listed: it imports
# what it offers.
PAPER = {
    **{name: set() for name in ("_detectron2", "config.workflow_keys", "layers", "structures")},
    "config.keys": {"config.workflow_keys"},
    "anchors": {"config.keys", "structures"},
    "normalizer": {"config.keys"},
    "registry": {"config.keys"},
    "contracts": {"structures"},
    "class_loss": {"contracts", "structures"},
    "inference": {"kernels", "structures"},
    "kernels": {"layers", "structures"},
    "matchers": {"contracts", "kernels", "registry", "structures"},
    "losses": {"config.keys", "contracts", "kernels", "registry", "structures"},
    "heads": {"contracts", "kernels", "losses", "registry", "structures"},
    "retinanet": {"anchors", "class_loss", "config.keys", "contracts", "inference", "kernels", "layers", "matchers"}
    | {"normalizer", "registry", "structures"},
}
# The components by name and what builds them, for the tools to use.
BASE = {"config.keys", "registry", "structures", "layers"}
TOOLS = {
    "files": {"config.keys"},
    "data": {"config.keys", "evaluation", "files", "structures"},
    "backbones": {"config.keys", "files", "registry"},
    "pipelines": BASE | {"anchors", "class_loss", "contracts", "kernels", "matchers", "normalizer"},
    "config": BASE | {"data", "files", "losses"},
    "evaluation": {"files"},
    "engine": set(PAPER) | {"config", "data", "evaluation", "files"},
    "deploy": set(PAPER) | {"config", "data", "engine", "evaluation", "files"},
    "analysis": set(PAPER) | {"backbones", "config", "data", "deploy", "engine", "evaluation", "files", "pipelines"},
    "ablation": set(PAPER)
    | {"analysis", "backbones", "config", "data", "deploy", "engine", "evaluation", "files", "pipelines"},
}
# Commands, above all rooms. `__main__` imports a command's module when it is called.
TOOLS |= {"commands": {"analysis", "config", "deploy", "engine", "files"}, "__main__": {"files"}}
BELOW = PAPER | TOOLS


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent != PACKAGE or p.name != "__init__.py"], ids=relative)
def test_imports_go_one_way(path):
    this = part(module_name(path))
    assert this in BELOW, f"Say in BELOW what {this} may import."
    found = {part(name) for name in own_imports(path)} - {this}
    assert found <= BELOW[this]


def test_the_table_of_imports_has_no_cycle():
    done = set()
    while ready := {name for name, below in BELOW.items() if name not in done and below <= done}:
        done |= ready
    assert done == set(BELOW)


def test_the_paper_imports_nothing_of_the_tools():
    assert set().union(*PAPER.values()) <= set(PAPER)


def test_the_paper_can_be_read_in_an_hour():
    """Without ``kernels``, which make it fast, and the keys of what surrounds it."""
    paper = [path for path in SOURCES if part(module_name(path)) in set(PAPER) - {"kernels", "config.workflow_keys"}]
    assert sum(len(path.read_text().splitlines()) for path in paper) <= 3_400


def test_the_functional_losses_need_torch_alone():
    path = PACKAGE / "losses" / "functional.py"
    assert outside_imports(path) == {"torch"}
    assert own_imports(path) == set()


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_the_package_imports_its_own_modules_at_the_top(path):
    functions = [n for n in ast.walk(parse(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    inside = [name for function in functions for _, name in imports(function, path)]
    assert [name for name in inside if name.split(".")[0] == "focal_plugin"] == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_public_things_have_docstrings(path):
    tree = parse(path)
    public = [
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    assert ast.get_docstring(tree), "the module"
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_what_is_imported_is_declared():
    declared = {canonicalize_name(requirement.name) for requirement in declared_requirements()}
    distributions = packages_distributions()
    brought = {"detectron2", "triton"}  # Detectron2 is on no index; triton comes with torch where there is one
    for path in SOURCES:
        for name in outside_imports(path) - brought:
            names = {canonicalize_name(distribution) for distribution in distributions.get(name, [])}
            assert names & declared, f"{relative(path)} imports {name}, which setup.cfg does not require"


def declared_requirements():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    texts = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    return [Requirement(line) for text in texts for line in text.strip().splitlines() if not line.startswith("#")]


def test_tested_versions_are_within_the_declared_bounds():
    pins = {}
    for path in (ROOT / "requirements").glob("*.txt"):
        for line in path.read_text().splitlines():
            if match := re.match(r"([\w.-]+)==(\S+)", line):
                pins[canonicalize_name(match[1])] = match[2]
    for requirement in declared_requirements():
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


# Config keys


def own_keys():
    cfg = get_cfg()
    stock = flatten(cfg).keys()
    add_focal_config(cfg)
    return sorted(flatten(cfg).keys() - stock)


@cache
def attribute_chains(path):
    """``.cfg.MODEL.FOCAL`` and the like: every chain of attributes in a file, as a whole and not its beginnings."""
    nodes = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Attribute)]
    inner = {id(node.value) for node in nodes}
    return {"." + ast.unparse(node) for node in nodes if id(node) not in inner}


@pytest.mark.parametrize("key", own_keys())
def test_every_own_key_is_read(key):
    """By its whole name, or by its last word in a file that takes the node around it."""
    node, _, leaf = key.rpartition(".")
    for path in SOURCES:
        chains = attribute_chains(path)
        whole = any(chain.endswith("." + key) for chain in chains)
        by_parts = any(chain.endswith("." + node) for chain in chains) and any(c.endswith("." + leaf) for c in chains)
        if path.name not in ("keys.py", "workflow_keys.py") and (whole or by_parts):
            return
    pytest.fail(f"No code reads {key}.")


# Shipped configs


@pytest.fixture
def catalogs():
    """Forget the data sets that a config registers."""
    before = set(DatasetCatalog), set(MetadataCatalog)
    yield
    for catalog, names in zip((DatasetCatalog, MetadataCatalog), before):
        for name in set(catalog) - names:
            catalog.remove(name)


def assert_detects(model):
    (result,) = model.eval()([{"image": torch.zeros(3, 64, 96), "height": 64, "width": 96}])
    assert result["instances"].image_size == (64, 96)


@pytest.mark.parametrize("path", YAML_CONFIGS, ids=relative)
def test_yaml_config_builds(path, catalogs, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu"])
    if cfg.MODEL.FOCAL.TIMM.WEIGHTS == "timm":
        cfg.MODEL.FOCAL.TIMM.WEIGHTS = ""  # rather than download them
    assert_detects(build_model(cfg))


@pytest.mark.parametrize("path", LAZY_CONFIGS, ids=relative)
def test_lazy_config_builds(path, catalogs, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = LazyConfig.load(str(path))
    assert_detects(instantiate(cfg.model))


_OWN_BARS = {
    "focal_plugin/engine/console.py",  # made on a terminal alone
    "focal_plugin/ablation/launch.py",  # a line a minute tells of jobs of hours
}


@pytest.mark.parametrize("path", [p for p in SOURCES if relative(p) not in _OWN_BARS], ids=relative)
def test_bars_are_drawn_on_a_terminal_alone(path):
    """In a log file a bar would be a line for each image."""
    calls = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
    bars = [node for node in calls if {"tqdm", "trange"} & {getattr(x, "id", "") for x in (node.func, *node.args)}]
    for bar in bars:
        disabled = [word.value for word in bar.keywords if word.arg == "disable"]
        assert [getattr(value, "value", "") for value in disabled] == [None], f"line {bar.lineno}"
