from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from focal_plugin.data import DataError
from focal_plugin.data.splits import groups_of, split_records


def records(count):
    return [{"file_name": f"{i}.png"} for i in range(count)]


@given(st.integers(3, 200), st.floats(0.05, 0.45), st.floats(0.05, 0.45), st.integers(0, 99))
def test_single_images(count, val, test, seed):
    shares = {"train": 1 - val - test, "val": val, "test": test}
    all_records = records(count)
    groups = [record["file_name"] for record in all_records]
    splits = split_records(all_records, groups, shares, seed)
    assert sorted(r["file_name"] for split in splits.values() for r in split) == sorted(groups)
    for split, share in shares.items():
        assert len(splits[split]) >= 1
        assert abs(len(splits[split]) - share * count) <= 1 + (count * min(val, test) < 1)
        assert [int(r["file_name"][:-4]) for r in splits[split]] == sorted(
            int(r["file_name"][:-4]) for r in splits[split]
        )


@given(st.lists(st.integers(1, 20), min_size=2, max_size=30), st.floats(0.1, 0.5), st.integers(0, 9))
def test_groups_stay_together(sizes, val, seed):
    groups = [str(number) for number, size in enumerate(sizes) for _ in range(size)]
    splits = split_records(records(len(groups)), groups, {"train": 1 - val, "val": val}, seed)
    where = {r["file_name"]: split for split, found in splits.items() for r in found}
    homes = [{where[f"{i}.png"] for i, group in enumerate(groups) if group == str(g)} for g in range(len(sizes))]
    assert all(len(home) == 1 for home in homes) and all(splits.values())
    assert len(splits["val"]) <= val * len(groups) + max(sizes)


def test_the_seed_decides_and_the_order_of_the_images_does_not():
    names = [f"{i}.png" for i in range(50)]

    def val(seed, order):
        found = split_records([{"file_name": n} for n in order], order, {"train": 0.8, "val": 0.2}, seed)
        return {record["file_name"] for record in found["val"]}

    assert val(0, names) == val(0, names[::-1]) != val(1, names)
    assert len(val(0, names)) == 10
    counts = Counter(name for seed in range(200) for name in val(seed, names))
    assert min(counts.values()) > 15 and max(counts.values()) < 70  # of 40 expected, five standard deviations


def test_too_few_groups():
    with pytest.raises(DataError, match="too few groups: 1 for the splits train, val: a"):
        split_records(records(2), ["a", "a"], {"train": 0.8, "val": 0.2}, 0)


def test_groups_by_an_expression():
    paths = ["site1/a_1.png", "site1/b_2.png", "site2/a_3.png"]
    assert groups_of(paths, "image") == paths
    assert groups_of(paths, r"site\d") == ["site1", "site1", "site2"]
    assert groups_of(paths, r"/(\w)_") == ["a", "b", "a"]
    with pytest.raises(DataError, match=r"image of no group: 'b' finds nothing in site1/a_1\.png"):
        groups_of(paths, "b")
    with pytest.raises(DataError, match=r"image of no group: 'x\*' finds nothing"):
        groups_of(paths, "x*")
    with pytest.raises(DataError, match=r"no regular expression: '\(': "):
        groups_of(paths, "(")


def test_paths_begin_below_the_folder_of_all_images(tmp_path, monkeypatch):
    """Whoever calls, and wherever the folder is: as the command's help and the pages say."""
    names = ["a/site1_1.png", "b/site2_1.png"]
    files = [str(tmp_path / "shots" / name) for name in names]
    assert groups_of(files, r"^(\w)/") == ["a", "b"]
    assert groups_of(files, "image") == names
    assert groups_of(files[:1], r"^(site\d+)_") == ["site1"]
    monkeypatch.chdir(tmp_path)
    assert groups_of([f"shots/{name}" for name in names], r"^(\w)/") == ["a", "b"]


def test_groups_in_a_file(tmp_path):
    path = tmp_path / "groups.csv"
    path.write_text("group,image_path\none,site1/a.png\ntwo,./site2/a.png\nthree,b.png\n")
    assert groups_of(["x/site1/a.png", "site2/a.png", "site2/b.png"], str(path)) == ["one", "two", "three"]
    below = [str(tmp_path / "images" / name) for name in ("b.png", "site1/a.png")]  # "images" is in every path
    assert groups_of(below, str(path)) == ["three", "one"]
    path.write_text("group,image_path\none,images/a.png\ntwo,images/b.png\n")
    assert groups_of([str(tmp_path / f"images/{name}.png") for name in "ab"], str(path)) == ["one", "two"]
    with pytest.raises(DataError, match=r"image of no group: .*groups\.csv has no row with a group for c\.png"):
        groups_of(["c.png"], str(path))
    path.write_text("path,group\n")
    with pytest.raises(DataError, match=r"missing column: .*expected image_path and group"):
        groups_of(["c.png"], str(path))
    with pytest.raises(DataError, match=r"missing file: "):
        groups_of(["c.png"], str(tmp_path / "no.csv"))
