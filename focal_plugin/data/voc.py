"""Data sets in Pascal VOC's layout: an XML file for each image, and a text file for each split."""

import functools
import os
from dataclasses import dataclass
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import parse
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..files.progress import progress
from ..files.regular import open_regular
from .images import check_image
from .records import NOT_NUMBERS, Checker, DataError, join_inside, make_annotation, need, read_lines, resolve


@dataclass(frozen=True)
class VocSet:
    """A split of a data set in VOC's layout: ``Annotations/*.xml``, ``ImageSets/Main/<split>.txt``, ``JPEGImages/*``.

    As in VOC and Detectron2, pixels are counted from 1 and a box includes its last pixel: xmin and ymin lose 1.

    Attributes:
        name: the data set's name, for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        root: the folder with these three.
        split: the name of a file in ImageSets/Main, without ``.txt``; each line names an image, without its extension.
        classes: class names in the order of their indices; None, all names in ``root/Annotations``, sorted, so that all
            splits of a root have the same.
        on_error: "raise" stops at the first bad record, "skip" leaves bad records out and counts them.
        difficult: "keep", objects marked as difficult are like any other, as in Detectron2; "ignore", they are crowds:
            not trained on, and in evaluation neither finding nor missing them counts, as in VOC's metric.
    """

    name: str
    root: str
    split: str
    classes: list[str] | None = None
    on_error: str = "raise"
    difficult: str = "keep"

    def load(self, checker: Checker) -> tuple[list[dict], dict]:
        """Return the records in Detectron2's format, and their metadata."""
        root = need(resolve(self.root), "root")
        classes = self.classes or find_classes(root, self.on_error)
        class_ids = {name: index for index, name in enumerate(classes)}
        images = _images_by_stem(os.path.join(root, "JPEGImages"))
        records, seen = [], set()
        for image_id in progress(self._image_ids(root), desc=f"Reading {self.name}"):
            with checker.record("image"):
                if image_id in seen:
                    raise DataError("image listed twice", f"{image_id} in split {self.split!r} of {root}.")
                seen.add(image_id)
                xml = join_inside(os.path.join(root, "Annotations"), f"{image_id}.xml", f"split {self.split!r}")
                annotation = parse_xml(xml)
                image = _find_image(root, images, image_id, annotation, xml)
                records.append(read_record(annotation, xml, image, image_id, class_ids, checker, self.difficult))
        return records, {"thing_classes": list(classes)}

    def _image_ids(self, root: str) -> list[str]:
        path = join_inside(os.path.join(root, "ImageSets", "Main"), f"{self.split}.txt", f"split of {self.name!r}")
        return [line for _, line in read_lines(need(path, "split"))]


def parse_xml(path: str) -> Element:
    """Return the root element of an XML file.

    Raises:
        DataError: the file is missing, is no XML, or defines entities.
    """
    try:
        with open_regular(path) as file:
            return parse(file).getroot()
    except FileNotFoundError:
        raise DataError("missing annotation", f"{path} does not exist.") from None
    except (ParseError, DefusedXmlException, OSError, ValueError, LookupError) as error:  # the last two: encodings
        raise DataError("annotation that is not XML", f"{path}: {error}") from error


def read_record(
    annotation: Element, xml: str, image: str, image_id: str, class_ids: dict, checker: Checker, difficult: str = "keep"
) -> dict:
    """Return an image's record in Detectron2's format, from the root element ``annotation`` of the file ``xml``."""
    width, height = check_image(image, _declared_size(annotation, xml), xml)
    annotations = []
    for number, element in enumerate(annotation.findall("object"), start=1):
        with checker.record("box"):
            where = f"{xml}, object {number}"
            box = make_annotation(
                _read_box(element, where), (width, height), _class_name(element), class_ids, where, first=1
            )
            annotations.append(box | {"iscrowd": int(difficult == "ignore" and _is_difficult(element, where))})
            if element.findtext("difficult", "").strip() == "1":
                annotations[-1]["difficult"] = 1  # a mark that VOC's writer keeps
    return {"file_name": image, "image_id": image_id, "height": height, "width": width, "annotations": annotations}


def _is_difficult(element: Element, where: str) -> bool:
    text = element.findtext("difficult", "0").strip()
    if text not in ("0", "1"):
        raise DataError("difficult that is neither 0 nor 1", f"{where}: <difficult> is {text!r}.")
    return text == "1"


def _class_name(element: Element) -> str:
    return element.findtext("name", "").strip()


def _declared_size(annotation: Element, xml: str) -> tuple[int, int] | None:
    if annotation.find("size") is None:
        return None
    texts = [annotation.findtext(f"size/{side}", "").strip() for side in ("width", "height")]
    try:
        return int(texts[0]), int(texts[1])
    except ValueError:
        message = f"{xml} gives {texts}, expected two whole numbers (width, height)."
        raise DataError("size that is not two numbers", message) from None


def _read_box(element: Element, where: str) -> list[float]:
    texts = [element.findtext(f"bndbox/{side}", "").strip() for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        return [float(text) for text in texts]
    except ValueError:
        raise DataError(NOT_NUMBERS, f"{where}: {texts}.") from None


@functools.lru_cache(maxsize=32)
def find_classes(root: str, on_error: str) -> tuple[str, ...]:
    """Return all class names in ``root/Annotations``, sorted; with ``on_error`` "skip", files that parse alone."""
    folder = need(os.path.join(root, "Annotations"), "the annotations' folder")
    files = sorted(name for name in PathManager.ls(folder) if name.endswith(".xml"))
    names, checker = set(), Checker(root, on_error)
    for name in progress(files, desc=f"Finding the classes of {root}", unit="file"):
        with checker.record("image"):
            names.update(map(_class_name, parse_xml(os.path.join(folder, name)).findall("object")))
    names.discard("")  # reading the object's image refuses it
    if not names:
        raise DataError("no classes", f"no object with a name in {folder}/*.xml; give the entry its classes: [...].")
    return tuple(sorted(names))


def _images_by_stem(folder: str) -> dict[str, list[str]]:
    extensions = Image.registered_extensions()
    images: dict[str, list[str]] = {}
    for name in PathManager.ls(need(folder, "the images' folder")):
        stem, extension = os.path.splitext(name)
        if extension.lower() in extensions:
            images.setdefault(stem, []).append(name)
    return images


def _find_image(root: str, images: dict[str, list[str]], image_id: str, annotation: Element, xml: str) -> str:
    """The image with the annotation's name and any extension; if there is none or several, the one in <filename>."""
    folder = os.path.join(root, "JPEGImages")
    found = images.get(image_id, [])
    filename = annotation.findtext("filename", "").strip()
    if len(found) == 1:
        return os.path.join(folder, found[0])
    if len(found) > 1 and filename not in found:
        message = f"{', '.join(sorted(found))} in {folder}; keep one, or name it as <filename> in {xml}."
        raise DataError("several images", message)
    if not filename:
        raise DataError("missing image", f"no {image_id}.* in {folder}, and {xml} has no <filename>.")
    return join_inside(folder, filename, xml)
