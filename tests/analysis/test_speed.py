"""Models take turns on the same images; the table names the sources of APs and weights."""

import csv
import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from focal_plugin.analysis import speed
from focal_plugin.analysis.__main__ import main
from focal_plugin.analysis.speed import Entry, last_ap, table, time_models
from focal_plugin.config.load import load_config


@pytest.fixture
def folder(tiny_config, tmp_path):
    """A run's folder, as train_net.py leaves it."""
    run = tmp_path / "runs" / "ours"
    run.mkdir(parents=True)
    cfg = load_config(tiny_config, ["MODEL.DEVICE", "cpu"])
    (run / "config.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, run / "model_0000003.pth")
    (run / "last_checkpoint").write_text("model_0000003.pth")
    lines = [{"iteration": 1, "bbox/AP": 12.0}, {"iteration": 3, "bbox/AP": 34.5, "bbox/AP50": 50.0}]
    (run / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture
def faster_rcnn(tmp_path):
    """A small stock Faster R-CNN with FPN."""
    path = tmp_path / "faster_rcnn.yaml"
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.merge_from_list(["DEPTH", 18, "RES2_OUT_CHANNELS", 64])
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS = ["res2", "res3", "res4", "res5"], 16
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_HEADS.IN_FEATURES = "StandardROIHeads", ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_BOX_HEAD.merge_from_list(["NAME", "FastRCNNConvFCHead", "NUM_FC", 1, "FC_DIM", 16])
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    cfg.INPUT.MIN_SIZE_TEST = 64
    path.write_text(cfg.dump())
    return path


def test_command(tiny_config, folder, faster_rcnn, tmp_path, capsys):
    words = ["speed", "--config-file", tiny_config, "--runs", str(folder), str(faster_rcnn), f"007={tiny_config}"]
    words += ["--ap", "faster_rcnn=30.1", "--num-images", "3", "--warmup", "1", "--optimize", "--paper"]
    assert main([*words, "MODEL.DEVICE", "cpu"]) == 0
    out = capsys.readouterr().out
    stem = tmp_path / "output" / "analysis" / "speed"
    with open(f"{stem}.csv") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert list(rows) == [name + end for name in ("ours", "faster_rcnn", "007") for end in ("", ", optimised")]
    assert rows["ours"]["AP"] == "34.5" and rows["ours"]["AP from"] == "metrics.json"
    assert rows["ours"]["weights"].endswith("model_0000003.pth")
    assert rows["ours, optimised"]["AP from"] == "before optimisation"
    assert (rows["faster_rcnn"]["AP"], rows["faster_rcnn"]["AP from"]) == ("30.1", "--ap")
    assert (rows["007"]["AP"], rows["007"]["weights"]) == ("", "random")
    for row in rows.values():
        assert 0 < float(row["ms (25 %)"]) <= float(row["ms (median)"]) <= float(row["ms (75 %)"])
    assert cv2.imread(f"{stem}.png").std() > 5
    assert "3 images" in out and "| 007 " in out and stem.with_suffix(".md").read_text().count("\n|") == 8


class Sleeper(torch.nn.Module):
    """Records its calls, and takes the given time on a fake clock."""

    def __init__(self, name, clock, seconds, seen):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.name, self.clock, self.seconds, self.seen = name, clock, list(seconds), seen

    def forward(self, batch):
        (image,) = batch
        self.seen.append((self.name, image["image_id"]))
        self.clock[0] += self.seconds[image["image_id"]]


def test_turns_and_times(tiny_config, monkeypatch):
    clock, seen = [0.0], []
    cfg = load_config(tiny_config, ["MODEL.DEVICE", "cpu"])
    records = [{"image_id": i} for i in range(4)]
    monkeypatch.setattr(speed, "DatasetMapper", lambda cfg, is_train: dict)
    monkeypatch.setattr(speed, "timer", lambda: clock[0])
    seconds = {"a": [0.1, 0.2, 0.3, 0.4], "b": [1.0, 1.0, 1.0, 9.0]}
    entries = [Entry(name, cfg, Sleeper(name, clock, s, seen), "random", None, "-") for name, s in seconds.items()]
    times = time_models(entries, records, warmup=2)
    np.testing.assert_allclose(times, 1000 * np.array(list(seconds.values())))
    assert [image for name, image in seen if name == "a"] == [0, 1, 0, 1, 2, 3]
    assert [name for name, _ in seen] == ["a", "b", "b", "a"] * 3  # who begins takes turns
    a, b = table(entries, times)
    assert a["ms (median)"] == pytest.approx(250) and b["ms (median)"] == pytest.approx(1000)
    assert b["ms (75 %)"] == pytest.approx(3000)


def test_the_ap_of_a_run(tmp_path):
    assert last_ap(tmp_path) is None
    metrics = tmp_path / "metrics.json"
    metrics.write_text('{"iteration": 1, "total_loss": 1.0}\n')
    assert last_ap(tmp_path) is None
    metrics.write_text('{"iteration": 1, "mine/bbox/AP": 7.5}\n')
    assert last_ap(tmp_path) == 7.5
    metrics.write_text('{"iteration": 1, "mine/bbox/AP": 7.5, "other/bbox/AP": 8.5}\n')
    assert last_ap(tmp_path) is None


@pytest.mark.parametrize(
    ("detections", "ap"),
    [("[]", 0.0), ('[{"image_id": 1}]', None), (None, None)],  # nothing found, a set without boxes, not known
)
def test_an_ap_that_is_nan(tmp_path, detections, ap):
    (tmp_path / "metrics.json").write_text('{"iteration": 1, "bbox/AP": NaN}\n')
    if detections:
        (tmp_path / "inference").mkdir()
        (tmp_path / "inference" / "coco_instances_results.json").write_text(detections)
    assert last_ap(tmp_path) == ap


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--runs", "nowhere"], "nowhere"),
        (["--runs", "EMPTY"], "config.yaml"),
        (["--runs", "TINY", "TINY"], "tiny"),
        (["--runs", "TINY", "--ap", "tiny"], "NAME=VALUE"),
        (["--runs", "TINY", "--ap", "tiny=high"], "high"),
        (["--runs", "TINY", "--ap", "tiny=nan"], "nan"),
        (["--runs", "TINY", "--ap", "other=3"], "other"),
        (["--runs", "TINY", "--join", "tiny,other"], "other"),
        (["--runs", "name=nowhere"], "--runs nowhere"),
        (["--runs", "tiny=TINY", "TINY"], "NAME=tiny"),
        (["--runs", "TINY", "--weights", "tiny=nowhere.pth"], "nowhere.pth"),
        (["--runs", "TINY", "--warmup", "-1"], "--warmup"),
    ],
)
def test_mistakes(tiny_config, tmp_path, capsys, words, message):
    (tmp_path / "empty").mkdir()
    words = [word.replace("TINY", tiny_config).replace("EMPTY", str(tmp_path / "empty")) for word in words]
    assert main(["speed", *words]) == 2
    assert message in capsys.readouterr().err


def test_names_and_lines(tiny_config, folder, monkeypatch):
    """Runs of one folder's name are told apart, and a line goes through those of known AP in the order given."""
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda axis, *xy, **style: drawn.append(xy))
    rows = [
        {"model": name, "AP": ap, **{f"ms ({which})": ms for which in ("median", "25 %", "75 %")}}
        for name, ap, ms in (("a", 30.0, 9.0), ("b", None, 8.0), ("c", 32.0, 11.0))
    ]
    speed.draw(folder / "x.png", rows, [["c", "b", "a"], ["b"]], paper=False, title="")
    assert [points for points in drawn if points] == [((11.0, 9.0), (32.0, 30.0))]
    cfg_words = ["MODEL.DEVICE", "cpu"]
    entries = [speed.build_entry(run, cfg_words, {"other": "3"}, {}) for run in (str(folder), f"other={folder}")]
    assert [(entry.name, entry.ap) for entry in entries] == [("ours", 34.5), ("other", 3.0)]
    assert {entry.weights for entry in entries} == {str(folder / "model_0000003.pth")}


def test_a_run_without_weights(folder, capsys):
    (folder / "model_0000003.pth").unlink()
    assert main(["speed", "--runs", str(folder)]) == 2
    assert "model_0000003.pth" in capsys.readouterr().err
