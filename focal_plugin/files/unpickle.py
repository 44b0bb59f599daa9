"""Unpickle arrays and plain values without importing anything, and without being made to wait.

A pickle is a program: it may import any function and call it. Here it gets stand-ins for what the pickles of NumPy
arrays call, and nothing else. It may also be small and take years: to hash a tuple that holds one tuple twice, and so
on, or thousands of numbers with one hash. So the keys of dicts and the members of sets are text and numbers.
"""

import collections
import io
import math
import pickle
import re
import reprlib
from collections.abc import Callable, Iterable
from typing import BinaryIO, ClassVar

import numpy as np

CONVERT = (
    "Nothing of it was run: tensors, NumPy arrays in a .pkl, numbers, text and containers of them are read. If you "
    "trust whoever made the file, load it in a program of your own and save its state_dict alone with torch.save."
)


class WeightsError(ValueError):
    """A file that holds no weights, is damaged, or asks for more than data. The message names the file and why."""


def unpickle(data: bytes, where: str) -> object:
    """Return the value in a pickle of any protocol, of Python 2 or 3 and NumPy 1 or 2.

    Allowed are NumPy arrays and scalars (numbers, bools, bytes and text), numbers, text, bytes, None, and dicts, lists,
    tuples and sets of them, none of which contains itself. Keys and members of sets are text and numbers up to 2^64.
    OrderedDicts become dicts.

    Args:
        data: the pickle.
        where: names it in messages.

    Raises:
        WeightsError: it asks for anything else, or is damaged.
    """
    if data.startswith(b"PK"):
        raise WeightsError(f"{where} is no pickle of arrays but a file of PyTorch's: name it .pth.")
    try:
        return _plain(_Unpickler(io.BytesIO(data), encoding="latin1").load(), {})
    except WeightsError as error:
        raise WeightsError(f"{where} {error}") from error
    except Exception as error:  # a damaged pickle raises errors of any type
        raise WeightsError(f"{where} is damaged or no pickle: {first_line(error)}") from error


def check_keys(file: BinaryIO) -> None:
    """Check that the pickle which begins here has keys and members of sets as ``unpickle`` takes them.

    Nothing is imported or called, so that any other unpickler can then read it.

    Raises:
        WeightsError: it has others.
        Exception: it is damaged; of many types.
    """
    _KeyChecker(file, encoding="latin1").load()


def _short(value: object) -> str:
    """Return the beginning of a value's text, which as a whole may be endless."""
    return reprlib.repr(value)[:80]


def first_line(error: Exception) -> str:
    """Return the type and the first line of an error's message."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


# Stand-ins for what the pickles of arrays call. NumPy's own take any state that a file gives them, and some states make
# them read memory that is not theirs. A pickle may also try to change what it calls: each stand-in is a class with its
# own __setstate__, or made anew for every use.


class _Dtype:
    """``numpy.dtype``: of numbers, bools, bytes and text."""

    def __init__(self, code: str | bytes, *align_and_copy: object):
        if not re.fullmatch(r"[biufcSU]\d{1,4}", code := _text(code)):
            raise WeightsError(f"has an array of dtype {_short(code)}, expected numbers, bools or text.")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        order = _text(state[1])
        if order not in ("<", ">", "=", "|"):
            raise WeightsError(f"has an array in the byte order {_short(order)}, expected <, >, = or |.")
        self.dtype = self.dtype.newbyteorder(order)  # all else follows from the code


class _Array:
    """``numpy.ndarray``, and ``numpy.core.multiarray._reconstruct``, which makes an array before its state arrives."""

    value: np.ndarray | None = None

    def __init__(self, kind: object, shape: object, code: object):
        if kind is not _Array:
            raise WeightsError(f"has an array of type {_short(kind)}, expected numpy.ndarray.")

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        self.value = _array(data, dtype, shape, "F" if is_fortran else "C")


def _array(data: object, dtype: object, shape: object, order: object) -> np.ndarray:
    """``numpy.core.numeric._frombuffer``: the array of these bytes, in this machine's byte order."""
    sizes = shape if isinstance(shape, tuple) and len(shape) <= 32 else (None,)
    if not isinstance(dtype, _Dtype) or not all(type(n) is int and 0 <= n < 2**63 for n in sizes) or order not in "CF":
        found = ", ".join(map(_short, (shape, order)))
        raise WeightsError(f"has an array of the shape and order {found}, expected whole numbers, and C or F.")
    data = data.encode("latin1") if isinstance(data, str) else data  # Python 2 had one type for bytes and text
    if not isinstance(data, bytes | bytearray):
        raise WeightsError(f"has an array of {type(data).__name__}, expected bytes.")
    if math.prod(shape) * dtype.dtype.itemsize != len(data):
        raise WeightsError(f"has {len(data)} bytes for an array of {dtype.dtype} of shape {shape}.")
    array = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)
    return array.astype(dtype.dtype.newbyteorder("="))  # a copy, which can be written to


def _scalar(dtype: object, data: object = b"") -> np.generic:
    """``numpy.core.multiarray.scalar``."""
    return _array(data, dtype, (), "C")[()]


def _encode(text: str, encoding: str) -> bytes:
    """``_codecs.encode``, with which protocols before 3 write bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise WeightsError(f"encodes {type(text).__name__} as {_short(encoding)}, expected text as latin1.")
    return text.encode("latin1")


def _text(value: str | bytes) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else value


def _ordered(pairs: Iterable[tuple] = ()) -> collections.OrderedDict:
    pairs = [(key, value) for key, value in pairs]
    _check_keys(key for key, _ in pairs)
    return collections.OrderedDict(pairs)


def _set(members: Iterable = ()) -> set:
    _check_keys(members := list(members))
    return set(members)


def _check_keys(keys: Iterable) -> None:
    """Check that ``keys`` are hashed soon, and that few of them have one hash."""
    for key in keys:
        if not (isinstance(key, str | bytes | float | None) or (isinstance(key, int) and abs(key) <= 2**64)):
            kind = f"{type(key).__name__} beyond 2^64" if isinstance(key, int) else type(key).__name__
            raise WeightsError(f"has a key, or a member of a set, of type {kind}, expected text or a number.")


_KNOWN: dict[str, Callable] = {
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _array,
    "_codecs.encode": _encode,
    "collections.OrderedDict": _ordered,
    "builtins.bytes": lambda: b"",  # protocols before 3 call it for empty ones; with a number it would fill the memory
    "builtins.set": _set,
    "builtins.frozenset": lambda members=(): frozenset(_set(members)),
    "detectron2.structures.boxes.BoxMode": lambda value: value,  # in files of proposals; the number is as good
}
_OLD_NAMES = {"numpy._core.multiarray": "numpy.core.multiarray", "numpy._core.numeric": "numpy.core.numeric"}
_OLD_NAMES["__builtin__"] = "builtins"


class _PlainKeys(pickle._Unpickler):
    """Python's own unpickler, the one in Python, for whose dicts and sets each key is checked before it is hashed."""

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        _check_keys(self.stack[::2])  # all since the mark: a key, its value, and so on
        super().load_setitems()

    def load_dict(self) -> None:
        _check_keys(self.stack[::2])
        super().load_dict()

    def load_additems(self) -> None:
        _check_keys(self.stack)
        super().load_additems()

    def load_frozenset(self) -> None:
        _check_keys(self.stack)
        super().load_frozenset()

    def load_bytearray8(self) -> None:  # Python's makes room for as many bytes as the file says
        size = int.from_bytes(self.read(8), "little")
        self.append(bytearray(self.read(size)))

    for _opcode, _load in (
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
        (pickle.DICT, load_dict),
        (pickle.ADDITEMS, load_additems),
        (pickle.FROZENSET, load_frozenset),
        (pickle.BYTEARRAY8, load_bytearray8),
    ):
        dispatch[_opcode[0]] = _load


class _Unpickler(_PlainKeys):
    """An unpickler that imports nothing."""

    def find_class(self, module: str, name: str) -> Callable:
        known = _KNOWN.get(f"{_OLD_NAMES.get(module, module)}.{name}")
        if known is None:
            raise WeightsError(f"asks for {module:.100}.{name:.100}, which is refused. {CONVERT}")
        return known if isinstance(known, type) else lambda *arguments: known(*arguments)


class _Anything:
    """Stands for whatever a pickle asks for; takes all that it may do."""

    def __init__(self, *_: object) -> None:
        pass

    append = extend = add = __setstate__ = __setitem__ = __init__


class _KeyChecker(_PlainKeys):
    """Goes through a pickle for its keys alone."""

    def find_class(self, module: str, name: str) -> Callable:
        name = f"{_OLD_NAMES.get(module, module)}.{name}"
        known = {"collections.Counter": _set, "collections.defaultdict": lambda _, *pairs: _ordered(*pairs)} | _KNOWN
        return known[name] if name.startswith(("builtins.", "collections.")) and name in known else _Anything

    def persistent_load(self, pid: object) -> None:
        return None


_PLAIN = (str, bytes, bytearray, bool, int, float, complex, type(None), np.generic, np.ndarray)


def _plain(value: object, copies: dict[int, tuple]) -> object:
    """Return a copy of ``value`` with arrays for their stand-ins.

    Args:
        value: what the unpickler gave.
        copies: (copy, value) by the id of the value; the copy is None while it is being made.
    """
    if isinstance(value, _PLAIN):
        return value
    if id(value) not in copies:
        copies[id(value)] = None, value
        match value:
            case dict():  # also an OrderedDict, whose methods a pickle can replace
                copy = {_plain(key, copies): _plain(item, copies) for key, item in dict.items(value)}
            case list() | tuple() | set() | frozenset():
                copy = type(value)(_plain(item, copies) for item in value)
            case _Array(value=np.ndarray() as copy):
                pass
            case _:
                raise WeightsError(f"has a value of type {type(value).__name__}, expected arrays and containers.")
        copies[id(value)] = copy, value
    copy, _ = copies[id(value)]
    if copy is None:
        raise WeightsError("has a container that contains itself.")
    return copy
