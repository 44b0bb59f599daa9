"""Data sets that are made to take long."""

import json
import time

import pytest
from PIL import Image

from focal_plugin.data import DataError
from focal_plugin.data.coco import CocoSet
from focal_plugin.data.records import Checker


@pytest.mark.parametrize("where", ["images", "annotations", "categories"])
def test_ids_with_one_hash(where, tmp_path):
    """A set of n of them would take n² comparisons."""
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [],
        "categories": [{"id": 1, "name": "cat"}],
    }
    same = {"file_name": "a.png", "bbox": [1, 1, 2, 2]}
    for k in range(1, 40_000):
        number = k * (2**61 - 1)
        entry = same | {"id": number, "image_id": number, "category_id": number, "name": str(k)}
        content[where].append(entry)
    (tmp_path / "a.json").write_text(json.dumps(content))
    start = time.perf_counter()
    with pytest.raises(DataError):
        CocoSet("x", str(tmp_path / "a.json"), str(tmp_path)).load(Checker("x"))
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("number", [2**64, -(2**64), 2**63 - 25])
def test_ids_of_64_bits_are_read(number, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    content = {"images": [{"id": number, "file_name": "a.png"}], "categories": [{"id": number, "name": "cat"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    (record,) = CocoSet("x", str(tmp_path / "a.json"), str(tmp_path)).load(Checker("x"))[0]
    assert record["image_id"] == number
