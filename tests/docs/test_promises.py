"""Each sentence of the page on reliability is held by tests, which promises.yaml names."""

import ast
import functools
import re
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import PAGES, ROOT, section
from tests.faults.fuzzing import FUZZERS
from tests.files import test_safe_load, test_safe_yaml

PROMISES = Path(__file__).with_name("promises.yaml")


def sentences():
    """The sentences and the rows of tables of the page, without headings, code and what was counted."""
    prose = re.sub(r"^```.*?^```$", "", PAGES["docs/reliability.md"], flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^\|.*\n(?=\|---)", "", prose, flags=re.MULTILINE)  # the heads of tables
    found = []
    for block in re.split(r"\n\s*\n|\n(?=- )|\n(?=\|)", prose):
        text = " ".join(block.split())
        if text.startswith("|"):
            found += [text] * (not text.startswith("|---"))
        elif text and not text.startswith("#"):
            found += re.split(r"(?<=[.:!?])\s+(?=[A-Z`])", text.removeprefix("- "))
    return [text for text in found if not re.search(r"\| [\d.]+ \|$", text)]


@functools.cache
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


def test_as_many_hostile_files_as_the_page_says():
    page = " ".join(section(PAGES["docs/reliability.md"], "Nothing you download runs code").split())
    (expressions,) = (mark.args[1] for mark in test_safe_yaml.test_all_else_is_refused.pytestmark)
    for number, what in [
        (len(test_safe_yaml.ZOO_CONFIGS), "configs of Detectron2's zoo"),
        (len(test_safe_load.hostile_pickles()) + len(test_safe_load.CRAFTED), "hostile pickles"),
        (len(test_safe_load.BOMBS), "that are made to take years"),
        (len(test_safe_yaml.HOSTILE), "hostile configs"),
        (len(expressions), "expressions"),
    ]:
        assert f" {number} {what}" in page


def test_the_table_has_all_fuzzers():
    rows = re.findall(
        r"^\| (.*) \| ([\d,]+) \| (\d+) \| (\d+) \| [\d.]+ \|$", PAGES["docs/reliability.md"], re.MULTILINE
    )
    rows = {name: [int(number.replace(",", "")) for number in numbers] for name, *numbers in rows}
    measured = {name: rows[name] for name in FUZZERS}
    assert [name for name in rows if name in FUZZERS] == list(FUZZERS)
    assert all(cases == values + errors for cases, values, errors in measured.values())
