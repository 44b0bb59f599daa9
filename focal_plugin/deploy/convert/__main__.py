"""Convert weights of another project to a checkpoint, with its config in a .yaml of the same name.

``classes`` and ``ema`` make weights of a checkpoint of this project, for its config.

Detectron2's own model zoo needs no conversion: its files and URLs serve as MODEL.WEIGHTS.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from ...config.load import load_config
from ...files.write import replace_file
from .backbones import convert_resnet
from .classes import map_classes, read_class_names
from .detectors import convert_detectron1, convert_mmdetection, convert_torchvision
from .files import Converted, ConvertError, averaged_weights, check_output, write

_SOURCES = {
    "torchvision": "torchvision's retinanet_resnet50_fpn and _v2, a state_dict (.pth)",
    "mmdetection": "MMDetection's RetinaNet on a ResNet or ResNeXt, a checkpoint (.pth)",
    "detectron1": "Detectron's RetinaNet, its blobs (.pkl)",
    "resnet": "a ResNet, ResNeXt or wide ResNet of torchvision or timm, for a backbone (.pth, .safetensors)",
}


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line, with a subcommand for each source, ``classes`` and ``ema``."""
    parser = argparse.ArgumentParser(
        prog=prog or "python -m focal_plugin.deploy.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="source", required=True, metavar="FROM")
    made = {name: _add_command(commands, name, text) for name, text in _SOURCES.items()}
    made["torchvision"].add_argument(
        "--classes",
        choices=("coco", "all"),
        default="",
        help="the classifier's rows to keep: coco, COCO's 80 classes of the 91 rows (default if there are 91); all",
    )
    made["torchvision"].add_argument(
        "--norm-eps",
        type=float,
        help="ε of the backbone's norms; by default torchvision's, 0 for its COCO weights of v1, else 1e-5",
    )
    made["mmdetection"].add_argument(
        "--style",
        choices=("pytorch", "caffe"),
        default="",
        help="of the ResNet (default: as in the checkpoint's config)",
    )
    _add_command(commands, "ema", "the averaged weights in a checkpoint of a training with MODEL.FOCAL.EMA")
    classes = _add_command(commands, "classes", "a checkpoint for other classes, mapped by their names")
    classes.add_argument("--config-file", required=True, help="the config of the model with the new classes")
    names = "a data set, a .json file in COCO's format, a file with a name on each line, or names separated by commas"
    classes.add_argument("--from-classes", required=True, help=f"the checkpoint's classes: {names}")
    classes.add_argument("--to-classes", default="", help="the new classes (default: those of DATASETS.TRAIN)")
    classes.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="changes to the config, at the end"
    )
    return parser


def _add_command(commands, name: str, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.add_argument("input", metavar="IN", help="the file to read")
    command.add_argument("output", metavar="OUT", help="the checkpoint to write (.pth)")
    command.add_argument("--force", action="store_true", help="overwrite existing files")
    return command


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Convert a file. Return 0, or 2 for a mistake of the user's."""
    args = build_parser(prog).parse_args(argv)
    try:
        check_output(args.output, args.force, with_config=args.source in _SOURCES)
        if not os.path.isfile(args.input):
            raise ConvertError(f"There is no file {args.input}.")
        if args.source == "classes":
            _convert_classes(args)
        elif args.source == "ema":
            weights = averaged_weights(args.input)
            replace_file(args.output, lambda file: torch.save({"model": weights}, file))
            print(f"Written: {args.output}")
        else:
            converted = _convert(args)
            config = write(converted, args.output, args.source, args.force)
            print(*converted.notes, f"Written: {args.output} and {config}", sep="\n")
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _convert(args: argparse.Namespace) -> Converted:
    match args.source:
        case "torchvision":
            return convert_torchvision(args.input, args.classes, args.norm_eps)
        case "mmdetection":
            return convert_mmdetection(args.input, args.style)
        case "detectron1":
            return convert_detectron1(args.input)
        case _:
            return convert_resnet(args.input)


def _convert_classes(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file, args.opts)
    old, new = read_class_names(args.from_classes, cfg), read_class_names(args.to_classes, cfg)
    weights, names = map_classes(cfg, args.input, old, new)
    replace_file(args.output, lambda file: torch.save({"model": weights}, file))
    for what, labels in names.items():
        print(f"{what:8}{len(labels):4}  {', '.join(labels)}")
    print(f"Written: {args.output}")


if __name__ == "__main__":
    sys.exit(main())
