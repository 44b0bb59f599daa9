"""Images whose values do not fit 8 bits, and images that Pillow opens and cannot decode, are refused by name."""

import io
import struct
import zlib

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data.detection_utils import read_image
from PIL import Image, ImageCms

from focal_plugin import add_focal_config
from focal_plugin.data import DataError, FocalDatasetMapper
from focal_plugin.data.images import check_image, decode, readable_image

SIDE = 8
RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


def png(depth, color, channels):
    """A PNG of any bit depth, made from its specification: Pillow writes none of 16 bits in colour."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, color, 0, 0, 0)
    rows = bytes(SIDE * (1 + SIDE * channels * depth // 8))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def tiff(bits, channels, photometric):
    """An uncompressed TIFF of three or more channels."""
    count, pixels = 10, bytes(SIDE * SIDE * channels * bits // 8)
    bits_at = 8 + 2 + 12 * count + 4
    entries = [(256, 4, 1, SIDE), (257, 4, 1, SIDE), (258, 3, channels, bits_at), (259, 3, 1, 1)]
    entries += [(262, 3, 1, photometric), (273, 4, 1, bits_at + 2 * channels), (277, 3, 1, channels)]
    entries += [(278, 4, 1, SIDE), (279, 4, 1, len(pixels)), (284, 3, 1, 1)]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, count) + directory + bytes(4) + struct.pack("<H", bits) * channels + pixels


def sgi():
    return struct.pack(">hBBHHHHll4x80si404x", 474, 0, 2, 3, SIDE, SIDE, 3, 0, 255, b"", 0) + bytes(SIDE * SIDE * 6)


def jpeg2000(path, bits=12, channels=3):
    """One of 8 bits whose codestream is said to have more."""
    RGB.save(path, format="JPEG2000")
    content = bytearray(path.read_bytes())
    first = content.index(b"\xff\x4f\xff\x51") + 42
    for channel in range(channels):
        content[first + 3 * channel] = bits - 1
    path.write_bytes(content)


def avif(path):
    """One of 8 bits whose header says 10, in both of its places."""
    RGB.save(path, format="AVIF")
    content = bytearray(path.read_bytes())
    first = content.index(b"pixi") + 9
    content[first : first + 3] = bytes([10]) * 3
    content[content.index(b"av1C") + 6] |= 0x40
    path.write_bytes(content)


DEEP = {
    "RGB PNG": png(16, 2, 3),
    "RGBA PNG": png(16, 6, 4),
    "grey PNG": png(16, 0, 1),
    "grey PNG with alpha": png(16, 4, 2),
    "RGB TIFF": tiff(16, 3, 2),
    "RGBA TIFF": tiff(16, 4, 2),
    "CMYK TIFF": tiff(16, 4, 5),
    "RGB PPM": b"P6 8 8 65535\n" + bytes(SIDE * SIDE * 6),
    "RGB PPM of 10 bits": b"P6 8 8 1023\n" + bytes(SIDE * SIDE * 6),
    "plain PPM": b"P3 8 8 65535\n" + b"300 " * SIDE * SIDE * 3,
    "grey PGM": b"P5 8 8 65535\n" + bytes(SIDE * SIDE * 2),
    "PFM": b"Pf\n8 8\n-1.0\n" + bytes(SIDE * SIDE * 4),
    "SGI": sgi(),
    "float TIFF": lambda path: Image.fromarray(np.zeros((SIDE, SIDE), np.float32)).save(path, format="TIFF"),
    "compressed grey TIFF": lambda path: Image.fromarray(np.zeros((SIDE, SIDE), np.uint16)).save(
        path, format="TIFF", compression="tiff_lzw"
    ),
    "JPEG 2000": jpeg2000,
    "AVIF": avif,
}
FINE = {
    "RGB PNG": png(8, 2, 3),
    "RGB TIFF": tiff(8, 3, 2),
    "RGB PPM": b"P6 8 8 255\n" + bytes(SIDE * SIDE * 3),
    "PPM of 4 bits": b"P6 8 8 15\n" + bytes(SIDE * SIDE * 3),
    "JPEG": lambda path: RGB.save(path, format="JPEG"),
    "CMYK JPEG": lambda path: RGB.convert("CMYK").save(path, format="JPEG"),
    "JPEG 2000": lambda path: RGB.save(path, format="JPEG2000"),
    "AVIF": lambda path: RGB.save(path, format="AVIF"),
    "WebP": lambda path: RGB.save(path, format="WEBP"),
    "BMP": lambda path: RGB.save(path, format="BMP"),
    "TGA": lambda path: RGB.save(path, format="TGA"),
    "SGI": lambda path: RGB.save(path, format="SGI"),
    "palette": lambda path: RGB.convert("P").save(path, format="PNG", transparency=3),
    "1 bit": lambda path: RGB.convert("1").save(path, format="PNG"),
    "animated GIF": lambda path: RGB.save(path, format="GIF", save_all=True, append_images=[RGB.rotate(90)]),
    "TIFF of two pages": lambda path: RGB.save(path, format="TIFF", save_all=True, append_images=[RGB.rotate(90)]),
    "APNG": lambda path: RGB.save(path, format="PNG", save_all=True, append_images=[RGB.rotate(90)]),
    "animated WebP": lambda path: RGB.save(
        path, format="WEBP", lossless=True, save_all=True, append_images=[RGB.rotate(90)]
    ),
}


def write(path, content):
    content(path) if callable(content) else path.write_bytes(content)
    return str(path)


def record(path, size=(SIDE, SIDE)):
    return {"file_name": str(path), "width": size[0], "height": size[1], "annotations": []}


def make_mapper(is_train=True, smallest=800):
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.INPUT.MIN_SIZE_TEST = smallest  # 0 leaves the size alone
    return FocalDatasetMapper(cfg, is_train)


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_8_bits_are_refused(tmp_path, kind):
    path = write(tmp_path / "deep", DEEP[kind])
    for use in (lambda: check_image(path, None, "a record"), lambda: decode(path), lambda: make_mapper()(record(path))):
        with pytest.raises(DataError, match="image of more than 8 bits") as error:
            use()
        assert path in str(error.value)


@pytest.mark.parametrize("kind", FINE)
def test_8_bits_are_read_as_detectron2_reads_them(tmp_path, kind):
    path = write(tmp_path / "fine", FINE[kind])
    assert check_image(path, (SIDE, SIDE), "a record") == (SIDE, SIDE)
    decode(path)
    with readable_image(path):
        assert read_image(path, "BGR").shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize("kind", ["animated GIF", "TIFF of two pages", "APNG", "animated WebP"])
def test_the_first_of_several_frames_is_read(tmp_path, kind):
    path = write(tmp_path / "frames", FINE[kind])
    assert np.abs(read_image(path, "RGB") - np.asarray(RGB, dtype=int)).max() < 60  # a palette of GIF


VALUES = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)
PALETTE = np.random.default_rng(2).integers(0, 256, (256, 3), dtype=np.uint8)
INDEXED = Image.fromarray(VALUES[..., 0], mode="P")
INDEXED.putpalette(PALETTE.tobytes())
CONVERTED = {
    "CMYK": (Image.fromarray(VALUES, mode="CMYK"), (255.0 - VALUES[..., :3]) * (255 - VALUES[..., 3:]) / 255),
    "palette": (INDEXED, PALETTE[VALUES[..., 0]]),
    "1 bit": (Image.fromarray(VALUES[..., 0] > 127), np.where(VALUES[..., :1] > 127, 255, 0)),
    "grey": (Image.fromarray(VALUES[..., 0]), VALUES[..., :1]),
    "grey with transparency": (Image.fromarray(np.ascontiguousarray(VALUES[..., 2:])), VALUES[..., 2:3]),
    "transparency": (Image.fromarray(VALUES * np.array([1, 1, 1, 0], np.uint8)), VALUES[..., :3]),
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_what_pixels_become(tmp_path, kind):
    image, expected = CONVERTED[kind]
    path = str(tmp_path / "image")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()  # which nothing may apply
    image.save(path, format="TIFF" if image.mode == "CMYK" else "PNG", icc_profile=profile)
    seen = make_mapper(False, smallest=0)(record(path))["image"].permute(1, 2, 0).numpy()[..., ::-1]
    assert np.abs(seen - expected.astype(float)).max() <= (1 if kind == "CMYK" else 0)


BROKEN = {
    "JPEG of 12 bits": lambda path: path.write_bytes(
        saved("JPEG").replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc1\x00\x11\x0c", 1)
    ),
    "truncated JPEG": lambda path: path.write_bytes(saved("JPEG")[:-1]),
    "truncated PNG": lambda path: path.write_bytes(saved("PNG")[:-100]),
    "PNG with a changed byte": lambda path: path.write_bytes(png(8, 2, 3)[:45] + b"changed" + png(8, 2, 3)[52:]),
    "truncated TIFF": lambda path: path.write_bytes(tiff(8, 3, 2)[:-60]),
    "RGB TIFF of 32 bits": lambda path: path.write_bytes(tiff(32, 3, 2)),
    "EXR": lambda path: path.write_bytes(b"\x76\x2f\x31\x01" + bytes(100)),
    "HDR": lambda path: path.write_bytes(b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 8 +X 8\n" + bytes(256)),
    "text": lambda path: path.write_text("not an image"),
    "empty": lambda path: path.write_bytes(b""),
}


def saved(kind):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, format=kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_decoded_is_named(tmp_path, kind):
    path = tmp_path / "broken"
    BROKEN[kind](path)
    for use in (lambda: decode(str(path)), lambda: make_mapper()(record(path))):
        with pytest.raises(DataError, match="image that does not open") as error:
            use()
        assert str(path) in str(error.value)


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("size", [(5000, 1), (1, 5000)])
def test_an_image_too_long_to_be_resized_is_named(tmp_path, size, is_train):
    path = tmp_path / "long.png"
    Image.new("RGB", size).save(path)
    with pytest.raises(DataError, match="image that cannot be transformed") as error:
        make_mapper(is_train)(record(path, size))
    assert f"{path} of {size[0]}×{size[1]}" in str(error.value)


def test_an_error_that_is_not_the_images_stays_as_it_is(tmp_path):
    path = write(tmp_path / "a.png", FINE["RGB PNG"])
    with pytest.raises(KeyError, match="mine") as error, readable_image(path):
        raise KeyError("mine")
    assert error.value.__notes__ == [f"The image is {path}."]


@pytest.mark.parametrize("seed", range(80))
def test_random_bytes(tmp_path, seed):
    """Whatever Pillow raises for a damaged file, and it raises many types, it is one error with the file's name."""
    random = np.random.default_rng(seed)
    contents = [value for value in DEEP.values() if isinstance(value, bytes)] + [
        saved(kind) for kind in ("JPEG", "PNG", "TIFF", "GIF", "WEBP", "BMP")
    ]
    content = bytearray(contents[seed % len(contents)])
    for place in random.integers(0, min(len(content), 200), 3):
        content[place] = random.integers(256)
    path = tmp_path / "a"
    path.write_bytes(content[: random.integers(20, len(content) + 1)])
    try:
        decode(str(path))
    except DataError as error:
        assert str(path) in str(error)
