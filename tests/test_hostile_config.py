"""Whatever a key of a config is set to, nothing is executed, and only what is meant to be downloaded is."""

import itertools
import json
import os
import pickle
import re
import socket
import sys
from pathlib import Path
from urllib import request

import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from focal_plugin import ConfigError, add_focal_config
from focal_plugin.analysis.checks.case import Case
from focal_plugin.analysis.common import MISTAKES
from focal_plugin.analysis.doctor import CHECKS, examine
from focal_plugin.config.explain import flatten
from focal_plugin.config.load import load_config

# The modules of this key are programs, as its documentation says.
PROGRAMS = {"MODEL.FOCAL.IMPORTS"}
# What these name may be a URL, whose file is read as data.
DOWNLOADS = {
    "MODEL.WEIGHTS",
    "MODEL.FOCAL.TIMM.WEIGHTS",
    "DATASETS.PROPOSAL_FILES_TRAIN",
    "DATASETS.PROPOSAL_FILES_TEST",
}


def defaults():
    cfg = get_cfg()
    add_focal_config(cfg)
    return flatten(cfg)


DEFAULTS = defaults()
NUMBERS = sorted(key for key, default in DEFAULTS.items() if isinstance(default, int | float))


class Call:
    """Unpickled, it makes the file "executed"."""

    def __reduce__(self):
        return open, (os.environ["CANARY"], "w")


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A folder of hostile files, none of which may make the file "executed"."""
    folder = tmp_path / "hostile"
    (folder / "evilpkg" / "a").mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("CANARY", str(tmp_path / "executed"))
    program = "import os\nopen(os.environ['CANARY'], 'w')\n"
    for name in ("evil.py", "evilpkg/__init__.py", "evilpkg/a/__init__.py"):
        (folder / name).write_text(program)
    content = {"model": {}, "ids": [], "boxes": [], "objectness_logits": [], "__author__": Call()}
    for name in ("evil.pkl", "evilpkg/a/w.pkl"):
        (folder / name).write_bytes(pickle.dumps(content))
    for name in ("evil.pth", "evilpkg/a/w.pth"):
        torch.save(content, folder / name)
    (folder / "evil.yaml").write_text("!!python/object/apply:evil.x []\n")
    return tmp_path / "executed"


@pytest.fixture
def asked(monkeypatch):
    """What was asked of the network, which is not there."""
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(request, "urlopen", refuse)
    monkeypatch.setattr(request, "urlretrieve", refuse)
    return asked


def values(folder):
    """Text that something might load, import, evaluate or download."""
    return [
        str(folder / "evil.pkl"),
        str(folder / "evil.pth"),
        "evil.yaml",
        f"file://{folder}/evil.pkl",
        "https://example.invalid/evil.pkl",
        "detectron2://evil.pkl",
        "catalog://ImageNetPretrained/MSRA/R-50",
        "package://evilpkg.a/w.pth",
        "package://evil/w.pth",
        "hf-hub:evil/evil",
        "local-dir:evilpkg",
        "resnet18.hf-hub:evil/evil",
        "evil",
        "evil.x",
        "evilpkg.a",
        "__import__('evil')",
        "open(__import__('os').environ['CANARY'], 'w')",
        "!!python/object/apply:evil.x []",
        "{'_target_': 'evil.x'}",
        "${env:CANARY}",
        "$(touch executed)",
        "| touch executed",
    ]


def of_kind(default, texts):
    """The texts in the place of ``default``, as that kind of value and as text."""
    if not isinstance(default, list | tuple):
        return texts
    forms = (lambda text: text, lambda text: [text], entry)
    return [form(text) for text in texts for form in forms]


def entry(text):
    return [{"name": text, "_target_": text, "format": "coco", "json": text, "images": text}]


def check(path):
    """Do what ``--doctor`` does: read the config, then all checks, each of which may fail."""
    case = Case(str(path), ["MODEL.DEVICE", "cpu"], num_images=2)
    try:
        _ = case.cfg
    except MISTAKES:
        return
    for _ in examine(case, [check for check in CHECKS if check.name != "time and memory"]):  # reads what others read
        pass


@pytest.fixture
def base(tiny_config):
    content = yaml.safe_load(Path(tiny_config).read_text())
    content["DATASETS"]["TEST"] = []  # the same reader
    return content


def with_value(content, key, value):
    """The nested config ``content`` with another value of ``key``."""
    head, _, rest = key.partition(".")
    inner = content.get(head) if isinstance(content.get(head), dict) else {}
    return content | {head: with_value(inner, rest, value) if rest else value}


@pytest.fixture
def catalogs():
    before = set(DatasetCatalog), set(MetadataCatalog)
    yield
    for catalog, names in zip((DatasetCatalog, MetadataCatalog), before):
        for name in set(catalog) - names:
            catalog.remove(name)


@pytest.fixture
def soon(monkeypatch):
    """Leave out random numbers, which take most of the time of building a model."""
    for name in ("kaiming_uniform_", "kaiming_normal_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)


@pytest.mark.parametrize("key", sorted(DEFAULTS.keys() - NUMBERS))
def test_no_key_runs_or_downloads_anything(key, base, tmp_path, trap, asked, catalogs, soon):
    """One value for each key that may be text, in turn; test_no_value_of_any_key_does has all of all keys."""
    choices = of_kind(DEFAULTS[key], values(trap.with_name("hostile")))
    walk(key, [choices[7 * sorted(DEFAULTS).index(key) % len(choices)]], base, tmp_path, trap, asked)


def test_no_text_is_a_number(trap, asked):
    choices = itertools.cycle(values(trap.with_name("hostile")))
    for key in NUMBERS:
        with pytest.raises(ConfigError, match=re.escape(key)):
            load_config("", [key, next(choices)])
        assert not trap.exists() and not asked


@pytest.mark.slow
@pytest.mark.parametrize("key", sorted(DEFAULTS))
def test_no_value_of_any_key_does(key, base, tmp_path, trap, asked, catalogs, soon):
    walk(key, of_kind(DEFAULTS[key], values(trap.with_name("hostile"))), base, tmp_path, trap, asked)


def walk(key, choices, base, tmp_path, trap, asked):
    """Set ``key`` to each of the choices, and do what ``--doctor`` does."""
    if key in PROGRAMS:
        pytest.skip("its modules are imported: documented")
    base = with_value(base, "MODEL.LOAD_PROPOSALS", key.startswith("DATASETS.PROPOSAL"))
    if key.startswith("MODEL.FOCAL.TIMM"):
        base = with_value(base, "MODEL.BACKBONE.NAME", "build_timm_fpn_backbone")
        base = with_value(base, "MODEL.FOCAL.TIMM.WEIGHTS", "")
        base = with_value(base, "MODEL.FOCAL.TIMM.NAME", "test_efficientnet")
        base = with_value(base, "MODEL.FPN.IN_FEATURES", ["c3", "c4", "c5"])
    path = tmp_path / "config.yaml"
    for value in choices:
        path.write_text(yaml.safe_dump(with_value(base, key, value)))
        check(path)
        assert not trap.exists(), value
        assert "evil" not in sys.modules and "evilpkg" not in sys.modules, value
        assert not asked or key in DOWNLOADS, (value, asked)


@pytest.mark.parametrize("key", sorted(DOWNLOADS))
def test_what_is_downloaded_is_read_as_data(key, base, tmp_path, trap, monkeypatch, catalogs, soon):
    """A server that answers with a hostile pickle."""

    def answer(url, filename, reporthook=None):
        served.append(url)
        with open(filename, "wb") as file:
            file.write(trap.with_name("hostile").joinpath("evil.pkl").read_bytes())
        return filename, None

    served = []
    monkeypatch.setattr(request, "urlretrieve", answer)
    monkeypatch.setattr("iopath.common.file_io.get_cache_dir", lambda _=None: str(tmp_path / "cache"))
    base = with_value(base, "MODEL.LOAD_PROPOSALS", key.startswith("DATASETS.PROPOSAL"))
    if "TIMM" in key:
        base = with_value(base, "MODEL.BACKBONE.NAME", "build_timm_fpn_backbone")
        base = with_value(base, "MODEL.FOCAL.TIMM.NAME", "test_efficientnet")
        base = with_value(base, "MODEL.FPN.IN_FEATURES", ["c3", "c4", "c5"])
    urls = ("https://example.invalid/evil.pkl", "https://example.invalid/evil.pth")
    if key.endswith("TEST"):
        pytest.skip("no check of the doctor's reads it; tests/data/test_proposals.py evaluates")
    for url in urls:
        (tmp_path / "config.yaml").write_text(
            yaml.safe_dump(with_value(base, key, [url] if "PROPOSAL" in key else url))
        )
        check(tmp_path / "config.yaml")
    assert len(served) == len(urls) and not trap.exists()


def test_a_record_of_the_data_leads_nowhere(base, tmp_path, trap, asked, catalogs):
    """A data set whose file names are URLs, programs and pickles."""
    Image.new("RGB", (64, 64)).save(tmp_path / "hostile" / "a.png")
    for entry in base["DATASETS"]["LOCAL"]:
        entry["on_error"] = "skip"
        entry["images"] = str(tmp_path / "hostile")
        content = json.loads(Path(entry["json"]).read_text())
        names = ["a.png", *values(tmp_path / "hostile")]
        content["images"] = [{"id": i, "file_name": name} for i, name in enumerate(names)]
        content["images"] += [
            {"id": 100, "file_name": "a.png", "sem_seg_file_name": "https://example.invalid/a.png", "coco_url": "x"}
        ]
        for annotation in content["annotations"]:
            annotation |= {"densepose": "evil.pkl", "segmentation": {"counts": "evil", "size": [64, 64]}}
            annotation |= {"keypoints": "https://example.invalid/k", "bbox": [1, 1, 20, 20]}
        (tmp_path / os.path.basename(entry["json"])).write_text(json.dumps(content))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(base))
    check(tmp_path / "config.yaml")
    assert not trap.exists() and asked == []


def test_the_trap_works(trap, asked):
    """Each of the ways that the tests above rule out does make the file or is counted."""
    for run in (
        lambda: pickle.loads(Path("evil.pkl").read_bytes()),
        lambda: __import__("evil"),
        lambda: __import__("evilpkg.a"),
    ):
        run()
        assert trap.exists()
        trap.unlink()
    for name in ("evil", "evilpkg", "evilpkg.a"):
        sys.modules.pop(name, None)
    with pytest.raises(OSError, match="no network"):
        request.urlopen("https://example.invalid")
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("example.invalid", 80))
    assert len(asked) == 2
    assert isinstance(load_config(""), CfgNode)
