"""A file that grows is whole whenever it is read."""

import json
import os
import resource

import pytest

from focal_plugin.files.growing import GrowingFile, GrowingJson


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("sizes", [[], [0], [1], [3, 0, 1, 200]])
def test_it_is_whole_after_each_addition(tmp_path, sizes):
    path, expected = tmp_path / "a.json", []
    file = GrowingJson(str(path))
    assert read(path) == []
    for size in sizes:
        items = [{"id": len(expected) + i, "text": "é" * size} for i in range(size)]
        file.add(items)
        expected += items
        assert read(path) == expected and file.count == len(expected)
    file.close()
    assert read(path) == expected


def test_what_is_around_the_list(tmp_path):
    path = tmp_path / "a.json"
    file = GrowingJson(str(path), '{"images": ', ', "categories": [1, 2, 3]}')
    assert read(path) == {"images": [], "categories": [1, 2, 3]}
    file.add([1], ', "categories": []}')  # shorter than before
    file.add([2])
    assert read(path) == {"images": [1, 2], "categories": []}
    file.undo()
    assert read(path) == {"images": [1], "categories": []}
    file.close()


def test_text(tmp_path):
    path = tmp_path / "a.csv"
    file = GrowingFile(str(path), "a,b\n")
    file.append("1,ü\n")
    file.append("2,4\n")
    assert path.read_text("utf-8") == "a,b\n1,ü\n2,4\n"
    file.undo()
    file.append("3,5\n", "end")
    file.close()
    assert path.read_text("utf-8") == "a,b\n1,ü\n3,5\nend"


def test_taking_back_counts_too(tmp_path):
    file = GrowingJson(str(tmp_path / "a.json"))
    file.add([1, 2])
    file.add([3])
    file.undo()
    file.close()
    assert file.count == 2 and read(tmp_path / "a.json") == [1, 2]


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "a.json").write_text("mine")
    with pytest.raises(FileExistsError):
        GrowingJson(str(tmp_path / "a.json"))
    assert (tmp_path / "a.json").read_text() == "mine"


@pytest.mark.parametrize("room", [0, 100, 4096])
def test_a_full_disk(tmp_path, room):
    """All additions before are there, and the file is whole."""
    path, limits, count, file = tmp_path / "a.json", resource.getrlimit(resource.RLIMIT_FSIZE), 0, None
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        with pytest.raises(OSError):
            file = GrowingJson(str(path))
            while True:
                file.add([{"number": count}])
                count += 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if room == 0:
        assert not os.path.lexists(path)
        return
    assert read(path) == [{"number": number} for number in range(count)] and file.count == count > 0
    file.add([7])  # there is room again
    assert read(path)[-1] == 7
    file.close()
