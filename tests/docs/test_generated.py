"""What the pages quote from the code is the code."""

import importlib.util
import inspect
import pkgutil
import re
import shutil

import pytest
from detectron2.config import get_cfg

import focal_plugin
from focal_plugin import add_focal_config
from tests.docs.pages import PAGES, ROOT, section


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load(ROOT / "docs/generate.py")


@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- generated: " in PAGES[page]])
def test_pages_are_not_stale(page):
    assert generate.render(PAGES[page]) == PAGES[page], f"{page} is stale: run python docs/generate.py"
    starts, ends = PAGES[page].count("<!-- generated: "), PAGES[page].count("<!-- end -->")
    assert starts == ends


def test_the_tour_shows_every_room_of_the_paper():
    tour = PAGES["docs/paper_in_code.md"]
    places = set(re.findall(r"generated: code focal_plugin/(\w+)", tour))
    assert {"anchors", "heads", "losses", "matchers", "normalizer", "retinanet"} <= places


_SOURCE = '''
LIMIT = 3


class Thing:
    """A thing."""

    def documented(self):
        """Return

        one.
        """
        # why
        return 1

    def bare(self, a,
             b):
        # why
        # so
        x = a + b
        return x
'''


@pytest.mark.parametrize(
    "symbol, between, expected, number",
    [
        ("LIMIT", "", "LIMIT = 3", 2),
        ("Thing.documented", "", "# why\nreturn 1", 13),
        ("Thing.bare", "", "# why\n# so\nx = a + b\nreturn x", 18),
        ("Thing.bare", "# so ... x =", "# so\nx = a + b", 19),
        ("Thing", "return 1", "return 1", 14),
    ],
)
def test_the_lines_of_a_symbol(symbol, between, expected, number, tmp_path, monkeypatch):
    (tmp_path / "thing.py").write_text(_SOURCE)
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    assert generate.code_lines("thing.py", symbol, between) == (expected + "\n", number)


@pytest.mark.parametrize(
    "words, message",
    [
        ("focal_plugin/nowhere.py f", "There is no focal_plugin/nowhere.py"),
        ("focal_plugin/normalizer.py nothing", "focal_plugin/normalizer.py has no nothing"),
        ("focal_plugin/normalizer.py NumPositives.nothing", "has no NumPositives.nothing"),
        ("focal_plugin/normalizer.py NumPositives.forward | not in it", "no line with 'not in it'"),
        ("focal_plugin/normalizer.py NumPositives.forward | count = ... not in it", "no line with 'not in it'"),
    ],
)
def test_what_is_gone_is_said(words, message):
    with pytest.raises(generate.StaleError, match=message):
        generate.render(f"<!-- generated: code {words} -->\n<!-- end -->")


def test_a_changed_file_makes_its_page_stale(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "focal_plugin", tmp_path / "focal_plugin", ignore=shutil.ignore_patterns("__pycache__"))
    page = tmp_path / "page.md"
    page.write_text(PAGES["docs/paper_in_code.md"])
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "PAGES", [page])
    assert generate.main(["--check"]) == 0
    changed = tmp_path / "focal_plugin/heads/bias_init.py"
    changed.write_text(changed.read_text().replace("-math.log((1 -", "-math.log((2 -"))
    assert generate.main(["--check"]) == 1
    assert "stale; run python docs/generate.py" in capsys.readouterr().out
    assert "(2 -" not in page.read_text()
    assert generate.main([]) == 0 and "(2 -" in page.read_text()
    assert generate.main(["--check"]) == 0


def test_keys_and_defaults_are_the_configs():
    cfg = get_cfg()
    add_focal_config(cfg)
    for key, default, text in generate.config_keys():
        node = cfg
        for name in key.split("."):
            node = node[name]
        assert node == default and type(node) is type(default), key
        assert text.endswith((".", ")")), key


@pytest.mark.parametrize("kind, title", [("DENSE_HEAD", "Heads"), ("CLS_LOSS", "Classification losses")])
def test_contracts_are_the_registries(kind, title):
    contract = inspect.cleandoc(getattr(focal_plugin, f"{kind}_REGISTRY").__doc__)
    assert contract in section(PAGES["docs/components.md"], title)


def test_moved_modules_are_where_the_changes_say():
    rows = re.findall(r"^\| `focal_plugin.*\|(.*)\|$", section(PAGES["CHANGELOG.md"], "Moved"), re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(focal_plugin(?:\.\w+)+)`", row)]
    assert len(names) > 10
    for name in names:
        pkgutil.resolve_name(name)
