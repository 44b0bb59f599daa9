"""Small data sets on disk, and catalogs left as they were found."""

import json
from xml.sax.saxutils import escape

import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from focal_plugin.data import register_local_dataset, voc


@pytest.fixture(autouse=True)
def catalogs():
    """Forget every data set that the test registered."""
    before = set(DatasetCatalog), set(MetadataCatalog)
    voc.find_classes.cache_clear()
    yield
    for catalog, names in zip((DatasetCatalog, MetadataCatalog), before):
        for name in set(catalog) - names:
            catalog.remove(name)


def _save_image(path, size, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "green").save(path, **kwargs)


@pytest.fixture
def save_image():
    return _save_image


class VocRoot:
    """Writes a data set in VOC layout."""

    def __init__(self, root):
        self.root = root
        for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (root / folder).mkdir(parents=True)

    def image(self, image_id, objects=(), size=(60, 40), declared=None, extension=".jpg", filename=None):
        """``objects``: (class name, (xmin, ymin, xmax, ymax)), or the text of an <object>."""
        _save_image(self.root / "JPEGImages" / f"{image_id}{extension}", size)
        width, height = declared or size
        self.xml(
            image_id,
            f"<filename>{escape(filename or image_id + extension)}</filename>"
            f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
            + "".join(o if isinstance(o, str) else self.object(*o) for o in objects),
        )

    @staticmethod
    def object(name, box, difficult=0):
        sides = "".join(f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
        return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{sides}</bndbox></object>"

    def xml(self, image_id, content):
        (self.root / "Annotations" / f"{image_id}.xml").write_text(f"<annotation>{content}</annotation>")

    def split(self, name, *image_ids):
        (self.root / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(image_ids) + "\n")

    def load(self, split="train", name="local", **keys):
        register_local_dataset({"name": name, "format": "voc", "root": str(self.root), "split": split, **keys})
        return DatasetCatalog.get(name)


@pytest.fixture
def voc_root(tmp_path):
    return VocRoot(tmp_path / "voc")


class CocoFile:
    """Writes a data set in COCO's format."""

    def __init__(self, folder):
        self.folder = folder
        self.content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}

    def image(self, image_id, size=(60, 40), **keys):
        name = keys.get("file_name", f"{image_id}.png")
        if name == f"{image_id}.png":
            _save_image(self.folder / "images" / name, size)
        image = {"id": image_id, "file_name": name, "width": size[0], "height": size[1], **keys}
        self.content["images"].append(image)

    def box(self, image_id, bbox=(5, 5, 10, 10), **keys):
        annotation = {
            "id": len(self.content["annotations"]) + 1,
            "image_id": image_id,
            "category_id": 1,
            "bbox": list(bbox),
            "area": bbox[-1] * bbox[-2] if len(bbox) == 4 else 0,
            "iscrowd": 0,
        }
        self.content["annotations"].append({**annotation, **keys})

    def write(self):
        path = self.folder / "annotations.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.content))
        return path

    def load(self, name="local", **keys):
        self.folder.joinpath("images").mkdir(parents=True, exist_ok=True)
        paths = {"json": str(self.write()), "images": str(self.folder / "images")}
        register_local_dataset({"name": name, "format": "coco", **paths, **keys})
        return DatasetCatalog.get(name)


@pytest.fixture
def coco_file(tmp_path):
    return CocoFile(tmp_path / "coco")


class YoloFolder:
    """Writes images/ and labels/ in YOLO's layout."""

    def __init__(self, root):
        self.root = root

    def image(self, name, lines=None, size=(60, 40), split="train"):
        """``lines``: of the label file; None, there is none."""
        path = self.root / "images" / split / name
        _save_image(path, size)
        if lines is not None:
            label = (self.root / "labels" / split / name).with_suffix(".txt")
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("".join(f"{line}\n" for line in lines))

    def describe(self, **content):
        self.root.mkdir(exist_ok=True)
        path = self.root / "data.yaml"
        path.write_text(yaml.safe_dump({"train": "images/train", "names": ["cat", "dog"], **content}))
        return path

    def load(self, split="train", name="local", **keys):
        if "images" not in keys:
            keys = {"data": str(self.root / "data.yaml"), "split": split, **keys}
        register_local_dataset({"name": name, "format": "yolo", **keys})
        return DatasetCatalog.get(name)


@pytest.fixture
def yolo_folder(tmp_path):
    return YoloFolder(tmp_path / "yolo")


class CsvFile:
    """Writes a CSV file and its images."""

    header = "image_path,xmin,ymin,xmax,ymax,label"

    def __init__(self, folder):
        self.path = folder / "trees.csv"
        self.rows = []

    def row(self, name, *words, size=(60, 40)):
        if name and not (self.path.parent / name).exists():
            _save_image(self.path.parent / name, size)
        self.rows.append(",".join(map(str, (name, *words))))

    def write(self, header=header):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\n".join([header, *self.rows, ""]))
        return str(self.path)

    def load(self, name="local", **keys):
        register_local_dataset({"name": name, "format": "csv", "csv": self.write(), **keys})
        return DatasetCatalog.get(name)


@pytest.fixture
def csv_file(tmp_path):
    return CsvFile(tmp_path / "csv")
