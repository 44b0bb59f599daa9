"""Read files of weights without running anything in them.

PyTorch's files are read with ``weights_only``. That unpickler knows no NumPy arrays and no protocol but 2, so
Detectron's model zoos (``.pkl``) are read by one with its own list of what a pickle may ask for (``files.unpickle``);
all else is refused and never imported. No switch turns this off.
"""

import io
import re
import zipfile
from typing import BinaryIO

import numpy as np
import torch

from .regular import open_regular
from .unpickle import CONVERT, WeightsError, check_keys, first_line, unpickle


def load_torch(path: str) -> dict:
    """Return what ``torch.save`` wrote to ``path``: a dict of tensors and plain values, on the CPU.

    Raises:
        OSError: the file cannot be opened, or is a pipe or a device.
        WeightsError: it is damaged, of another kind, or asks for anything but tensors and plain containers.
    """
    with open_regular(path) as file:
        try:
            _check_archive(file) if _is_zip(file) else _check_old(file)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
        except WeightsError as error:
            raise WeightsError(f"{path} {error}") from error
        except Exception as error:  # PyTorch raises errors of many types on files that are not its own
            if wanted := re.search(r"GLOBAL (\S+)", str(error)):
                raise WeightsError(f"{path} asks for {wanted[1]:.200}, which is refused. {CONVERT}") from error
            problem = re.search(r"WeightsUnpickler error: (.+)", str(error))
            problem = problem[1] if problem else first_line(error) if _is_zip(file) else _beginning(file)
            raise WeightsError(f"{path} is damaged or no file of PyTorch's: {problem[:300]}") from error
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


def _check_archive(file: BinaryIO) -> None:
    """Check that a zip of ``torch.save`` is as large as what is in it, and the keys of the pickle in it."""
    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        content = sum(entry.file_size for entry in archive.infolist())
        if content > size:
            raise WeightsError(
                f"is compressed: {content:,} bytes in a file of {size:,}; expected one that torch.save wrote."
            )
        for entry in archive.infolist():
            if entry.filename.endswith("data.pkl"):
                check_keys(io.BytesIO(archive.read(entry)))


def _check_old(file: BinaryIO) -> None:
    """Check the keys in a file from before PyTorch 1.6: pickles of a number, a version, facts, and the content."""
    file.seek(0)
    for _ in range(4):
        check_keys(file)


def _is_zip(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(2) == b"PK"


def _beginning(file: BinaryIO) -> str:
    """Quote the beginning of ``file``, which shows a page of HTML in place of a download, or a pointer of Git LFS."""
    file.seek(0)
    beginning, size = file.read(40), file.seek(0, io.SEEK_END)
    return f"it begins with {beginning!r} and has {size} bytes" if size else "it is empty"


def _need_dict(content: object, where: str) -> dict:
    if not isinstance(content, dict):
        raise WeightsError(f"{where} is of type {type(content).__name__}, expected a dict of weights by name.")
    return content
