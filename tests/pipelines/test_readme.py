"""The lines of the page "Inside stock models" do what they say, as printed."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import instantiate
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY

import focal_plugin
from focal_plugin.files.safe_yaml import merge_from_file
from tests.docs.pages import PAGES, blocks, commands

PAGE = PAGES["docs/stock_models.md"]
REGISTRIES = {
    "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
}


def losses(model, images):
    found = model(images)
    sum(found.values()).backward()
    return set(found)


def test_the_table_lists_them_all():
    listed = set(re.findall(r"`(MODEL\.[A-Z_.]+): (\w+)`", PAGE))
    ours = {
        (key, name)
        for key, registry in REGISTRIES.items()
        for name, item in registry
        if item.__module__.startswith("focal_plugin.pipelines")
    }
    assert listed == ours
    assert all(hasattr(focal_plugin, name) for _, name in ours)


@pytest.mark.parametrize(
    "base", ["COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"]
)
def test_the_yaml_lines(small_config, draw_images, tmp_path, base):
    (lines,) = blocks(PAGE, "yaml")
    (tmp_path / "lines.yaml").write_text("VERSION: 2\n" + lines)
    cfg = small_config(base)
    merge_from_file(cfg, str(tmp_path / "lines.yaml"))
    model = build_model(cfg)
    assert type(model.proposal_generator).__name__ == "FocalRPN"
    assert type(model.roi_heads).__name__ == "FocalROIHeads"
    assert {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"} <= losses(model, draw_images([2, 0]))


def test_the_command(train_net, tiny_config, small_words, tmp_path):
    (command,) = commands(PAGE)
    assert command[:3] == ["focal", "train", "--config-file"]
    data = yaml.safe_load(Path(tiny_config).read_text())
    words = [*small_words(command[3]), "DATASETS.LOCAL", str(data["DATASETS"]["LOCAL"])]
    words += ["DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_test',)", "SOLVER.MAX_ITER", 2]
    words += ["INPUT.MIN_SIZE_TRAIN", "[64]", "INPUT.MIN_SIZE_TEST", 64, "SOLVER.IMS_PER_BATCH", 2]
    words += ["DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", tmp_path / "output"]
    words += ["SOLVER.CLIP_GRADIENTS.ENABLED", True]  # the rate is one for 16 images
    assert "AP50" in train_net(*command[4:], *words, config=command[3])["bbox"]
    state = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)["model"]
    assert "proposal_generator.normalizer.mean" in state and "roi_heads.box_predictor.normalizer.mean" in state


def test_the_lazy_config(draw_images):
    names = {}
    (code,) = blocks(PAGE, "python")
    exec(code, names)
    model = names["model"]
    model.backbone.bottom_up.stages = {"_target_": ResNet.make_default_stages, "depth": 18, "norm": "GN"}
    model = instantiate(model)
    assert isinstance(model, focal_plugin.FocalFCOS) and isinstance(model.cls_loss, focal_plugin.VarifocalLoss)
    assert losses(model, draw_images([2, 0])) == {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
