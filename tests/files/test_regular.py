"""Pipes, devices and files beyond measure are refused at once, whatever they stand for."""

import contextlib
import json
import os
import signal

import pytest
import torch
from PIL import Image

from focal_plugin import ConfigError
from focal_plugin.backbones.timm_weights import create_encoder
from focal_plugin.config.load import load_config
from focal_plugin.data import DataError, FocalDatasetMapper, check_files_of
from focal_plugin.data.coco import CocoSet
from focal_plugin.data.proposals import load_proposals_into_dataset
from focal_plugin.data.records import Checker
from focal_plugin.data.voc import VocSet
from focal_plugin.deploy.convert.files import read_content
from focal_plugin.engine import AtomicCheckpointer, settled_seed
from focal_plugin.files.regular import open_regular, read_regular
from focal_plugin.files.safe_load import load_torch, load_zoo

XML = "<annotation><object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
XML += "</object></annotation>"


@pytest.fixture(autouse=True)
def soon():
    """Fail a test that waits on a pipe or reads a device without end."""

    def stop(*_):
        pytest.fail("it took more than 5 seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def voc(tmp_path):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(tmp_path / "JPEGImages" / "a.png")
    (tmp_path / "Annotations" / "a.xml").write_text(XML)
    (tmp_path / "ImageSets" / "Main" / "all.txt").write_text("a\n")
    content = {"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    return tmp_path


def load_voc(root):
    return VocSet("x", str(root), "all").load(Checker("x"))


def load_coco(root):
    return CocoSet("x", str(root / "a.json"), str(root / "JPEGImages")).load(Checker("x"))


def test_the_set_is_sound(voc):
    assert len(load_voc(voc)[0]) == len(load_coco(voc)[0]) == 1


@pytest.mark.parametrize(
    ("load", "name"),
    [
        (load_voc, "Annotations/a.xml"),
        (load_voc, "ImageSets/Main/all.txt"),
        (load_voc, "JPEGImages/a.png"),
        (load_coco, "a.json"),
        (load_coco, "JPEGImages/a.png"),
    ],
)
def test_a_pipe_in_a_data_set(load, name, voc):
    (voc / name).unlink()
    os.mkfifo(voc / name)
    with pytest.raises(DataError, match=rf"{os.path.basename(name)}.*is a pipe; expected a file"):
        load(voc)


def test_a_pipe_as_a_training_image(voc, tiny_config):
    os.mkfifo(voc / "pipe.png")
    mapper = FocalDatasetMapper(load_config(tiny_config), is_train=False)
    with pytest.raises(DataError, match=r"pipe\.png is a pipe"):
        mapper({"file_name": str(voc / "pipe.png"), "width": 20, "height": 20})


def test_a_pipe_as_the_file_of_a_known_data_set(tmp_path, monkeypatch):
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    os.mkfifo(tmp_path / "a.json")
    from detectron2.data import MetadataCatalog

    MetadataCatalog.get("a_set_of_a_pipe").set(json_file=str(tmp_path / "a.json"))
    with pytest.raises(FileNotFoundError, match=r"a\.json.*no file"):
        check_files_of("a_set_of_a_pipe", "DATASETS.TRAIN", "")
    MetadataCatalog.remove("a_set_of_a_pipe")


@pytest.mark.parametrize("device", ["pipe", "/dev/zero"])
@pytest.mark.parametrize("in_base", [False, True], ids=["file", "base"])
def test_a_config(device, in_base, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.yaml").write_text(f"_BASE_: {device}\n")
    path = str(tmp_path / "a.yaml") if in_base else str(tmp_path / device)
    with pytest.raises(ConfigError, match=r"(pipe|zero) is a (pipe|device); expected a file"):
        load_config(path)


def test_a_config_of_a_gigabyte(tmp_path):
    path = tmp_path / "a.yaml"
    path.touch()
    os.truncate(path, 2**30)
    with pytest.raises(ConfigError, match=r"a\.yaml has more than 1,000,000 bytes"):
        load_config(str(path))


@pytest.mark.parametrize("ending", ["pth", "pkl", "pyth", "safetensors"])
@pytest.mark.parametrize("device", ["pipe", "/dev/zero"])
def test_weights(device, ending, tmp_path):
    path = tmp_path / f"w.{ending}"
    if device == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(device)
    checkpointer = AtomicCheckpointer(torch.nn.Linear(1, 1))
    with pytest.raises(OSError, match="which is no file"):
        checkpointer.resume_or_load(str(path), resume=False)
    read = {"pth": load_torch, "safetensors": read_content}.get(ending, load_zoo)
    for function in (read, read_content):
        with pytest.raises(OSError, match=r"w\.\w+ is a (pipe|device); expected a file"):
            function(str(path))
    with pytest.raises(OSError, match=r"MODEL\.FOCAL\.TIMM\.WEIGHTS"):
        create_encoder("test_efficientnet", str(path))


def test_proposals(tmp_path):
    os.mkfifo(tmp_path / "a.pkl")
    with pytest.raises(ConfigError, match="no file"):
        load_proposals_into_dataset([{"image_id": 1}], str(tmp_path / "a.pkl"))


def test_the_config_of_a_run(tmp_path):
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(OSError, match=r"config\.yaml is a pipe"):
        settled_seed(-1, str(tmp_path), again=True)


def test_what_is_opened(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    with open_regular(str(tmp_path / "a")) as file:
        assert file.read() == b"abc"
    assert read_regular(str(tmp_path / "a"), 3) == b"abc"
    with pytest.raises(OSError, match="has more than 2 bytes"):
        read_regular(str(tmp_path / "a"), 2)
    with pytest.raises(IsADirectoryError):
        open_regular(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        open_regular(str(tmp_path / "gone"))
    (tmp_path / "link").symlink_to("a")
    with contextlib.closing(open_regular(str(tmp_path / "link"))) as file:
        assert file.read(1) == b"a"


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n(executed) (w) file\nshowpage\n"


def test_an_image_that_is_a_program(voc, tiny_config, monkeypatch):
    """PIL gives an EPS, whatever its name, to Ghostscript, which runs it."""
    (voc / "bin").mkdir()
    ghostscript = voc / "bin" / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {voc}/executed\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{voc / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    (voc / "JPEGImages" / "a.png").write_bytes(EPS)
    for load in (load_voc, load_coco):
        with pytest.raises(DataError, match=r"a\.png.*is EPS, a program"):
            load(voc)
    mapper = FocalDatasetMapper(load_config(tiny_config), is_train=False)
    with pytest.raises(DataError, match=r"a\.png.*is EPS, a program"):
        mapper({"file_name": str(voc / "JPEGImages" / "a.png"), "width": 20, "height": 20})
    assert not (voc / "executed").exists()
    with contextlib.suppress(OSError):
        Image.open(voc / "JPEGImages" / "a.png").load()
    assert (voc / "executed").exists()  # the trap works
