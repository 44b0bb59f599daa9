import logging

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data.datasets.pascal_voc import load_voc_instances
from PIL import Image

from focal_plugin.data import DataError, register_local_dataset


def test_same_records_as_detectron2(voc_root):
    voc_root.image("b", [("dog", (1, 1, 60, 40)), ("cat", (11, 6, 30, 20))])
    voc_root.image("a", [("cat", (2.5, 3, 4, 40)), ("dog", (20, 5, 20, 9))], size=(61, 45))  # the latter 1 pixel wide
    voc_root.image("empty")
    voc_root.split("trainval", "b", "a", "empty")
    records = voc_root.load("trainval")
    expected = load_voc_instances(str(voc_root.root), "trainval", ["cat", "dog"])
    for record in records:
        assert {box.pop("iscrowd") for box in record["annotations"]} <= {0}
    assert records == expected
    assert MetadataCatalog.get("local").thing_classes == ["cat", "dog"]


def test_every_split_of_a_root_has_the_same_classes(voc_root):
    voc_root.image("a", [("zebra", (1, 1, 9, 9))])
    voc_root.image("b", [("ape", (1, 1, 9, 9)), ("mouse", (1, 1, 9, 9))])
    voc_root.split("train", "a")
    voc_root.split("test", "b")
    train, test = voc_root.load("train", "train"), voc_root.load("test", "test")
    for name in ("train", "test"):
        assert MetadataCatalog.get(name).thing_classes == ["ape", "mouse", "zebra"]
    assert [box["category_id"] for box in train[0]["annotations"]] == [2]
    assert [box["category_id"] for box in test[0]["annotations"]] == [0, 1]


def test_given_classes_set_the_order(voc_root):
    voc_root.image("a", [("ape", (1, 1, 9, 9)), ("zebra", (1, 1, 9, 9))])
    voc_root.split("train", "a")
    (record,) = voc_root.load(classes=["zebra", "ape"])
    assert [box["category_id"] for box in record["annotations"]] == [1, 0]


@pytest.mark.parametrize(("mode", "crowd"), [("keep", 0), ("ignore", 1)])
def test_difficult(voc_root, mode, crowd):
    voc_root.image("a", [voc_root.object("cat", (1, 1, 9, 9), difficult=1), ("cat", (1, 1, 9, 9))])
    voc_root.split("train", "a")
    (record,) = voc_root.load(difficult=mode)
    assert [box["iscrowd"] for box in record["annotations"]] == [crowd, 0]


@pytest.mark.parametrize("text", ["yes", "true", "2", "", "-1"])
def test_difficult_that_is_no_flag(voc_root, text):
    voc_root.image("a", [voc_root.object("cat", (1, 1, 9, 9), difficult=text), ("cat", (1, 1, 9, 9))])
    voc_root.split("train", "a")
    with pytest.raises(DataError, match=rf"a\.xml, object 1: <difficult> is '{text}'"):
        voc_root.load(name="strict", difficult="ignore")
    assert len(voc_root.load(name="lenient", difficult="ignore", on_error="skip")[0]["annotations"]) == 1
    assert len(voc_root.load(name="unread")[0]["annotations"]) == 2  # "keep" does not read it


@pytest.mark.parametrize(
    ("bad", "kind", "says"),
    [
        (("cat", (20, 5, 19, 9)), "box of no size", "(20, 5)"),
        (("cat", (20, 9, 30, 5)), "box of no size", "(20, 9)"),
        (("cat", (20, 5, 62, 9)), "box outside its image", "60×40"),
        (("cat", (-1, 5, 20, 9)), "box outside its image", "60×40"),
        (("cat", (100, 100, 120, 120)), "box outside its image", "60×40"),
        (("cat", ("nan", 5, 20, 9)), "box that is not four numbers", "nan"),
        (("cat", (1, 5, "inf", 9)), "box that is not four numbers", "inf"),
        (("cat", (1, 5, "", 9)), "box that is not four numbers", "''"),
        ("<object><name>cat</name></object>", "box that is not four numbers", "''"),
        (("bird", (1, 5, 20, 9)), "unknown class", "'bird'; the classes are cat, dog"),
        (("", (1, 5, 20, 9)), "unknown class", "''"),
    ],
)
def test_bad_box(voc_root, caplog, bad, kind, says):
    voc_root.image("good", [("cat", (1, 1, 9, 9))])
    voc_root.image("bad", [("cat", (1, 1, 9, 9)), bad, ("dog", (2, 2, 8, 8))])
    voc_root.split("train", "good", "bad")
    with pytest.raises(DataError) as error:
        voc_root.load(name="strict", classes=["cat", "dog"])
    for part in (kind, "'strict'", "bad.xml, object 2", says, "on_error: skip"):
        assert part in str(error.value)

    caplog.set_level(logging.WARNING, logger="focal_plugin")
    good, rest = voc_root.load(name="lenient", classes=["cat", "dog"], on_error="skip")
    assert len(good["annotations"]) == 1
    assert [box["category_id"] for box in rest["annotations"]] == [0, 1]
    assert caplog.messages == [f"Data set 'lenient': 2 images, 3 boxes; boxes left out: 1 ({kind}: 1)"]


def _no_xml(voc):
    (voc.root / "Annotations" / "bad.xml").unlink()


def _broken_xml(voc):
    (voc.root / "Annotations" / "bad.xml").write_text("<annotation>")


def _entities(voc):
    text = '<!DOCTYPE a [<!ENTITY e "cat">]><annotation><object><name>&e;</name></object></annotation>'
    (voc.root / "Annotations" / "bad.xml").write_text(text)


def _external_entity(voc):
    text = f'<!DOCTYPE a [<!ENTITY e SYSTEM "file://{voc.root}/x">]><annotation><filename>&e;</filename></annotation>'
    (voc.root / "Annotations" / "bad.xml").write_text(text)


def _laughs(voc):
    entities = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10 if i else "ha"}">' for i in range(12))
    text = f"<!DOCTYPE a [{entities}]><annotation><filename>&a11;</filename></annotation>"  # 2 TB, written out
    (voc.root / "Annotations" / "bad.xml").write_text(text)


def _folder_for_xml(voc):
    _no_xml(voc)
    (voc.root / "Annotations" / "bad.xml").mkdir()


def _no_image(voc):
    (voc.root / "JPEGImages" / "bad.jpg").unlink()


def _empty_image(voc):
    (voc.root / "JPEGImages" / "bad.jpg").write_bytes(b"")


def _text_image(voc):
    (voc.root / "JPEGImages" / "bad.jpg").write_text("not an image")


def _two_images(voc):
    (voc.root / "JPEGImages" / "bad.jpg").rename(voc.root / "JPEGImages" / "bad.png")
    (voc.root / "JPEGImages" / "bad.JPEG").write_bytes(b"")


def _other_size(voc):
    voc.image("bad", size=(60, 40), declared=(40, 60))


def _no_number(voc):
    voc.image("bad", size=(60, 40), declared=("wide", 60))


def _escapes(voc):
    _no_image(voc)
    voc.xml("bad", "<filename>../../secret.jpg</filename>")


def _absolute(voc):
    _no_image(voc)
    voc.xml("bad", "<filename>/etc/passwd</filename>")


def _listed_twice(voc):
    voc.split("train", "good", "bad", "good")


def _split_escapes(voc):
    voc.split("train", "good", "bad", "../../x")


@pytest.mark.parametrize(
    ("spoil", "kind", "says"),
    [
        (_no_xml, "missing annotation", "bad.xml"),
        (_broken_xml, "annotation that is not XML", "bad.xml"),
        (_entities, "annotation that is not XML", "bad.xml"),
        (_external_entity, "annotation that is not XML", "bad.xml"),
        (_laughs, "annotation that is not XML", "bad.xml"),
        (_folder_for_xml, "annotation that is not XML", "bad.xml"),
        (_no_image, "missing image", "bad.jpg"),
        (_empty_image, "image that does not open", "bad.jpg"),
        (_text_image, "image that does not open", "bad.jpg"),
        (_two_images, "several images", "bad.JPEG, bad.png"),
        (_other_size, "size that disagrees", "says 40×60"),
        (_no_number, "size that is not two numbers", "'wide'"),
        (_escapes, "path outside its folder", "../../secret.jpg"),
        (_absolute, "path outside its folder", "/etc/passwd"),
        (_listed_twice, "image listed twice", "good"),
        (_split_escapes, "path outside its folder", "../../x"),
    ],
)
def test_bad_image(voc_root, caplog, spoil, kind, says):
    for image_id in ("good", "bad"):
        voc_root.image(image_id, [("cat", (1, 1, 9, 9))])
    voc_root.split("train", "good", "bad")
    spoil(voc_root)
    with pytest.raises(DataError) as error:
        voc_root.load(name="strict", classes=["cat"])
    for part in (kind, "'strict'", says, "on_error: skip"):
        assert part in str(error.value)

    caplog.set_level(logging.WARNING, logger="focal_plugin")
    records = voc_root.load(name="lenient", classes=["cat"], on_error="skip")
    assert "good" in [record["image_id"] for record in records]
    assert f"images left out: 1 ({kind}: 1)" in caplog.messages[-1]


def test_a_list_of_images_as_notepad_writes_it(voc_root):
    voc_root.image("ä", [("cat", (1, 1, 9, 9))])
    (voc_root.root / "ImageSets/Main/train.txt").write_text("ä\n", encoding="utf-8-sig")
    assert [record["image_id"] for record in voc_root.load()] == ["ä"]


@pytest.mark.parametrize("missing", ["root", "split", "JPEGImages", "Annotations"])
def test_what_the_set_needs_is_not_skipped(voc_root, missing):
    voc_root.image("a", [("cat", (1, 1, 9, 9))])
    voc_root.split("train", "a")
    keys = {"name": "x", "format": "voc", "root": str(voc_root.root), "split": "train", "on_error": "skip"}
    if missing in keys:
        keys[missing] += "_not_there"
    else:
        (voc_root.root / missing).rename(voc_root.root / "moved")
    register_local_dataset(keys)
    with pytest.raises(DataError, match=f"missing file: in data set 'x'.*{missing}") as error:
        DatasetCatalog.get("x")
    assert "skip" not in str(error.value)


@pytest.mark.parametrize("split", [[], ["bad"]])
def test_nothing_left_is_an_error(voc_root, split):
    voc_root.image("bad", [("cat", (1, 1, 9, 9))], declared=(1, 1))
    voc_root.split("train", *split)
    with pytest.raises(DataError, match="no image: in data set 'local'"):
        voc_root.load(on_error="skip")


def test_no_class_found(voc_root):
    voc_root.image("a")
    voc_root.split("train", "a")
    with pytest.raises(DataError, match=r"no classes.*classes: \["):
        voc_root.load()


def test_a_file_without_size_takes_the_images(voc_root):
    voc_root.image("a", size=(31, 17))
    voc_root.xml("a", voc_root.object("cat", (1, 1, 31, 17)))
    voc_root.split("train", "a")
    (record,) = voc_root.load()
    assert (record["width"], record["height"]) == (31, 17)
    assert record["annotations"][0]["bbox"] == [0, 0, 31, 17]


def test_counting_from_zero_costs_a_pixel_at_most(voc_root):
    voc_root.image("a", [("cat", (0, 0, 60, 40))])
    voc_root.split("train", "a")
    assert voc_root.load()[0]["annotations"][0]["bbox"] == [0, 0, 60, 40]


@pytest.mark.parametrize("extension", [".jpg", ".JPG", ".png", ".bmp", ".tif"])
def test_image_of_any_extension(voc_root, extension):
    voc_root.image("with.dot and space", [("cat", (1, 1, 9, 9))], extension=extension, filename="misleading.jpg")
    voc_root.split("train", "with.dot and space")
    (record,) = voc_root.load()
    assert record["file_name"].endswith(f"with.dot and space{extension}")


def test_image_by_the_name_in_the_file(voc_root, save_image):
    voc_root.image("a", [("cat", (1, 1, 9, 9))], filename="other.jpg")
    (voc_root.root / "JPEGImages" / "a.jpg").rename(voc_root.root / "JPEGImages" / "other.jpg")
    voc_root.split("train", "a")
    assert voc_root.load()[0]["file_name"].endswith("other.jpg")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_that_of_the_image_as_detectron2_turns_it(voc_root, save_image, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    voc_root.image("a", [("cat", (1, 1, 9, 9))], size=(60, 40))
    path = voc_root.root / "JPEGImages" / "a.jpg"
    save_image(path, (60, 40), exif=exif)
    height, width = utils.read_image(str(path), "BGR").shape[:2]  # what Detectron2 makes of it
    voc_root.split("train", "a")
    if (width, height) == (60, 40):
        assert voc_root.load()[0]["width"] == 60
        return
    with pytest.raises(DataError, match=f"size that disagrees.*EXIF orientation {orientation}"):
        voc_root.load()
    voc_root.xml("a", "<size><width>40</width><height>60</height></size>")
    record = voc_root.load(name="turned", classes=["cat"])[0]
    utils.check_image_size(record, utils.read_image(record["file_name"], "BGR"))
