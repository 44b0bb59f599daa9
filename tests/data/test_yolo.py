import os

import pytest
from detectron2.data import MetadataCatalog
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from focal_plugin.data import DataError
from focal_plugin.data.records import Checker
from focal_plugin.data.yolo import YoloSet
from tests.data.conftest import YoloFolder


def boxes(record):
    return [box["bbox"] for box in record["annotations"]]


@pytest.mark.parametrize("names", [["cat", "dog"], {0: "cat", 1: "dog"}, {1: "dog", 0: "cat"}])
def test_boxes_are_shares_of_the_image(yolo_folder, names):
    yolo_folder.image("a.png", ["1 0.5 0.5 0.2 0.1", "", "0 0.05 0.5 0.1 1"], size=(100, 50))
    yolo_folder.describe(names=names)
    (record,) = yolo_folder.load()
    assert boxes(record) == [pytest.approx([40, 22.5, 60, 27.5]), pytest.approx([0, 0, 10, 50])]
    assert [box["category_id"] for box in record["annotations"]] == [1, 0]
    assert (record["width"], record["height"], record["image_id"]) == (100, 50, "a.png")
    assert MetadataCatalog.get("local").thing_classes == ["cat", "dog"]


def test_a_polygon_becomes_its_box(yolo_folder):
    yolo_folder.image("a.png", ["0 0.1 0.5 0.6 0.2 0.3 0.9", "0 .1 .1 .1 .2 .3 .2 .3 .1"], size=(100, 100))
    yolo_folder.describe()
    assert boxes(yolo_folder.load()[0]) == [pytest.approx([10, 20, 60, 90]), pytest.approx([10, 10, 30, 20])]


def test_keypoints_are_passed_over(yolo_folder):
    yolo_folder.image("a.png", ["0 0.5 0.5 0.2 0.2 0.9 0.9 2 0.1 0.1 1"], size=(100, 100))
    yolo_folder.describe(kpt_shape=[2, 3])
    assert boxes(yolo_folder.load()[0]) == [pytest.approx([40, 40, 60, 60])]
    yolo_folder.describe(kpt_shape=[3, 3])
    with pytest.raises(DataError, match=r"a\.txt, line 1 has 11 values; expected keypoints too"):
        yolo_folder.load(name="other")


def test_empty_and_missing_label_files_are_images_without_boxes(yolo_folder):
    yolo_folder.image("a.png", [])
    yolo_folder.image("b.png")
    yolo_folder.image("deeper/c.jpg", ["0 .5 .5 .1 .1"])
    (yolo_folder.root / "images" / "train" / ".hidden.png").write_bytes(b"")
    (yolo_folder.root / "images" / "train" / "notes.md").write_text("")
    yolo_folder.describe()
    records = yolo_folder.load()
    assert [(record["image_id"], len(boxes(record))) for record in records] == [
        ("a.png", 0),
        ("b.png", 0),
        ("deeper/c.jpg", 1),
    ]


def test_boxes_follow_the_orientation(yolo_folder, save_image):
    yolo_folder.image("a.jpg", ["0 0.5 0.5 0.5 0.5"])
    exif = Image.Exif()
    exif[274] = 6
    save_image(yolo_folder.root / "images/train/a.jpg", (60, 40), exif=exif)
    yolo_folder.describe()
    (record,) = yolo_folder.load()
    assert (record["width"], record["height"], boxes(record)) == (40, 60, [[10, 15, 30, 45]])


def test_what_reaches_outside_by_rounding_is_clipped(yolo_folder):
    yolo_folder.image("a.png", ["0 0.5 0.5 1.01 1.01"])
    yolo_folder.describe()
    assert boxes(yolo_folder.load()[0]) == [[0, 0, 60, 40]]


@pytest.mark.parametrize(
    ("line", "kind", "says"),
    [
        ("2 .5 .5 .1 .1", "unknown class", "class 2; the classes' numbers are 0 to 1"),
        ("-1 .5 .5 .1 .1", "unknown class", "class -1"),
        ("0.5 .5 .5 .1 .1", "unknown class", "class 0.5"),
        ("nan .5 .5 .1 .1", "unknown class", "class nan"),
        ("0 .5 .5 .1", "line of another length", "4 values; expected class cx cy w h"),
        ("0 .5 .5 .1 .1 .9", "line of another length", "6 values"),
        ("0 .5 .5 .1 .1 .9 .9 .9", "line of another length", "8 values"),
        ("0 .5 .5 .1 x", "box that is not four numbers", "0 .5 .5 .1 x"),
        ("0 .5 .5 .1 nan", "box that is not four numbers", "nan"),
        ("0 .1 .1 .2 .2 nan .3", "box that is not four numbers", "nan"),
        ("0 inf .5 .1 .1", "box that is not four numbers", "inf"),
        ("0 30 20 6 4", "box that is not normalised", "expected shares of the image, from 0 to 1"),
        ("0 .5 .5 0 .1", "box of no size", "from"),
        ("0 .5 .5 -.1 .1", "box of no size", "from"),
        ("0 .95 .5 .2 .1", "box outside its image", "in an image of 60×40"),
        ("0 .5 .5 .1 .1\n\n0 .5 .5 .1 0", "box of no size", "line 3"),
    ],
)
def test_a_line_that_cannot_be_right(yolo_folder, line, kind, says):
    yolo_folder.image("a.png", [line])
    yolo_folder.image("b.png", ["0 .5 .5 .1 .1"])
    yolo_folder.describe()
    with pytest.raises(DataError) as error:
        yolo_folder.load()
    text = str(error.value)
    assert text.startswith(f"{kind}: in data set 'local': {yolo_folder.root}/labels/train/a.txt, line") and says in text
    good = line.count("\n") // 2
    assert [len(boxes(r)) for r in yolo_folder.load(name="skips", on_error="skip")] == [good, 1]


def test_ways_to_say_where_the_images_are(yolo_folder, tmp_path, monkeypatch):
    yolo_folder.image("a.png", ["0 .5 .5 .5 .5"])
    yolo_folder.image("b.png", ["0 .5 .5 .5 .5"], split="more")
    root = yolo_folder.root
    (root / "lists").mkdir()
    (root / "lists/train.txt").write_text(f"../images/train/a.png\n\n{root}/images/more/b.png\n")
    monkeypatch.chdir(tmp_path)
    contents = [
        ({"train": "images/train"}, ["a.png"]),
        ({"train": ["images/more", "images/train"]}, ["more/b.png", "train/a.png"]),
        ({"train": "images"}, ["more/b.png", "train/a.png"]),
        ({"train": "lists/train.txt"}, ["train/a.png", "more/b.png"]),
        ({"path": str(root)}, ["a.png"]),
        ({"path": "../yolo"}, ["a.png"]),
        ({"path": "yolo"}, ["a.png"]),  # relative to the current folder
        ({"train": "../images/train"}, ["a.png"]),  # one ../ too many
    ]
    for number, (content, expected) in enumerate(contents):
        yolo_folder.describe(**content)
        records = yolo_folder.load(name=str(number))
        assert [record["image_id"] for record in records] == expected
        assert all(len(boxes(record)) == 1 for record in records)


def test_data_outside_the_folder_of_the_yaml_file(yolo_folder, tmp_path):
    yolo_folder.image("a.png", ["0 .5 .5 .5 .5"])
    yolo_folder.describe(path="/somewhere/else").rename(tmp_path / "mine.yaml")
    keys = {"data": str(tmp_path / "mine.yaml"), "split": "train"}
    with pytest.raises(DataError, match="path is /somewhere/else, which is no folder in"):
        yolo_folder.load(**keys)
    (record,) = yolo_folder.load(name="root", root=str(yolo_folder.root), **keys)
    assert len(boxes(record)) == 1


@pytest.mark.parametrize("kind", ["yaml", "list", "label"])
def test_pipes_are_refused(yolo_folder, kind):
    yolo_folder.image("a.png", ["0 .5 .5 .5 .5"])
    yolo_folder.describe(train="list.txt" if kind == "list" else "images/train")
    path = yolo_folder.root / {"yaml": "data.yaml", "list": "list.txt", "label": "labels/train/a.txt"}[kind]
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(DataError, match=f"{path.name} is a pipe; expected a file"):
        yolo_folder.load()


def test_a_yaml_file_that_stands_for_more_than_fits(yolo_folder):
    """Ten lists of ten, eight times over: PyYAML makes them in no time, and their text has 10^8 words."""
    yolo_folder.image("a.png", ["0 .5 .5 .5 .5"])
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 8)]
    yolo_folder.describe().write_text("\n".join([*lines, "train: images/train", "names: *a7"]))
    with pytest.raises(DataError, match=r"file that is not YAML: .*stands for more than"):
        yolo_folder.load()


@pytest.mark.parametrize("labels", [None, "elsewhere"])
def test_folders_without_a_yaml_file(yolo_folder, labels):
    yolo_folder.image("a.png", ["1 .5 .5 .5 .5"])
    keys = {"images": str(yolo_folder.root / "images/train")}
    if labels:
        os.rename(yolo_folder.root / "labels/train", yolo_folder.root / labels)
        keys["labels"] = str(yolo_folder.root / labels)
    with pytest.raises(DataError, match=r"no classes: .* give the entry its classes"):
        yolo_folder.load(**keys)
    (record,) = yolo_folder.load(name="named", classes=["cat", "dog"], **keys)
    assert len(boxes(record)) == 1
    (yolo_folder.root / "classes.txt").write_text("cat\ndog\n")
    yolo_folder.load(name="listed", **keys)
    assert MetadataCatalog.get("listed").thing_classes == ["cat", "dog"]
    (yolo_folder.root / "classes.txt").write_text("cat\n\ndog\n")  # dog is 2, or the line is a slip: not guessed
    with pytest.raises(DataError, match=r"no classes: .*'cat', '', 'dog'"):
        yolo_folder.load(name="a line is empty", **keys)
    (yolo_folder.root / "classes.txt").write_text("cat \n dog\n\n \n")
    yolo_folder.load(name="the last lines are", **keys)
    assert MetadataCatalog.get("the last lines are").thing_classes == ["cat", "dog"]


def test_labels_beside_the_images(tmp_path, yolo_folder, save_image):
    save_image(tmp_path / "all" / "a.png", (60, 40))
    (tmp_path / "all" / "a.txt").write_text("0 .5 .5 .5 .5")
    (tmp_path / "all" / "classes.txt").write_text("cat")
    (record,) = yolo_folder.load(images=str(tmp_path / "all"))
    assert len(boxes(record)) == 1


def test_other_classes(yolo_folder):
    yolo_folder.image("a.png", ["1 .5 .5 .5 .5"])
    yolo_folder.describe()
    (record,) = yolo_folder.load(classes=["dog", "cat"])
    assert record["annotations"][0]["category_id"] == 0
    with pytest.raises(DataError, match=r"unknown class: .*'dog'; the classes are cat"):
        yolo_folder.load(name="other", classes=["cat"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"names": None}, "no classes: .*names None"),
        ({"names": []}, "no classes"),
        ({"names": [True, "a"]}, "no classes: .*quote yes and no"),
        ({"names": {"a": 0}}, "no classes"),
        ({"names": ["a", "a"]}, "category listed twice"),
        ({"train": None}, "no such split: .*train: None; its splits are: none"),
        ({"train": 5, "val": "x"}, "no such split: .*train: 5; its splits are: train, val"),
        ({"train": "nowhere"}, "missing file: .*train in .*data.yaml is .*nowhere, which does not exist"),
        ({"path": "nowhere"}, "path outside its folder: .*data.yaml: path is nowhere, which is no folder in"),
        ({"path": "/"}, "path outside its folder: .*path is /, which is no folder in .*give the entry a root"),
        ({"path": ".."}, "path outside its folder"),
        ({"train": "/"}, "path outside its folder: .*data.yaml has train: /, outside .*give the entry a root"),
        ({"train": "../../images/train"}, "path outside its folder"),
        ({"train": "hostile.txt"}, "path outside its folder: .*hostile.txt, line 2 names ../../a.png"),
        ({"path": 5}, "not YOLO's format: .*path is 5"),
        ({"kpt_shape": [17]}, r"not YOLO's format: .*kpt_shape is \[17\]"),
        ({"kpt_shape": "x"}, "not YOLO's format"),
    ],
)
def test_a_yaml_file_that_cannot_be_right(yolo_folder, content, says):
    yolo_folder.image("a.png", ["0 .5 .5 .5 .5"])
    yolo_folder.describe(**content)
    (yolo_folder.root / "hostile.txt").write_text("images/train/a.png\n../../a.png\n")
    with pytest.raises(DataError, match=says):
        yolo_folder.load()


@pytest.mark.parametrize("text", ["{", "- a", "", "\x00", "&a [*a]", "!!python/object:os.system {}", "a: \udcff"])
def test_a_yaml_file_of_any_content(yolo_folder, text):
    path = yolo_folder.describe()
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"file that is not YAML|no such split"):
        yolo_folder.load()


def test_two_images_with_the_same_labels(yolo_folder):
    yolo_folder.image("a.png", ["0 .5 .5 .5 .5"])
    yolo_folder.image("a.jpg")
    yolo_folder.describe()
    with pytest.raises(DataError, match=r"image listed twice: .*a\.png and .*a\.jpg have the same labels, .*a\.txt"):
        yolo_folder.load()
    assert len(yolo_folder.load(name="skips", on_error="skip")) == 1


def test_labels_of_no_image(yolo_folder):
    yolo_folder.image("a.png", ["0 .5 .5 .5 .5"])
    (yolo_folder.root / "labels/train/b.txt").write_text("0 .5 .5 .5 .5")
    yolo_folder.describe()
    with pytest.raises(DataError, match=r"labels of no image: .*b\.txt"):
        yolo_folder.load()
    assert len(yolo_folder.load(name="skips", on_error="skip")) == 1


def test_no_labels_at_all(yolo_folder):
    yolo_folder.image("a.png")
    yolo_folder.describe()
    with pytest.raises(DataError, match=r"no labels: .*none of 1 images has a label file; .*labels/train/a\.txt"):
        yolo_folder.load()


def test_broken_and_missing_images_and_labels(yolo_folder):
    yolo_folder.image("a.png", ["0 .5 .5 .5 .5"])
    yolo_folder.image("b.png", ["0 .5 .5 .5 .5"])
    yolo_folder.describe(train="train.txt")
    (yolo_folder.root / "train.txt").write_text("images/train/a.png\nimages/train/b.png\nimages/train/c.png\n")
    (yolo_folder.root / "labels/train/b.txt").write_bytes(b"\xff\xfe")
    records = yolo_folder.load(on_error="skip")
    assert [record["image_id"] for record in records] == ["a.png"]
    with pytest.raises(DataError, match=r"file that is not text: .*b\.txt"):
        yolo_folder.load(name="raises")
    (yolo_folder.root / "images/train/a.png").write_bytes(b"GIF?")
    with pytest.raises(DataError, match=r"image that does not open: .*a\.png"):
        yolo_folder.load(name="broken")


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    folder = YoloFolder(tmp_path_factory.mktemp("yolo"))
    folder.image("a.png", ["0 .5 .5 .5 .5"])
    return folder.root


words = st.sampled_from(["0", "1", "2", ".5", "1e999", "nan", "-1", "0x1", "1_0", "9" * 400, "\x00", "\xff", "\n"])


@given(st.lists(words, max_size=12).map(" ".join) | st.text(max_size=12), st.sampled_from(["raise", "skip"]))
@settings(max_examples=200)
def test_labels_of_any_content(fuzzed, text, on_error):
    (fuzzed / "labels/train/a.txt").write_text(text, encoding="utf-8", errors="replace")
    dataset = YoloSet("fuzz", images=str(fuzzed / "images"), classes=["cat", "dog"], on_error=on_error)
    try:
        records, _ = dataset.load(Checker("fuzz", on_error))
    except DataError as error:
        assert on_error == "raise" and str(error)
        return
    for record in records:
        for x0, y0, x1, y1 in boxes(record):
            assert 0 <= x0 < x1 <= 60 and 0 <= y0 < y1 <= 40
