import importlib.util
import os
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import given, settings
from hypothesis import strategies as st

from focal_plugin.data import DataError, register_local_dataset
from focal_plugin.data.csv_file import CsvSet
from focal_plugin.data.records import Checker
from tests.data.conftest import CsvFile


def boxes(record):
    return [box["bbox"] for box in record["annotations"]]


def test_several_rows_of_an_image(csv_file):
    csv_file.row("b.png", 5, 6, 15, 16.5, "Tree")
    csv_file.row("a.png", 1, 2, 3, 4, "Bush")
    csv_file.row("b.png", 0, 0, 60, 40, "Bush")
    first, second = csv_file.load()
    assert (first["image_id"], boxes(first)) == ("b.png", [[5, 6, 15, 16.5], [0, 0, 60, 40]])
    assert (second["image_id"], boxes(second)) == ("a.png", [[1, 2, 3, 4]])
    assert [box["category_id"] for box in first["annotations"]] == [1, 0]  # sorted: Bush, Tree
    assert MetadataCatalog.get("local").thing_classes == ["Bush", "Tree"]


@pytest.mark.parametrize(
    "words", [("", "", "", "", ""), ("", "", "", "", "Tree"), (0, 0, 0, 0, "Fog"), ("0.0", 0, 0, 0, "")]
)
def test_images_without_boxes(csv_file, words):
    csv_file.row("a.png", *words)
    csv_file.row("b.png", 5, 6, 15, 16, "Tree")
    records = csv_file.load()
    assert [len(boxes(record)) for record in records] == [0, 1]
    assert MetadataCatalog.get("local").thing_classes == ["Tree"]


def test_columns_in_any_order_and_others_beside(csv_file):
    csv_file.row("a.png", "Tree", 0.9, 15, 16, 5, 6)
    csv_file.write("image_path,label,score,xmax,ymax,xmin,ymin")
    register_local_dataset({"name": "x", "format": "csv", "csv": str(csv_file.path)})
    assert boxes(DatasetCatalog.get("x")[0]) == [[5, 6, 15, 16]]


def test_images_in_another_folder_and_two_spellings(csv_file, save_image, tmp_path):
    save_image(tmp_path / "other" / "in" / "a.png", (60, 40))
    csv_file.rows = ["in/a.png,1,1,5,5,Tree", "./in//a.png,2,2,6,6,Tree"]
    (record,) = csv_file.load(images=str(tmp_path / "other"))
    assert len(boxes(record)) == 2


def test_a_file_from_excel(csv_file):
    csv_file.row("a.png", 5, 6, 15, 16, '"Tree, old"')
    csv_file.write()
    csv_file.path.write_bytes(b"\xef\xbb\xbf" + csv_file.path.read_bytes().replace(b"\n", b"\r\n"))
    register_local_dataset({"name": "x", "format": "csv", "csv": str(csv_file.path)})
    assert len(DatasetCatalog.get("x")) == 1 and MetadataCatalog.get("x").thing_classes == ["Tree, old"]


@pytest.mark.parametrize(
    ("row", "kind", "says"),
    [
        ("a.png,5,6,15,16,Fog", "unknown class", "'Fog'; the classes are Tree"),
        ("a.png,5,6,15,16,", "unknown class", "''"),
        ("a.png,5,6,15,x,Tree", "box that is not four numbers", "'x'"),
        ("a.png,5,6,15,,Tree", "box that is not four numbers", "''"),
        ("a.png,5,6,15,nan,Tree", "box that is not four numbers", "nan"),
        ("a.png,5,6,15,1e999,Tree", "box that is not four numbers", "inf"),
        ("a.png,5,6,5,16,Tree", "box of no size", "from (5, 6) to (5, 16)"),
        ("a.png,5,6,1,16,Tree", "box of no size", "from"),
        ("a.png,5,6,65,16,Tree", "box outside its image", "in an image of 60×40"),
        ("a.png,5,6,15,16", "row of another length", "fewer values"),
        ("a.png,5,6,15,16,Tree,more", "row of another length", "more values"),
    ],
)
def test_a_row_that_cannot_be_right(csv_file, row, kind, says):
    csv_file.row("a.png", 1, 1, 5, 5, "Tree")
    csv_file.rows.append(row)
    with pytest.raises(DataError) as error:
        csv_file.load(classes=["Tree"])
    text = str(error.value)
    assert text.startswith(f"{kind}: in data set 'local': {csv_file.path}, line 3") and says in text
    assert [len(boxes(r)) for r in csv_file.load(name="skips", on_error="skip", classes=["Tree"])] == [1]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("", "missing image"), ("b.png", "missing image"), ("../a.png", "path outside"), ("/a.png", "path outside")],
)
def test_an_image_that_cannot_be_right(csv_file, name, kind):
    csv_file.row("a.png", 1, 1, 5, 5, "Tree")
    csv_file.rows.append(f"{name},1,1,5,5,Tree")
    with pytest.raises(DataError, match=rf"{kind}.*trees\.csv, line 3"):
        csv_file.load()
    assert len(csv_file.load(name="skips", on_error="skip")) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "missing column: .*lacks image_path, xmin, ymin, xmax, ymax, label; its first line names: none"),
        (
            "image_path,geometry,label\n",
            "missing column: .*lacks xmin, ymin, xmax, ymax; .*image_path, geometry, label",
        ),
        ("image_path,xmin,ymin,xmax,ymax,label\n", "no classes"),
        ('image_path,xmin,ymin,xmax,ymax,label\n"a.png', "file that is not CSV"),
        ("image_path,xmin,ymin,xmax,ymax,label\n\udcff,", "file that is not CSV"),
    ],
)
def test_a_file_that_cannot_be_right(csv_file, content, says):
    csv_file.write()
    csv_file.path.write_bytes(content.encode("utf-8", "surrogateescape"))
    register_local_dataset({"name": "x", "format": "csv", "csv": str(csv_file.path)})
    with pytest.raises(DataError, match=says):
        DatasetCatalog.get("x")


def test_a_pipe_is_refused(csv_file):
    csv_file.path.parent.mkdir()
    os.mkfifo(csv_file.path)
    register_local_dataset({"name": "x", "format": "csv", "csv": str(csv_file.path)})
    with pytest.raises(DataError, match=r"trees\.csv is a pipe; expected a file"):
        DatasetCatalog.get("x")


@pytest.mark.skipif(
    importlib.util.find_spec("deepforest") is None, reason="needs `pip install --no-deps deepforest==2.1.0`"
)
@pytest.mark.parametrize(
    ("file", "classes"), [("testfile_deepforest.csv", ["Tree"]), ("testfile_multi.csv", ["Alive", "Dead"])]
)
def test_deepforests_own_files(file, classes):
    folder = Path(importlib.util.find_spec("deepforest").submodule_search_locations[0]) / "data"
    register_local_dataset({"name": "x", "format": "csv", "csv": str(folder / file)})
    records = DatasetCatalog.get("x")
    lines = (folder / file).read_text().split()[1:]
    assert (len(records), sum(len(boxes(r)) for r in records)) == (1, len(lines))
    assert MetadataCatalog.get("x").thing_classes == classes


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    file = CsvFile(tmp_path_factory.mktemp("csv"))
    file.row("a.png")
    return file.path


cells = st.sampled_from(
    ["a.png", "b.png", "0", "5", "9.5", "nan", "1e999", "9" * 400, "", '"', "\n", "../a.png", "Tree"]
)


@given(st.lists(st.lists(cells, max_size=7).map(",".join), max_size=3), st.sampled_from(["raise", "skip"]))
@settings(max_examples=200)
def test_rows_of_any_content(fuzzed, rows, on_error):
    fuzzed.write_text("\n".join([CsvFile.header, *rows, "a.png,1,1,9,9,Tree"]))
    try:
        records, _ = CsvSet("fuzz", str(fuzzed), classes=["Tree"], on_error=on_error).load(Checker("fuzz", on_error))
    except DataError as error:
        assert str(error)
        return
    for record in records:
        for x0, y0, x1, y1 in boxes(record):
            assert 0 <= x0 < x1 <= 60 and 0 <= y0 < y1 <= 40
