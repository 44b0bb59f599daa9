"""A command line becomes a config; what cannot be right is said before anything runs."""

from argparse import Namespace

import pytest
import torch
from detectron2.data import DatasetCatalog

from focal_plugin.config.load import load_config, usable_device
from focal_plugin.engine import start_run
from focal_plugin.files.safe_yaml import ConfigError

pytestmark = pytest.mark.usefixtures("loggers")

ZOO = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


def test_a_stock_config_and_one_line():
    cfg = load_config(ZOO, ["MODEL.META_ARCHITECTURE", "FocalRetinaNet"])
    assert cfg.MODEL.META_ARCHITECTURE == "FocalRetinaNet"
    assert cfg.MODEL.FOCAL.CLS_LOSS.NAME == "SigmoidFocalLoss"
    assert cfg.SOLVER.BASE_LR == 0.01
    assert not cfg.is_frozen()


def test_a_lazy_config_where_a_yaml_config_is_read(tmp_path):
    (tmp_path / "my.py").write_text("for name in 'ab': print(name)\n")
    with pytest.raises(ConfigError, match=r"my\.py is a LazyConfig; expected a YAML config"):
        load_config(str(tmp_path / "my.py"))


def test_defaults_without_a_file():
    assert load_config().MODEL.FOCAL.HEAD.NAME == "FocalRetinaNetHead"


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "cpu"])
def test_device(monkeypatch, gpu, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert usable_device(device) == (device if gpu else "cpu")


def test_a_device_that_is_none():
    with pytest.raises(ValueError, match=r"MODEL\.DEVICE is 'gpu'; expected cpu, cuda"):
        load_config(opts=["MODEL.DEVICE", "gpu"])


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("MODEL.FOCAL.GAMMA", "MODEL.RETINANET.FOCAL_LOSS_GAMMA"),
        ("MODEL.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES"),
        ("MODEL.FOCAL.CLS_LOSS.NAMES", "MODEL.FOCAL.CLS_LOSS.NAME"),
        ("MODEL.FOCAL.CLASS_LOSS.NAME", "MODEL.FOCAL.CLS_LOSS.NAME"),
        ("solver.base_lr", "SOLVER.BASE_LR"),
    ],
)
def test_a_key_that_there_is_not(tmp_path, key, near):
    with pytest.raises(ConfigError, match=rf"command line: there is no key {key}\. Near it: .*{near}\b"):
        load_config(opts=[key, "2"])
    path, nested = tmp_path / "my.yaml", "2"
    for part in reversed(key.split(".")):
        nested = f"{{{part}: {nested}}}"
    path.write_text(nested)
    with pytest.raises(ConfigError, match=r"my\.yaml: there is no key "):
        load_config(str(path))


def test_nothing_is_near():
    with pytest.raises(ConfigError, match=r"there is no key XYZZY\.$"):
        load_config(opts=["XYZZY", "2"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("SOLVER.BASE_LR", "much", r"SOLVER\.BASE_LR is much \(str\); expected a value of type float\.$"),
        ("DATASETS.TRAIN", "mine", r"DATASETS\.TRAIN is mine \(str\); expected a value of type tuple, as in .*'a',"),
        ("MODEL.FOCAL.IMPORTS", "mine", r"MODEL\.FOCAL\.IMPORTS is mine \(str\); expected a value of type list"),
    ],
)
def test_a_value_of_another_type(key, value, message):
    with pytest.raises(ConfigError, match=message):
        load_config(opts=[key, value])


@pytest.mark.parametrize("words", [["SOLVER.BASE_LR"], ["SOLVER.BASE_LR=0.1"], ["SEED", 1, "VERSION"]])
def test_a_key_without_a_value(words):
    with pytest.raises(ConfigError, match=r"expected pairs of a key and its value"):
        load_config(opts=words)


def test_user_modules_and_local_sets(tiny_config, tmp_path, monkeypatch):
    (tmp_path / "module_of_a_user.py").write_text("imported = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    load_config(tiny_config, ["MODEL.FOCAL.IMPORTS", ["module_of_a_user"]])
    import module_of_a_user

    assert module_of_a_user.imported
    assert "shapes_train" in DatasetCatalog


@pytest.fixture
def start(tiny_config):
    """Start a run of the tiny config with some keys changed."""

    def start(*opts, eval_only=False):
        cfg = load_config(tiny_config, opts)
        cfg.freeze()
        start_run(cfg, Namespace(config_file=tiny_config, eval_only=eval_only))
        return cfg

    return start


def test_the_screen_is_short_and_the_log_is_not(start, capfd, tmp_path):
    start("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.3)
    screen = capfd.readouterr().out
    assert len(screen.splitlines()) <= 5
    assert "MODEL.RETINANET.SCORE_THRESH_TEST" in screen
    if not torch.cuda.is_available():
        assert screen.count("No GPU found") == 1
    log = (tmp_path / "output" / "log.txt").read_text()
    assert "Running with full config" in log and "Environment info" in log and "SCORE_THRESH_TEST" in log
    assert (tmp_path / "output" / "config.yaml").is_file()


def test_a_run_by_the_config_in_its_own_folder(start, tmp_path):
    start("SOLVER.MAX_ITER", 7)
    path = str(tmp_path / "output" / "config.yaml")
    cfg = load_config(path, ["SOLVER.MAX_ITER", 8])
    start_run(cfg, Namespace(config_file=path, eval_only=False))
    assert load_config(path).SOLVER.MAX_ITER == 8
    assert not list((tmp_path / "output").glob("*.part"))
    with pytest.raises(FileNotFoundError):  # after config.yaml was set aside
        start_run(cfg, Namespace(config_file=str(tmp_path / "gone.yaml"), eval_only=False))
    assert load_config(path).SOLVER.MAX_ITER == 8


def test_the_number_of_classes_is_checked(start, tmp_path):
    with pytest.raises(ValueError, match=r"MODEL\.RETINANET\.NUM_CLASSES is 5.*2 classes"):
        start("MODEL.RETINANET.NUM_CLASSES", 5)
    (tmp_path / "shapes_train.json").unlink()
    start(eval_only=True)  # the training set may be elsewhere
    with pytest.raises(ValueError, match=r"MODEL\.RETINANET\.NUM_CLASSES is 5"):
        start("MODEL.RETINANET.NUM_CLASSES", 5, eval_only=True)


@pytest.mark.parametrize(("key", "eval_only"), [("TRAIN", False), ("TEST", True)])
def test_without_data(start, key, eval_only):
    with pytest.raises(ValueError, match=rf"DATASETS\.{key} is empty; expected the name of a data set.*tiny\.yaml"):
        start(f"DATASETS.{key}", (), eval_only=eval_only)
    start(f"DATASETS.{'TRAIN' if eval_only else 'TEST'}", (), eval_only=eval_only)  # the other is not needed


def test_without_a_config(tmp_path):
    cfg = load_config(opts=["OUTPUT_DIR", str(tmp_path)])
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN is empty.*--config-file"):
        start_run(cfg, Namespace(config_file="", eval_only=False))


@pytest.mark.parametrize(
    ("dataset", "file"), [("coco_2017_val", r"instances_val2017\.json"), ("voc_2007_test", "VOC2007")]
)
def test_data_that_are_not_there(start, monkeypatch, tmp_path, dataset, file):
    monkeypatch.chdir(tmp_path)
    classes = 80 if "coco" in dataset else 20
    words = ["DATASETS.TEST", (dataset,), "MODEL.RETINANET.NUM_CLASSES", classes]
    message = rf"DATASETS\.TEST names '{dataset}', whose .*{file} does not exist .*DETECTRON2_DATASETS.*DATASETS\.LOCAL"
    with pytest.raises(FileNotFoundError, match=message):
        start(*words, eval_only=True)
