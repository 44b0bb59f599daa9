"""YAML configs are read, and nothing in them is executed.

Detectron2 falls back to ``yaml.unsafe_load``, which runs whatever program a file holds, since its Base-RetinaNet.yaml
has the anchor sizes computed by ``!!python/object/apply:eval``. Here that tag gets arithmetic on lists of numbers;
every other tag that is not plain YAML is refused.
"""

import ast
import io
import operator
import os

import yaml
from detectron2.config import CfgNode, downgrade_config, upgrade_config
from detectron2.config.compat import guess_version
from detectron2.utils.file_io import PathManager

from ..config import ConfigError
from .shipped import shipped

_EVAL = "tag:yaml.org,2002:python/object/apply:eval"
_MOST_NODES = 100_000  # of a file, aliases written out: far above any config, far below what fills the memory

_TOO_DEEP = "is nested too deep, or its _BASE_ leads back to itself."


def merge_from_file(cfg: CfgNode, path: str) -> None:
    """Merge a config file and its ``_BASE_`` files into ``cfg``, as Detectron2's ``cfg.merge_from_file`` does.

    A ``_BASE_`` is relative to its file, as in Detectron2, or else the name of a shipped config.

    Args:
        cfg: of Detectron2's latest version; changed in place.
        path: a file, or what Detectron2's PathManager opens. A file of an older version is upgraded.

    Raises:
        ConfigError: the file, or one that it is based on, is no YAML mapping, or asks for code to be run.
        FileNotFoundError: one of them is not there.
        KeyError: it has a key that ``cfg`` does not have.
    """
    try:
        loaded = CfgNode(_SafeFiles.load_yaml_with_base(path))
    except RecursionError as error:
        raise ConfigError(f"{path} {_TOO_DEEP}") from error
    version = loaded.get("VERSION") or guess_version(loaded, path)
    if version == cfg.VERSION:
        cfg.merge_from_other_cfg(loaded)
        return
    old = downgrade_config(cfg, to_version=version)
    old.merge_from_other_cfg(loaded)
    upgraded = upgrade_config(old)
    cfg.clear()
    cfg.update(upgraded)


class _SafeFiles(CfgNode):
    """fvcore's reader of ``_BASE_`` chains, whose files reach it as plain YAML: there is nothing to fall back for."""

    @classmethod
    def _open_cfg(cls, filename: str) -> io.StringIO:
        with PathManager.open(filename, "rb") as file:
            content = parse_yaml(file.read(), filename)
        if bases := content.get("_BASE_"):
            content["_BASE_"] = [_find_base(base, filename) for base in (bases if isinstance(bases, list) else [bases])]
        return io.StringIO(yaml.safe_dump(content, sort_keys=False))


def _find_base(base: str, config: str) -> str:
    """Return ``base`` as ``config`` names it, relative to itself, or if no such file exists, the shipped config."""
    beside = os.path.join(os.path.dirname(config), os.path.expanduser(base))
    if "://" in config or os.path.exists(beside) or not shipped(base).is_file():
        return base
    return str(shipped(base))


def parse_yaml(text: str | bytes, where: str) -> dict:
    """The mapping that ``text`` is; ``where`` names it in messages.

    Raises:
        ConfigError: it is no YAML, no mapping, or asks for more than data.
    """
    loader = None
    try:
        loader = _Loader(text)
        loader.name = where
        node = loader.get_single_node()
        if node is None:
            return {}
        _count(node, {})
        content = loader.construct_document(node)
    except RecursionError as error:
        raise ConfigError(f"{where} {_TOO_DEEP}") from error
    except Exception as error:  # PyYAML fails in many ways on what is no YAML
        raise ConfigError(f"{where}: {error or type(error).__name__}") from error
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(content, dict):
        raise ConfigError(f"{where} holds {type(content).__name__}, expected keys and values.")
    bases = content.get("_BASE_", [])
    if not all(isinstance(base, str) for base in (bases if isinstance(bases, list) else [bases])):
        raise ConfigError(f"{where}: _BASE_ is {bases!r}, expected a path or a list of paths.")
    return content


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with one tag more."""


def _construct_eval(loader: _Loader, node: yaml.Node) -> object:
    """What ``!!python/object/apply:eval ["expression"]`` stands for."""
    arguments = loader.construct_sequence(node)
    if len(arguments) != 1 or not isinstance(arguments[0], str):
        raise ConfigError(f"!!python/object/apply:eval has {arguments!r}, expected one expression.{node.start_mark}")
    try:
        return evaluate(arguments[0])
    except ArithmeticError as error:
        raise ConfigError(f"{error}\n{node.start_mark}") from error


def _refuse(loader: _Loader, node: yaml.Node) -> None:
    tag = node.tag.replace("tag:yaml.org,2002:", "!!")
    raise ConfigError(
        f"the tag {tag} asks for more than data, which is refused. Write the value itself; a tuple is text in round "
        "brackets. (The config.yaml of a LazyConfig's run holds objects: it is a record, and no config to read.)\n"
        f"{node.start_mark}"
    )


_Loader.add_constructor(_EVAL, _construct_eval)
_Loader.add_constructor(None, _refuse)


def _count(node: yaml.Node, counts: dict[int, int | None]) -> int:
    """The nodes of a tree with its aliases written out; few lines of aliases can stand for more than a memory holds."""
    if id(node) not in counts:
        counts[id(node)] = None  # under way
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in children for part in pair]
        counts[id(node)] = 1 + sum(_count(child, counts) for child in children)
    count = counts[id(node)]
    if count is None or count > _MOST_NODES:
        found = "contains itself" if count is None else f"stands for more than {_MOST_NODES:,} values"
        raise ConfigError(f"what is written here {found}.\n{node.start_mark}")
    return count


# Arithmetic

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_MOST_CHARACTERS, _MOST_STEPS, _LARGEST, _LARGEST_POWER = 1_000, 10_000, 2**63, 64


class ExpressionError(ArithmeticError):
    """An expression that is not arithmetic on numbers and lists of them, or too much of it."""


def evaluate(expression: str) -> int | float | list | tuple:
    """The value of ``expression``, the same that Python gives it.

    It may consist of numbers, lists, tuples, ``+ - * / **`` and brackets between numbers, and list comprehensions over
    one list of numbers: ``[[x, x * 2 ** 0.5] for x in [32, 64]]``. Values are at most 2^63, and an expression takes at
    most 10,000 steps, so that none takes long.

    Raises:
        ExpressionError: anything else.
    """
    if len(expression) > _MOST_CHARACTERS:
        raise ExpressionError(f"an expression of {len(expression)} characters; at most {_MOST_CHARACTERS} are read.")
    try:
        return _Arithmetic(expression).value(ast.parse(expression.strip(), mode="eval").body, {})
    except ExpressionError:
        raise
    except (ArithmeticError, MemoryError, RecursionError, SyntaxError, ValueError) as error:  # of Python's parser, too
        raise ExpressionError(f"{expression!r} has no value: {error}") from error


class _Arithmetic:
    """Evaluates the syntax tree of one expression."""

    def __init__(self, expression: str):
        self.expression = expression
        self.steps = 0

    def value(self, node: ast.expr, variables: dict[str, int | float]) -> object:
        """The value of a node, where ``variables`` are those of the comprehensions around it."""
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise ExpressionError(f"{self.expression!r} takes more than {_MOST_STEPS:,} steps.")
        match node:
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                return self._within_bounds(value)
            case ast.Name(id=name) if name in variables:
                return variables[name]
            case ast.List(elts=elements):
                return [self.value(element, variables) for element in elements]
            case ast.Tuple(elts=elements):
                return tuple(self.value(element, variables) for element in elements)
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
                return self._within_bounds(_OPERATORS[type(op)](self._number(operand, variables)))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                a, b = self._number(left, variables), self._number(right, variables)
                if isinstance(op, ast.Pow) and abs(b) > _LARGEST_POWER:
                    raise ExpressionError(f"{self.expression!r}: a power of {b}; at most {_LARGEST_POWER} is computed.")
                return self._within_bounds(_OPERATORS[type(op)](a, b))
            case ast.ListComp(elt=element, generators=[ast.comprehension(ast.Name(id=name), over, [], 0)]):
                items = self.value(over, variables)
                if isinstance(items, list | tuple) and all(isinstance(item, int | float) for item in items):
                    return [self.value(element, {**variables, name: item}) for item in items]
        raise ExpressionError(
            f"{ast.unparse(node)!r} in {self.expression!r} is refused: an expression may have numbers, lists, tuples, "
            "+ - * / ** between numbers, and comprehensions over one list of numbers."
        )

    def _number(self, node: ast.expr, variables: dict[str, int | float]) -> int | float:
        value = self.value(node, variables)
        if isinstance(value, int | float):
            return value
        raise ExpressionError(f"{ast.unparse(node)!r} in {self.expression!r} is no number; it is {value!r}.")

    def _within_bounds(self, value: object) -> int | float:
        if isinstance(value, int | float) and abs(value) <= _LARGEST:  # neither complex nor NaN
            return value
        raise ExpressionError(f"{self.expression!r} leads to {value!r}, expected numbers up to 2^63.")
