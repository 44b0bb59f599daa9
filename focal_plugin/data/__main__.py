"""Data sets from data sets: cut into tiles, in another format, or split; and a picture of one. No image is changed.

IN is a folder, or a JSON, YAML or CSV file, whose format is found out as it is for a path in DATASETS.LOCAL. OUT is a
new folder, of boxes and classes: masks, keypoints and further fields are not written.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from ..config import ConfigError
from ..files.write import check_free, free_paths, replace_file, whole_folder
from .corrections import correct, numbers, read_suggestions
from .deeppcb import convert
from .formats import FORMATS, find_sets, make_set
from .images import any_size, decoded
from .records import Checker, DataError
from .sheet import count_boxes, draw_sheet
from .splits import groups_of, split_records, table_of
from .suspects import suspects
from .tiles import check_tiling, cut_tiles
from .writers import LAYOUTS, flat_names, write_coco, write_dataset

_NO_CLASSES = ("voc", "csv")  # formats without a list of classes
_MARK = "made_by.json"  # what a folder was made by; --force replaces no other


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the defaults that there are, where the help does not."""

    def _get_help_string(self, action: argparse.Action) -> str:
        is_told = action.default in (None, "") or action.default is False or "(default" in action.help
        return action.help if is_told else super()._get_help_string(action)


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line: a subcommand for each thing to do."""
    parser = argparse.ArgumentParser(
        prog=prog or "python -m focal_plugin.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")

    tile = _add(commands, "tile", _tile, "cut images into tiles, as a data set in COCO's format")
    tile.add_argument("--size", type=int, default=800, metavar="PIXELS", help="the approximate side of a tile")
    tile.add_argument("--overlap", type=int, default=100, metavar="PIXELS", help="what neighbouring tiles share")
    text = "the least share of an object that a tile shows; where it shows less, the region is ignored"
    tile.add_argument("--min-visible", type=float, default=0.5, metavar="SHARE", help=text)

    convert = _add(commands, "convert", _convert, "write the data set in another format, with copies of its images")
    convert.add_argument("--to", choices=LAYOUTS, required=True, help="the format")

    split = _add(commands, "split", _split, "split the images at random into train, val and test")
    split.add_argument("--val", type=float, default=0.2, metavar="SHARE", help="of the images, for val")
    split.add_argument("--test", type=float, default=0.0, metavar="SHARE", help="of the images, for test; 0: no test")
    text = (
        "what stays together: image; a regular expression, whose first group (or else whole match) in the image's path "
        "in the data set names its group, such as ^(site\\d+)_ for site12_a.jpg; or a .csv with the columns image_path "
        "and group"
    )
    split.add_argument("--by", default="image", metavar="WHAT", help=text)
    split.add_argument("--seed", type=int, default=0, help="of the shuffling")
    split.add_argument("--to", choices=LAYOUTS, help="the format to write (default: that of IN)")

    correct = _add(commands, "correct", _correct, "apply suggestions of `focal analysis hardest` to the labels")
    correct.add_argument("--suggestions", required=True, metavar="FILE", help="the JSON file that it wrote")
    text = "the numbers of suggestions on its page, such as 7 or 1-20; or all that are in the file"
    correct.add_argument("--accept", nargs="+", required=True, metavar="NUMBER", help=text)
    correct.add_argument("--to", choices=LAYOUTS, help="the format to write (default: that of IN)")

    show = _add(commands, "show", _show, "draw some images with their boxes, and count boxes by class and size", False)
    text = "the picture, a PNG (default: sheet.png, or else sheet-2.png and so on)"
    show.add_argument("--output", metavar="FILE", help=text)
    show.add_argument("--num-images", type=int, default=16, metavar="N", help="the images to draw")

    boards = commands.add_parser("deeppcb", help="write CSV files for DeepPCB, a data set with a layout of its own")
    boards.set_defaults(run=_deeppcb)
    boards.add_argument("path", metavar="PCBDATA", help="the folder PCBData of a clone of its repository")
    boards.add_argument(
        "--every", type=int, default=1, metavar="N", help="take every N-th image of a list (default: 1)"
    )
    return parser


def _add(commands, name: str, run: Callable, summary: str, writes_folder: bool = True) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        formatter_class=_Formatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("path", metavar="IN", help="the data set: a folder, or a JSON, YAML or CSV file")
    if writes_folder:
        parser.add_argument("output", metavar="OUT", help="the folder to make")
    parser.add_argument("--format", choices=FORMATS, default="", help="the format of IN, where it holds several")
    parser.add_argument("--split", default="", help="of IN, where it holds several; all, if the command takes several")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="the classes in the order of their indices")
    parser.add_argument("--images", default="", metavar="FOLDER", help="of a CSV or COCO file, if not found beside it")
    parser.add_argument("--difficult", choices=["keep", "ignore"], default="keep", help="VOC's difficult objects")
    parser.add_argument(
        "--on-error", choices=["raise", "skip"], default="raise", help="stop at a bad record, or skip and list all"
    )
    force = "replace OUT, if one of these commands made it" if writes_folder else "overwrite the picture"
    parser.add_argument("--force", action="store_true", help=force)
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a command.

    Args:
        argv: the words of the command line; those of this process if not given.
        prog: the name of the program in usage lines.

    Returns:
        0; 2 if the user has to correct the command line or a file.
    """
    args = build_parser(prog).parse_args(argv)
    try:
        args.run(args)
    except (ConfigError, DataError, OSError) as error:
        hint = (
            " Correct it; --on-error skip leaves out all such records and lists them."
            if getattr(error, "unit", None)
            else ""
        )
        print(f"error: {error}{hint}", file=sys.stderr)
        return 2
    return 0


@any_size()
def _tile(args: argparse.Namespace) -> None:
    check_tiling(args.size, args.overlap, args.min_visible)
    _check_output(args)
    _, splits, classes = _read(args)
    names = flat_names(record["file_name"] for records in splits.values() for record in records)
    numbers = {"tile": args.size, "overlap": args.overlap, "min_visible": args.min_visible}
    with whole_folder(args.output, replace=args.force) as folder:
        for split, records in splits.items():
            stems = [os.path.splitext(names[record["file_name"]])[0] for record in records]
            splits[split] = cut_tiles(records, stems, folder / split / "images", **numbers)
            write_coco(folder / split / "annotations.json", splits[split], classes)
        _mark(folder, args)
    _print_written(args, "coco", splits, classes)


def _convert(args: argparse.Namespace) -> None:
    _check_output(args)
    _, splits, classes = _read(args)
    _write(args, args.to, splits, classes)


def _split(args: argparse.Namespace) -> None:
    shares = {"train": 1 - args.val - args.test, "val": args.val, "test": args.test}
    if not min(shares["val"], shares["test"]) >= 0 or not shares["train"] > 1e-9:
        raise ConfigError(f"--val {args.val:g}, --test {args.test:g}: expected shares from 0 on, less than 1 in all.")
    _check_output(args)
    format, splits, classes = _read(args, most=1)
    (records,) = splits.values()
    groups = groups_of([record["file_name"] for record in records], args.by)
    shares = {split: share for split, share in shares.items() if share > 0}
    split = split_records(records, groups, shares, args.seed)
    print(table_of(split, shares, classes))
    _write(args, args.to or format, split, classes)


def _correct(args: argparse.Namespace) -> None:
    _check_output(args)
    content = read_suggestions(args.suggestions)
    accepted = numbers(args.accept, {entry["id"] for entry in content["annotations"]})
    format, splits, classes = _read(args)
    records = [record for split in splits.values() for record in split]
    labels = sum(len(record["annotations"]) for record in records)
    done = correct(records, classes, content, accepted)
    print(f"Accepted for {labels} labels: {', '.join(f'{count} {kind}' for kind, count in done.items()) or 'nothing'}.")
    _write(args, args.to or format, splits, classes)


def _show(args: argparse.Namespace) -> None:
    if args.num_images < 1:
        raise ConfigError(f"--num-images is {args.num_images}; expected at least 1.")
    if args.output and not args.force:
        check_free(args.output, "--output", "overwrite it with --force")
    _, splits, classes = _read(args, most=1)
    (records,) = splits.values()
    sheet = draw_sheet(records, classes, args.num_images)
    output = args.output or ("sheet.png" if args.force else free_paths("", "sheet.png")[0])
    replace_file(output, lambda file: sheet.save(file, "PNG"))
    print(count_boxes(records, classes))
    print(f"Written: {output}")


def _deeppcb(args: argparse.Namespace) -> None:
    written = convert(args.path, args.every)
    print(f"Written: {', '.join(f'{path} with {rows} rows' for path, rows in written.items())}")


def _read(args: argparse.Namespace, most: int | None = None) -> tuple[str, dict[str, list[dict]], list[str]]:
    """Return the format of IN, the records of its splits, and the classes, on which all splits then agree.

    Raises:
        DataError: IN holds several formats, or more splits than ``most``, or a record is wrong.
    """
    found = find_sets(args.path, args.format, args.split)
    is_one = len({one.format for one in found}) == 1 and len({one.split for one in found}) == len(found)
    if not is_one or (most and len(found) > most):
        listed = "; ".join(map(str, found))
        raise DataError("several data sets", f"{args.path} holds {listed}. Choose by --format and --split, or by file.")
    read, names = {}, {}
    for one in found:
        keys = {"difficult": args.difficult} if one.format == "voc" else {}
        if args.images and one.format not in ("csv", "coco"):
            raise ConfigError(f"--images is for csv and coco; {one} says itself where its images are.")
        if args.images:
            keys["images"] = args.images
        name = f"{args.path}, {one.split}" if len(found) > 1 else args.path
        dataset = make_set(one, name, args.classes, args.on_error, **keys)
        checker = Checker(dataset.name, args.on_error)
        read[one.split], metadata = dataset.load(checker)
        if args.on_error == "skip":
            read[one.split] = decoded(read[one.split], checker)
        names[one.split] = metadata["thing_classes"]
        print(f"{checker.summary(read[one.split])}; format {one.format}")
        if checker.left_out:
            print(checker.listing())
        if not read[one.split]:
            raise DataError("no image", f"in {one}: none is listed, or all were left out.")
    classes = list(dict.fromkeys(name for listed in names.values() for name in listed))
    for split, records in read.items():
        for box in (box for record in records for box in record["annotations"]):
            box["category_id"] = classes.index(names[split][box["category_id"]])
    records = [record for split in read.values() for record in split]
    for warning in suspects(records, classes, args.classes is None and found[0].format in _NO_CLASSES):
        print(f"warning: {warning}", file=sys.stderr)
    return found[0].format, read, classes


def _check_output(args: argparse.Namespace) -> None:
    """Check that OUT may be made: there is nothing or an empty folder, or with --force what these commands made.

    Raises:
        FileExistsError: it may not.
    """
    folder = Path(args.output)
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if not args.force:
        check_free(folder, "OUT", "overwrite it with --force")
    elif os.path.lexists(folder) and not (folder / _MARK).is_file():
        raise FileExistsError(f"{folder} has no {_MARK}: no data command made it. Remove it, or choose another OUT.")
    else:
        read = {"IN": args.path, "--images": args.images, "--suggestions": getattr(args, "suggestions", "")}
        for what, path in read.items():
            if path and Path(path).resolve().is_relative_to(folder.resolve()):
                raise FileExistsError(f"{what} is in {folder}, which --force would replace. Choose another OUT.")


def _write(args: argparse.Namespace, format: str, splits: dict[str, list[dict]], classes: list[str]) -> None:
    with whole_folder(args.output, replace=args.force) as folder:
        left_out = write_dataset(folder, format, splits, classes)
        _mark(folder, args)
    for what, count in left_out.items():
        print(f"warning: {count} {what} left out, for which format {format} has no mark.", file=sys.stderr)
    _print_written(args, format, splits, classes)


def _mark(folder: Path, args: argparse.Namespace) -> None:
    words = {key: value for key, value in vars(args).items() if key not in ("run", "force", "output")}
    (folder / _MARK).write_text(json.dumps(words, indent=2))


def _print_written(args: argparse.Namespace, format: str, splits: dict[str, list[dict]], classes: list[str]) -> None:
    listed = ", ".join(f"{split} with {len(records)} images" for split, records in splits.items())
    print(f"Written: {args.output}, {listed}. In a config:")
    print("DATASETS:\n  LOCAL:")
    boxes = (box for records in splits.values() for record in records for box in record["annotations"])
    are_marked = format == "voc" and any(box["iscrowd"] for box in boxes)  # as difficult, VOC's only mark
    for found in find_sets(args.output, format):
        keys = {"format": format, "root": args.output, "difficult": "ignore"} if are_marked else {"path": args.output}
        entry = {"name": f"my_{found.split}", **keys, "split": found.split}
        if format in _NO_CLASSES:
            entry["classes"] = classes
        text = yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
        print(f"    - {text.strip()}")


if __name__ == "__main__":
    sys.exit(main())
