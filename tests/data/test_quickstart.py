import importlib.util
import itertools
import json
import sys

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from focal_plugin.data import quickstart, register_local_dataset
from focal_plugin.data.quickstart import make_quickstart
from focal_plugin.data.tiles import clip_to_tile, tile_spans

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("deepforest") is None, reason="needs `pip install --no-deps deepforest==2.1.0`"
)


@given(st.integers(1, 5000), st.integers(2, 1000), st.data())
def test_spans_cover_a_side_and_overlap(length, tile, data):
    overlap = data.draw(st.integers(0, tile - 1))
    spans = tile_spans(length, tile, overlap)
    assert spans[0][0] == 0 and spans[-1][1] == length
    assert len({stop - start for start, stop in spans}) == 1
    for (start, stop), (following, _) in itertools.pairwise(spans):
        assert start < following and stop - following >= overlap


@pytest.mark.parametrize("length", [1035, 1249, 2299, 2472])
def test_spans_are_near_the_size_asked_for(length):
    start, stop = tile_spans(length, 400, 110)[0]
    assert abs(stop - start - 400) <= 20


def test_clip_to_tile():
    boxes = np.array(
        [
            [10, 10, 20, 20],
            [95, 10, 105, 20],
            [92, 92, 102, 102],
            [93, 92, 103, 108],
            [100, 0, 120, 9],
            [-5, 0, 200, 99],
        ]
    )
    clipped, is_object, indices = clip_to_tile(boxes, (5, 5, 100, 100), min_visible=0.5)
    expected = [[5, 5, 15, 15], [90, 5, 95, 15], [87, 87, 95, 95], [88, 87, 95, 95], [0, 0, 95, 94]]  # 5th is outside
    np.testing.assert_array_equal(clipped, expected)
    assert is_object.tolist() == [True, True, True, False, False]  # shares 1, .5, .64, .35, .44
    assert indices.tolist() == [0, 1, 2, 3, 5]


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A package like deepforest with two little images."""
    folder = tmp_path / "site" / "deepforest" / "data"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    rng = np.random.default_rng(0)
    for stem, (width, height) in zip(quickstart.SOURCES.values(), [(130, 90), (70, 75)]):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{stem}.png")
        boxes = [(1, 1, 20, 20), (35, 40, 52, 50), (60, 60, 70, 75)]
        objects = "".join(
            f"<object><name>Tree</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox>"
            "</object>"
            for a, b, c, d in boxes
        )
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        (folder / f"{stem}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


SMALL = {"tile": 40, "overlap": 20}


@pytest.mark.parametrize("split", ["train", "val"])
def test_tiles_are_pieces_of_the_image(source, tmp_path, split):
    folder = make_quickstart(str(tmp_path / "made" / "here"), **SMALL) / split
    whole = np.asarray(Image.open(source / f"{quickstart.SOURCES[split]}.png"))
    seen = np.zeros(whole.shape[:2], bool)
    content = json.loads((folder / "annotations.json").read_text())
    areas = dict.fromkeys([(0, 0, 20, 20), (34, 39, 52, 50), (59, 59, 70, 75)], 0)
    for image in content["images"]:
        x, y = map(int, image["file_name"].removesuffix(".png").split("_")[-2:])
        pixels = np.asarray(Image.open(folder / "images" / image["file_name"]))
        width, height = image["width"], image["height"]
        np.testing.assert_array_equal(pixels, whole[y : y + height, x : x + width])
        seen[y : y + height, x : x + width] = True
        for box in (a for a in content["annotations"] if a["image_id"] == image["id"]):
            x0, y0, w, h = box["bbox"]
            assert min(w, h) > 0 and min(x0, y0) >= 0 and x0 + w <= width and y0 + h <= height
            of = [b for b in areas if b[0] <= x + x0 and b[1] <= y + y0 and x + x0 + w <= b[2] and y + y0 + h <= b[3]]
            assert len(of) == 1  # no other tree is near
            share = w * h / ((of[0][2] - of[0][0]) * (of[0][3] - of[0][1]))
            assert box["iscrowd"] == int(share < 0.5) and box["area"] == w * h
            areas[of[0]] = max(areas[of[0]], share)
    assert seen.all()
    assert set(areas.values()) == {1}  # each tree is whole somewhere


@pytest.mark.parametrize("split", ["train", "val"])
def test_served_as_a_local_set(source, tmp_path, split):
    folder = make_quickstart(str(tmp_path / "made"), **SMALL) / split
    paths = {"json": str(folder / "annotations.json"), "images": str(folder / "images")}
    register_local_dataset({"name": "trees", "format": "coco", **paths})
    records = DatasetCatalog.get("trees")
    assert {box["iscrowd"] for record in records for box in record["annotations"]} == {0, 1}


def files(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")}


def test_second_run_does_nothing(source, tmp_path, monkeypatch):
    folder = make_quickstart(str(tmp_path / "made"), **SMALL)
    before = files(folder)
    monkeypatch.setattr(quickstart, "source_folder", lambda: pytest.fail("read the package again"))
    make_quickstart(str(tmp_path / "made"), **SMALL)
    assert files(folder) == before


def test_other_arguments_leave_what_is_there(source, tmp_path):
    folder = make_quickstart(str(tmp_path / "made"), **SMALL)
    before = files(folder)
    with pytest.raises(FileExistsError, match=r"made was made with .*'tile': 40.*not .*'tile': 45"):
        make_quickstart(str(tmp_path / "made"), tile=45, overlap=20)
    assert files(folder) == before


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_never_overwrites_what_it_did_not_make(source, tmp_path, kind):
    path = tmp_path / "mine"
    if kind == "folder":
        path.mkdir()
        (path / "thesis.txt").write_text("words")
    else:
        path.write_text("words")
    before = files(tmp_path)
    with pytest.raises(FileExistsError, match="mine was not made by the quickstart"):
        make_quickstart(str(path), **SMALL)
    assert files(tmp_path) == before


def test_empty_folder_is_used(source, tmp_path):
    (tmp_path / "made").mkdir()
    assert (make_quickstart(str(tmp_path / "made"), **SMALL) / "val" / "annotations.json").is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_nothing_is_left_of_a_run_that_ended_early(source, tmp_path, monkeypatch, error):
    cut = quickstart._cut

    def fails(folder, stem, *args):
        cut(folder, stem, *args)
        if stem == quickstart.SOURCES["val"]:
            raise error

    monkeypatch.setattr(quickstart, "_cut", fails)
    with pytest.raises(error):
        make_quickstart(str(tmp_path / "out" / "made"), **SMALL)
    assert list((tmp_path / "out").iterdir()) == []


def test_two_runs_at_once(source, tmp_path, monkeypatch):
    cut, output = quickstart._cut, str(tmp_path / "out" / "made")

    def slower(*args):
        monkeypatch.setattr(quickstart, "_cut", cut)
        make_quickstart(output, **SMALL)  # another run ends while this one works
        cut(*args)

    monkeypatch.setattr(quickstart, "_cut", slower)
    make_quickstart(output, **SMALL)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["made"]


@pytest.mark.parametrize(
    "args", [{"tile": 0}, {"overlap": -1}, {"overlap": 400}, {"min_inside": 0}, {"min_inside": 1.1}]
)
def test_arguments_out_of_range(tmp_path, args):
    with pytest.raises(ValueError, match="expected 0 <= overlap < size and 0 < share <= 1"):
        make_quickstart(str(tmp_path / "made"), **args)


def test_package_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"not installed.*pip install --no-deps deepforest==2\.1\.0"):
        make_quickstart(str(tmp_path / "made"))


def test_package_without_its_images(source, tmp_path):
    next(source.glob("*.png")).unlink()
    with pytest.raises(FileNotFoundError, match=r"which has none in .*pip install"):
        make_quickstart(str(tmp_path / "made"))


def test_command_line(source, tmp_path, monkeypatch, capsys):
    command = ["quickstart", "--output", str(tmp_path / "trees"), "--tile", "40", "--overlap", "20"]
    monkeypatch.setattr(sys, "argv", command)
    quickstart.main()
    assert str(tmp_path / "trees") in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--min-inside", "0.7"])
    with pytest.raises(SystemExit) as exit_:
        quickstart.main()
    assert exit_.value.code == 1
    assert "remove it, or choose another --output" in capsys.readouterr().err


@needs_package
def test_real_images(tmp_path):
    make_quickstart(str(tmp_path / "trees"))
    counts = {}
    for split in ("train", "val"):
        folder = tmp_path / "trees" / split
        paths = {"json": str(folder / "annotations.json"), "images": str(folder / "images")}
        register_local_dataset({"name": split, "format": "coco", **paths})
        records = DatasetCatalog.get(split)
        boxes = [box for record in records for box in record["annotations"]]
        counts[split] = len(records), len(boxes), sum(box["iscrowd"] for box in boxes)
    assert counts == {"train": (64, 1192, 224), "val": (12, 487, 65)}


@needs_package
def test_every_tree_is_whole_in_some_tile():
    """What the default overlap promises of the real images."""
    folder = quickstart.source_folder()
    for stem, trees in zip(quickstart.SOURCES.values(), (574, 279)):
        xml = str(folder / f"{stem}.xml")
        checker = quickstart.Checker(stem)
        record = quickstart.read_record(quickstart.parse_xml(xml), xml, xml[:-3] + "png", stem, {"Tree": 0}, checker)
        boxes = np.array([box["bbox"] for box in record["annotations"]])
        assert len(boxes) == trees
        whole = np.zeros(len(boxes), bool)
        for top, bottom in tile_spans(record["height"], 400, 110):
            for left, right in tile_spans(record["width"], 400, 110):
                whole |= ((boxes >= [left, top, left, top]) & (boxes <= [right, bottom, right, bottom])).all(axis=1)
        assert whole.all()
