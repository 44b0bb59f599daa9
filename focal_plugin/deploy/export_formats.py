"""The formats of exported models: writing a file of each, and running it."""

import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .export_graph import ExportedHeads, class_wise_nms, offset_nms

# Of the image in tracing. No side is a multiple of a stride, and P7 has several cells: PyTorch makes a 1 a constant.
_EXAMPLE_SIZE = (298, 426)

Run = Callable[[Tensor], list[np.ndarray]]


def write_onnx(
    module: ExportedHeads, path: str, names: Sequence[str], metadata: Mapping[str, Any], opset: int | None
) -> None:
    """Write an ONNX file with the weights inside. Metadata are texts as they are, and all else as JSON."""
    _import("onnxscript")
    image = _example(module)
    program = torch.onnx.export(
        module,
        (image,),
        dynamo=True,
        input_names=["image"],
        output_names=list(names),
        dynamic_shapes=_dynamic_shapes(module),
        opset_version=opset,
        custom_translation_table={torch.ops.focal_plugin.class_wise_nms.default: _class_wise_nms_in_onnx},
        verbose=False,
    )
    program.model.metadata_props.update(_texts(metadata))
    program.save(path)


def run_onnx(path: str) -> Run:
    """Load an ONNX file into ONNX Runtime, on the CPU, and return a function that runs it."""
    onnxruntime = _import("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image.cpu().numpy()})


def write_torchscript(
    module: ExportedHeads, path: str, names: Sequence[str], metadata: Mapping[str, Any], opset: int | None
) -> None:
    """Write a TorchScript file, with the metadata as extra files."""
    traced = torch.jit.trace(module, _example(module), check_trace=False)
    _write(path, lambda file: torch.jit.save(traced, file, _extra_files=_texts(metadata)))


def run_torchscript(path: str) -> Run:
    """Load a TorchScript file and return a function that runs it."""
    with quiet():
        return _as_arrays(torch.jit.load(path))


def write_torch_export(
    module: ExportedHeads, path: str, names: Sequence[str], metadata: Mapping[str, Any], opset: int | None
) -> None:
    """Write a file of ``torch.export``, with the metadata as extra files."""
    program = torch.export.export(module, (_example(module),), dynamic_shapes=_dynamic_shapes(module), strict=False)
    _write(path, lambda file: torch.export.save(program, file, extra_files=_texts(metadata)))


def run_torch_export(path: str) -> Run:
    """Load a file of ``torch.export`` and return a function that runs it."""
    with open(path, "rb") as file:
        return _as_arrays(torch.export.load(file).module())


def _write(path: str, save: Callable[[BinaryIO], None]) -> None:
    """Write what ``save`` writes: on a full disk PyTorch's own writer ends the process."""
    buffer = io.BytesIO()
    save(buffer)
    with open(path, "wb") as file:
        file.write(buffer.getbuffer())


# name: (write, run, how NMS is written, whether on the CPU alone)
FORMATS = {
    "onnx": (write_onnx, run_onnx, class_wise_nms, True),
    "torchscript": (write_torchscript, run_torchscript, offset_nms, False),
    "torch-export": (write_torch_export, run_torch_export, offset_nms, False),
}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' warnings for developers: deprecations, sizes that tracing makes constants, and steps."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _class_wise_nms_in_onnx(boxes, scores, classes, num_classes: int, threshold: float, count: int):
    """``class_wise_nms`` in ONNX's operators: a row of scores for each class, −1 where a box has another class."""
    op = _import("onnxscript").opset18
    rows = op.Unsqueeze(op.Range(0, num_classes, 1), [1])  # (K, 1)
    nothing = op.CastLike(-1.0, scores)
    rows = op.Where(op.Equal(rows, op.Unsqueeze(classes, [1])), op.Unsqueeze(scores, [1]), nothing)  # (N, K, C)
    kept = op.NonMaxSuppression(
        boxes,
        rows,
        op.Constant(value_ints=[count]),
        op.Constant(value_floats=[threshold]),
        op.Constant(value_floats=[-0.5]),  # scores are above
    )  # (P, 3): image, class, box
    kept = op.Gather(kept, op.Constant(value_ints=[0, 2]), axis=1)
    scores = op.ScatterND(op.Expand(nothing, op.Shape(scores)), kept, op.GatherND(scores, kept))  # (N, C)
    most = op.Min(op.Constant(value_ints=[count]), op.Shape(scores, start=1))
    return op.TopK(scores, most)  # of equal ones, the first


def _example(module: ExportedHeads) -> Tensor:
    generator, mean = torch.Generator().manual_seed(0), module.model.pixel_mean  # (C, 1, 1)
    images = torch.rand((1 + module.image_input.batch, len(mean), *_EXAMPLE_SIZE), generator=generator) * 255
    return module.image_input.pack(images).to(mean.device)


def _dynamic_shapes(module: ExportedHeads) -> tuple[dict]:
    layout, batch = module.image_input.layout, module.image_input.batch
    return ({layout.index(side): torch.export.Dim.DYNAMIC for side in ("NHW" if batch else "HW")},)


def _texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}


def _as_arrays(module: Callable[[Tensor], Sequence[Tensor]]) -> Run:
    return lambda image: [output.cpu().numpy() for output in module(image)]


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"ONNX files need onnx, onnxscript and onnxruntime ({error}): pip install -e .[export], or choose another "
            "--format."
        ) from error
