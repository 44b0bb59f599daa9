"""Write a trained model as one file that runs without this package.

    python -m focal_plugin export --config-file output/config.yaml --weights output/model_final.pth \\
        --format onnx --output detector.onnx

The file takes one image of any size, resized as in the config, with values from 0 to 255 in the channel order of
INPUT.FORMAT: (3, H, W) in float32, or as in --input-layout and --input-dtype. It returns boxes (XYXY in pixels of that
image), scores and classes, best first; normalisation, padding, NMS and clipping are inside. With --raw it returns the
logits and deltas of each level instead. Its metadata has what is needed around it: channel order, image size and class
names; with --raw, the anchors.

The file is kept only if it computes what the model does (scores to 1e-3) on the images of --image, or else on some of
DATASETS.TEST, each as it is and reflected to a larger size. An existing file is never overwritten.
"""

import argparse
import copy
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torch import Tensor, nn
from tqdm import tqdm

from ..anchors.foreign import TorchvisionAnchorGenerator
from ..config.explain import split_pairs
from ..engine.signals import exit_on_sigterm
from ..files.write import check_free, is_running, process_name
from ..retinanet import FocalRetinaNet
from .export_check import ExportError, compare_detections, compare_maps, expected_maps, find_candidates
from .export_formats import FORMATS, Run, quiet
from .export_graph import DTYPES, LAYOUTS, ExportedDetector, ExportedHeads, ImageInput
from .loading import class_metadata, load_model, read_config
from .optimize import fold_norms
from .predictor import read_file

_UNFINISHED = ".export-"  # the beginning of a folder's name
_NUM_IMAGES = 4  # of DATASETS.TEST, to compare on


def export_model(
    model: nn.Module,
    output: str | os.PathLike,
    format: str,
    images: Mapping[str, Tensor],
    *,
    raw: bool = False,
    layout: str = "CHW",
    dtype: str = "float32",
    opset: int | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a model to a file, which is kept if it computes what the model does.

    Args:
        model: a ``FocalRetinaNet`` with anchors of a ``DefaultAnchorGenerator`` or torchvision's. It is not changed.
        output: the file to write.
        format: "onnx", "torchscript" or "torch-export".
        images: real images to compare on, by name: (3, H, W), 0 to 255, as the model takes them.
        raw: return logits and deltas (``ExportedHeads``), not detections (``ExportedDetector``).
        layout, dtype: of the file's image, see ``ImageInput``.
        opset: the version of ONNX's operators; None, PyTorch's choice.
        metadata: written into the file; texts as they are, all else as JSON.

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
    image_input = ImageInput(layout, dtype)
    _check_supported(model)
    if not images:
        raise ExportError("There is no image to compare the file and the model on.")
    output = os.path.abspath(output)
    check_free(output, "--output")
    write, run, class_wise_nms, on_cpu = FORMATS[format]
    model = copy.deepcopy(model).eval()
    model = model.cpu() if on_cpu else model
    folded = fold_norms(model)
    module = ExportedHeads(folded, image_input) if raw else ExportedDetector(folded, class_wise_nms, image_input)
    names = output_names(model, raw)
    os.makedirs(os.path.dirname(output), exist_ok=True)
    _remove_left(os.path.dirname(output))
    prefix = f"{_UNFINISHED}{process_name()}-"
    with exit_on_sigterm(), tempfile.TemporaryDirectory(dir=os.path.dirname(output), prefix=prefix) as work:
        path = os.path.join(work, "model")  # on the same disk: one rename
        try:
            with torch.no_grad(), quiet():
                write(module, path, names, metadata or {}, opset)
                loaded = run(path)
        except ImportError:
            raise
        except OSError as error:
            raise OSError(error.errno, f"{output} could not be written, and nothing is left of it: {error}") from error
        except Exception as error:  # exporters raise many types for what they do not support
            raise ExportError(f"{format} cannot express this model: {type(error).__name__}: {error}") from error
        check(model, loaded, images, raw, image_input)
        check_free(output, "--output")  # again: the export has taken minutes
        os.rename(path, output)


def _remove_left(folder: str) -> None:
    """Remove what exports that were killed have left in ``folder``."""
    for path in glob.glob(os.path.join(glob.escape(folder), f"{_UNFINISHED}*")):
        process = os.path.basename(path).removeprefix(_UNFINISHED).rpartition("-")[0]
        if is_running(process) is False:
            shutil.rmtree(path, ignore_errors=True)


def check(model: FocalRetinaNet, run: Run, images: Mapping[str, Tensor], raw: bool, image_input: ImageInput) -> None:
    """Compare an exported model and ``model`` on each image, as it is and reflected to a larger size.

    Raises:
        ExportError: they differ, or no image has a detection to compare.
    """
    found_any = raw
    for name, image in tqdm(images.items(), desc="Comparing", unit="image", delay=2, leave=False):
        height, width = image.shape[-2:]
        larger = F.pad(image[None], (0, width // 3, 0, height // 4), mode="reflect")[0]
        for packed in (image_input.pack(x.to(model.device)) for x in (image, larger)):
            view = image_input.unpack(packed).float()
            expected = expected_maps(model, view) if raw else find_candidates(model, view)
            try:
                found = run(packed)
                if raw:
                    compare_maps(expected, found, output_names(model, raw))
                else:
                    compare_detections(expected, found, model)
            except Exception as error:  # running the file may fail, too
                size = " × ".join(map(str, view.shape[-2:]))
                raise ExportError(
                    f"The exported file does not compute what the model does, and is not kept. On {name}, {size}: "
                    f"{error}"
                ) from error
            found_any = found_any or len(found[0]) > 0
    if not found_any:
        raise ExportError(
            f"The model detects nothing in {', '.join(images)}, so the file could not be compared with it and is not "
            "kept: give --image files with objects."
        )


def output_names(model: FocalRetinaNet, raw: bool) -> list[str]:
    """Return the names of an exported model's outputs."""
    if not raw:
        return ["boxes", "scores", "classes"]
    return [f"{kind}_{level}" for kind in ("logits", "deltas") for level in model.head_in_features]


def describe(cfg: CfgNode, model: FocalRetinaNet, raw: bool, layout: str, dtype: str) -> dict[str, Any]:
    """Return the metadata of an exported model: what one needs to know to use it."""
    about = {
        "input_format": cfg.INPUT.FORMAT,
        "input_layout": layout,
        "input_dtype": dtype,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "classes": class_metadata(cfg, model).get("thing_classes") or [str(i) for i in range(model.num_classes)],
    }
    if raw:
        about |= _describe_anchors(model.anchor_generator)
        about["bbox_reg_weights"] = list(model.box2box_transform.weights)
    return about


def _describe_anchors(generator: nn.Module) -> dict[str, Any]:
    if isinstance(generator, TorchvisionAnchorGenerator):
        return {"first_stride": generator.first_stride, "cell_anchors": [cell.tolist() for cell in generator.shapes]}
    return {
        "strides": list(generator.strides),
        "cell_anchors": [cell.tolist() for cell in generator.cell_anchors],  # around (0, 0)
        "anchor_offset": generator.offset,
    }


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
        "--input-layout",
        default="CHW",
        choices=LAYOUTS,
        help="of the image; N is a batch of one (default: %(default)s)",
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
        cfg = read_config(args.config_file, opts + args.opts)
        cfg.MODEL.WEIGHTS = args.weights or cfg.MODEL.WEIGHTS
        model = load_model(cfg)
        _check_supported(model)
        images = read_images(cfg, files)
        print(f"Exporting to {args.format} ...")
        how = {"raw": args.raw, "layout": args.input_layout, "dtype": args.input_dtype}
        about = describe(cfg, model, **how)
        export_model(model, args.output, args.format, images, **how, opset=args.opset, metadata=about)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {os.path.getsize(args.output) / 2**20:.1f} MB, same as the model on {len(images)} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
