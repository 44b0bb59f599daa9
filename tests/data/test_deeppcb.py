"""DeepPCB's lists and text files become CSV files that ``local`` reads."""

import csv

import pytest

from focal_plugin.config.load import load_config
from focal_plugin.data import check_num_classes
from focal_plugin.data.__main__ import main
from focal_plugin.data.csv_file import CsvSet
from focal_plugin.data.deeppcb import CLASSES
from focal_plugin.data.records import Checker

RECIPE = "deeppcb/focal_retinanet_R_18_FPN_scratch.yaml"


@pytest.fixture
def pcb_data(tmp_path, save_image):
    """Five images in the layout of the repository: the one numbered n has n boxes, of the types 1 to n."""
    root = tmp_path / "datasets/DeepPCB/PCBData"
    for split, numbers in (("trainval", (1, 0, 3)), ("test", (2, 6))):
        lines = []
        for n in numbers:
            place = root / "group20085/20085"
            save_image(place / f"2008500{n}_test.jpg", (640, 640))
            save_image(place / f"2008500{n}_temp.jpg", (640, 640))
            boxes = root / f"group20085/20085_not/2008500{n}.txt"
            boxes.parent.mkdir(exist_ok=True)
            boxes.write_text("".join(f"{10 * k} 20 {10 * k + 30} 60 {k}\n" for k in range(1, n + 1)))
            lines.append(f"group20085/20085/2008500{n}.jpg group20085/20085_not/2008500{n}.txt\n")
        (root / f"{split}.txt").write_text("".join(lines))
    return root


def rows_of(path):
    return list(csv.DictReader(path.open()))


def test_the_recipe_reads_what_is_written(pcb_data, monkeypatch, capsys):
    assert main(["deeppcb", str(pcb_data)]) == 0
    assert "trainval.csv with 5 rows" in capsys.readouterr().out  # 1 + 3 boxes and an image without
    monkeypatch.chdir(pcb_data.parents[2])
    cfg = load_config(RECIPE)
    check_num_classes(cfg)
    for entry, counts in zip(cfg.DATASETS.LOCAL, ([1, 0, 3], [2, 6])):
        keys = {key: value for key, value in entry.items() if key != "format"}
        records, metadata = CsvSet(**keys).load(Checker(entry["name"]))
        assert metadata["thing_classes"] == list(CLASSES)
        assert [len(record["annotations"]) for record in records] == counts
        assert all("_test.jpg" in record["file_name"] for record in records)
        for record in records:
            for k, box in enumerate(record["annotations"]):
                left = 10.0 * (k + 1)
                assert (box["bbox"], box["category_id"]) == ([left, 20.0, left + 30, 60.0], k)


def test_every_second_image(pcb_data):
    assert main(["deeppcb", str(pcb_data), "--every", "2"]) == 0
    assert {row["image_path"][-10:] for row in rows_of(pcb_data / "trainval.csv")} == {"1_test.jpg", "3_test.jpg"}
    assert {row["image_path"][-10:] for row in rows_of(pcb_data / "test.csv")} == {"2_test.jpg"}


def test_commas_between_the_numbers(pcb_data):
    """As the repository's description of the format has them."""
    (pcb_data / "group20085/20085_not/20085002.txt").write_text("1,2,3,4,5\n\n")
    main(["deeppcb", str(pcb_data)])
    assert list(rows_of(pcb_data / "test.csv")[0].values())[1:] == ["1", "2", "3", "4", "copper"]


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("group20085/20085_not/20085003.txt", "1 2 3 4\n", "20085003.txt, line 1: '1 2 3 4'; expected 5 words"),
        ("group20085/20085_not/20085003.txt", "1 2 3 4 7\n", "line 1: type 7; expected 1 to 6"),
        ("group20085/20085_not/20085003.txt", None, "20085003.txt"),
        ("trainval.txt", "a.jpg ../../b.txt\n", "outside its folder"),
        ("trainval.txt", "a.jpg\n", "expected 2 words"),
        ("trainval.txt", "\n", "trainval.txt lists no image"),
        ("test.txt", None, "test.txt"),
        ("test.txt", b"\xff\xfe", "test.txt"),
        ("test.csv", "mine", "remove it"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(pcb_data, capsys, file, content, expected):
    if content is None:
        (pcb_data / file).unlink()
    else:
        (pcb_data / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["deeppcb", str(pcb_data)]) == 2
    assert expected in capsys.readouterr().err
    assert not (pcb_data / "trainval.csv").exists()
    assert not (pcb_data / "test.csv").exists() or (pcb_data / "test.csv").read_text() == "mine"


def test_every_is_checked(pcb_data, capsys):
    assert main(["deeppcb", str(pcb_data), "--every", "0"]) == 2
    assert "--every is 0; expected 1 or more" in capsys.readouterr().err
