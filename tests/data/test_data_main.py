"""The commands on data, from the command line to data sets that are read back."""

import json
import os

import numpy as np
import pytest
import yaml
from detectron2.data import DatasetCatalog
from PIL import Image

from focal_plugin.__main__ import main as focal
from focal_plugin.data import register_local_dataset
from focal_plugin.data.__main__ import main
from focal_plugin.data.formats import find_sets


@pytest.fixture
def coco(coco_file):
    """Images of noise, 90×70: the first with a box in its middle, every third one without any."""
    rng = np.random.default_rng(0)
    coco_file.content["categories"].append({"id": 2, "name": "dog"})
    for number in range(1, 11):
        coco_file.image(number, (90, 70))
        pixels = rng.integers(0, 255, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(coco_file.folder / "images" / f"{number}.png")
        if number % 3:
            coco_file.box(number, (35, 25, 20, 20), category_id=1 + number % 2)
    coco_file.write()
    return coco_file


def read(text):
    """The data sets of the config that a command prints."""
    entries = yaml.safe_load(text[text.index("DATASETS:") :])["DATASETS"]["LOCAL"]
    sets = {}
    for number, entry in enumerate(entries):
        register_local_dataset({**entry, "name": f"{len(DatasetCatalog)}_{number}"})
        sets[entry["split"]] = DatasetCatalog.get(f"{len(DatasetCatalog) - 1}_{number}")
    return sets


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("to", ["coco", "yolo", "voc", "csv"])
def test_convert(coco, tmp_path, capsys, to):
    before = files(coco.folder)
    assert main(["convert", str(coco.folder), str(tmp_path / "out"), "--to", to]) == 0
    output = capsys.readouterr().out
    assert "10 images, 7 boxes; format coco" in output and "Written: " in output
    (records,) = read(output).values()
    records.sort(key=lambda record: int(os.path.basename(record["file_name"])[:-4]))
    assert [len(record["annotations"]) for record in records] == [int(n % 3 > 0) for n in range(1, 11)]
    assert [b["category_id"] for r in records for b in r["annotations"]] == [n % 2 for n in range(1, 11) if n % 3]
    assert files(coco.folder) == before
    assert json.loads((tmp_path / "out/made_by.json").read_text())["what"] == "convert"


def test_all_splits_are_converted_and_agree_on_the_classes(csv_file, tmp_path, capsys):
    csv_file.row("a.png", 1, 1, 9, 9, "dog")
    csv_file.write()
    csv_file.path.rename(csv_file.path.parent / "train.csv")
    csv_file.rows.clear()
    csv_file.row("b.png", 1, 1, 9, 9, "cat")
    csv_file.row("b.png", 2, 2, 9, 9, "dog")
    csv_file.write()
    csv_file.path.rename(csv_file.path.parent / "val.csv")
    assert main(["convert", str(csv_file.path.parent), str(tmp_path / "out"), "--to", "yolo"]) == 0
    sets = read(capsys.readouterr().out)
    names = yaml.safe_load((tmp_path / "out/data.yaml").read_text())["names"]
    assert {s: [names[b["category_id"]] for r in found for b in r["annotations"]] for s, found in sets.items()} == {
        "train": ["dog"],
        "val": ["cat", "dog"],
    }


def test_crowds_that_are_lost_are_said(coco, tmp_path, capsys):
    coco.box(1, iscrowd=1)
    coco.write()
    assert main(["convert", str(coco.folder), str(tmp_path / "out"), "--to", "csv"]) == 0
    assert capsys.readouterr().err == "warning: 1 crowds left out, for which format csv has no mark.\n"


@pytest.mark.parametrize("to", ["coco", "voc"])
def test_regions_to_ignore_are_that_in_the_config_that_is_printed(coco, tmp_path, capsys, to):
    coco.box(1, iscrowd=1)
    coco.write()
    assert main(["convert", str(coco.folder), str(tmp_path / "out"), "--to", to]) == 0
    (records,) = read(capsys.readouterr().out).values()
    (record,) = [record for record in records if record["file_name"].endswith("/1.png")]
    assert [box["iscrowd"] for box in record["annotations"]] == [0, 1]


def test_vocs_difficult_objects(voc_root, tmp_path, capsys):
    voc_root.image("a", [voc_root.object("cat", (1, 1, 9, 9), difficult=1)])
    voc_root.split("train", "a")
    for keep in ("keep", "ignore"):
        assert main(["convert", str(voc_root.root), str(tmp_path / keep), "--to", "coco", "--difficult", keep]) == 0
        (record,) = read(capsys.readouterr().out)["train"]
        assert record["annotations"][0]["iscrowd"] == int(keep == "ignore")


@pytest.mark.parametrize("words", [["split", "--val", "0.5"], ["convert", "--to", "voc"]])
def test_vocs_difficult_objects_stay_so(voc_root, tmp_path, capsys, words):
    """Those that are kept as objects have their mark in VOC's files still, for those who ignore them."""
    for name in "ab":
        voc_root.image(name, [voc_root.object("cat", (1, 1, 9, 9), difficult=1), ("cat", (2, 2, 9, 9))])
    voc_root.split("train", "a", "b")
    assert main([words[0], str(voc_root.root), str(tmp_path / "out"), *words[1:]]) == 0
    capsys.readouterr()
    for difficult, expected in (("keep", [0, 0]), ("ignore", [1, 0])):
        for split in find_sets(str(tmp_path / "out")):
            name = f"{difficult} {split.split}"
            register_local_dataset({"name": name, "format": "voc", **split.keys, "difficult": difficult})
            found = [[box["iscrowd"] for box in record["annotations"]] for record in DatasetCatalog.get(name)]
            assert found == [expected] * len(found)


@pytest.mark.parametrize("source", ["coco", "voc", "yolo", "csv"])
def test_tile(coco, tmp_path, capsys, source):
    folder = coco.folder
    if source != "coco":
        folder = tmp_path / "in"
        assert main(["convert", str(coco.folder), str(folder), "--to", source]) == 0
    words = ["--size", "40", "--overlap", "10", "--min-visible", "0.6"]
    assert main(["tile", str(folder), str(tmp_path / "out"), *words]) == 0
    (records,) = read(capsys.readouterr().out[-400:]).values()
    assert len(records) == 60 and {(r["width"], r["height"]) for r in records} == {(37, 40)}  # 3 × 2 an image
    whole = {n: np.asarray(Image.open(coco.folder / "images" / f"{n}.png")) for n in range(1, 11)}
    for record in records:
        number, x, y = map(int, os.path.basename(record["file_name"])[:-4].split("_"))
        np.testing.assert_array_equal(
            np.asarray(Image.open(record["file_name"])), whole[number][y : y + 40, x : x + 37]
        )
        x0, y0, x1, y1 = max(35, x) - x, max(25, y) - y, min(55, x + 37) - x, min(45, y + 40) - y
        inside = number % 3 and x1 > x0 and y1 > y0
        assert [(b["bbox"], b["iscrowd"]) for b in record["annotations"]] == (
            [(pytest.approx([x0, y0, x1, y1], abs=1e-6), int((x1 - x0) * (y1 - y0) < 0.6 * 400))] if inside else []
        )


def test_tiles_of_an_image_that_is_too_large_for_training(coco, tmp_path, capsys, monkeypatch):
    """Whoever tiles has large images. Elsewhere Pillow's limit holds, as in training."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90 * 70 // 3)  # an error from twice as many on
    assert main(["convert", str(coco.folder), str(tmp_path / "out"), "--to", "coco"]) == 2
    assert "exceeds limit" in (error := capsys.readouterr().err) and "focal data tile" in error
    words = ["--size", "45", "--overlap", "0", "--on-error", "skip"]
    assert main(["tile", str(coco.folder), str(tmp_path / "out"), *words]) == 0
    monkeypatch.undo()
    assert len(read(capsys.readouterr().out)["coco"]) == 40 and Image.MAX_IMAGE_PIXELS == 89_478_485


def test_tiles_of_a_turned_image(yolo_folder, save_image, tmp_path, capsys):
    exif = Image.Exif()
    exif[274] = 6
    yolo_folder.image("a.jpg", ["0 .5 .5 1 1"])
    save_image(yolo_folder.root / "images/train/a.jpg", (60, 40), exif=exif)
    yolo_folder.describe()
    assert main(["tile", str(yolo_folder.root), str(tmp_path / "out"), "--size", "100", "--overlap", "0"]) == 0
    (record,) = read(capsys.readouterr().out)["train"]
    assert (record["width"], record["height"]) == (40, 60) and record["annotations"][0]["bbox"] == [0, 0, 40, 60]


@pytest.mark.parametrize("to", [None, "yolo"])
def test_split(coco, tmp_path, capsys, to):
    words = [
        "split",
        str(coco.folder),
        str(tmp_path / "out"),
        "--val",
        "0.3",
        "--test",
        "0.1",
        *(["--to", to] if to else []),
    ]
    assert main(words) == 0
    sets = read(capsys.readouterr().out)
    assert {split: len(records) for split, records in sets.items()} == {"train": 6, "val": 3, "test": 1}
    names = [os.path.basename(record["file_name"]) for records in sets.values() for record in records]
    assert sorted(names) == sorted(f"{n}.png" for n in range(1, 11))
    assert (tmp_path / "out" / ("data.yaml" if to else "val/annotations.json")).is_file()
    first = files(tmp_path / "out")
    assert main([*words, "--force"]) == 0
    assert files(tmp_path / "out") == first
    assert main([*words, "--force", "--seed", "1"]) == 0
    assert files(tmp_path / "out") != first


def test_split_by_groups(coco, tmp_path, capsys):
    assert main(["split", str(coco.folder), str(tmp_path / "out"), "--by", r"^(\d)"]) == 0  # 1 and 10 go together
    sets = read(capsys.readouterr().out)
    homes = {os.path.basename(r["file_name"]): split for split, records in sets.items() for r in records}
    assert homes["1.png"] == homes["10.png"] and len(sets["val"]) == 2


def test_show(coco, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["show", str(coco.folder), "--num-images", "4"]) == 0
    output = capsys.readouterr().out
    assert "10 images, 3 of them without boxes\nWritten: sheet.png" in output
    assert Image.open("sheet.png").width == 2 * 332 + 12
    assert main(["show", str(coco.folder), "--num-images", "1"]) == 0  # a name that nobody chose gets a number
    assert Image.open("sheet.png").width == 2 * 332 + 12 and Image.open("sheet-2.png").width == 332 + 12
    assert main(["show", str(coco.folder), "--output", "sheet.png"]) == 2
    assert "sheet.png exists and is left as it is" in capsys.readouterr().err
    assert main(["show", str(coco.folder), "--force"]) == 0
    assert Image.open("sheet.png").width == 4 * 332 + 12


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tile", "--size", "0"], "expected 0 <= overlap < size"),
        (["tile", "--min-visible", "0"], "0 < share <= 1"),
        (["split", "--val", "1"], "expected shares from 0 on, less than 1 in all"),
        (["split", "--val", "-0.1"], "expected shares from 0 on"),
        (["split", "--val", "nan"], "expected shares from 0 on"),
        (["split", "--by", "("], "no regular expression"),
        (["split", "--by", "no.csv"], "missing file: --by is no.csv"),
        (["split", "--split", "x"], "no such split"),
        (["convert", "--to", "voc", "--format", "yolo"], "no data set"),
    ],
)
def test_mistakes(coco, tmp_path, capsys, words, says):
    assert main([words[0], str(coco.folder), str(tmp_path / "out"), *words[1:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and not (tmp_path / "out").exists()


def test_a_bad_record(coco, tmp_path, capsys):
    coco.box(1, (5, 5, 0, 5))
    coco.write()
    words = ["convert", str(coco.folder), str(tmp_path / "out"), "--to", "voc"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "box of no size" in error and error.endswith("--on-error skip leaves out all such records and lists them.\n")
    assert main([*words, "--on-error", "skip"]) == 0
    assert "boxes left out: 1 (box of no size: 1)" in capsys.readouterr().out


def test_what_is_left_out_is_listed(csv_file, tmp_path, capsys):
    """With the file and the line, up to 20; defects of every kind, in one run."""
    csv_file.row("a.png", 1, 1, 9, 9, "cat")
    csv_file.row("a.png", 1, 1, 9)
    (tmp_path / "csv/b.png").write_bytes(b"no image")
    csv_file.row("b.png", 1, 1, 9, 9, "cat")
    csv_file.row("a.png", 5, 5, 5, 9, "cat")
    words = ["convert", csv_file.write(), str(tmp_path / "out"), "--to", "csv", "--on-error", "skip"]
    assert main(words) == 0
    first, *listed = capsys.readouterr().out.split("\nWritten")[0].splitlines()
    assert "1 images, 1 boxes; images left out: 1" in first and "boxes left out: 2" in first
    assert listed == [
        f"  row of another length: {csv_file.path}, line 3 has fewer values than the first line.",
        f"  box of no size: {csv_file.path}, line 5: from (5, 5) to (5, 9).",
        f"  image that does not open: {tmp_path}/csv/b.png ({csv_file.path}, line 4): "
        "Pillow cannot identify its format.",
    ]

    csv_file.rows += ["a.png,5,5,5,9,cat"] * 22  # 25 in all
    csv_file.write()
    assert main([*words, "--force"]) == 0
    listed = capsys.readouterr().out.split("\nWritten")[0].splitlines()[1:]
    assert len(listed) == 21 and f"{csv_file.path}, line 22:" in listed[18] and listed[-1] == "  and 5 more"


def test_several_sets(coco, csv_file, tmp_path, capsys):
    csv_file.row("a.png", 1, 1, 9, 9, "cat")
    csv_file.write()
    csv_file.path.rename(coco.folder / "trees.csv")
    assert main(["show", str(coco.folder), "--output", str(tmp_path / "a.png")]) == 2
    assert "Choose by --format and --split, or by file" in capsys.readouterr().err
    assert main(["show", str(coco.folder), "--format", "coco", "--output", str(tmp_path / "a.png")]) == 0


def test_nothing_is_overwritten(coco, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("words")
    for force in ([], ["--force"]):
        assert main(["convert", str(coco.folder), str(mine), "--to", "voc", *force]) == 2
        assert files(mine) == {mine / "thesis.txt": b"words"}
    assert "has no made_by.json: no data command made it" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(coco.folder), str(tmp_path / "empty"), "--to", "voc"]) == 0
    assert main(["convert", str(tmp_path / "empty"), str(tmp_path / "empty"), "--to", "csv", "--force"]) == 2
    assert "IN is in" in capsys.readouterr().err


def test_what_a_command_reads_is_not_replaced(coco, tmp_path, capsys):
    """The images of another file, or the suggestions on them, may be where the last command has written."""
    made, labels = tmp_path / "made", coco.folder / "annotations.json"
    assert main(["convert", str(coco.folder), str(made), "--to", "coco"]) == 0
    (made / "hardest.json").write_text("{}")
    before = files(made)
    words = [str(labels), str(made), "--force", "--images", str(made / "coco/images")]
    assert main(["tile", *words]) == 2
    assert "--images is in" in capsys.readouterr().err
    words = [str(coco.folder), str(made), "--force", "--suggestions", str(made / "hardest.json"), "--accept", "all"]
    assert main(["correct", *words]) == 2
    assert "--suggestions is in" in capsys.readouterr().err and files(made) == before


@pytest.mark.parametrize(
    "words", [["show", "--output", "gone/a.png"], ["convert", "--to", "voc", "coco/annotations.json/out"]]
)
def test_what_cannot_be_written_is_said_in_a_line(coco, tmp_path, capsys, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    assert main([words[0], str(coco.folder), *words[1:]]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_nothing_is_left_of_a_command_that_fails(coco, tmp_path, capsys):
    words = [str(coco.folder), str(tmp_path / "out" / "set")]
    assert main(["convert", *words, "--to", "voc"]) == 0
    before = files(tmp_path / "out")
    (coco.folder / "images" / "10.png").write_bytes((coco.folder / "images" / "10.png").read_bytes()[:500])
    assert main(["tile", *words, "--force"]) == 2
    assert "image that does not open" in capsys.readouterr().err
    assert files(tmp_path / "out") == before and len(list((tmp_path / "out").iterdir())) == 1
    assert main(["tile", *words, "--force", "--on-error", "skip"]) == 0
    assert "9 images, 6 boxes; images left out: 1 (image that does not open: 1)" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["yolo", "csv", "voc"])
def test_a_run_on_a_path(tiny_config, tmp_path, loggers, to):
    """Training and evaluation on what was converted, found by its path alone."""
    entries = []
    for name in ("shapes_train", "shapes_test"):
        out = tmp_path / f"{name}_{to}"
        assert main(["convert", str(tmp_path / f"{name}.json"), str(out), "--to", to]) == 0
        entries.append({"name": f"{name}_{to}", "path": str(out), "classes": ["square", "disc"]})
    names = [entry["name"] for entry in entries]
    changes = ["DATASETS.LOCAL", repr(entries), "DATASETS.TRAIN", repr(names[:1]), "DATASETS.TEST", repr(names[1:])]
    assert focal(["train", "--config-file", tiny_config, *changes], "focal") == 0
    results = [json.loads(line) for line in (tmp_path / "output/metrics.json").read_text().splitlines()]
    assert "bbox/AP" in results[-1]


def test_images_in_another_folder(csv_file, save_image, tmp_path, capsys):
    save_image(tmp_path / "shots/a.png", (60, 40))
    csv_file.rows = ["a.png,1,1,9,9,cat"]
    words = ["convert", csv_file.write(), str(tmp_path / "out"), "--to", "csv"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"{csv_file.path}, line 2 needs {csv_file.path.parent}/a.png, which does not exist" in error
    assert "the key images" in error and "--images" in error
    assert main([*words, "--images", str(tmp_path / "shots")]) == 0
    (record,) = read(capsys.readouterr().out)["trees"]
    assert record["annotations"][0]["bbox"] == [1, 1, 9, 9]
    assert main([*words, "--force", "--images", str(tmp_path / "nowhere")]) == 2
    assert "nowhere, which does not exist" in capsys.readouterr().err


def test_images_of_a_coco_file_in_another_folder(coco, tmp_path, capsys):
    (coco.folder / "images").rename(tmp_path / "shots")
    words = ["convert", str(coco.folder / "annotations.json"), str(tmp_path / "out"), "--to", "coco"]
    assert main(words) == 2
    assert "--images" in capsys.readouterr().err
    assert main([*words, "--images", str(tmp_path / "shots")]) == 0


def test_images_of_a_format_that_has_them_elsewhere(voc_root, tmp_path, capsys):
    voc_root.image("a", [voc_root.object("cat", (1, 1, 9, 9))])
    voc_root.split("train", "a")
    assert main(["convert", str(voc_root.root), str(tmp_path / "out"), "--to", "coco", "--images", "x"]) == 2
    assert "--images is for csv and coco" in capsys.readouterr().err


def test_the_shares_and_classes_of_a_split_are_shown(coco, tmp_path, capsys):
    """Of three groups of 1, 1 and 8 images, none gives 30 % of 10."""
    (tmp_path / "groups.csv").write_text(
        "image_path,group\n" + "".join(f"{'images/' * (n % 2)}{n}.png,{min(n, 3)}\n" for n in range(1, 11))
    )
    words = ["--val", "0.3", "--by", str(tmp_path / "groups.csv")]
    assert main(["split", str(coco.folder), str(tmp_path / "out"), *words]) == 0
    output = capsys.readouterr().out
    sets = read(output)
    sizes = {split: len(records) for split, records in sets.items()}
    assert sum(sizes.values()) == 10 and set(sizes) == {"train", "val"} and sizes["val"] != 3
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.strip()}
    assert rows["images"] == [str(sizes["train"]), str(sizes["val"])]
    assert rows["share"] == [f"{10 * sizes['train']}.0", "%", f"{10 * sizes['val']}.0", "%"]
    assert rows["asked"] == ["70.0", "%", "30.0", "%"]
    for index, name in enumerate(("cat", "dog")):
        found = [sum(b["category_id"] == index for r in sets[s] for b in r["annotations"]) for s in ("train", "val")]
        assert rows[name] == [*map(str, found)] and sum(found) > 0


def test_boxes_that_are_there_twice(coco, tmp_path, capsys):
    coco.box(3, (5, 5, 10, 10))
    coco.box(3, (5, 5, 10, 10))
    coco.box(3, (5, 5, 10, 10), category_id=2)  # another class
    coco.box(3, (5, 5, 10, 10), iscrowd=1)
    coco.box(6, (5, 5, 10, 10))  # another image
    coco.write()
    assert main(["show", str(coco.folder), "--output", str(tmp_path / "a.png")]) == 0
    assert "repeated boxes (same image, box and class): 1, as in" in (error := capsys.readouterr().err)
    assert "images/3.png" in error


@pytest.mark.parametrize(
    ("names", "classes", "says"),
    [
        ([*["screw"] * 20, "scew"], None, "class 'scew' is spelt nearly like 'screw'; it has boxes: 1, the other: 20"),
        (
            [*["Screw"] * 30, "screw", "screw"],
            None,
            "class 'screw' is spelt nearly like 'Screw'; it has boxes: 2, the other: 30",
        ),
        ([*["screw"] * 20, "scew"], ["screw", "scew"], ""),
        ([*["screw"] * 20, "nut"], None, ""),
        ([*["screw"] * 8, *["scew"] * 8], None, ""),
        ([*["size 10"] * 20, "size 12"], None, ""),
    ],
)
def test_classes_that_are_one_misspelt(csv_file, tmp_path, capsys, names, classes, says):
    for number, name in enumerate(names):
        csv_file.row("a.png", number, number, number + 9, number + 9, name)
    words = [*(["--classes", *classes] if classes else [])]
    assert main(["convert", csv_file.write(), str(tmp_path / "out"), "--to", "csv", *words]) == 0
    error = capsys.readouterr().err
    assert says in error if says else not error


@pytest.mark.parametrize("command", ["tile", "convert", "split", "correct", "show", "deeppcb"])
def test_helps_tell_defaults_where_there_are_some(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "default: )" not in text and "default: None" not in text and "default: False" not in text
    assert all(flags.count("(default") <= 1 for flags in text.split(" --"))
    assert command != "split" or ("0: no test (default: 0.0)" in text and "^(site\\d+)_" in text)
