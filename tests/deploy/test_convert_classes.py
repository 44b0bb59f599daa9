"""Checkpoints for another list of classes, and the command line."""

import json
import math

import pytest
import torch
import torchvision
from detectron2.modeling import build_model

from focal_plugin.config.load import load_config
from focal_plugin.deploy.convert import ConvertError, map_classes
from focal_plugin.deploy.convert.__main__ import main
from focal_plugin.engine import AtomicCheckpointer

A = 6  # anchors at a location of tiny_config


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    """That of a detector of squares and discs."""
    model = build_model(load_config(tiny_config, ["MODEL.DEVICE", "cpu"]))
    torch.nn.init.normal_(model.head.cls_score.bias)
    torch.save({"model": model.state_dict(), "iteration": 7, "optimizer": {}}, tmp_path / "old.pth")
    return str(tmp_path / "old.pth"), model.eval()


def config_for(path, num_classes, *opts):
    return load_config(path, ["MODEL.DEVICE", "cpu", "MODEL.RETINANET.NUM_CLASSES", num_classes, *opts])


@torch.no_grad()
@pytest.mark.parametrize("new", [["disc", "star", "square"], ["disc", "square"], ["disc"], ["star", "moon", "sun"]])
def test_kept_classes_have_the_scores_they_had(new, checkpoint, tiny_config, tmp_path):
    path, old_model = checkpoint
    cfg = config_for(tiny_config, len(new), "MODEL.RETINANET.PRIOR_PROB", 0.02)
    weights, names = map_classes(cfg, path, ["square", "disc"], new)
    assert names["kept"] == [name for name in new if name in ("square", "disc")]
    assert set(names["new"]) == set(new) - {"square", "disc"}
    assert set(names["dropped"]) == {"square", "disc"} - set(new)

    torch.save({"model": weights}, tmp_path / "new.pth")
    model = build_model(cfg).eval()
    assert not _load(model, tmp_path / "new.pth")
    image = torch.rand(1, 3, 64, 64)
    outputs = []
    for detector, classes in ((old_model, 2), (model, len(new))):
        features = list(detector.backbone(image).values())
        logits, deltas = detector.head(features)
        outputs.append((logits[0].unflatten(1, (-1, classes)), deltas[0]))
    (old, old_deltas), (found, new_deltas) = outputs
    assert old.shape[1] == found.shape[1]
    assert torch.equal(old_deltas, new_deltas)
    bias = model.head.cls_score.bias.view(-1, len(new))
    for k, name in enumerate(new):
        if name in ("square", "disc"):
            torch.testing.assert_close(found[:, :, k], old[:, :, ["square", "disc"].index(name)])
        else:
            assert torch.allclose(bias[:, k], torch.tensor(-math.log(0.98 / 0.02)))
            weight = model.head.cls_score.weight.view(-1, len(new), 16 * 9)[:, k]
            assert 0.008 < weight.std() < 0.012


def _load(model, path):
    problems = []
    checkpointer = AtomicCheckpointer(model)
    checkpointer._log_incompatible_keys = problems.append
    checkpointer.load(str(path), checkpointables=[])
    return [
        line for found in problems for line in (*found.missing_keys, *found.unexpected_keys, *found.incorrect_shapes)
    ]


@pytest.mark.parametrize(
    "old, new, message",
    [
        (["square"], ["disc", "star", "sun"], r"2 for each of the config's \d+ anchors at a location; expected 1"),
        (["square", "disc"], ["disc"], "NUM_CLASSES is 3, but there are 1 new"),
        (["square", "square"], ["disc", "star", "sun"], "Of the checkpoint's classes square is there twice"),
        (["square", "disc"], ["sun", "star", "sun"], "Of the new classes sun is there twice"),
    ],
)
def test_lists_that_cannot_be(old, new, message, checkpoint, tiny_config):
    with pytest.raises(ConvertError, match=message):
        map_classes(config_for(tiny_config, 3), checkpoint[0], old, new)


def test_two_stage_models_are_refused(checkpoint, tiny_config):
    cfg = config_for(tiny_config, 3, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    with pytest.raises(ConvertError, match="META_ARCHITECTURE is GeneralizedRCNN; expected a dense detector"):
        map_classes(cfg, checkpoint[0], ["square", "disc"], ["a", "b", "c"])


def test_loading_names_the_command(checkpoint, tiny_config, caplog):
    for num_classes, says in ((3, True), (2, False)):
        caplog.clear()
        AtomicCheckpointer(build_model(config_for(tiny_config, num_classes))).load(checkpoint[0], checkpointables=[])
        assert ("python -m focal_plugin convert classes" in caplog.text) is says


# The command line


@pytest.mark.parametrize(
    "words, message",
    [
        (["MODEL.FOCAL.CLS_LOSS.NAME", "Nope"], "MODEL.FOCAL.CLS_LOSS.NAME is 'Nope'"),
        (["MODEL.META_ARCHITECTURE", "Nope"], "MODEL.META_ARCHITECTURE is 'Nope'"),
        (["MODEL.BACKBONE.NAME", "Nope"], "MODEL.BACKBONE.NAME is 'Nope'"),
        (["MODEL.RESNETS.DEPTH", "77"], "MODEL.RESNETS.DEPTH is 77"),
        (["MODEL.FOCAL.IMPORTS", "['nope']"], "MODEL.FOCAL.IMPORTS names 'nope'"),
    ],
)
def test_mistakes_in_the_config_by_command(words, message, checkpoint, tiny_config, tmp_path, capsys):
    given = [checkpoint[0], str(tmp_path / "out.pth"), "--config-file", tiny_config, "--from-classes", "square,disc"]
    assert main(["classes", *given, "--opts", *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_classes_by_command(checkpoint, tiny_config, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("square\ndisc\n", encoding="utf-8-sig")
    categories = [{"id": 9, "name": "disc"}, {"id": 3, "name": "star"}, {"id": 4, "name": "sun"}]
    (tmp_path / "new.json").write_text(json.dumps({"categories": categories}), encoding="utf-8-sig")  # of Windows
    out = str(tmp_path / "out.pth")
    command = ["classes", checkpoint[0], out, "--config-file", tiny_config]
    opts = ["--opts", "MODEL.RETINANET.NUM_CLASSES", "3"]
    for old in ("shapes_train", "square, disc", str(tmp_path / "names.txt")):
        assert (
            main([*command, "--force", "--from-classes", old, "--to-classes", str(tmp_path / "new.json"), *opts]) == 0
        )
        assert capsys.readouterr().out.splitlines() == [
            "kept       1  disc",
            "new        2  star, sun",
            "dropped    1  square",
            f"Written: {out}",
        ]
    assert not _load(build_model(config_for(tiny_config, 3)), out)
    assert main([*command, "--from-classes", "square,disc"]) == 2
    assert "exists and is left as it is" in capsys.readouterr().err
    assert main([*command, "--force", "--from-classes", "disc,square"]) == 0  # to those of DATASETS.TRAIN
    assert capsys.readouterr().out.startswith("kept       2  square, disc\n")
    (tmp_path / "latin.txt").write_text("carré\ndisc\n", encoding="latin-1")
    for old, message in (
        (str(tmp_path / "none.txt"), "There is no file"),
        (str(tmp_path / "latin.txt"), "latin.txt is no text in UTF-8"),
        ("square,,disc", "has an empty name"),
    ):
        assert main([*command, "--force", "--from-classes", old]) == 2
        assert message in capsys.readouterr().err


def test_a_backbone_by_command(tmp_path, capsys):
    source, out = tmp_path / "resnet18.pth", tmp_path / "out.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), source)
    assert main(["resnet", str(source), str(out)]) == 0
    assert f"Written: {out} and {tmp_path / 'out.yaml'}" in capsys.readouterr().out
    before = (tmp_path / "out.yaml").read_text()
    assert before.startswith("# Weights of resnet, converted.")

    out.unlink()
    assert main(["resnet", str(source), str(out)]) == 2  # the config is there, and may have been edited
    assert f"{tmp_path / 'out.yaml'} exists and is left as it is" in capsys.readouterr().err
    assert not out.exists()
    assert (tmp_path / "out.yaml").read_text() == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["torchvision", "none.pth", "out.pth"], "There is no file none.pth"),
        (["torchvision", "text.pth", "out.pth"], "text.pth is damaged or no file of PyTorch's"),
        (["detectron1", "text.pkl", "out.pth"], "text.pkl is damaged or no pickle"),
        (["torchvision", "number.pth", "out.pth"], "has int for 'epoch'; expected tensors by name"),
        (["torchvision", "number.pth", "out.pkl"], "out.pkl does not end in .pth"),
        (["resnet", "text.safetensors", "out.pth"], "text.safetensors is damaged or no file of safetensors'"),
    ],
)
def test_bad_files(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.pkl").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save({"epoch": 3}, "number.pth")
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()
