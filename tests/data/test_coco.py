import json
import logging

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances

from focal_plugin.data import DataError, leave_out_broken_images, register_local_dataset


def test_same_records_as_detectron2(coco_file):
    coco_file.content["categories"] = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
    coco_file.image(20)
    coco_file.image(3, size=(50, 30))
    coco_file.image(100)
    coco_file.box(20, (1.5, 2, 10, 20.25), category_id=7)
    coco_file.box(20, (0, 0, 60, 40), category_id=3, iscrowd=1)
    coco_file.box(3, (40, 20, 10, 10), category_id=3)
    records = coco_file.load()
    folder = coco_file.folder
    expected = load_coco_json(str(folder / "annotations.json"), str(folder / "images"), "by_detectron2")
    for record in expected:
        for box in record["annotations"]:
            box["bbox"] = BoxMode.convert(box["bbox"], box.pop("bbox_mode"), BoxMode.XYXY_ABS)
    for record in records:
        for box in record["annotations"]:
            assert box.pop("bbox_mode") == BoxMode.XYXY_ABS
    assert records == expected
    ours, theirs = MetadataCatalog.get("local"), MetadataCatalog.get("by_detectron2")
    assert ours.thing_classes == theirs.thing_classes == ["cat", "dog"]
    assert ours.thing_dataset_id_to_contiguous_id == theirs.thing_dataset_id_to_contiguous_id
    assert ours.json_file == str(folder / "annotations.json")
    assert ours.image_root == str(folder / "images")


@pytest.mark.parametrize(
    ("bbox", "keys", "kind", "says"),
    [
        ((5, 5, 0, 10), {}, "box of no size", "(5, 5)"),
        ((5, 5, -2, 10), {}, "box of no size", "(5, 5)"),
        ((55, 5, 10, 10), {}, "box outside its image", "60×40"),
        ((60, 5, 0.5, 10), {}, "box outside its image", "60×40"),
        ((float("nan"), 5, 10, 10), {}, "box that is not four numbers", "nan"),
        ((5, 5, 10), {}, "box that is not four numbers", "[5, 5, 10]"),
        ((5, 5, 10, "x"), {}, "box that is not four numbers", "'x'"),
        ((), {}, "box that is not four numbers", "[]"),
        ((5, 5, 10, 10**400), {}, "box that is not four numbers", "0000"),
        ((5, 1e300, 10, 1e308), {}, "box that is not four numbers", "1e+300"),
        (None, {}, "not COCO's format", "'bbox' is None"),
        ((5, 5, 9, 9), {"category_id": 9}, "unknown class", "category_id 9; the categories' ids are 1"),
        ((5, 5, 9, 9), {"category_id": [1]}, "not COCO's format", "'category_id'"),
        ((5, 5, 9, 9), {"image_id": 77}, "box of no image", "77"),
        ((5, 5, 9, 9), {"image_id": "1"}, "box of no image", "'1'"),
        ((5, 5, True, 9), {}, "box that is not four numbers", "True"),
        ((5, 5, "9", "9"), {}, "box that is not four numbers", "'9'"),
        ((5, 5, 9, 9), {"area": None}, "not COCO's format", "'area' is None, expected a number ≥ 0"),
        ((5, 5, 9, 9), {"area": "81"}, "not COCO's format", "'area' is '81'"),
        ((5, 5, 9, 9), {"area": float("nan")}, "not COCO's format", "'area' is nan"),
        ((5, 5, 9, 9), {"area": float("inf")}, "not COCO's format", "'area' is inf"),
        ((5, 5, 9, 9), {"area": 10**400}, "not COCO's format", "0000"),
        ((5, 5, 9, 9), {"area": -81}, "not COCO's format", "'area' is -81"),
        ((5, 5, 9, 9), {"area": True}, "not COCO's format", "'area' is True"),
        ((5, 5, 9, 9), {"iscrowd": None}, "not COCO's format", "'iscrowd' is None, expected 0 or 1"),
        ((5, 5, 9, 9), {"iscrowd": "0"}, "not COCO's format", "'iscrowd' is '0'"),
        ((5, 5, 9, 9), {"iscrowd": 2}, "not COCO's format", "'iscrowd' is 2"),
        ((5, 5, 9, 9), {"iscrowd": [0]}, "not COCO's format", "'iscrowd' is [0]"),
        ((5, 5, 9, 9), {"ignore": "0"}, "not COCO's format", "'ignore' is '0'"),
        ((5, 5, 9, 9), {"ignore": float("nan")}, "not COCO's format", "'ignore' is nan"),
    ],
)
def test_bad_box(coco_file, caplog, bbox, keys, kind, says):
    coco_file.image(1)
    coco_file.box(1)
    coco_file.box(1)
    coco_file.content["annotations"][-1] |= {"bbox": bbox, **keys}
    coco_file.box(1)
    with pytest.raises(DataError) as error:
        coco_file.load("strict")
    for part in (kind, "'strict'", "annotations.json, annotations[1]", says, "on_error: skip"):
        assert part in str(error.value)

    caplog.set_level(logging.WARNING, logger="focal_plugin")
    (record,) = coco_file.load("lenient", on_error="skip")
    assert len(record["annotations"]) == 2
    assert caplog.messages == [f"Data set 'lenient': 1 images, 2 boxes; boxes left out: 1 ({kind}: 1)"]
    assert MetadataCatalog.get("lenient").get("json_file") is None


@pytest.mark.parametrize(
    ("keys", "kind", "says"),
    [
        ({"file_name": "gone.png"}, "missing image", "gone.png"),
        ({"file_name": "../1.png"}, "path outside its folder", "../1.png"),
        ({"file_name": "a/../../1.png"}, "path outside its folder", "a/../../1.png"),
        ({"file_name": "..\\1.png"}, "path outside its folder", "1.png"),
        ({"file_name": "1.png\0"}, "image that does not open", "null"),
        ({"file_name": ""}, "image that does not open", "images"),
        ({"file_name": "/etc/passwd"}, "path outside its folder", "/etc/passwd"),
        ({"file_name": 5}, "not COCO's format", "'file_name' is 5"),
        ({"width": 40, "height": 60}, "size that disagrees", "says 40×60"),
        ({"width": None}, "not COCO's format", "'width' is None"),
        ({"width": "60"}, "not COCO's format", "'width' is '60'"),
        ({"height": 40.5}, "size that disagrees", "says 60×40.5"),
        ({"height": [40]}, "not COCO's format", "'height' is [40]"),
        ({"height": True}, "not COCO's format", "'height' is True"),
        ({"id": 1, "file_name": "1.png"}, "image listed twice", "id 1"),
        ({"id": None}, "not COCO's format", "'id' is None"),
    ],
)
def test_bad_image(coco_file, caplog, keys, kind, says):
    coco_file.image(1)
    coco_file.image(2, **keys)
    coco_file.box(1)
    with pytest.raises(DataError) as error:
        coco_file.load("strict")
    for part in (kind, "'strict'", "annotations.json, images[1]", says, "on_error: skip"):
        assert part in str(error.value)
    caplog.set_level(logging.WARNING, logger="focal_plugin")
    assert [record["image_id"] for record in coco_file.load("lenient", on_error="skip")] == [1]
    assert caplog.messages == [f"Data set 'lenient': 1 images, 1 boxes; images left out: 1 ({kind}: 1)"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "file that is not JSON"),
        ("[" * 100_000, "file that is not JSON"),
        ("[]", "'images' is None, expected list"),
        ('{"images": {}}', "'images' is {}, expected list"),
        ('{"images": [], "categories": []}', "no classes"),
        ('{"images": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "category listed twice"),
        ('{"images": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}', "category listed twice"),
        ('{"images": [], "categories": [{"id": 1, "name": "a"}, {"id": "2", "name": "b"}]}', "ids of two kinds"),
        ('{"images": [{"id": 1}, {"id": "2"}], "categories": [{"id": 1, "name": "a"}]}', "ids of two kinds"),
        ('{"images": [], "categories": [{"id": 1, "name": "a"}]}', "no image"),
    ],
)
def test_bad_file_is_not_skipped(tmp_path, content, says):
    (tmp_path / "a.json").write_text(content)
    paths = {"json": str(tmp_path / "a.json"), "images": str(tmp_path)}
    register_local_dataset({"name": "x", "format": "coco", "on_error": "skip", **paths})
    with pytest.raises(DataError, match="in data set 'x'") as error:
        DatasetCatalog.get("x")
    assert says in str(error.value)


def test_rounding_is_clipped(coco_file):
    coco_file.image(1)
    coco_file.box(1, (-0.4, 10, 60.9, 30.2))
    np.testing.assert_allclose(coco_file.load()[0]["annotations"][0]["bbox"], [0, 10, 60, 40])


def test_given_classes(coco_file):
    coco_file.content["categories"] = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    coco_file.image(1)
    coco_file.box(1, category_id=1)
    coco_file.box(1, category_id=2)
    (record,) = coco_file.load("more", classes=["ape", "dog", "cat"])
    assert [box["category_id"] for box in record["annotations"]] == [2, 1]
    (record,) = coco_file.load("fewer", classes=["dog"], on_error="skip")
    assert [box["category_id"] for box in record["annotations"]] == [0]
    for name in ("more", "fewer"):  # the file's own ids would not fit
        assert MetadataCatalog.get(name).get("json_file") is None


def test_ignored_boxes_are_crowds(coco_file):
    coco_file.image(1)
    coco_file.box(1, ignore=1)
    assert coco_file.load()[0]["annotations"][0]["iscrowd"] == 1


def test_without_annotations(coco_file):
    coco_file.image(1)
    del coco_file.content["annotations"]
    assert coco_file.load()[0]["annotations"] == []


def evaluate(name, output_dir, found=None):
    """AP of a detector that finds every box of the records ``found`` (by default all that are no crowds)."""
    evaluator = COCOEvaluator(name, output_dir=str(output_dir), allow_cached_coco=False, distributed=False)
    evaluator.reset()
    for record in DatasetCatalog.get(name) if found is None else found:
        boxes = [box for box in record["annotations"] if not box["iscrowd"]]
        instances = Instances((record["height"], record["width"]))
        instances.pred_boxes = Boxes(torch.tensor([box["bbox"] for box in boxes]).reshape(-1, 4).float())
        instances.pred_classes = torch.tensor([box["category_id"] for box in boxes], dtype=torch.long)
        instances.scores = torch.full((len(boxes),), 0.9)
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]["AP"]


def _spoil_nothing(coco):
    pass


def _bad_box(coco):
    coco.box(1, (0, 0, 0, 0), area=0)


def _bad_image(coco):
    coco.image(3, file_name="gone.png")
    coco.box(3)


def _no_area(coco):
    del coco.content["annotations"][0]["area"]


def _no_iscrowd(coco):
    del coco.content["annotations"][0]["iscrowd"]


def _id_zero(coco):
    coco.content["annotations"][0]["id"] = 0


def _id_twice(coco):
    coco.content["annotations"][0]["id"] = 2


def _id_of_text(coco):
    coco.content["annotations"][0]["id"] = "one"


def _huge_id(coco):
    coco.content["annotations"][0]["id"] = 2**70


def _null_id(coco):
    coco.content["annotations"][0]["id"] = None


def _nan_area(coco):
    coco.content["annotations"].insert(0, coco.content["annotations"][0] | {"id": 99, "area": float("nan")})


def _unread_fields(coco):
    """What neither training nor the metric of boxes reads may hold anything."""
    unread = {"segmentation": None, "keypoints": "none", "num_keypoints": None, "score": None, "attributes": 1}
    coco.content["annotations"][0] |= unread
    coco.content["images"][0] |= {"license": None, "date_captured": 5, "flickr_url": []}
    coco.content |= {"info": None, "licenses": None}


def _ids_of_text(coco):
    for image in coco.content["images"]:
        image["id"] = f"image {image['id']}"
    for annotation in coco.content["annotations"]:
        annotation["image_id"] = f"image {annotation['image_id']}"


def _huge_image_ids(coco):
    for image in coco.content["images"]:
        image["id"] += 2**60
    for annotation in coco.content["annotations"]:
        annotation["image_id"] += 2**60


def _true_for_crowd(coco):
    coco.box(1, (30, 30, 10, 10), iscrowd=True)


def _crowd(coco):
    coco.box(1, (30, 30, 10, 10), iscrowd=1)


def _ignored(coco):
    coco.box(1, (30, 30, 10, 10), ignore=1)


@pytest.mark.parametrize(
    "spoil",
    [_spoil_nothing, _bad_box, _bad_image, _no_area, _no_iscrowd, _id_zero, _id_twice, _crowd, _ignored]
    + [_id_of_text, _huge_id, _null_id, _nan_area, _unread_fields, _ids_of_text, _huge_image_ids, _true_for_crowd],
)
def test_evaluation_is_of_what_was_kept(coco_file, tmp_path, spoil):
    coco_file.content["categories"] = [{"id": 5, "name": "dog"}, {"id": 2, "name": "cat"}]
    for image_id in (1, 2):
        coco_file.image(image_id)
        coco_file.box(image_id, (5, 5, 12, 10), category_id=5)
        coco_file.box(image_id, (30, 8, 12, 20), category_id=2)
    spoil(coco_file)
    for annotation in coco_file.content["annotations"]:
        if annotation["category_id"] == 1:
            annotation["category_id"] = 2
    records = coco_file.load(on_error="skip")
    assert evaluate("local", tmp_path / "out") == pytest.approx(100)
    half = [dict(record, annotations=record["annotations"][:1]) for record in records]
    assert evaluate("local", tmp_path / "out", half) == pytest.approx(50)  # one class of two


@pytest.mark.parametrize("categories", [[(1, "cat"), (2, "dog")], [(9, "cat"), (4, "dog")]])
def test_evaluator_built_before_the_records_are_read(coco_file, tmp_path, categories):
    coco_file.content["categories"] = [{"id": number, "name": name} for number, name in categories]
    coco_file.image(1)
    coco_file.box(1, category_id=categories[0][0])
    coco_file.box(1, (30, 8, 12, 20), category_id=categories[1][0])
    paths = {"json": str(coco_file.write()), "images": str(coco_file.folder / "images")}
    register_local_dataset({"name": "local", "format": "coco", **paths})
    assert evaluate("local", tmp_path / "out") == pytest.approx(100)
    assert evaluate("local", tmp_path / "out") == pytest.approx(100)


def test_evaluation_of_a_voc_set(voc_root, tmp_path):
    voc_root.image("a", [("cat", (1, 1, 20, 20)), ("dog", (5, 5, 5, 9)), ("dog", (9, 9, 30, 40))])
    voc_root.image("b", [("cat", (3, 3, 20, 20))])
    voc_root.split("train", "a", "b")
    voc_root.load(on_error="skip")
    assert evaluate("local", tmp_path) == pytest.approx(100)


def test_evaluation_in_an_output_folder_of_other_data(voc_root, tmp_path):
    """A JSON file of an earlier run must not be taken for this one's truth."""
    voc_root.image("a", [("cat", (1, 1, 20, 20)), ("cat", (9, 9, 30, 40))])
    voc_root.split("train", "a")
    voc_root.load()
    stale = tmp_path / "out" / "local_coco_format.json"
    stale.parent.mkdir()
    stale.write_text(json.dumps({"images": [], "annotations": [], "categories": [{"id": 0, "name": "cat"}]}))
    assert evaluate("local", tmp_path / "out") == pytest.approx(100)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:60])


def test_broken_images_are_left_out_of_evaluation(coco_file, tmp_path, caplog):
    """They open, and are read with their boxes; neither loader nor metric may meet them."""
    for image_id in (1, 2, 3):
        coco_file.image(image_id)
        coco_file.box(image_id)
    _truncate(coco_file.folder / "images" / "2.png")
    assert len(coco_file.load(on_error="skip")) == 3
    assert MetadataCatalog.get("local").json_file
    caplog.set_level(logging.WARNING, logger="focal_plugin")
    caplog.clear()
    for _ in range(2):
        leave_out_broken_images("local")
    assert caplog.messages == ["Data set 'local': 2 images, 2 boxes; images left out: 1 (image that does not open: 1)"]
    assert [record["image_id"] for record in DatasetCatalog.get("local")] == [1, 3]
    assert evaluate("local", tmp_path / "out") == pytest.approx(100)
    assert DatasetCatalog["local"].left_out == {("image", "image that does not open"): 1}


def test_a_set_without_broken_images_is_evaluated_by_its_file(coco_file):
    coco_file.image(1)
    coco_file.box(1)
    coco_file.load(on_error="skip")
    leave_out_broken_images("local")
    assert MetadataCatalog.get("local").json_file == str(coco_file.folder / "annotations.json")


def test_raise_leaves_no_image_out(coco_file):
    coco_file.image(1)
    _truncate(coco_file.folder / "images" / "1.png")
    coco_file.load()
    leave_out_broken_images("local")
    assert len(DatasetCatalog.get("local")) == 1


def test_all_images_are_broken(coco_file):
    coco_file.image(1)
    _truncate(coco_file.folder / "images" / "1.png")
    coco_file.load(on_error="skip")
    with pytest.raises(DataError, match="no image: in data set 'local'"):
        leave_out_broken_images("local")


def test_whole_numbers_become_floats(coco_file):
    """What transforms a box computes in its type: whole numbers would be cut off."""
    coco_file.image(1)
    coco_file.box(1, (5, 5, 10, 10))
    assert {type(value) for value in coco_file.load()[0]["annotations"][0]["bbox"]} == {float}
