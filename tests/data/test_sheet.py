import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from focal_plugin.data.sheet import count_boxes, draw_sheet
from focal_plugin.evaluation.style import GRAY, class_color


def record(path, *boxes, size=(80, 40)):
    Image.new("RGB", size, "white").save(path)
    annotations = [{"bbox": box, "category_id": category, "iscrowd": crowd} for box, category, crowd in boxes]
    return {"file_name": str(path), "width": size[0], "height": size[1], "annotations": annotations}


def test_counts(tmp_path):
    big = [0, 0, 96, 96]
    records = [
        record(tmp_path / "a.png", ([0, 0, 31, 33], 0, 0), ([0, 0, 32, 32], 0, 0), (big, 1, 0)),
        record(tmp_path / "b.png", ([0, 0, 95, 97], 0, 0), (big, 0, 1)),
        record(tmp_path / "c.png"),
    ]
    rows = [re.split(r"  +", line.strip()) for line in count_boxes(records, ["1", "dog", "none"]).splitlines()]
    assert rows[0] == ["class", "images", "boxes", "small", "medium", "large"]
    assert rows[2:6] == [
        ["1", "2", "3", "1", "2", "0"],
        ["dog", "1", "1", "0", "0", "1"],
        ["none", "0", "0", "0", "0", "0"],
        ["ignored regions", "1", "1", "0", "0", "1"],
    ]
    assert rows[6][0] == "3 images, 1 of them without boxes"


def test_boxes_are_where_they_belong(tmp_path):
    """A box of a class and a crowd, four times as large as in the image."""
    sheet = draw_sheet(
        [record(tmp_path / "a.png", ([10, 5, 30, 25], 1, 0), ([40, 5, 60, 25], 0, 1))], ["cat", "dog"], 5
    )
    pixels = np.asarray(sheet)[12 : 12 + 160, 12 : 12 + 320]
    for color, (x0, x1) in ((class_color(1), (40, 120)), (GRAY, (160, 240))):
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        ys, xs = (pixels == rgb).all(axis=2).nonzero()
        assert (xs.min(), xs.max(), ys.min(), ys.max()) == (x0, x1, 20, 100)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_images_are_spread_over_the_set(tmp_path, count):
    records = [record(tmp_path / f"{i}.png", size=(40 + i, 1000 if i == 2 else 30)) for i in range(5)]
    records[0]["file_name"] = records[0]["file_name"]
    sheet = draw_sheet(records, ["cat"], count)
    columns = {1: 1, 2: 2, 5: 3}[count]
    assert sheet.width == columns * 332 + 12


def test_the_legend_says_of_which_images_it_is(tmp_path, monkeypatch):
    drawn = []
    draw = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, xy, text, *a: drawn.append(text) or draw(self, xy, text, *a)
    )
    records = [record(tmp_path / f"{i}.png", ([0, 0, 9, 9], 0, 0)) for i in range(5)]
    draw_sheet(records, ["cat"], 2)
    assert drawn[-2:] == ["Boxes of 2 images out of 5:", "cat: 2"]
