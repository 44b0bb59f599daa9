"""Whatever a file of annotations holds, its records are sound or a DataError says why not."""

import contextlib
import copy
import io
import json
import os

import pycocotools.coco
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.cocoeval import COCOeval

from focal_plugin.data import DataError
from focal_plugin.data.coco import CocoSet
from focal_plugin.data.records import Checker, check_box, join_inside
from focal_plugin.data.voc import VocSet

SIZE = (60, 40)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
on_error = st.sampled_from(["raise", "skip"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of two images in VOC layout, whose images serve COCO files too."""
    root = tmp_path_factory.mktemp("voc")
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / name).mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", SIZE).save(root / "JPEGImages" / name)
    (root / "ImageSets" / "Main" / "all.txt").write_text("a\nb\n")
    return root


def check(dataset, folder, mode):
    """Load the set: a DataError, or records that Detectron2 can train on."""
    try:
        records, metadata = dataset.load(Checker(dataset.name, mode))
    except DataError as error:
        assert str(error)
        return
    if "json_file" in metadata:
        evaluate(metadata["json_file"], records)
    assert all(isinstance(name, str) for name in metadata["thing_classes"])
    for record in records:
        assert os.path.dirname(record["file_name"]) == str(folder / "JPEGImages")
        assert (record["width"], record["height"]) == SIZE
        for box in record["annotations"]:
            x0, y0, x1, y1 = box["bbox"]
            assert 0 <= x0 < x1 <= SIZE[0] and 0 <= y0 < y1 <= SIZE[1]
            assert 0 <= box["category_id"] < len(metadata["thing_classes"]) and box["iscrowd"] in (0, 1)


def evaluate(json_file, records):
    """What COCO's metric reads from a file itself is sound too: a detector that finds every box has AP 1 or none."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = pycocotools.coco.COCO(json_file)
        found = [
            {key: annotation[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
            for annotation in truth.dataset["annotations"]
            if not annotation["iscrowd"]
        ]
        if not found:
            return
        metric = COCOeval(truth, truth.loadRes(found), "bbox")
        metric.evaluate()
        metric.accumulate()
        metric.summarize()
    assert len(found) == sum(not box["iscrowd"] for record in records for box in record["annotations"])
    assert metric.stats[0] == pytest.approx(1)


COCO = {
    "images": [{"id": 1, "file_name": "a.png", "width": 60, "height": 40}, {"id": 2, "file_name": "b.png"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 5, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0},
        {"id": 2, "image_id": 2, "category_id": 7, "bbox": [5, 5, 10.5, 10], "area": 105, "iscrowd": 1},
    ],
    "categories": [{"id": 5, "name": "cat"}, {"id": 7, "name": "dog"}],
}


def places(node, path=()):
    """The path of every value in nested dicts and lists."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@given(st.lists(st.tuples(st.sampled_from(list(places(COCO))), anything), max_size=3), on_error)
@settings(max_examples=300, deadline=None)
def test_coco(folder, changes, mode):
    content = copy.deepcopy(COCO)
    for path, value in changes:
        node = content
        for key in path[:-1]:
            try:
                node = node[key]
            except (KeyError, IndexError, TypeError):  # a change before it took that away
                break
        if isinstance(node, dict) or (isinstance(node, list) and isinstance(path[-1], int) and path[-1] < len(node)):
            node[path[-1]] = value
    (folder / "a.json").write_text(json.dumps(content))
    check(CocoSet("fuzz", str(folder / "a.json"), str(folder / "JPEGImages")), folder, mode)


@given(st.binary(max_size=30) | anything.map(lambda value: json.dumps(value).encode()), on_error)
@settings(max_examples=50)
def test_json_of_any_content(folder, content, mode):
    (folder / "a.json").write_bytes(content)
    check(CocoSet("fuzz", str(folder / "a.json"), str(folder / "JPEGImages")), folder, mode)


XML = (
    b'<?xml version="1.0" encoding="utf-8"?><annotation><filename>a.png</filename>'
    b"<size><width>60</width><height>40</height></size>"
    b"<object><name>cat</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8.5</ymax>"
    b"</bndbox></object></annotation>"
)
texts = st.sampled_from(
    [b"60", b"40", b"a.png", b"cat", b"<xmin>1</xmin>", b"utf-8", b"9", b"<bndbox>", b"</annotation>"]
)
junk = st.binary(max_size=4) | st.sampled_from(
    [b"nan", b"-1", b"1e999", b"9" * 5000, b"../../x", b"&e;", b"&#0;", b"utf-7", b"latin1", b"utf-16", b"<a>", b"\xff"]
)


@given(st.lists(st.tuples(texts, junk), max_size=3), st.binary(max_size=4), on_error)
@settings(max_examples=200)
def test_voc(folder, changes, end, mode):
    content = XML
    for old, new in changes:
        content = content.replace(old, new, 1)
    (folder / "Annotations" / "a.xml").write_bytes(content + end)
    (folder / "Annotations" / "b.xml").write_bytes(XML)
    check(VocSet("fuzz", str(folder), "all", classes=["cat"]), folder, mode)


@given(st.binary(max_size=20) | st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")), on_error)
@settings(max_examples=50)
def test_split_of_any_content(folder, content, mode):
    (folder / "Annotations" / "a.xml").write_bytes(XML)
    (folder / "ImageSets" / "Main" / "fuzz.txt").write_bytes(content)
    check(VocSet("fuzz", str(folder), "fuzz", classes=["cat"]), folder, mode)


@given(st.lists(anything, min_size=4, max_size=4), st.tuples(*[st.integers(1, 100)] * 2))
@settings(max_examples=100)
def test_box(box, size):
    try:
        x0, y0, x1, y1 = check_box(box, size, "here")
    except DataError as error:
        assert "here" in str(error)
        return
    assert 0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]


@given(st.lists(st.sampled_from(["..", ".", "a", "b.png", "/", "\\", "~", "", "\0", "a/../..", "://"]), max_size=6))
@settings(max_examples=100)
def test_path(parts):
    for name in ("".join(parts), "/".join(parts)):
        try:
            path = join_inside("/data/images", name, "here")
        except DataError:
            continue
        assert os.path.commonpath(["/data/images", os.path.normpath(path)]) == "/data/images"
