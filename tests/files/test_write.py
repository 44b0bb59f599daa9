"""Nothing that is there is overwritten unless the user says so."""

import pytest

from focal_plugin.files.write import check_free, free_paths


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
