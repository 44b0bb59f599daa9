"""Write what the pages take from the code: its lines, the registries' contracts and the table of config keys.

    python docs/generate.py            # after a change of what a page quotes
    python docs/generate.py --check    # says which pages are stale; exit code 1 if there is one

Such a part of a page stands between two comments, the first of which says what belongs there:

    <!-- generated: code focal_plugin/heads/bias_init.py PriorBiasInit.__call__ -->
    <!-- generated: code focal_plugin/losses/functional.py sigmoid_focal_loss | cross_entropy = ... return -->
    <!-- generated: contract CLS_LOSS -->
    <!-- generated: keys -->
    <!-- end -->

``code`` is the body of a function or class without its docstring, or a constant. The texts after a ``|`` are in the
first and in the last line of what is quoted of it. Code is read as text, never imported.
"""

import argparse
import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
_PART = re.compile(r"(<!-- generated: (?P<what>\w+) ?(?P<words>.*?) ?-->\n).*?(?P<end><!-- end -->)", re.DOTALL)


class StaleError(LookupError):
    """A page asks for something that is not in the code any more. The message says what."""


def render(page: str) -> str:
    """Return the text of a page with its generated parts made anew.

    Raises:
        StaleError: a part asks for what is not there.
    """
    makers = {"code": _code, "contract": _contract, "keys": _keys}
    return _PART.sub(lambda part: f"{part[1]}\n{makers[part['what']](part['words'])}\n{part['end']}", page)


def code_lines(path: str, symbol: str, between: str = "") -> tuple[str, int]:
    """Return the lines of a symbol, dedented, and the number of the first one in the file ``path``, from 1.

    Args:
        path: relative to the repository.
        symbol: dotted: a function, class, method or constant.
        between: "first text ... last text" of the lines wanted; empty for all but the docstring.

    Raises:
        StaleError: the file, the symbol or a text is not there.
    """
    if not (ROOT / path).is_file():
        raise StaleError(f"There is no {path}.")
    source = (ROOT / path).read_text()
    start, end = _extent(source, symbol, path)
    lines = source.splitlines()[start - 1 : end]
    if between:
        first_text, _, last_text = (text.strip() for text in between.partition("..."))
        first = _find(lines, first_text, 0, f"{path}, {symbol}")
        last = _find(lines, last_text, first, f"{path}, {symbol}") if last_text else first
        lines, start = lines[first : last + 1], start + first
    return textwrap.dedent("\n".join(lines)) + "\n", start


def _extent(source: str, symbol: str, path: str) -> tuple[int, int]:
    """The first and the last line of a symbol; of a function or class, of its body without the docstring."""
    node: ast.AST = ast.parse(source)
    for name in symbol.split("."):
        found = [child for child in ast.iter_child_nodes(node) if name in _names(child)]
        if not found:
            raise StaleError(f"{path} has no {symbol}.")
        node = found[0]
    if not isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.lineno, node.end_lineno
    if ast.get_docstring(node):
        return node.body[0].end_lineno + 1, node.end_lineno
    lines, start = source.splitlines(), node.body[0].lineno
    while lines[start - 2].lstrip().startswith("#"):  # comments above the first statement belong to the body
        start -= 1
    return start, node.end_lineno


def _names(node: ast.AST) -> list[str]:
    """What a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _find(lines: list[str], text: str, start: int, where: str) -> int:
    """The index of the first line from ``start`` on that contains ``text``."""
    for index in range(start, len(lines)):
        if text in lines[index]:
            return index
    raise StaleError(f"{where} has no line with {text!r}.")


def _code(words: str) -> str:
    path, symbol, between = split_code(words)
    lines, _ = code_lines(path, symbol, between)
    return f"[{path}](../{path}), `{symbol}`:\n\n```python\n{lines}```\n"


def split_code(words: str) -> tuple[str, str, str]:
    """Split the words after ``generated: code`` into the arguments of ``code_lines``."""
    place, _, between = words.partition(" | ")
    path, symbol = place.split()
    return path, symbol, between


def _contract(name: str) -> str:
    """The documentation of a registry."""
    path = "focal_plugin/registry.py"
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == f"{name}_REGISTRY.__doc__":
            return inspect.cleandoc(ast.literal_eval(node.value)) + "\n"
    raise StaleError(f"{path} sets no {name}_REGISTRY.__doc__.")


def _keys(_: str) -> str:
    """A table of the plugin's config keys."""
    rows = [f"| `{key}` | {_cell(default)} | {text} |\n" for key, default, text in config_keys()]
    return "| key | default | what it does |\n|---|---|---|\n" + "".join(rows)


def config_keys() -> Iterator[tuple[str, object, str]]:
    """Yield the plugin's config keys in the order of their files: (key, default, the comment above it).

    Raises:
        StaleError: a key has no comment of its own.
    """
    for path in ("focal_plugin/config/keys.py", "focal_plugin/config/workflow_keys.py"):
        yield from _config_keys_of(path)


def _config_keys_of(path: str) -> Iterator[tuple[str, object, str]]:
    comment = []
    for line in (ROOT / path).read_text().splitlines():
        line = line.strip()
        if line.startswith("#"):
            comment.append(line.removeprefix("#").strip())
        elif match := re.fullmatch(r"cfg\.([\w.]+) = (.+)", line):
            if match[2] != "CN()":
                if not comment:
                    raise StaleError(f"{path}: {match[1]} has no comment above it.")
                yield match[1], ast.literal_eval(match[2]), " ".join(comment)
            comment = []
        else:
            comment = []


def _cell(default: object) -> str:
    return "empty" if default == "" else f"`{default}`"


def main(arguments: list[str] | None = None) -> int:
    """Write the pages, or with ``--check`` say which are stale. 0; 1 if any is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(arguments).check
    stale = 0
    for path in PAGES:
        page = path.read_text()
        try:
            made = render(page)
        except StaleError as error:
            print(f"docs/{path.name}: {error}", file=sys.stderr)
            stale += 1
            continue
        if made != page:
            if not check:
                path.write_text(made)
            print(f"docs/{path.name}: " + ("stale; run python docs/generate.py" if check else "written"))
            stale += check
    return int(stale > 0)


if __name__ == "__main__":
    sys.exit(main())
