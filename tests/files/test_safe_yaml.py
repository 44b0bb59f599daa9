"""Configs are Detectron2's to the last digit, and cannot run anything."""

import ast
import logging
import re
import time
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from detectron2.config import get_cfg
from hypothesis import given, settings
from hypothesis import strategies as st

from focal_plugin import add_focal_config
from focal_plugin.config.load import load_config
from focal_plugin.files.safe_yaml import ConfigError, ExpressionError, evaluate, merge_from_file, parse_yaml

ZOO = Path(str(files("detectron2.model_zoo") / "configs"))
ZOO_CONFIGS = sorted(ZOO.rglob("*.yaml"))
ANCHORS = "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]"


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A file that a hostile config would write."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "executed"


def test_the_zoo_is_there():
    assert len(ZOO_CONFIGS) > 50 and any("python/object" in path.read_text() for path in ZOO_CONFIGS)


@pytest.mark.parametrize("path", ZOO_CONFIGS, ids=lambda path: str(path.relative_to(ZOO)))
def test_zoo_configs_are_detectron2s(path, caplog):
    theirs, ours = get_cfg(), get_cfg()
    theirs.merge_from_file(str(path))
    caplog.clear()
    merge_from_file(ours, str(path))
    assert ours == theirs and ours.dump() == theirs.dump()
    assert "unsafe_load" not in caplog.text


def test_loading_a_stock_config_warns_of_nothing(caplog):
    caplog.set_level(logging.INFO)
    sizes = load_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml").MODEL.ANCHOR_GENERATOR.SIZES
    assert sizes == [[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in [32, 64, 128, 256, 512]]
    assert caplog.messages == []


def test_bases_and_own_files(tmp_path):
    base = f"VERSION: 2\nMODEL:\n  ANCHOR_GENERATOR:\n    SIZES: !!python/object/apply:eval ['{ANCHORS}']\n"
    (tmp_path / "base.yaml").write_text(base)
    (tmp_path / "sub").mkdir()
    text = "_BASE_: [../base.yaml]\nINPUT: {MIN_SIZE_TEST: 1.0e+3}\nSOLVER: {STEPS: '(10, 20)', BASE_LR: 1e-3}\n"
    (tmp_path / "sub" / "a.yaml").write_text(text)
    theirs, ours = get_cfg(), get_cfg()
    theirs.INPUT.MIN_SIZE_TEST = ours.INPUT.MIN_SIZE_TEST = 800.0
    theirs.merge_from_file(str(tmp_path / "sub" / "a.yaml"))
    merge_from_file(ours, str(tmp_path / "sub" / "a.yaml"))
    assert ours == theirs
    assert ours.SOLVER.STEPS == (10, 20) and ours.INPUT.MIN_SIZE_TEST == 1000.0


def test_an_old_config_is_upgraded(tmp_path):
    (tmp_path / "v1.yaml").write_text("MODEL:\n  WEIGHT: a.pkl\n  RETINANET: {NUM_CLASSES: 7}\n")
    theirs, ours = get_cfg(), get_cfg()
    theirs.merge_from_file(str(tmp_path / "v1.yaml"))
    merge_from_file(ours, str(tmp_path / "v1.yaml"))
    assert ours == theirs and ours.MODEL.WEIGHTS == "a.pkl"


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    cfg = get_cfg()
    merge_from_file(cfg, str(tmp_path / "empty.yaml"))
    assert cfg == get_cfg()


def test_files_and_keys_that_are_not_there(tmp_path):
    (tmp_path / "a.yaml").write_text("_BASE_: gone.yaml\n")
    with pytest.raises(FileNotFoundError, match=r"a\.yaml: _BASE_ is gone\.yaml; expected a file relative to "):
        merge_from_file(get_cfg(), str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_text("VERSION: 2\nMODEL: {NO_SUCH_KEY: 1}\n")
    with pytest.raises(KeyError, match=r"MODEL\.NO_SUCH_KEY"):
        merge_from_file(get_cfg(), str(tmp_path / "b.yaml"))


HOSTILE = {
    "apply": ("!!python/object/apply:os.system ['touch executed']", "!!python/object/apply:os.system"),
    "new": ("!!python/object/new:os.system ['touch executed']", "config.yaml of a LazyConfig's run"),
    "module": ("!!python/module:os", "!!python/module:os"),
    "name": ("!!python/name:os.system", "!!python/name:os.system"),
    "tuple": ("!!python/tuple [1, 2]", "!!python/tuple"),
    "other tag": ("!mine 1", "!mine"),
    "eval": ("""!!python/object/apply:eval ["open('executed', 'w')"]""", "open"),
    "import": ("""!!python/object/apply:eval ["__import__('os').system('touch executed')"]""", "__import__"),
    "two arguments": ("!!python/object/apply:eval ['1', {}]", "expected one expression"),
    "mapping": ("!!python/object/apply:eval {args: ['1']}", "sequence node"),
    "exec": ("!!python/object/apply:exec ['1']", "!!python/object/apply:exec"),
    "contains itself": ("&a [*a]", "contains itself"),
    "laughs": (
        "".join(f"\n- &a{i} {[f'*a{i - 1}'] * 10 if i else 'ha'}".replace("'", "") for i in range(9)),
        "stands for more than 50,000 values",
    ),
}


@pytest.mark.parametrize("in_base", [False, True], ids=["file", "base"])
@pytest.mark.parametrize(("value", "says"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_config_is_refused(value, says, in_base, trap, tmp_path):
    path = tmp_path / "config.yaml"
    hostile = tmp_path / "hostile.yaml" if in_base else path
    path.write_text("_BASE_: hostile.yaml\n")
    hostile.write_text(f"VERSION: 2\nSEED: {value}\n")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError) as error:
        load_config(str(path))
    assert says in str(error.value) and hostile.name in str(error.value)
    assert not trap.exists() and sorted(tmp_path.iterdir()) == before


def test_the_trap_works(trap):
    """What the tests above refuse is what Detectron2 would run."""
    trap.with_name("a.yaml").write_text("VERSION: 2\nSEED: !!python/object/apply:os.system ['touch executed']\n")
    get_cfg().merge_from_file("a.yaml")
    assert trap.exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- 1\n", "holds list, expected keys and values"),
        ("a: [", "line 1"),
        ("_BASE_: 5\n", "_BASE_ is 5"),
        ("_BASE_: [a, 5]\n", "_BASE_ is"),
        ("a: !!int x\n", "config.yaml"),
        ("a: 2001-99-99\n", "config.yaml"),
        ("? [a]\n: 1\n", "is list; expected text"),
        ("\x00", "config.yaml"),
    ],
)
def test_what_is_no_config(tmp_path, text, says):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(str(tmp_path / "config.yaml"))
    assert says in str(error.value) and "config.yaml" in str(error.value)


def test_bases_in_a_circle(tmp_path):
    (tmp_path / "a.yaml").write_text("_BASE_: b.yaml\n")
    (tmp_path / "b.yaml").write_text("_BASE_: a.yaml\n")
    with pytest.raises(ConfigError, match=r"[ab]\.yaml.*its _BASE_ leads back to itself"):
        load_config(str(tmp_path / "a.yaml"))


def test_a_run_reads_the_config_it_wrote(tiny_config, tmp_path):
    cfg = load_config(tiny_config)
    (tmp_path / "dumped.yaml").write_text(cfg.dump())
    again = get_cfg()
    add_focal_config(again)
    merge_from_file(again, str(tmp_path / "dumped.yaml"))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


# Arithmetic


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "1",
            "-1.5",
            "+2",
            "1 / 3",
            "2 ** -1",
            "-2 ** 2",
            "(1 + 2) * 3 - 4",
            "1e3",
            "0x10",
            " [1, 2.5,]\n",
            "[]",
            "()",
        ),
        *("(1, [2, (3,)])", "[x for x in (1, 2)]", "[(x, -x) for x in [y * 2 for y in [1, 2]]]", ANCHORS),
        "[[x * y for y in [1, 2]] for x in [3, 4]]",
    ],
)
def test_what_python_computes(expression):
    assert repr(evaluate(expression)) == repr(eval(expression, {}))


@pytest.mark.parametrize(
    "expression",
    [
        *("", "x", "True", "None", "'a'", "b'a'", "1j", "...", "f'{1}'", "{}", "{1: 2}", "{1}", "print", "print(1)"),
        *(
            "(1).real",
            "[1][0]",
            "[1] + [2]",
            "[1] * 3",
            "(1,) + (2,)",
            "-[1]",
            "1 < 2",
            "1 and 2",
            "not 1",
            "~1",
            "5 % 2",
        ),
        *("5 // 2", "1 << 2", "1 @ 2", "1 if 1 else 2", "lambda: 1", "(x := 1)", "[*[1]]", "*[1]", "1; 2", "import os"),
        *("[x for x in [1] if x]", "[x for x in [1] for y in [1]]", "[x async for x in [1]]", "[x for x in 5]"),
        *("[x for x, y in [(1, 2)]]", "[x for x in [[1]]]", "[x for x in [1] for x in x]", "{x for x in [1]}"),
        *("(x for x in [1])", "[x for x in range(5)]", "[x for x.y in [1]]", "1 / 0", "0 ** -1", "(-8) ** 0.5"),
        *("2 ** 65", "9 ** 9 ** 9", "10.0 ** 400", "2 ** 64", "1e999", "1e999 - 1e999", "9" * 5000, "(" * 300 + "1"),
        *("-" * 900 + "1", "[" * 400 + "]" * 400, "1 +", "\x00", "\ud800", "(1).__class__", "__builtins__"),
        "[" * 6 + "x" + " for x in [1, 2, 3, 4, 5, 6, 7, 8]]" * 6,
    ],
    ids=lambda expression: ascii(expression[:20]),
)
def test_all_else_is_refused(expression):
    with pytest.raises(ExpressionError):
        evaluate(expression)


numbers = st.one_of(st.integers(-(2**40), 2**40), st.floats(-1e9, 1e9)).map(repr)
operators = st.sampled_from(["+", "-", "*", "/", "**"])
expressions = st.recursive(
    st.one_of(numbers, st.just("x")),
    lambda inner: st.one_of(
        st.tuples(inner, operators, inner).map(lambda parts: "({} {} {})".format(*parts)),
        st.lists(inner, max_size=3).map(lambda parts: f"[{', '.join(parts)}]"),
        st.tuples(inner, inner).map(lambda parts: "({}, {})".format(*parts)),
        st.tuples(inner, inner).map(lambda parts: "[{} for x in {}]".format(*parts)),
    ),
    max_leaves=8,
)


@given(expressions)
@settings(max_examples=150)
def test_any_expression_has_pythons_value_or_is_refused(expression):
    try:
        value = evaluate(expression)
    except ExpressionError:
        return
    assert repr(value) == repr(eval(expression, {}))


@given(st.one_of(st.text(max_size=40), st.text("[]()x12.*+-/ for in,", max_size=40)))
@settings(max_examples=100)
def test_any_text_has_a_literal_value_or_is_refused(text):
    try:
        value = evaluate(text)
    except ExpressionError:
        return
    assert repr(ast.literal_eval(repr(value))) == repr(value)


tags = ["!!python/object/apply:eval", "!!int", "!!float", "!!binary", "!!set", "!!timestamp", "!!omap", "!!bool"]
words = ["<<: ", "&a ", "*a ", "_BASE_: ", "\n- ", "\nk: ", "2001-99-99", "---\n", *(f"{tag} " for tag in tags)]
yaml_pieces = st.sampled_from([*words, *"abc&*!-:?[]{},#|>%@`'\"\n \t01."])


@given(st.one_of(st.lists(yaml_pieces, max_size=12).map("".join), st.binary(max_size=20)))
@settings(max_examples=200)
def test_any_yaml_is_a_mapping_or_refused(text):
    try:
        content = parse_yaml(text, "some.yaml")
    except ConfigError as error:
        assert "some.yaml" in str(error)
        return
    assert isinstance(content, dict)
    yaml.safe_dump(content)  # it is data and no more


# Mistakes and malice in the form of a file


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"VERSION: 2\nSEED: 1\nSEED: 2\n", r"the key 'SEED' is here twice.*line 3"),
        (b"VERSION: 2\nMODEL: {MASK_ON: 1, FOCAL: {}, MASK_ON: 2}\n", r"the key 'MASK_ON' is here twice"),
        (b"VERSION: 2\nINPUT: {AUGMENTATIONS: [{name: a, name: b}]}\n", r"the key 'name' is here twice"),
        ("VERSION: 2\n".encode("utf-16"), "is not text in UTF-8.*expected"),
        ("VERSION: 2\n".encode("utf-16-le"), "not allowed"),
        ("VERSION: 2\n".encode("utf-32"), "is not text in UTF-8"),
        ("OUTPUT_DIR: ä".encode("latin1"), "is not text in UTF-8"),
        (b"VERSION: 2\n5: 1\n", r"the key 5 is int; expected text"),
        (b"VERSION: 2\nMODEL: {yes: 1}\n", r"the key True is bool; expected text"),
        (b"VERSION: 2\nMODEL: {null: 1}\n", r"the key None is NoneType; expected text"),
        (b"VERSION: 2\nINPUT: {AUGMENTATIONS: [{1.5: 1}]}\n", r"the key 1\.5 is float; expected text"),
        (b"VERSION: 2\n2001-01-01: 1\n", "is date; expected text"),
        (b"VERSION: 2\nSOLVER: {MAX_ITER: null}\n", r"SOLVER\.MAX_ITER has no value; expected one of type int"),
        (b"VERSION: 2\nSOLVER: {MAX_ITER: 'None'}\n", r"SOLVER\.MAX_ITER has no value; expected one of type int"),
        (b"SOLVER:\n", r"SOLVER is None.*expected keys"),
        (b"MODEL:\n", r"MODEL is None.*expected keys"),
        (b"MODEL: {RPN: 5}\n", r"MODEL\.RPN is 5.*expected keys"),
        (b"VERSION: 2\nDATASETS: {TRAIN:}\n", r"DATASETS\.TRAIN has no value; expected one of type tuple"),
        *((f"VERSION: {v}\n".encode(), "VERSION is .*; expected 1 or 2") for v in ("a", "0", "7", "-1", "[1]", "true")),
        (b"VERSION: 2\nSEED: 1" + b":1" * 400_000, r"a number of 800001 characters"),
        (b"VERSION: 2\nSEED: 1" + b"0" * 300, r"is beyond 2\^63"),
        (b"VERSION: 2\nSEED: 0x" + b"f" * 300, r"is beyond 2\^63"),
        (b"VERSION: 2\nSOLVER: {STEPS: [" + b"1," * 400_000 + b"]}\n", r"stands for more than 50,000 values"),
        (b"VERSION: 2\nOUTPUT_DIR: '" + b"-" * 90_000 + b"1'\n", r"nested too deep"),
        (b"VERSION: 2\nOUTPUT_DIR: 2001-01-01\n", r"OUTPUT_DIR.*date"),
    ],
    ids=lambda value: ascii(value[:40]),
)
def test_malformed_configs(content, says, tmp_path):
    (tmp_path / "a.yaml").write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(ConfigError) as error:
        load_config(str(tmp_path / "a.yaml"))
    assert re.search(says, str(error.value), re.DOTALL) and "a.yaml" in str(error.value)
    assert time.perf_counter() - start < 5


def test_a_value_that_is_taken_away_on_the_command_line(tiny_config):
    for value in ("None", "-" * 90_000 + "1"):
        with pytest.raises(ConfigError, match=r"The command line: .*(has no value|nested too deep)"):
            load_config(tiny_config, ["SOLVER.MAX_ITER", value])
    assert load_config(tiny_config, ["MODEL.WEIGHTS", "(" * 5000]).MODEL.WEIGHTS == "(" * 5000


def test_merged_keys_may_be_repeated():
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc:\n  <<: [*a, {z: 4}]\n  x: 5\n"
    assert parse_yaml(text, "a.yaml") == yaml.safe_load(text)


def test_a_byte_order_mark_of_utf_8(tmp_path):
    (tmp_path / "a.yaml").write_bytes("\ufeffVERSION: 2\nSEED: 7\n".encode())
    assert load_config(str(tmp_path / "a.yaml")).SEED == 7


def test_bases_that_double_with_each_file(tmp_path):
    """2^60 files to read."""
    for number in range(60):
        (tmp_path / f"{number}.yaml").write_text(f"_BASE_: [{number + 1}.yaml, {number + 1}.yaml]\n")
    (tmp_path / "60.yaml").write_text("VERSION: 2\n")
    with pytest.raises(ConfigError, match=r"is based on more than 100 files"):
        load_config(str(tmp_path / "0.yaml"))


def test_a_long_chain_of_bases(tmp_path):
    for number in range(90):
        (tmp_path / f"{number}.yaml").write_text(f"_BASE_: {number + 1}.yaml\n")
    (tmp_path / "90.yaml").write_text("SEED: 5\n")
    assert load_config(str(tmp_path / "0.yaml")).SEED == 5
