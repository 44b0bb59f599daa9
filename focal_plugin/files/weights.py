"""Whether a file of weights is there, and whether its weights fit a model."""

import os
from collections.abc import Mapping
from typing import NamedTuple

import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

from .unpickle import WeightsError

Shape = tuple[int, ...]


def missing_file(key: str, path: str, expected: str = "a path or a URL") -> str:
    """Return what is wrong if ``path`` names no file of weights; "" if it does, or is a URL, which is not opened.

    Args:
        key: the config key or the flag that names the file.
        path: a path, with Detectron2's ``?matching_heuristics=True`` behind it or not; a URL; or a name such as
            "detectron2://ImageNetPretrained/MSRA/R-50.pkl".
        expected: what the key may be set to.
    """
    if "://" in path or PathManager.isfile(path.partition("?")[0]):
        return ""
    return f"{key} is {path}, which is no file (current folder: {os.getcwd()}). Expected {expected}."


class Fit(NamedTuple):
    """How the weights of a file fit a model, by the names of its parameters and buffers.

    Attributes:
        missing: names of the model's that the file does not have.
        unexpected: names of the file's that the model does not have.
        other_shapes: (name, shape in the file, shape in the model) where the two differ.
    """

    missing: list[str]
    unexpected: list[str]
    other_shapes: list[tuple[str, Shape, Shape]]

    def problems(self) -> list[str]:
        """Return a line for each difference that matters for inference.

        Batch norm's counters and the loss normaliser, which training alone reads, do not.
        """
        return [
            *(f"{name} is missing" for name in self.missing if not _is_for_training(name)),
            *(f"{name} is {found}, expected {expected}" for name, found, expected in self.other_shapes),
            *(f"{name} is of no part of the model" for name in self.unexpected if not _is_for_training(name)),
        ]


def compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Fit:
    """Compare two state dicts by names and shapes: ``found`` in a file, and what a model ``expected``."""
    shapes = {name: (tuple(found[name].shape), tuple(expected[name].shape)) for name in expected if name in found}
    return Fit(
        [name for name in expected if name not in found],
        [name for name in found if name not in expected],
        [(name, theirs, ours) for name, (theirs, ours) in shapes.items() if theirs != ours],
    )


def check_values(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str) -> None:
    """Check that the tensors of the file ``path`` can be copied into those of a model: what has its name and shape.

    Raises:
        WeightsError: one is sparse, quantised, without values or of another kind of numbers, or has a NaN or infinity.
    """
    for name, ours in expected.items():
        theirs = found.get(name)
        if theirs is None or theirs.shape != ours.shape:
            continue
        if theirs.layout != torch.strided:
            problem = f"is {theirs.layout}"
        elif theirs.is_meta:
            problem = "is meta, without values"
        elif theirs.is_quantized or _kind(theirs) != _kind(ours):
            problem = f"is {theirs.dtype}"
        elif not theirs.to(ours.dtype).isfinite().all():
            problem = "has a value that is not finite"
        else:
            continue
        raise WeightsError(f"{path}: {name} {problem}; expected finite numbers, dense and of {ours.dtype}.")


def _kind(tensor: Tensor) -> tuple[bool, bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool


def _is_for_training(name: str) -> bool:
    return name.endswith("num_batches_tracked") or name.startswith("normalizer.")
