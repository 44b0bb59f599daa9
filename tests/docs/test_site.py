"""The site: it builds, nothing in it is broken, and it documents all that is public."""

import json
import pkgutil
import re
import shutil

import pytest
import yaml

import focal_plugin
from tests.docs.pages import PAGES, ROOT
from tests.docs.test_generated import load

API = PAGES["docs/api.md"]


def nav_pages(items):
    for item in items:
        (target,) = item.values()
        yield from nav_pages(target) if isinstance(target, list) else [target]


@pytest.fixture
def build(tmp_path):
    """Build a copy of the site, after ``change`` of its folder; its output folder."""
    pytest.importorskip("mkdocs", reason="needs pip install -e .[docs]")
    pytest.importorskip("mkdocstrings", reason="needs pip install -e .[docs]")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    def make(change=lambda folder: None):
        copy = tmp_path / "copy"
        for name in ("docs", "focal_plugin", "configs", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("mkdocs.yml", "SECURITY.md"):  # pages link to the latter
            shutil.copy(ROOT / name, copy)
        change(copy)
        config = load_config(str(copy / "mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site"))
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
        return tmp_path / "site"

    return make


def test_it_builds(build):
    site = build()
    pages = list(nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert {f"docs/{page}" for page in pages} == {page for page in PAGES if page.startswith("docs/")} | {
        "docs/own_loss.md"
    }
    for page in pages:
        assert (site / page).with_suffix(".html").is_file(), page
    assert not list(site.rglob("*.py"))
    api = (site / "api.html").read_text()
    assert "max_detections_per_image" in api and "focal_plugin.SigmoidFocalLoss" in api
    tour = (site / "paper_in_code.html").read_text()
    assert "../focal_plugin" not in tour
    line = 1 + next(i for i, text in enumerate(_lines("heads/bias_init.py")) if "nn.init.constant_(conv.bias" in text)
    assert re.search(rf'class="normal">\s*{line}<', tour)


def _lines(path):
    return (ROOT / "focal_plugin" / path).read_text().splitlines()


@pytest.mark.parametrize(
    "text, error",
    [
        ("nothing broken", None),
        ("[gone](gone.md)", "Aborted with 1 warnings"),
        ("[gone](index.md#gone)", "Aborted with 1 warnings"),
        ("[gone](../focal_plugin/gone.py)", "there is no focal_plugin/gone.py"),
        ("::: focal_plugin.Gone", "Aborted with a BuildError|Could not collect|focal_plugin.Gone"),
    ],
)
def test_what_is_broken_stops_it(build, text, error):
    def change(folder):
        for page in (folder / "docs").glob("*.md"):
            page.write_text("# Title\n")
        (folder / "docs/index.md").write_text(f"# Title\n\n{text}\n")

    if error is None:
        build(change)
        return
    with pytest.raises(Exception, match=error):
        build(change)


def test_links_into_the_repository():
    hooks = load(ROOT / "docs/hooks.py")
    link = hooks._OUTSIDE.search("see [the notes](../tests/benchmarks/NOTES.md#top).")
    assert hooks._outside_link(link, "results.md", None) == "the notes"
    url = "https://example.org/repo/"
    expected = "[the notes](https://example.org/repo/blob/main/tests/benchmarks/NOTES.md#top)"
    assert hooks._outside_link(link, "results.md", url) == expected


def test_a_notebook_becomes_a_page():
    hooks = load(ROOT / "docs/hooks.py")
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {
            "cell_type": "code",
            "source": ["print(1)"],
            "outputs": [{"text": ["1\n"]}, {"data": {"image/png": "QUJD", "text/plain": ["<Figure>"]}}],
        },
    ]
    page, pictures = hooks.notebook_page({"cells": cells}, "some.ipynb")
    assert page.startswith("# Title\ntext\n\n") and "```python\nprint(1)\n```\n\n```text\n1\n```\n" in page
    assert pictures == {"images/some_1.png": b"ABC"} and "(images/some_1.png)" in page and "<Figure>" not in page


def test_all_that_is_public_is_in_the_reference():
    shown = re.findall(r"^::: ([\w.]+)$", API, re.MULTILINE)
    for name in shown:
        pkgutil.resolve_name(name)
    named = {name.rpartition(".")[2] for name in shown} | set(re.findall(r"`(\w+)`", API))
    assert set(focal_plugin.__all__) <= named
    assert len(shown) == len(set(shown))


def test_the_notebook_is_as_it_was_run():
    notebook = json.loads((ROOT / "docs/own_loss.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
