"""Each sentence of the page on reliability, but those of two sections, is held by tests, which promises.yaml names."""

import ast
import functools
import re
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import PAGES, ROOT, section

NOT_LISTED = ("Broken data", "Nothing you download runs code")  # sections that are not listed yet
PROMISES = Path(__file__).with_name("promises.yaml")


def sentences():
    """The sentences and the rows of tables of the page, without headings and code."""
    page = PAGES["docs/reliability.md"]
    for title in NOT_LISTED:
        page = page.replace(section(page, title), "")
    prose = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    found = []
    for block in re.split(r"\n\s*\n|\n(?=- )|\n(?=\|)", prose):
        text = " ".join(block.split())
        if text.startswith("|"):
            found += [text] * (not text.startswith(("|---", "| ---")))
        elif text and not text.startswith("#"):
            found += re.split(r"(?<=[.:!?])\s+(?=[A-Z`])", text.removeprefix("- "))
    return [text for text in found if not re.search(r"^\| fault \||\| \d+ \|$", text)]  # what the campaign found


def promises():
    return {entry["says"]: entry["held_by"] for entry in yaml.safe_load(PROMISES.read_text(encoding="utf-8"))}


@functools.cache
def functions(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_each_sentence_is_listed():
    assert [text for text in sentences() if text not in promises()] == []


def test_nothing_else_is_listed():
    assert [text for text in promises() if text not in sentences()] == []


@pytest.mark.parametrize(
    "name", sorted({name for held in promises().values() if isinstance(held, list) for name in held})
)
def test_the_tests_are_there(name):
    file, _, function = name.partition("::")
    assert function.startswith("test_") and function in functions(ROOT / "tests" / file)
