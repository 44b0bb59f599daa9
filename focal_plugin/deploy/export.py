"""Write a trained model as one file that runs without this package.

    python -m focal_plugin export --config-file output/config.yaml --weights output/model_final.pth \\
        --format onnx --output detector.onnx

The file takes one image of any size, resized as in the config, with values from 0 to 255 in the channel order of
INPUT.FORMAT: (3, H, W) in float32, or as in --input-layout and --input-dtype. It returns boxes (XYXY in pixels of that
image), scores and classes, best first; normalisation, padding, NMS and clipping are inside. With --batch it takes any
number of images of one size, and returns the detections of one image after another, and their counts. With --raw it
returns the logits and deltas of each level instead. Its metadata has what is needed around it: channel order, image
size and class names; with --raw, the anchors and thresholds.

The file is kept only if it computes what the model does (scores to 1e-3, or to 1e-2 with --precision float16) on the
images of --image, or else on some of DATASETS.TEST, each as it is and reflected to a larger size. An existing file is
never overwritten.
"""

import argparse
import copy
import glob
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torch import Tensor, nn

from ..anchors.foreign import TorchvisionAnchorGenerator
from ..config.explain import split_pairs
from ..engine.signals import exit_on_sigterm
from ..files.write import check_free, is_running, process_name
from ..retinanet import FocalRetinaNet
from .export_check import TOLERANCES, ExportError, check
from .export_float16 import run_rounded
from .export_formats import FORMATS, quiet
from .export_graph import DTYPES, LAYOUTS, PRECISIONS, ExportedDetector, ExportedHeads, ImageInput
from .export_metadata import describe, output_names
from .loading import load_model, read_config
from .optimize import fold_norms
from .predictor import read_file

logger = logging.getLogger(__name__)

_UNFINISHED = ".export-"  # the beginning of a folder's name
_NUM_IMAGES = 4  # of DATASETS.TEST, to compare on


def export_model(
    model: nn.Module,
    output: str | os.PathLike,
    format: str,
    images: Mapping[str, Tensor],
    *,
    raw: bool = False,
    layout: str | None = None,
    dtype: str = "float32",
    batch: bool = False,
    precision: str = "float32",
    opset: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = logger.info,
) -> None:
    """Write a model to a file, which is kept if it computes what the model does.

    Args:
        model: a ``FocalRetinaNet`` with anchors of a ``DefaultAnchorGenerator`` or torchvision's. It is not changed.
        output: the file to write.
        format: "onnx", "torchscript" or "torch-export".
        images: real images to compare on, by name: (3, H, W), 0 to 255, as the model takes them.
        raw: return logits and deltas (``ExportedHeads``), not detections (``ExportedDetector``).
        layout, dtype, batch: of the file's images, see ``ImageInput``.
        precision: what the network computes in and its weights are, "float32" or, of an ONNX file, "float16". Boxes,
            scores and NMS are computed in float32, and what goes in and comes out stays as it is.
        opset: the version of ONNX's operators; None, PyTorch's choice.
        metadata: written into the file; texts as they are, all else as JSON.
        say: called with a sentence when a step begins.

    Raises:
        ExportError: the model cannot be exported, or the file computes something else. No file is left.
        FileExistsError: ``output`` exists.
        ImportError: a package that ONNX needs is missing.
        OSError: the file cannot be written.
        ValueError: an option has another value.
    """
    if format not in FORMATS:
        raise ValueError(f"--format is {format!r}; expected one of {', '.join(FORMATS)}.")
    if opset is not None and format != "onnx":
        raise ValueError(f"--opset {opset} is for --format onnx, not {format}.")
    if precision not in PRECISIONS:
        raise ValueError(f"--precision is {precision!r}; expected one of {', '.join(PRECISIONS)}.")
    if precision != "float32" and format != "onnx":
        raise ValueError(f"--precision {precision} is for --format onnx, not {format}.")
    image_input = ImageInput(layout, dtype, batch)
    _check_supported(model)
    if not images:
        raise ExportError("There is no image to compare the file and the model on.")
    output = os.path.abspath(output)
    check_free(output, "--output")
    write, run, class_wise_nms, on_cpu = FORMATS[format]
    model = copy.deepcopy(model).eval()
    model = model.cpu() if on_cpu else model
    how = fold_norms(model), image_input, PRECISIONS[precision]
    module = ExportedHeads(*how) if raw else ExportedDetector(*how, class_wise_nms=class_wise_nms)
    names = output_names(model, raw, batch)
    os.makedirs(os.path.dirname(output), exist_ok=True)
    _remove_left(os.path.dirname(output))
    prefix = f"{_UNFINISHED}{process_name()}-"
    with exit_on_sigterm(), tempfile.TemporaryDirectory(dir=os.path.dirname(output), prefix=prefix) as work:
        path = os.path.join(work, "model")  # on the same disk: one rename
        try:
            with torch.no_grad(), quiet():
                say(f"Writing {format} ...{' This takes minutes for a large network.' * (format == 'onnx')}")
                write(module, path, names, metadata or {}, opset)
                say(f"Written, {os.path.getsize(path) / 2**20:.1f} MB. Loading it ...")
                loaded = run(path)
        except ImportError:
            raise
        except OSError as error:
            raise OSError(error.errno, f"{output} could not be written, and nothing is left of it: {error}") from error
        except Exception as error:  # exporters raise many types for what they do not support
            raise ExportError(f"{format} cannot express this model: {type(error).__name__}: {error}") from error
        say(f"Comparing it with the model on {len(images)} images ...")
        for ran in (loaded, run_rounded(module)) if precision == "float16" else (loaded,):
            check(model, ran, images, raw, image_input, TOLERANCES[precision])
        check_free(output, "--output")  # again: the export has taken minutes
        os.rename(path, output)


def _remove_left(folder: str) -> None:
    """Remove what exports that were killed have left in ``folder``."""
    for path in glob.glob(os.path.join(glob.escape(folder), f"{_UNFINISHED}*")):
        process = os.path.basename(path).removeprefix(_UNFINISHED).rpartition("-")[0]
        if is_running(process) is False:
            shutil.rmtree(path, ignore_errors=True)


def _check_supported(model: nn.Module) -> None:
    if not isinstance(model, FocalRetinaNet):
        hint = " It is the same model: set MODEL.META_ARCHITECTURE FocalRetinaNet." * (
            type(model).__name__ == "RetinaNet"
        )
        raise ExportError(f"A {type(model).__name__} cannot be exported; expected a FocalRetinaNet.{hint}")
    known = DefaultAnchorGenerator, TorchvisionAnchorGenerator
    if not isinstance(model.anchor_generator, known):
        names = " or ".join(generator.__name__ for generator in known)
        raise ExportError(f"Anchors of {type(model.anchor_generator).__name__} cannot be exported; expected {names}.")


def read_images(cfg: CfgNode, files: Sequence[str]) -> dict[str, Tensor]:
    """Return images by file, (C, H, W), read and resized as in evaluation: ``files``, or some of ``DATASETS.TEST``.

    Raises:
        ExportError: there are none.
        ImageError, FileNotFoundError: one cannot be read.
    """
    if not files:
        if not cfg.DATASETS.TEST:
            raise ExportError("DATASETS.TEST is empty: give --image files to compare the file and the model on.")
        try:
            records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
        except Exception as error:  # of a data set's own function
            raise ExportError(
                f"{cfg.DATASETS.TEST[0]} of DATASETS.TEST cannot be read ({error}): give --image files to compare the "
                "file and the model on."
            ) from error
        files = [record["file_name"] for record in records[:: max(1, len(records) // _NUM_IMAGES)][:_NUM_IMAGES]]
    resize = T.AugmentationList(build_augmentation(cfg, is_train=False))
    images = {}
    for file in files:
        view = T.AugInput(read_file(file, cfg.INPUT.FORMAT))
        resize(view)
        images[file] = torch.from_numpy(view.image.transpose(2, 0, 1).astype("float32"))  # (C, H, W)
    return images


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog=prog or "python -m focal_plugin.deploy.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML, such as a run's config.yaml")
    parser.add_argument("--weights", default="", metavar="FILE", help="a checkpoint (default: MODEL.WEIGHTS)")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--raw", action="store_true", help="return the logits and deltas of each level")
    parser.add_argument("--input-dtype", default="float32", choices=DTYPES, help="of the image (default: %(default)s)")
    parser.add_argument(
        "--input-layout", choices=LAYOUTS, help="of the image; N is 1 without --batch (default: CHW; NCHW with --batch)"
    )
    parser.add_argument("--batch", action="store_true", help="take any number of images of one size")
    parser.add_argument(
        "--precision", default="float32", choices=PRECISIONS, help="of the network, in ONNX (default: %(default)s)"
    )
    parser.add_argument("--image", nargs="+", default=[], metavar="FILE", help="compare on these images")
    parser.add_argument("--opset", type=int, metavar="N", help="of ONNX (default: PyTorch's choice)")
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="changes to the config, at the end")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Export. Return 0, or 2 for a mistake of the user's."""
    args = build_parser(prog).parse_args(argv)
    try:
        check_free(args.output, "--output")  # before minutes of work
        files, opts = split_pairs(args.image)  # keys may follow it
        if opts and not files:
            raise ExportError(f"--image names no file before {opts[0]}.")
        image_input = ImageInput(args.input_layout, args.input_dtype, args.batch)
        cfg = read_config(args.config_file, opts + args.opts)
        cfg.MODEL.WEIGHTS = args.weights or cfg.MODEL.WEIGHTS
        model = load_model(cfg)
        _check_supported(model)
        images = read_images(cfg, files)
        how = vars(image_input) | {"raw": args.raw, "precision": args.precision, "opset": args.opset}
        about = describe(cfg, model, args.raw, image_input, args.precision)
        export_model(model, args.output, args.format, images, **how, metadata=about, say=print)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size, far = os.path.getsize(args.output) / 2**20, TOLERANCES[args.precision].scores
    print(f"{args.output}: {size:.1f} MB, same as the model on {len(images)} images, scores to {far}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
