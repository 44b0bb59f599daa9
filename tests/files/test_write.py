"""Nothing that is there is overwritten unless the user says so."""

import os

import pytest

from focal_plugin.files.write import check_free, free_paths, whole_folder


def test_names_that_are_taken_get_one_number(tmp_path):
    def names():
        paths = free_paths(tmp_path, "a.jpg", "b.json")
        return [path.removeprefix(f"{tmp_path}/") for path in paths]

    assert names() == ["a.jpg", "b.json"]
    (tmp_path / "b.json").write_text("")
    assert names() == ["a-2.jpg", "b-2.json"]
    (tmp_path / "a-2.jpg").symlink_to("nowhere")
    assert names() == ["a-3.jpg", "b-3.json"]


def test_a_name_of_the_users_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    check_free(path, "--output")
    path.symlink_to("nowhere")
    message = r"model\.onnx exists and is left as it is: remove it, or choose another --output"
    with pytest.raises(FileExistsError, match=rf"{message}\.$"):
        check_free(path, "--output")
    with pytest.raises(FileExistsError, match=rf"{message}, or overwrite it with --force\.$"):
        check_free(path, "--output", "overwrite it with --force")


@pytest.mark.parametrize("there", ["nothing", "empty", "full"])
def test_a_whole_folder(tmp_path, there):
    path = tmp_path / "in" / "out"
    if there != "nothing":
        path.mkdir(parents=True)
    if there == "full":
        (path / "old").write_text("old")
    with whole_folder(path, replace=there == "full") as folder:
        (folder / "new").write_text("new")
        assert not (path / "new").exists()
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("replace", [True, False])
def test_nothing_of_an_unfinished_folder(tmp_path, error, replace):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(error), whole_folder(tmp_path / "out", replace=replace) as folder:
        (folder / "new").write_text("new")
        raise error
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_a_whole_folder_over_nothing_that_is_there(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(OSError), whole_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_the_former_folder_comes_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    rename = os.rename

    def fails(source, target):
        if os.path.basename(source) == "made":
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="no"), whole_folder(tmp_path / "out", replace=True):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]
