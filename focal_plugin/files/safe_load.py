"""Read files of weights without running anything in them.

A pickle is a program: it may import any function and call it. PyTorch's files are read with ``weights_only``. That
unpickler knows no NumPy arrays and no protocol but 2, so Detectron's model zoos (``.pkl``) are read by one with its own
list of what a pickle may ask for; all else is refused and never imported. No switch turns this off.
"""

import collections
import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
import torch

from .regular import open_regular

_CONVERT = (
    "Nothing of it was run: tensors, NumPy arrays in a .pkl, numbers, text and containers of them are read. If you "
    "trust whoever made the file, load it in a program of your own and save its state_dict alone with torch.save."
)


class WeightsError(ValueError):
    """A file that holds no weights, is damaged, or asks for more than data. The message names the file and why."""


def load_torch(path: str) -> dict:
    """Return what ``torch.save`` wrote to ``path``: a dict of tensors and plain values, on the CPU.

    Raises:
        OSError: the file cannot be opened, or is a pipe or a device.
        WeightsError: it is damaged, of another kind, or asks for anything but tensors and plain containers.
    """
    with open_regular(path) as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # PyTorch raises errors of many types on files that are not its own
            if wanted := re.search(r"GLOBAL (\S+)", str(error)):
                raise WeightsError(f"{path} asks for {wanted[1]}, which is refused. {_CONVERT}") from error
            problem = re.search(r"WeightsUnpickler error: (.+)", str(error))
            problem = problem[1] if problem else _first_line(error) if _is_zip(file) else _beginning(file)
            raise WeightsError(f"{path} is damaged or no file of PyTorch's: {problem}") from error
    return _need_dict(content, path)


def load_zoo(path: str) -> dict:
    """Read a file of Detectron2's model zoo, of Detectron's or Caffe2's (``.pkl``), or of pycls (``.pyth``).

    Returns:
        What Detectron2's checkpointer makes of it: ``model``, tensors or arrays by name; ``matching_heuristics`` where
        the names are those of another project; ``__author__``, and whatever else the file has.

    Raises:
        OSError: the file cannot be opened, or is a pipe or a device.
        WeightsError: it is damaged, of another kind, or asks for anything but arrays and plain containers.
    """
    if path.endswith(".pyth"):
        model = _need_dict(load_torch(path).get("model_state"), f"model_state of {path}")
        model = {name: value for name, value in model.items() if not name.endswith("num_batches_tracked")}
        return {"model": model, "__author__": "pycls", "matching_heuristics": True}
    with open_regular(path) as file:
        content = _need_dict(unpickle(file.read(), path), path)
    if not ("model" in content and "__author__" in content):  # Detectron has "blobs"; ImageNet models have nothing
        blobs = _need_dict(content.get("blobs", content), f"blobs of {path}")
        model = {name: value for name, value in blobs.items() if not str(name).endswith("_momentum")}
        content = {"model": model, "__author__": "Caffe2", "matching_heuristics": True}
    for name, value in _need_dict(content["model"], f"model of {path}").items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise WeightsError(f"{path} has {type(value).__name__} for the weights {name!r}, expected a NumPy array.")
    return content


def unpickle(data: bytes, where: str) -> object:
    """Return the value in a pickle of any protocol, of Python 2 or 3 and NumPy 1 or 2.

    Allowed are NumPy arrays and scalars (numbers, bools, bytes and text), numbers, text, bytes, None, and dicts, lists,
    tuples and sets of them, none of which contains itself. OrderedDicts become dicts.

    Args:
        data: the pickle.
        where: names it in messages.

    Raises:
        WeightsError: it asks for anything else, or is damaged.
    """
    if data.startswith(b"PK"):
        raise WeightsError(f"{where} is no pickle of arrays but a file of PyTorch's: name it .pth.")
    try:
        _check_memo(data)
        return _plain(_Unpickler(io.BytesIO(data), encoding="latin1").load(), {})
    except WeightsError as error:
        raise WeightsError(f"{where} {error}") from error
    except Exception as error:  # a damaged pickle raises errors of any type
        raise WeightsError(f"{where} is damaged or no pickle: {_first_line(error)}") from error


def _is_zip(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(2) == b"PK"


def _beginning(file: BinaryIO) -> str:
    """Quote the beginning of ``file``, which shows a page of HTML in place of a download, or a pointer of Git LFS."""
    file.seek(0)
    beginning, size = file.read(40), file.seek(0, io.SEEK_END)
    return f"it begins with {beginning!r} and has {size} bytes" if size else "it is empty"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _need_dict(content: object, where: str) -> dict:
    if not isinstance(content, dict):
        raise WeightsError(f"{where} is of type {type(content).__name__}, expected a dict of weights by name.")
    return content


# Stand-ins for what the pickles of arrays call. NumPy's own take any state that a file gives them, and some states make
# them read memory that is not theirs. A pickle may also try to change what it calls: each stand-in is a class with its
# own __setstate__, or made anew for every use.


class _Dtype:
    """``numpy.dtype``: of numbers, bools, bytes and text."""

    def __init__(self, code: str | bytes, *align_and_copy: object):
        if not re.fullmatch(r"[biufcSU]\d{1,4}", code := _text(code)):
            raise WeightsError(f"has an array of dtype {code!r}, expected numbers, bools or text.")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(_text(state[1]))  # all else follows from the code


class _Array:
    """``numpy.ndarray``, and ``numpy.core.multiarray._reconstruct``, which makes an array before its state arrives."""

    value: np.ndarray | None = None

    def __init__(self, kind: object, shape: object, code: object):
        if kind is not _Array:
            raise WeightsError(f"has an array of type {kind!r}, expected numpy.ndarray.")

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        self.value = _array(data, dtype, shape, "F" if is_fortran else "C")


def _array(data: object, dtype: object, shape: object, order: object) -> np.ndarray:
    """``numpy.core.numeric._frombuffer``: the array of these bytes, in this machine's byte order."""
    if not isinstance(dtype, _Dtype) or not isinstance(shape, tuple) or order not in ("C", "F"):
        raise WeightsError(f"has an array of dtype {dtype!r}, shape {shape!r} and order {order!r}, expected others.")
    data = data.encode("latin1") if isinstance(data, str) else data  # Python 2 had one type for bytes and text
    if math.prod(shape) * dtype.dtype.itemsize != len(data):
        raise WeightsError(f"has {len(data)} bytes for an array of {dtype.dtype} of shape {shape}.")
    array = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)
    return array.astype(dtype.dtype.newbyteorder("="))  # a copy, which can be written to


def _scalar(dtype: object, data: object = b"") -> np.generic:
    """``numpy.core.multiarray.scalar``."""
    return _array(data, dtype, (), "C")[()]


def _encode(text: str, encoding: str) -> bytes:
    """``_codecs.encode``, with which protocols before 3 write bytes."""
    if encoding != "latin1":
        raise WeightsError(f"encodes text as {encoding!r}, expected latin1.")
    return text.encode("latin1")


def _text(value: str | bytes) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else value


_KNOWN: dict[str, Callable] = {
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _array,
    "_codecs.encode": _encode,
    "collections.OrderedDict": collections.OrderedDict,
    "builtins.bytes": lambda: b"",  # protocols before 3 call it for empty ones; with a number it would fill the memory
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "detectron2.structures.boxes.BoxMode": lambda value: value,  # in files of proposals; the number is as good
}
_OLD_NAMES = {"numpy._core.multiarray": "numpy.core.multiarray", "numpy._core.numeric": "numpy.core.numeric"}
_OLD_NAMES["__builtin__"] = "builtins"


class _Unpickler(pickle.Unpickler):
    """An unpickler that imports nothing."""

    def find_class(self, module: str, name: str) -> Callable:
        known = _KNOWN.get(f"{_OLD_NAMES.get(module, module)}.{name}")
        if known is None:
            raise WeightsError(f"asks for {module}.{name}, which is refused. {_CONVERT}")
        return known if isinstance(known, type) else lambda *arguments: known(*arguments)


def _check_memo(data: bytes) -> None:
    """Refuse a pickle that numbers its values beyond its own length: the unpickler makes room for so many."""
    for opcode, argument, position in pickletools.genops(data):
        if "PUT" in opcode.name and argument > position:
            raise WeightsError(f"is damaged or no pickle: it numbers a value {argument} at byte {position}.")


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
