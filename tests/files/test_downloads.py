"""Whatever a URL says, its file is written into the cache of downloads and nowhere else."""

import pickle
from pathlib import Path
from urllib import request
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
import torch
from detectron2.utils.file_io import PathManager

from focal_plugin import ConfigError
from focal_plugin.backbones.timm_weights import create_encoder
from focal_plugin.commands.train import main as train
from focal_plugin.config.load import load_config
from focal_plugin.engine import AtomicCheckpointer

WEIGHTS = {"model": {"weight": np.ones((2, 3), np.float32)}, "__author__": "someone"}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Answer each download with a file of weights; the list of what was asked for."""
    asked = []

    def urlretrieve(url, filename, reporthook=None):
        asked.append(url)
        Path(filename).write_bytes(pickle.dumps(WEIGHTS))
        return filename, None

    monkeypatch.setattr(request, "urlretrieve", urlretrieve)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "home" / "cache"))
    monkeypatch.setattr("iopath.common.file_io.get_cache_dir", lambda _=None: str(tmp_path / "home" / "cache"))
    (tmp_path / "home" / "cache").mkdir(parents=True)
    return asked


def written(tmp_path):
    cache = tmp_path / "home" / "cache"
    return [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(cache)]


OUTSIDE = [
    "https://example.invalid/../sitecustomize.py",
    "https://example.invalid/a/../../../sitecustomize.py",
    "http://example.invalid/../a.pkl",
    "ftp://example.invalid/../a.pkl",
    "https://example.invalid/.\t./.\n./a.pkl",  # urlparse drops tabs and line ends
    "https://example.invalid/a?b/..",
    "detectron2://../../../a.pkl",
]


@pytest.mark.parametrize("url", OUTSIDE, ids=ascii)
def test_a_url_that_leads_out_of_the_cache(url, server, tmp_path):
    load = AtomicCheckpointer(torch.nn.Linear(3, 2)).load
    for read in (PathManager.get_local_path, PathManager.open, *[load] * ("?" not in url)):  # it drops what follows a ?
        with pytest.raises(ConfigError, match=r"leads out of .*; expected a URL without \.\."):
            read(url)
    assert server == [] and written(tmp_path) == []


def test_a_base_that_leads_out_of_the_cache(server, tmp_path):
    (tmp_path / "a.yaml").write_text("_BASE_: https://example.invalid/../../usercustomize.py\n")
    with pytest.raises(ConfigError, match="leads out of"):
        load_config(str(tmp_path / "a.yaml"))
    assert server == [] and written(tmp_path) == [tmp_path / "a.yaml"]


@pytest.mark.parametrize(
    "url",
    [
        "https://example.invalid/a/w.pkl",
        "detectron2://ImageNetPretrained/MSRA/R-50.pkl",
        "catalog://ImageNetPretrained/MSRA/R-50",
    ],
)
def test_other_urls_are_downloaded(url, server, tmp_path):
    model = torch.nn.Linear(3, 2)
    AtomicCheckpointer(model).load(url)
    assert len(server) == 1 and written(tmp_path) == []
    assert torch.equal(model.weight, torch.ones(2, 3))


NO_NETWORK = [
    (URLError(OSError(-2, "Name or service not known")), "Name or service not known"),
    (HTTPError("https://example.invalid/a.pkl", 404, "Not Found", None, None), "Not Found"),
    (ConnectionResetError(104, "Connection reset by peer"), "Connection reset"),
    (TimeoutError("timed out"), "timed out"),
]


@pytest.mark.parametrize(("error", "reason"), NO_NETWORK, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("url", ["https://example.invalid/a.pkl", "detectron2://ImageNetPretrained/MSRA/R-50.pkl"])
def test_weights_that_cannot_be_downloaded(url, error, reason, server, tmp_path, monkeypatch):
    def urlretrieve(*args, **kwargs):
        raise error

    monkeypatch.setattr(request, "urlretrieve", urlretrieve)
    where = {"MODEL.WEIGHTS (in a LazyConfig train.init_checkpoint)": AtomicCheckpointer(torch.nn.Linear(3, 2)).load}
    where["MODEL.FOCAL.TIMM.WEIGHTS"] = lambda url: create_encoder("resnet18", url)
    for key, load in where.items():
        with pytest.raises(FileNotFoundError) as told:
            load(url)
        text = str(told.value)
        assert text.startswith(f"{key} is {url}: ") and "could not be downloaded (" in text and reason in text
        assert "Without a network, get the file on another machine, and give the path" in text
    assert written(tmp_path) == []


def test_a_training_without_a_network_ends_in_a_line(server, tiny_config, loggers, monkeypatch, capsys):
    def urlretrieve(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(request, "urlretrieve", urlretrieve)
    words = ["--config-file", tiny_config, "MODEL.WEIGHTS", "https://example.invalid/a.pkl"]
    assert train(words) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: MODEL.WEIGHTS (in a LazyConfig")
