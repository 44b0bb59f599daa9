"""Detect objects in images, videos and camera pictures; write annotated copies, and all detections as JSON.

    python -m focal_plugin predict --config-file output/config.yaml --weights output/model_final.pth \\
        street.jpg photos/ "more/**/*.png" drive.mp4 --output found --csv --geojson

An INPUT is an image, a folder (the images directly in it), a pattern, a video, or the number of a camera, which Ctrl+C
stops. Each gets an annotated copy in the output folder. detections.json has all detections in COCO's results format;
images.json has the images and categories that its ids refer to. pycocotools reads both with
COCO("images.json").loadRes("detections.json"), unless there is no detection. With --csv, detections.csv has a line for
each detection; with --geojson, each input has a file of polygons beside its annotated copy, in pixels. All are whole
after each image, also if the command is killed then. No file is overwritten: if a name is
taken, a number is added. The copy of a video of odd width or height has one column or row less, since OpenCV writes
even sizes.

An input that cannot be read does not stop the others: it is listed at the end, and the exit code is 1, as it is if the
disk is full. It is 2 if nothing could be started. Images are read and resized as in evaluation (INPUT.FORMAT,
INPUT.MIN_SIZE_TEST, ...).
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import groupby

import numpy as np
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import Instances
from PIL import Image
from tqdm import tqdm

from ..config.explain import split_pairs
from ..engine.signals import exit_on_sigterm
from ..files.write import free_paths
from .inputs import ImageError, Source, find_sources
from .media import LABELS, VIDEO_CODECS, Video, VideoOutput, draw
from .predictor import SCORE_THRESH, Predictor
from .results import Results


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog=prog or "python -m focal_plugin.deploy.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --config-file FILE [--weights FILE] INPUT ... --output DIR [options] [KEY VALUE ...]",
    )
    parser.add_argument(
        "words", nargs="+", metavar="INPUT ... KEY VALUE", help="what to predict on, then changes to the config"
    )
    parser.add_argument(
        "--config-file",
        required=True,
        metavar="FILE",
        help="YAML: a file, or the name of a shipped config or of one of Detectron2's model zoo",
    )
    parser.add_argument("--weights", default="", metavar="FILE", help="a checkpoint (default: MODEL.WEIGHTS)")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write to")
    parser.add_argument(
        "--score-thresh",
        default=str(SCORE_THRESH),
        metavar="SCORE",
        help="the lowest score; the path of an evaluation.json, for the best F1 there; or config, for the config's "
        "MODEL.RETINANET.SCORE_THRESH_TEST, evaluation's (default: %(default)s)",
    )
    parser.add_argument("--csv", action="store_true", help="write detections.csv too")
    parser.add_argument("--geojson", action="store_true", help="write a GeoJSON file of each input too")
    parser.add_argument("--labels", choices=LABELS, default="all", help="the text on boxes (default: %(default)s)")
    parser.add_argument(
        "--tile", type=int, default=0, metavar="SIZE", help="cut larger images into tiles of SIZE × SIZE pixels"
    )
    parser.add_argument(
        "--no-whole-image", action="store_true", help="with --tile, look for no objects that are larger than a tile"
    )
    parser.add_argument("--overlap", type=int, metavar="PX", help="pixels that tiles share (default: SIZE / 5)")
    parser.add_argument(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="N images, or tiles, go through the network together (default: 1)",
    )
    parser.add_argument("--no-optimize", action="store_true", help="do not fold norms or use bfloat16")
    parser.add_argument(
        "--tta", action="store_true", help="test-time augmentation by the keys of TEST.AUG (MIN_SIZES, MAX_SIZE, FLIP)"
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Predict. Return 0, 1 if not all was read and written, 2 for a mistake of the user's, or 130 after Ctrl+C.

    Raises:
        SystemExit: 143, after SIGTERM.
    """
    args = build_parser(prog).parse_intermixed_args(argv)
    try:
        words, opts = split_pairs(args.words)
        sources = find_sources(words)
        predictor = Predictor(
            args.config_file,
            args.weights,
            opts=opts,
            score_thresh=args.score_thresh,
            tile=args.tile,
            overlap=args.overlap,
            whole_image=not args.no_whole_image,
            optimize=not args.no_optimize,
            tta=args.tta or None,
            batch_size=args.batch,
        )
        os.makedirs(args.output, exist_ok=True)
        results = Results(predictor.metadata, args.output, csv=args.csv, geojson=args.geojson)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    problems: list[str] = []
    code = 0
    try:
        with exit_on_sigterm():
            predict(predictor, sources, args.output, results, problems, args.labels)
    except KeyboardInterrupt:
        print("Stopped. The results so far are kept.", file=sys.stderr)
        code = 130
    except OSError as error:
        print(f"error: {error}. The results so far are kept.", file=sys.stderr)
        code = 1
    finally:
        is_saved = _close(results, predictor.score_thresh)
        if problems:
            print(f"{len(problems)} of {len(sources)} inputs not read:", *problems, sep="\n  ", file=sys.stderr)
    return code or int(bool(problems) or not is_saved)


def _close(results: Results, score_thresh: float | None) -> bool:
    """Close the JSON files, print the result, and return whether it worked."""
    try:
        written = results.close()
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    found = f"{results.images.count} images, {results.detections.count} detections"
    if not results.detections.count:
        least = "the config's threshold" if score_thresh is None else f"{score_thresh:g}"
        found += f" with a score of at least {least} (--score-thresh)"
    print(f"{found}. Written: {', '.join(written)}")
    return True


def predict(
    predictor: Predictor, sources: Sequence[Source], folder: str, results: Results, problems: list[str], labels: str
) -> None:
    """Predict on each source: write annotated copies to ``folder``, and add to ``results`` and ``problems``.

    Raises:
        OSError: something could not be written.
    """
    with tqdm(total=len(sources), desc="Predicting", unit="image", disable=None) as bar:
        for group in _groups(sources, predictor.batch_size):
            try:
                if group[0].kind == "image":
                    predict_images(predictor, [source.path for source in group], folder, results, problems, labels)
                    bar.update(len(group))
                else:
                    predict_video(predictor, Video(group[0]), folder, results, bar, labels)
            except ImageError as error:
                problems.append(str(error))
                bar.update()
            except KeyboardInterrupt:
                if group[0].kind != "camera":
                    raise


def _groups(sources: Sequence[Source], size: int) -> Iterator[list[Source]]:
    """Images that follow each other, at most ``size`` in a group; a video or a camera is a group of its own."""
    for is_image, group in groupby(sources, key=lambda source: source.kind == "image"):
        same = list(group)
        step = size if is_image else 1
        yield from (same[start : start + step] for start in range(0, len(same), step))


def predict_images(
    predictor: Predictor, paths: Sequence[str], folder: str, results: Results, problems: list[str], labels: str
) -> None:
    """Predict on image files together; what is wrong with those that cannot be read or resized goes to ``problems``."""
    images: list[tuple[str, np.ndarray]] = []
    for path in paths:
        try:
            images.append((path, predictor.read(path)))  # (H, W, C) in INPUT.FORMAT
        except FileNotFoundError as error:  # a broken link
            problems.append(f"{path} cannot be read: {error}")
        except ImageError as error:
            problems.append(str(error))
    for (path, image), found in zip(images, _detect(predictor, [image for _, image in images]), strict=True):
        if isinstance(found, ImageError):
            problems.append(f"{path}: {found}")
            continue
        drawn = draw(convert_image_to_rgb(image, predictor.cfg.INPUT.FORMAT), found, predictor.metadata, labels)
        name, suffix = os.path.splitext(os.path.basename(path))
        suffix = ".jpg" if suffix.lower() in (".jpg", ".jpeg") else ".png"
        written, *beside = free_paths(folder, f"{name}{suffix}", *results.beside(name))
        Image.fromarray(drawn).save(written)
        results.add(found, beside, file_name=path, annotated=os.path.basename(written))


def _detect(predictor: Predictor, images: list[np.ndarray]) -> list[Instances | ImageError]:
    """The detections in each image, or why there are none."""
    try:
        return list(predictor.detect(images))
    except ImageError as error:
        if len(images) == 1:
            return [error]
        return [found for image in images for found in _detect(predictor, [image])]  # one does not stop the others


def predict_video(predictor: Predictor, video: Video, folder: str, results: Results, bar: tqdm, labels: str) -> None:
    """Predict on each frame of a video or camera.

    Raises:
        ImageError: no frame can be read.
    """
    bar.total += (video.num_frames or 1) - 1
    name = os.path.splitext(os.path.basename(video.name))[0]
    paths = free_paths(folder, *(f"{name}{suffix}" for suffix in VIDEO_CODECS), *results.beside(name))
    paths, beside = paths[: len(VIDEO_CODECS)], paths[len(VIDEO_CODECS) :]
    with closing(VideoOutput(paths, video.fps, predictor.metadata, labels)) as output:
        for number, frame in enumerate(video):
            (instances,) = predictor.detect([predictor.read(frame)])
            output.add(frame[:, :, ::-1], instances)
            annotated = os.path.basename(output.path)
            results.add(instances, beside, file_name=video.name, frame_id=number, annotated=annotated)
            bar.update()


if __name__ == "__main__":
    sys.exit(main())
