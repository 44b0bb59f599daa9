"""What the README prints does what it says."""

import re
from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import focal_plugin
from focal_plugin import CLS_LOSS_REGISTRY, add_focal_config
from focal_plugin.registry import _CONFIG_KEYS as CONFIG_KEYS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def small_config():
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.merge_from_file(ROOT / "configs/Base-FocalRetinaNet.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    cfg.MODEL.RETINANET.NUM_CLASSES = 2
    return cfg


def test_the_example_of_an_own_component_trains(tmp_path, monkeypatch):
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "REGISTRY.register" in block]
    assert len([line for line in code.splitlines() if line.strip()]) < 15
    (name,) = re.findall(r"^class (\w+)", code, re.MULTILINE)
    (tmp_path / "my_losses.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    cfg = small_config()
    cfg.merge_from_list(["MODEL.FOCAL.IMPORTS", "['my_losses']", "MODEL.FOCAL.CLS_LOSS.NAME", name])

    monkeypatch.setattr(CLS_LOSS_REGISTRY, "_obj_map", dict(CLS_LOSS_REGISTRY._obj_map))  # registered for this test
    model = build_model(cfg)
    assert type(model.cls_loss).__name__ == name
    instances = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[8.0, 8, 40, 40]])), gt_classes=torch.tensor([1]))
    with EventStorage():
        losses = model([{"image": torch.zeros(3, 64, 64), "instances": instances}])
    sum(losses.values()).backward()
    assert model.head.cls_score.weight.grad.abs().sum() > 0


def test_every_shipped_component_is_listed():
    for registry_name, key in CONFIG_KEYS.items():
        (row,) = [line for line in README.splitlines() if line.startswith(f"| `{registry_name}_REGISTRY`")]
        registry = getattr(focal_plugin, f"{registry_name}_REGISTRY")
        shipped = [name for name, item in registry if item.__module__.startswith("focal_plugin.")]
        assert f"`{key}`" in row
        assert sorted(re.findall(r"`(\w+)`", row.split("|")[3])) == sorted(shipped)


def test_every_own_key_is_in_the_reference():
    def keys(node, stock, prefix=""):
        for key, value in node.items():
            if key not in stock:
                yield from keys(value, {}, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
            elif isinstance(value, dict):
                yield from keys(value, stock[key], f"{prefix}{key}.")

    ours = get_cfg()
    add_focal_config(ours)
    listed = re.findall(r"^\| `([A-Z0-9_]+(?:\.[A-Z0-9_]+)+)` \|", README, re.MULTILINE)
    assert sorted(listed) == sorted(keys(ours, get_cfg()))


def test_named_files_exist():
    for path in re.findall(r"configs/[\w./-]+\.(?:yaml|py)", README):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
