"""Arithmetic in text: what Detectron2's configs compute with ``!!python/object/apply:eval``."""

import ast
import operator
from collections.abc import Iterator

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_MOST_CHARACTERS, _MOST_STEPS, LARGEST, _LARGEST_POWER = 500, 10_000, 2**63, 64


class ExpressionError(ValueError):
    """An expression that is not arithmetic on numbers and lists of them, or too much of it."""


def evaluate(expression: str) -> int | float | list | tuple:
    """Return the value of ``expression``, the same that Python gives it.

    It may have numbers, lists, tuples, ``+ - * / **`` between numbers, and list comprehensions over one list of
    numbers: ``[[x, x * 2 ** 0.5] for x in [32, 64]]``. Its length, steps and values are bounded, so that none takes
    long.

    Raises:
        ExpressionError: it is anything else.
    """
    try:
        if len(expression) > _MOST_CHARACTERS:
            raise ValueError(f"more than {_MOST_CHARACTERS} characters")
        return _value(ast.parse(expression.strip(), mode="eval").body, {}, iter(range(_MOST_STEPS)))
    except (ArithmeticError, MemoryError, RecursionError, SyntaxError, ValueError) as error:  # the parser's, too
        raise ExpressionError(
            f"{expression[:80]!r} is refused ({error}); expected numbers, lists, + - * / ** between numbers, and "
            "comprehensions over one list of numbers"
        ) from error


def _value(node: ast.expr, variables: dict[str, int | float], steps: Iterator) -> int | float | list | tuple:
    """Return the value of a node of a syntax tree, where ``variables`` are those of the comprehensions around it."""
    if next(steps, None) is None:
        raise ValueError(f"more than {_MOST_STEPS:,} steps")
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _number(value)
        case ast.Name(id=name) if name in variables:
            return variables[name]
        case ast.List(elts=elements):
            return [_value(element, variables, steps) for element in elements]
        case ast.Tuple(elts=elements):
            return tuple(_value(element, variables, steps) for element in elements)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _number(_OPERATORS[type(op)](_number(_value(operand, variables, steps))))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = (_number(_value(side, variables, steps)) for side in (left, right))
            if isinstance(op, ast.Pow) and abs(b) > _LARGEST_POWER:
                raise ValueError(f"a power above {_LARGEST_POWER}")
            return _number(_OPERATORS[type(op)](a, b))
        case ast.ListComp(elt=element, generators=[ast.comprehension(ast.Name(id=name), over, [], 0)]):
            items = _value(over, variables, steps)
            if isinstance(items, list | tuple):
                return [_value(element, {**variables, name: _number(item)}, steps) for item in items]
    raise ValueError(ast.unparse(node))


def _number(value: object) -> int | float:
    if isinstance(value, int | float) and abs(value) <= LARGEST:  # no list, no complex number, no NaN
        return value
    raise ValueError(f"{value!r} is no number up to 2^63")
