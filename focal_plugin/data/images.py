"""Images as training reads them: of 8 bits a channel, turned by their EXIF orientation. Errors name the file."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import BinaryIO

from detectron2.data.detection_utils import read_image
from PIL import Image, UnidentifiedImageError

from ..files.progress import progress
from ..files.regular import open_regular
from .records import Checker, DataError

ELSEWHERE = " Name the images' folder by the key images beside format, or by --images of focal data."

_ROTATED = (5, 6, 7, 8)  # values of the EXIF tag that swap width and height
_EXIF_ORIENTATION = 274
_TIFF_BITS_PER_SAMPLE = 258
_HEAD = 2**20  # bytes in which a JPEG 2000 or AVIF file says its bit depth, after a colour profile perhaps


def check_image(path: str, declared: tuple | None, where: str, if_missing: str = "") -> tuple[int, int]:
    """Return the (width, height) of the image at ``path`` as Detectron2 reads it: turned by its EXIF orientation.

    Only the header is read.

    Args:
        path: the image.
        declared: the (width, height) in the annotation, or None if it has none.
        where: the record, for the message.
        if_missing: what to do if there is no such image, for the message.

    Raises:
        DataError: the image is missing, does not open, has more than 8 bits a channel or another size.
    """
    with _opened(path, where, if_missing) as image:
        size, orientation = image.size, _orientation(image)
    if orientation in _ROTATED:
        size = size[::-1]
    if declared is not None and tuple(declared) != size:
        turned = f", once turned by its EXIF orientation {orientation}" if orientation in _ROTATED else ""
        raise DataError(
            "size that disagrees",
            f"{where} says {declared[0]}×{declared[1]}, but {path} is {size[0]}×{size[1]}{turned} (width×height).",
        )
    return size


def decode(path: str) -> int:
    """Read the whole image at ``path``, as training does, and return the number of its frames, of which one is read.

    Raises:
        DataError: the image is missing, damaged or incomplete, or has more than 8 bits a channel.
    """
    with _opened(path) as image:
        frames = getattr(image, "n_frames", 1)
    try:
        read_image(path, "RGB")
    except Exception as error:  # Pillow raises many types for damaged files
        raise _broken(path, error) from error
    return frames


def decode_all(paths: Sequence[str], what: str) -> Iterator[int | DataError]:
    """Yield for each of the images what ``decode`` returns or raises, with a bar that says ``what`` they are."""

    def attempt(path: str) -> int | DataError:
        try:
            return decode(path)
        except DataError as error:
            return error

    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 16)) as pool:
        found = pool.map(attempt, paths)
        yield from progress(found, total=len(paths), desc=f"Decoding {what}")


def decoded(records: Sequence[dict], checker: Checker) -> list[dict]:
    """Return the records whose images can be decoded; ``checker`` says what to do about the others."""
    kept = []
    for record, found in zip(records, decode_all([record["file_name"] for record in records], checker.dataset)):
        with checker.record("image"):
            if isinstance(found, DataError):
                raise found
            kept.append(record)
    return kept


@contextmanager
def readable_image(path: str) -> Iterator[None]:
    """Read and transform the image ``path`` inside; errors name it.

    Raises:
        DataError: the image is missing, damaged or incomplete, has more than 8 bits a channel, or cannot be transformed
            (one of 5000×1 pixels has no pixel left once its longer side is 1333).
    """
    with _opened(path) as image:
        width, height = image.size
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        decode(path)  # raises an error if the file is at fault
        if isinstance(error, ValueError | AssertionError | RuntimeError):  # of Detectron2's and PyTorch's transforms
            raise DataError(
                "image that cannot be transformed", f"{path} of {width}×{height} pixels, by INPUT's keys: {error}"
            ) from error
        error.add_note(f"The image is {path}.")
        raise


@contextmanager
def any_size() -> Iterator[None]:
    """Let Pillow read images of any size inside. It refuses more than 179 million pixels as a possible attack."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def open_image(path: str) -> Iterator[tuple[Image.Image, BinaryIO]]:
    """Open an image inside, without decoding its pixels, and the file that it is in.

    Raises:
        OSError: it does not exist, is no regular file or no image, or is a program: PIL runs Ghostscript on an EPS.
        SyntaxError, ValueError: PIL finds it broken.
        Image.DecompressionBombError: it has too many pixels.
    """
    with open_regular(path) as file, Image.open(file) as image:
        if image.format == "EPS":
            raise OSError("it is EPS, a program in PostScript; expected an image of pixels.")
        yield image, file


@contextmanager
def _opened(path: str, where: str = "", if_missing: str = "") -> Iterator[Image.Image]:
    """Open the image at ``path``, whose header is read, and whose depth is checked."""
    record = f" ({where})" if where else ""
    try:
        with open_image(path) as (image, file):
            bits = _bits(image, file)
            if bits > 8:
                raise DataError(
                    "image of more than 8 bits",
                    f"{path}{record} has {bits} bits a channel (PIL's mode {image.mode}), whose values do not fit the "
                    "8 bits of a channel. Save it as 8 bits, in a range of your choice.",
                )
            yield image
    except FileNotFoundError:
        needed = f"{where} needs {path}, which" if where else path
        raise DataError("missing image", f"{needed} does not exist.{if_missing}") from None
    except DataError:
        raise
    except Exception as error:  # Pillow raises many types for damaged files
        raise _broken(f"{path}{record}", error) from error


def _broken(name: str, error: Exception) -> DataError:
    if isinstance(error, UnidentifiedImageError):  # its text is the repr of a file object
        reason = "Pillow cannot identify its format."
    elif isinstance(error, Image.DecompressionBombError):
        reason = f"{error} `focal data tile` cuts it. With tile (--tile), prediction reads it."
    else:
        reason = str(error) or type(error).__name__
    return DataError("image that does not open", f"{name}: {reason}")


def _bits(image: Image.Image, file: BinaryIO) -> int:
    """Return the bits a channel in the header of an image file, which Pillow may cut to 8 without a word."""
    if image.mode.startswith(("I", "F")):  # Detectron2 would make all values above 255 white
        return 32 if image.mode in ("I", "F") else 16
    if image.format == "TIFF":
        return max(image.tag_v2.get(_TIFF_BITS_PER_SAMPLE, (1,)))
    if image.format == "PPM":  # P3 and P6 say their largest value, which is an argument of the decoder
        arguments = image.tile[0].args if image.tile else ()
        return max([n.bit_length() for n in arguments if isinstance(n, int)] if isinstance(arguments, tuple) else [8])
    find = _HEADERS.get(image.format)
    if find is None:
        return 8
    position = file.tell()
    file.seek(0)
    head = file.read(_HEAD)
    file.seek(position)
    return find(head)


def _bits_of_jpeg2000(head: bytes) -> int:
    first = head.find(b"\xff\x4f\xff\x51") + 42  # after the markers SOC and SIZ: for each channel, its bits − 1
    return max((bits & 0x7F) + 1 for bits in head[first : first + 3 * head[first - 1] : 3])


def _bits_of_avif(head: bytes) -> int:
    first = head.find(b"pixi") + 9  # the box says the number of channels, then the bits of each
    return max(head[first : first + head[first - 1]], default=8)


_HEADERS = {
    "PNG": lambda head: head[24],  # IHDR
    "SGI": lambda head: 8 * head[3],
    "JPEG2000": _bits_of_jpeg2000,
    "AVIF": _bits_of_avif,
}


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # PIL fails in many ways on broken EXIF data; Detectron2 then leaves the image as it is
        return None
