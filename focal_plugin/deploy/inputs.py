"""The inputs of a prediction: the images, videos and cameras that words of a command line name."""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass

IMAGES = (".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")


class ImageError(ValueError):
    """An image, video or camera that cannot be found or read. The message names it and says why."""


@dataclass(frozen=True)
class Source:
    """One image, video or camera.

    Attributes:
        path: of the file; a camera's number.
        kind: "image", "video" or "camera".
    """

    path: str
    kind: str


def find_sources(words: Sequence[str]) -> list[Source]:
    """Return the sources that ``words`` name, in their order.

    A word is a file; a folder, for the images directly in it; a pattern such as ``imgs/**/*.jpg``, for the files that
    match, where ``**`` matches any folders; or a number, for a camera. A file is a video by the ending of its name.

    Raises:
        ImageError: there is no word, no such file, no image in the folder, or no file that matches.
    """
    if not words:
        raise ImageError("Nothing to predict on: expected an image, a folder, a pattern, a video or a camera's number.")
    return [source for word in words for source in _find(word)]


def _find(word: str) -> list[Source]:
    if os.path.isdir(word):
        # Files that cannot be read are included: reading them raises the error.
        paths = sorted(os.path.join(word, name) for name in os.listdir(word) if name.lower().endswith(IMAGES))
        paths = [path for path in paths if not os.path.isdir(path)]
        if not paths:
            raise ImageError(f"{word} is a folder without an image ({', '.join(IMAGES)}); its subfolders are not read.")
        return [Source(path, "image") for path in paths]
    if os.path.exists(word):
        return [_of_file(word)]
    if word.isdecimal() and len(word) <= 4:
        return [Source(word, "camera")]
    if glob.has_magic(word):
        paths = sorted(path for path in glob.glob(word, recursive=True) if os.path.isfile(path))
        if not paths:
            raise ImageError(f"No file matches {word} (current folder: {os.getcwd()}).")
        return [_of_file(path) for path in paths]
    raise ImageError(
        f"There is no {word} (current folder: {os.getcwd()}); expected an image, a folder, a pattern, a video, or the "
        "number of a camera. Keys of the config follow after all of them, in pairs KEY VALUE."
    )


def _of_file(path: str) -> Source:
    return Source(path, "video" if path.lower().endswith(VIDEOS) else "image")
