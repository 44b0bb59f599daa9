"""Accepted suggestions, from a file as `focal analysis hardest` writes it to labels that are read back."""

import json
import shutil

import pytest

from focal_plugin.analysis.labels.page import to_coco
from focal_plugin.analysis.labels.suggestions import Suggestion
from focal_plugin.data import DataError
from focal_plugin.data.__main__ import main
from focal_plugin.data.corrections import correct, numbers
from tests.data.test_data_main import files, read

CAT, DOG = 0, 1
LABELS = {1: [("cat", (10, 10, 30, 30)), ("dog", (40, 20, 60, 50)), ("cat", (5, 40, 20.5, 60.25))], 2: []}


@pytest.fixture
def dataset(csv_file):
    """Two images, one of them without labels, and the file of four suggestions, one of each kind."""
    for image, labels in LABELS.items():
        for name, box in labels or [("", ("", "", "", ""))]:
            csv_file.row(f"{image}.png", *box, name, size=(90, 70))
    csv_file.write()
    folder = csv_file.path.parent
    records = {i: {"file_name": str(folder / f"{i}.png"), "width": 90, "height": 70} for i in LABELS}

    def suggestion(kind, image, label, box, predicted):
        old = LABELS[image][label] if label is not None else None
        return Suggestion(
            kind=kind,
            value=1.0,
            loss=1.0,
            label=label,
            label_class=old and ("cat", "dog").index(old[0]),
            label_box=old and old[1],
            predicted_class=predicted,
            predicted_box=box,
            score=0.5,
            iou=old and 0.5,
            record=records[image],
        )

    found = [
        suggestion("missing", 2, None, (1.0, 2.0, 30.0, 40.0), DOG),
        suggestion("class", 1, 0, (11.0, 11.0, 31.0, 31.0), DOG),
        suggestion("box", 1, 1, (42.0, 20.0, 66.0, 52.0), DOG),
        suggestion("extra", 1, 2, (5.0, 40.0, 20.0, 60.0), CAT),
    ]
    path = folder.parent / "hardest.json"
    path.write_text(to_coco(found, ["cat", "dog"]))
    return csv_file.path, path


def labels_of(records):
    names = ["cat", "dog"]
    return {
        int(r["file_name"].rpartition("/")[2][:-4]): [
            (names[a["category_id"]], tuple(round(x, 2) for x in a["bbox"])) for a in r["annotations"]
        ]
        for r in records
    }


CHANGES = {  # the labels after one suggestion alone
    1: {2: [("dog", (1, 2, 30, 40))]},
    2: {1: [("dog", (10, 10, 30, 30)), *LABELS[1][1:]]},
    3: {1: [LABELS[1][0], ("dog", (42, 20, 66, 52)), LABELS[1][2]]},
    4: {1: LABELS[1][:2]},
}


@pytest.mark.parametrize("number", CHANGES)
def test_one(dataset, tmp_path, capsys, number):
    before = files(dataset[0].parent)
    words = ["correct", str(dataset[0]), str(tmp_path / "out"), "--suggestions", str(dataset[1])]
    assert main([*words, "--accept", str(number)]) == 0
    output = capsys.readouterr().out
    assert f"Accepted for 3 labels: 1 {('missing', 'class', 'box', 'extra')[number - 1]}." in output
    (records,) = read(output).values()
    assert labels_of(records) == LABELS | CHANGES[number]
    assert files(dataset[0].parent) == before


@pytest.mark.parametrize("to", ["coco", "yolo", "voc", "csv"])
def test_all_in_each_format(dataset, tmp_path, capsys, to):
    words = ["correct", str(dataset[0]), str(tmp_path / "out"), "--suggestions", str(dataset[1]), "--to", to]
    assert main([*words, "--accept", "all"]) == 0
    output = capsys.readouterr().out
    assert "Accepted for 3 labels: 1 missing, 1 class, 1 box, 1 extra." in output
    (records,) = read(output).values()
    assert labels_of(records) == {2: CHANGES[1][2], 1: [CHANGES[2][1][0], CHANGES[3][1][1]]}


def test_what_was_deleted_from_the_file_is_rejected(dataset, tmp_path, capsys):
    content = json.loads(dataset[1].read_text())
    content["annotations"] = content["annotations"][3:]
    dataset[1].write_text(json.dumps(content))
    words = ["correct", str(dataset[0]), str(tmp_path / "out"), "--suggestions", str(dataset[1]), "--accept", "all"]
    assert main(words) == 0
    assert "Accepted for 3 labels: 1 extra." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["7"], {7}), (["1-3", "3", "9-9"], {1, 2, 3, 9}), (["10", "1-2"], {1, 2, 10}), (["all"], set(range(1, 11)))],
)
def test_numbers(words, expected):
    assert numbers(words, range(1, 11)) == expected


@pytest.mark.parametrize("word", ["", "-", "3-", "-3", "x", "3-1", "1.5", "1-2-3", "²", "ALL"])
def test_words_that_are_no_numbers(dataset, tmp_path, capsys, word):
    words = ["correct", str(dataset[0]), str(tmp_path / "out"), "--suggestions", str(dataset[1])]
    assert main([*words, f"--accept={word}"]) == 2
    assert f"--accept {word}: expected numbers of suggestions" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("words", "first"), [(["2-5"], 5), (["1", "0"], 0), ([f"3-{10**20}"], 5)])
def test_a_number_that_is_not_there(dataset, tmp_path, capsys, words, first):
    options = ["--suggestions", str(dataset[1]), "--accept", *words]
    assert main(["correct", str(dataset[0]), str(tmp_path / "out"), *options]) == 2
    assert f"--accept {first}: there is no such suggestion; they are 1 to 4." in capsys.readouterr().err


SUGGESTION = """{"info": {"images": ""}, "images": [{"id": 1}], "categories": [{"id": 1}], "annotations": [{"id": 1,
"suggestion": "missing", "replaces": null, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, SIDE]}]}"""


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (None, "file that does not open"),
        ("", "file that has no suggestions"),
        ("[1]", "file that has no suggestions"),
        ("[" * 100_000, "file that has no suggestions"),
        ('{"images": [], "categories": [], "annotations": []}', "file that has no suggestions"),
        (
            '{"info": {"images": ""}, "images": [{"id": 1}], "categories": [{"id": 1}],'
            ' "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}]}',
            "file that has no suggestions",
        ),
        *((SUGGESTION.replace("SIDE", side), "file that has no suggestions") for side in ('"4"', "NaN", f"{10**400}")),
    ],
    ids=["gone", "empty", "list", "deep", "no info", "plain COCO", "text in a box", "NaN in a box", "10^400 in a box"],
)
def test_files_that_are_something_else(dataset, tmp_path, capsys, content, kind):
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    words = ["correct", str(dataset[0]), str(tmp_path / "out"), "--suggestions", str(path), "--accept", "all"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert kind in error and "other.json" in error and len(error.splitlines()) == 1


def test_labels_that_have_changed_since(dataset, tmp_path, capsys):
    """The second time, the label is not as it was judged: nothing is guessed."""
    words = ["--suggestions", str(dataset[1]), "--accept", "2"]
    dataset[0].write_text(dataset[0].read_text().replace("10,10,30,30", "10,10,30,31"))
    assert main(["correct", str(dataset[0]), str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert "suggestion 2, " in error and "a label cat with the corners 10.0, 10.0, 30.0, 30.0" in error
    assert not (tmp_path / "out").exists()


def test_all_is_never_meant_by_silence(dataset, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["correct", str(dataset[0]), str(tmp_path / "out"), "--suggestions", str(dataset[1])])
    assert "--accept" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_copy_is_found_by_the_names_of_its_images(dataset, tmp_path, capsys):
    """Suggestions on what `focal data split` made correct the data set that it was made of, and a copy of it."""
    shutil.copytree(dataset[0].parent, tmp_path / "copy")
    words = ["correct", str(tmp_path / "copy/trees.csv"), str(tmp_path / "out"), "--suggestions", str(dataset[1])]
    assert main([*words, "--accept", "all"]) == 0
    (records,) = read(capsys.readouterr().out).values()
    assert labels_of(records) == {2: CHANGES[1][2], 1: [CHANGES[2][1][0], CHANGES[3][1][1]]}


@pytest.mark.parametrize("where", ["IN", "suggestions"])
def test_copies_whose_images_share_a_name_are_not_guessed(dataset, where):
    content = json.loads(dataset[1].read_text())
    names = ["a/2.png", "b/2.png"] if where == "IN" else ["a/2.png", "a/1.png"]
    if where == "suggestions":
        content["images"].append({"id": 9, "file_name": "elsewhere/1.png"})
    records = [{"file_name": name, "annotations": []} for name in names]
    with pytest.raises(DataError, match=r"image that is not there: IN has none of .*, and several are named [12]\.png"):
        correct(records, ["cat", "dog"], content, {1})
    assert not any(record["annotations"] for record in records)


@pytest.mark.parametrize(
    ("records", "classes", "kind"),
    [([], ["cat", "dog"], "image that is not there"), (None, ["cat"], "unknown class")],
    ids=["image", "class"],
)
def test_another_data_set(dataset, records, classes, kind):
    content = json.loads(dataset[1].read_text())
    if records is None:
        records = [{"file_name": str(dataset[0].parent / "2.png"), "annotations": []}]
    with pytest.raises(DataError, match=f"{kind}: suggestion 1, "):
        correct(records, classes, content, {1})


def test_an_image_in_two_splits_is_corrected_in_both(dataset):
    content = json.loads(dataset[1].read_text())
    records = [{"file_name": str(dataset[0].parent / "2.png"), "annotations": []} for _ in range(2)]
    assert correct(records, ["dog"], content, {1}) == {"missing": 1}
    assert [len(record["annotations"]) for record in records] == [1, 1]


def test_a_region_to_ignore_is_no_label(dataset):
    content = json.loads(dataset[1].read_text())
    label = {"bbox": [10, 10, 30, 30], "category_id": 0}
    records = [{"file_name": str(dataset[0].parent / "1.png"), "annotations": [{**label, "iscrowd": 1}, label]}]
    correct(records, ["cat", "dog"], content, {2})
    assert [(one["category_id"], one["iscrowd"]) for one in records[0]["annotations"]] == [(0, 1), (1, 0)]


def test_the_same_label_twice_is_changed_once(dataset):
    content = json.loads(dataset[1].read_text())
    label = {"bbox": [10, 10, 30, 30], "category_id": 0}
    records = [{"file_name": str(dataset[0].parent / "1.png"), "annotations": [dict(label), dict(label)]}]
    correct(records, ["cat", "dog"], content, {2})
    assert [one["category_id"] for one in records[0]["annotations"]] == [1, 0]
