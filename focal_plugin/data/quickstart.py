"""A small real data set: trees from the air, cut from two images in the package ``deepforest``.

``python -m focal_plugin quickstart --output datasets/quickstart_trees`` writes ``train`` and ``val``, each a data
set in COCO's format (``annotations.json`` and ``images/``) of one class, Tree. The two images show different places.

A tree that the edge of a tile cuts is clipped to the tile. If at least ``min_inside`` of its box's area is inside, it
is an object of the tile; otherwise it is a crowd: not trained on, and in evaluation a detection that matches no object
and lies in it does not count (for AP50, if half of the detection's area does). Neighbouring tiles overlap, so a tree in
the overlap may be an object of several tiles, and counts in each of them.
"""

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from ..files.write import whole_folder
from .records import Checker
from .tiles import check_tiling, cut_tiles
from .voc import parse_xml, read_record
from .writers import write_coco

SOURCES = {"train": "2019_YELL_2_528000_4978000_image_crop2", "val": "2019_YELL_2_541000_4977000_image_crop"}
CLASSES = ["Tree"]
_MARK = "quickstart.json"  # written last, with what the folder was made from


def source_folder() -> Path:
    """Return the folder of the images in the installed package ``deepforest``, without importing it.

    Raises:
        FileNotFoundError: the package or one of its files is missing; the message says how to install it.
    """
    spec = importlib.util.find_spec("deepforest")
    folders = [Path(folder) / "data" for folder in (spec and spec.submodule_search_locations) or []]
    for folder in folders:
        if all((folder / f"{stem}{ext}").is_file() for stem in SOURCES.values() for ext in (".png", ".xml")):
            return folder
    found = f"which has none in {folders}" if spec else "which is not installed"
    raise FileNotFoundError(
        f"The quickstart's images are in the package deepforest 2.1.0, {found}. "
        "Install it without what it depends on: pip install --no-deps deepforest==2.1.0"
    )


def make_quickstart(output: str, tile: int = 400, overlap: int = 110, min_inside: float = 0.5) -> Path:
    """Cut the two images into tiles and write them to ``output``/{train, val}, unless that was done before.

    Args:
        output: the folder to make.
        tile: the approximate side of a tile, in pixels.
        overlap: the pixels that neighbouring tiles share. By default more than the widest tree, so that every tree is
            whole in some tile.
        min_inside: the least share, in (0, 1], of an object's area that is inside a tile; of a crowd's less is.

    Raises:
        FileExistsError: ``output`` exists and was not made by this function with the same arguments.
        FileNotFoundError: the package deepforest is not installed.
        ConfigError: an argument is out of range.
    """
    check_tiling(tile, overlap, min_inside)
    folder = Path(output)
    made_from = {"sources": SOURCES, "tile": tile, "overlap": overlap, "min_inside": min_inside}
    if _is_made(folder, made_from):
        return folder
    source = source_folder()
    try:
        with whole_folder(folder) as whole:
            for split, stem in SOURCES.items():
                _cut(source, stem, whole / split, tile, overlap, min_inside)
            (whole / _MARK).write_text(json.dumps(made_from, indent=2))
    except OSError:
        if not _is_made(folder, made_from):  # else someone was faster
            raise
    return folder


def _is_made(folder: Path, made_from: dict) -> bool:
    """Whether ``folder`` holds these tiles; raise a ``FileExistsError`` if it holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    mark = folder / _MARK
    found = json.loads(mark.read_text()) if mark.is_file() else None
    if found == made_from:
        return True
    what = f"was made with {found}, not {made_from}" if found else "was not made by the quickstart"
    raise FileExistsError(f"{folder} {what}. It is left as it is: remove it, or choose another --output.")


def _cut(source: Path, stem: str, folder: Path, tile: int, overlap: int, min_inside: float) -> None:
    """Write the tiles of one image to ``folder``."""
    xml, png = str(source / f"{stem}.xml"), str(source / f"{stem}.png")
    class_ids = {name: index for index, name in enumerate(CLASSES)}
    record = read_record(parse_xml(xml), xml, png, stem, class_ids, Checker(stem))
    tiles = cut_tiles([record], [stem], folder / "images", tile=tile, overlap=overlap, min_visible=min_inside)
    write_coco(folder / "annotations.json", tiles, CLASSES)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write the quickstart's data set: tiles of aerial images with trees.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", default="datasets/quickstart_trees", help="the folder to make")
    parser.add_argument("--tile", type=int, default=400, help="the approximate side of a tile, in pixels")
    parser.add_argument("--overlap", type=int, default=110, help="the pixels that neighbouring tiles share")
    parser.add_argument(
        "--min-inside", type=float, default=0.5, help="the least share of an object's area that is inside a tile"
    )
    args = parser.parse_args(argv)
    try:
        folder = make_quickstart(args.output, args.tile, args.overlap, args.min_inside)
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    print(f"The quickstart's data is in {folder}")


if __name__ == "__main__":
    main()
