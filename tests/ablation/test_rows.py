"""Finding rows, what the paper says of them, and composing their configs."""

import shutil
import subprocess
from pathlib import Path

import pytest
from detectron2.config import get_cfg

from focal_plugin import ConfigError, add_focal_config
from focal_plugin.ablation import runs
from focal_plugin.ablation.rows import as_yaml, compared_with, compose, find_base, find_tables

CONFIGS = Path(__file__).parents[2] / "configs"


def find_table(words):
    """The only table of ``words``."""
    (table,) = find_tables(words)
    return table


def test_a_folder_a_file_and_the_beginning_of_names(rows):
    names = ["gamma_0", "gamma_1", "gamma_2"]
    rows.add("other", "SEED: 1")
    assert [row.name for row in find_table([str(rows.folder)]).rows] == [*names, "other"]
    assert [row.name for row in find_table([str(rows.folder / "gamma")]).rows] == names
    two = [str(rows.folder / "other.yaml"), str(rows.folder / "gamma_1.yaml")]
    assert [row.name for row in find_table(two).rows] == ["other", "gamma_1"]
    assert find_table(two).baseline == "other"
    with pytest.raises(FileNotFoundError, match=r"delta: not a folder, a file, or the beginning of names of rows"):
        find_table([str(rows.folder / "delta")])
    with pytest.raises(ValueError, match=f"{two[0]}, {two[0]}: rows have the names of their files"):
        find_table([two[0], str(rows.folder)])


def test_odd_names(tmp_path):
    """A folder that looks like a pattern; a row that begins as a base config does."""
    folder = tmp_path / "my [1] rows"
    folder.mkdir()
    for name in ("Base", "Base-small", "Base_small", "Baseline", "γ = 1"):
        (folder / f"{name}.yaml").write_text("SEED: 1")
    assert [row.name for row in find_table([str(folder)]).rows] == ["Baseline", "γ = 1"]


@pytest.mark.parametrize("word", ["paper/table1b", "configs/paper/table1b"])
def test_shipped_rows_are_found_from_anywhere(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = find_table([word])
    assert [row.name for row in table.rows][:2] == ["table1b_gamma_0", "table1b_gamma_0.1"]
    assert (table.baseline, table.missing) == ("table1b_gamma_0", [])
    with pytest.raises(FileNotFoundError, match=rf"paper/table9: not a folder, .* in {tmp_path} or in {CONFIGS}"):
        find_table(["paper/table9"])

    (tmp_path / word).parent.mkdir(parents=True)
    (tmp_path / f"{word}_mine.yaml").write_text("SEED: 1")
    assert [row.name for row in find_table([word]).rows] == ["table1b_mine"]  # what is here comes first
    (tmp_path / word).mkdir()
    with pytest.raises(FileNotFoundError, match=f"{word}: no row in this folder"):
        find_table([word])


def test_data_by_name_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_base("quickstart").samefile(CONFIGS / "quickstart/trees.yaml")
    assert find_base("Base-FocalRetinaNet.yaml").samefile(CONFIGS / "Base-FocalRetinaNet.yaml")
    assert "detectron2" in str(find_base("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    with pytest.raises(FileNotFoundError, match="--data nothing: expected quickstart, bccd, deeppcb, or"):
        find_base("nothing")


def test_the_version_is_the_commit_in_the_checkout_of_the_package_alone(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    monkeypatch.setattr(runs, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(runs.metadata, "version", lambda name: "1.2.3")
    assert runs.versions()["focal_plugin"] == head[:12]
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(runs, "_CHECKOUT", tmp_path / "site-packages")
    assert runs.versions()["focal_plugin"] == "1.2.3"
    shutil.rmtree(tmp_path / ".git")
    (tmp_path / ".git").mkdir()  # no repository
    monkeypatch.setattr(runs, "_CHECKOUT", tmp_path)
    assert runs.versions()["focal_plugin"] == "1.2.3"

    def unknown(name):
        raise runs.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(runs.metadata, "version", unknown)
    assert runs.versions().keys() == {"torch", "detectron2"}


def test_results_beside_the_rows(rows):
    (rows.folder / "results.csv").write_text(
        "row,AP,AP50,AP75,APs,APm,APl,ms,baseline,note\n"
        "gamma_2,34.0,52.5,,,,,,x,\n"
        "gamma_5,32.2,,,,,,,,\n"
        "gamma_0,,,,,,,,,diverged\n"
        "alpha_1,1,,,,,,,,\n"
    )
    table = find_table([str(rows.folder)])
    assert [row.name for row in table.rows] == ["gamma_2", "gamma_0", "gamma_1"]  # the paper's order, then the others
    assert [row.paper for row in table.rows] == [{"AP": 34.0, "AP50": 52.5}, {}, {}]
    assert [row.diverged for row in table.rows] == [False, True, False]
    assert table.baseline == "gamma_2"
    assert table.missing == ["gamma_5"]  # of this table, and not alpha_1


def test_results_of_a_spreadsheet(rows):
    """With a byte order mark and Windows newlines."""
    text = "row,AP,baseline\ngamma_1,34.0,\ngamma_2,35.0,x\n"
    (rows.folder / "results.csv").write_text(text, encoding="utf-8-sig", newline="\r\n")
    table = find_table([str(rows.folder)])
    assert [row.paper for row in table.rows] == [{"AP": 34.0}, {"AP": 35.0}, {}]
    assert table.baseline == "gamma_2"


def test_results_are_of_the_rows_beside_them(rows, tmp_path):
    """Another folder's row of the same name is another row."""
    (rows.folder / "results.csv").write_text("row,AP,baseline\ngamma_1,34.0,x\n")
    other = tmp_path / "other"
    other.mkdir()
    (other / "delta.yaml").write_text("SEED: 1")
    (other / "results.csv").write_text("row,AP,baseline\ndelta,1.0,\ngamma_1,2.0,\ngamma_2,3.0,x\n")
    table = find_table([str(rows.folder), str(other)])
    assert {row.name: row.paper for row in table.rows if row.paper} == {"gamma_1": {"AP": 34.0}, "delta": {"AP": 1.0}}
    assert table.baseline == "gamma_1"


def test_the_tables_of_the_paper():
    """The whole folder is seven tables, each with a baseline of its own; a part of one is one table."""
    tables = find_tables([str(CONFIGS / "paper")])
    assert {table.name: table.baseline for table in tables} == {
        "table1a": "table1a_alpha_0.5",
        "table1b": "table1b_gamma_0",
        "table1c": "table1c_3x3",
        "table1d": "table1d_focal",
        "table1e": "table1e_R50_600",
        "table2": "table2_R101",
        "table3": "table3_fl_gamma_2",
    }
    assert all(row.name.startswith(f"{table.name}_") for table in tables for row in table.rows)
    part = find_table([str(CONFIGS / "paper/table1b"), str(CONFIGS / "paper/table1a_ce_prior.yaml")])
    assert (part.name, part.baseline) == ("", "table1b_gamma_0")


@pytest.mark.parametrize(
    "text, message",
    [
        ("name,AP\ngamma_2,34.0\n", "expected a column 'row'.*found the columns name, AP"),
        ("row;AP\ngamma_2;34,0\n", "expected a column 'row'.*found the columns row;AP"),
        ("", "expected a column 'row'"),
        ("row,AP50\ngamma_2,n/a\n", "AP50 of gamma_2 is n/a; expected a number"),
        ("row,AP\ngamma_2,nan\n", "AP of gamma_2 is nan; expected a number"),
    ],
)
def test_what_is_wrong_with_results(rows, text, message):
    path = rows.folder / "results.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}: {message}"):
        find_table([str(rows.folder)])


def test_results_of_no_row(rows):
    (rows.folder / "results.csv").write_text("AP,row\n34.0\n35.0,\n36.0,gamma_2\n")
    table = find_table([str(rows.folder)])
    assert [row.paper for row in table.rows] == [{"AP": 36.0}, {}, {}]
    assert table.missing == []


def test_results_that_are_no_utf8(rows):
    path = rows.folder / "results.csv"
    path.write_bytes("row,note\ngamma_1,über\n".encode("latin-1"))
    with pytest.raises(ValueError, match=f"{path}: .*UTF-8"):
        find_table([str(rows.folder)])


def test_a_row_on_a_base(rows, tiny_config):
    """The base, the row's own keys, then the command line; the row's _BASE_ is not followed."""
    table = find_table([str(rows.folder)])
    cfg = compose(table.rows[1], find_base(tiny_config), ["SOLVER.MAX_ITER", "3"])
    assert cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA == 1.0
    assert cfg.MODEL.RETINANET.NUM_CONVS == 1
    assert cfg.SOLVER.BASE_LR == 0.001  # not Base.yaml's
    assert cfg.SOLVER.MAX_ITER == 3
    alone = compose(table.rows[1], None, [])
    assert (alone.SOLVER.BASE_LR, alone.SOLVER.MAX_ITER) == (7.0, get_cfg().SOLVER.MAX_ITER)


def test_the_yaml_of_a_config_gives_it_again(rows, tiny_config, tmp_path):
    cfg = compose(find_table([str(rows.folder)]).rows[0], find_base(tiny_config), ["SOLVER.STEPS", "(1, 2)"])
    (tmp_path / "again.yaml").write_text(as_yaml(cfg))
    again = get_cfg()
    add_focal_config(again)
    again.merge_from_file(str(tmp_path / "again.yaml"))
    assert again == cfg


@pytest.mark.parametrize(
    "text, word",
    [
        ("SOLVER: {BASE_RL: 1}", "BASE_RL"),
        ("SOLVER: {MAX_ITER: [1]}", "MAX_ITER"),
        ("- 1", "list"),
        ("SOLVER: {MAX_ITER", "expected"),
        ("SEED: !!python/object/apply:os.getpid []", "refused"),
    ],
)
def test_what_is_wrong_with_a_row(rows, tiny_config, text, word):
    path = rows.add("wrong", "")
    path.write_text(text)
    with pytest.raises(ValueError, match=f"(?s){path}.*{word}"):
        compose(find_table([str(path)]).rows[0], find_base(tiny_config), [])


@pytest.mark.parametrize(
    "opts, says",
    [
        (["SOLVER.BASE_RL", 1], "The command line: there is no key SOLVER.BASE_RL. Near it: SOLVER.BASE_LR"),
        (["SOLVER.BASE_LR=1"], "expected pairs of a key and its value"),
    ],
)
def test_what_is_wrong_with_the_command_line(rows, tiny_config, opts, says):
    (row,) = find_table([str(rows.add("right", ""))]).rows
    with pytest.raises(ValueError, match=says):
        compose(row, find_base(tiny_config), opts)


def test_a_row_may_compute_as_detectron2s_configs_do(rows, tiny_config):
    sizes = "!!python/object/apply:eval ['[[x, x * 2] for x in [4, 8]]']"
    path = rows.add("wide", f"MODEL: {{ANCHOR_GENERATOR: {{SIZES: {sizes}}}}}")
    (row,) = find_table([str(path)]).rows
    assert compose(row, find_base(tiny_config), []).MODEL.ANCHOR_GENERATOR.SIZES == [[4, 8], [8, 16]]


def test_the_row_to_compare_with():
    """Of several tables, that of the row changes its own."""
    tables = find_tables(["paper/table1a", "paper/table1b"])
    first, second = compared_with(tables, "table1b_gamma_5")
    assert (first.baseline, second.baseline) == (tables[0].baseline, "table1b_gamma_5")
    assert [row.name for row in second.rows] == [row.name for row in tables[1].rows]
    assert compared_with(tables, "configs/paper/table1b_gamma_5.yaml") == [first, second]
    with pytest.raises(ConfigError, match=r"--baseline gamma_5: expected the name of a row, such as .*table1b_gamma_5"):
        compared_with(tables, "gamma_5")


def test_an_unknown_base():
    with pytest.raises(FileNotFoundError, match="--data nowhere: expected quickstart, bccd, deeppcb"):
        find_base("nowhere")
