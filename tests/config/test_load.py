"""Finding a config: a file, one of the shipped ones, or one of Detectron2's model zoo."""

import os
import sys
from pathlib import Path

import pytest

from focal_plugin.commands.train import main as train
from focal_plugin.config.load import find_config, load_config

CONFIGS = Path(__file__).parents[2] / "configs"
ZOO = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
SHIPPED = "quickstart/trees.yaml"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A current folder that is no checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [SHIPPED, f"configs/{SHIPPED}", f"./configs/{SHIPPED}"])
def test_a_shipped_config(name):
    assert Path(find_config(name)).samefile(CONFIGS / SHIPPED)


def test_a_shipped_config_is_read_with_what_it_is_based_on():
    cfg = load_config("paper/table1b_gamma_5.yaml", ["MODEL.DEVICE", "cpu"])
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA) == ("FocalRetinaNet", 5.0)


@pytest.mark.parametrize("base", [SHIPPED, f"configs/{SHIPPED}", f"[paper/table1b_gamma_5.yaml, {SHIPPED}]"])
def test_a_config_of_ones_own_on_a_shipped_one(elsewhere, base):
    (elsewhere / "sub").mkdir()
    (elsewhere / "sub" / "my.yaml").write_text(f"_BASE_: {base}\nSEED: 17\n")
    cfg = load_config("sub/my.yaml", ["MODEL.DEVICE", "cpu", "DATASETS.LOCAL", "[]"])
    assert (cfg.SEED, cfg.MODEL.FOCAL.TIMM.NAME, cfg.MODEL.RETINANET.NUM_CLASSES) == (17, "tf_efficientnet_lite0", 1)
    gamma = 5.0 if base.startswith("[") else 2.0
    assert gamma == cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA


def test_a_base_beside_the_config_comes_first(elsewhere):
    (elsewhere / "sub" / SHIPPED).parent.mkdir(parents=True)
    (elsewhere / "sub" / SHIPPED).write_text("VERSION: 2\nSEED: 3\n")
    (elsewhere / "sub" / "my.yaml").write_text(f"_BASE_: {SHIPPED}\n")
    cfg = load_config("sub/my.yaml")
    assert (cfg.SEED, cfg.MODEL.FOCAL.TIMM.NAME) == (3, load_config().MODEL.FOCAL.TIMM.NAME)


def test_a_base_that_is_nowhere(elsewhere):
    (elsewhere / "my.yaml").write_text("_BASE_: quickstart/no.yaml\n")
    with pytest.raises(FileNotFoundError, match=r"^my\.yaml: _BASE_ is quickstart/no\.yaml; .* shipped config of /"):
        load_config("my.yaml")


@pytest.mark.parametrize("can_import", [True, False])
def test_a_config_of_the_zoo(monkeypatch, can_import):
    """Also where Detectron2's module cannot be imported: it needs a part of setuptools that newer ones lack."""
    if not can_import:
        monkeypatch.delattr("detectron2.model_zoo", raising=False)
        monkeypatch.setitem(sys.modules, "detectron2.model_zoo", None)
    assert "detectron2" in find_config(ZOO) and os.path.isfile(find_config(ZOO))
    assert os.path.isfile(find_config(ZOO.replace(".yaml", ".py")))


@pytest.mark.parametrize("name", [ZOO, SHIPPED, f"configs/{SHIPPED}"])
def test_a_file_in_the_current_folder_comes_first(elsewhere, name):
    (elsewhere / name).parent.mkdir(parents=True)
    (elsewhere / name).write_text("VERSION: 2\n")
    assert find_config(name) == name


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("trees.yaml", "quickstart/trees.yaml"),
        ("configs/paper/table1b_gamma2.yaml", "paper/table1b_gamma_2.yaml"),
        ("COCO-Detection/retinanet_R50_FPN_1x.yaml", ZOO),
        ("no-such-thing", ""),
        ("../README.md", ""),  # a way out of the shipped configs
        ("", ""),
        ("paper", ""),
    ],
)
def test_no_such_config(elsewhere, name, near):
    with pytest.raises(FileNotFoundError) as error:
        find_config(name)
    text = str(error.value)
    assert text.startswith(f"--config-file {name}: there is no such file in {elsewhere}")
    assert text.endswith(".") and "model zoo" in text
    assert near in text and bool(near) == ("Near it: " in text)


@pytest.mark.parametrize("steps", [0, -5])
def test_a_run_of_no_steps(steps, tiny_config, loggers, capsys):
    assert train(["--config-file", tiny_config, "SOLVER.MAX_ITER", str(steps)]) == 2
    assert f"SOLVER.MAX_ITER is {steps}; expected a whole number ≥ 1" in capsys.readouterr().err
    assert train(["--config-file", tiny_config, "--doctor", "SOLVER.MAX_ITER", str(steps)]) == 1
    assert f"SOLVER.MAX_ITER is {steps}; expected a whole number ≥ 1" in capsys.readouterr().out
