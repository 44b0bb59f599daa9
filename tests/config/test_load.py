"""Finding a config: a file, one of the shipped ones, or one of Detectron2's model zoo."""

import os
import sys
from pathlib import Path

import pytest

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
