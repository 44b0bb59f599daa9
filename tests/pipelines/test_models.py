"""Whole models, by config alone: each trains two steps and detects; one without our names is left as it is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone import ResNet

from focal_plugin import FocalBoxPredictor, FocalFCOS, FocalRPN
from focal_plugin.config.load import load_config

ROOT = Path(__file__).parents[2]
FOCAL_RPN = ["MODEL.PROPOSAL_GENERATOR.NAME", "FocalRPN"]
FASTER = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
# A config of the zoo and the keys that change.
MODELS = {
    "Faster R-CNN": (FASTER, [*FOCAL_RPN, "MODEL.ROI_HEADS.NAME", "FocalROIHeads"]),
    "Faster R-CNN, RPN alone": (FASTER, FOCAL_RPN),
    "Faster R-CNN, ROI heads alone": (FASTER, ["MODEL.ROI_HEADS.NAME", "FocalROIHeads"]),
    "class-agnostic": (
        FASTER,
        [*FOCAL_RPN, "MODEL.ROI_HEADS.NAME", "FocalROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True],
    ),
    "one class": (FASTER, [*FOCAL_RPN, "MODEL.ROI_HEADS.NAME", "FocalROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", 1]),
    "Mask R-CNN": (
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        [*FOCAL_RPN, "MODEL.ROI_HEADS.NAME", "FocalROIHeads"],
    ),
    "Cascade R-CNN": (
        "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
        [*FOCAL_RPN, "MODEL.ROI_HEADS.NAME", "FocalCascadeROIHeads"],
    ),
    "C4": (
        "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
        [*FOCAL_RPN, "MODEL.ROI_HEADS.NAME", "FocalRes5ROIHeads"],
    ),
    "RPN": ("COCO-Detection/rpn_R_50_FPN_1x.yaml", FOCAL_RPN),
    "FCOS": ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", ["MODEL.META_ARCHITECTURE", "FocalFCOS"]),
}


def train_two_steps(model, images):
    """The names of the losses. Every part of the model has moved after the two steps."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        losses = model.train()(images)
        assert all(loss.isfinite() for loss in losses.values())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    moved = {name.split(".")[0] for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    assert moved == {name.split(".")[0] for name in before}
    return set(losses)


@pytest.mark.parametrize(("name", "words"), MODELS.values(), ids=MODELS)
def test_by_config_alone(small_config, draw_images, name, words):
    cfg = small_config(name, *words)
    model = build_model(cfg)
    images = draw_images([3, 0], cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    found = train_two_steps(model, images)
    if cfg.MODEL.META_ARCHITECTURE != "FocalFCOS":
        stock = small_config(name, focal=False)
        stock.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        assert found == set(build_model(stock)(images))
    with torch.no_grad():
        for result in model.eval()(images):
            if "proposals" in result:
                assert len(result["proposals"])
                continue
            result = result["instances"]
            assert result.image_size == (64, 96) and (result.scores <= 1).all()
            assert result.has("pred_masks") == cfg.MODEL.MASK_ON
            assert cfg.MODEL.META_ARCHITECTURE == "FocalFCOS" or len(result)


def test_it_trains_and_is_evaluated_from_the_command_line(train_net, tmp_path):
    words = [*FOCAL_RPN, "MODEL.ROI_HEADS.NAME", "FocalROIHeads", "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"]
    words += ["MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4", "p5"]]
    words += ["MODEL.RPN.IN_FEATURES", ["p3", "p4", "p5", "p6", "p7"], "MODEL.RPN.POST_NMS_TOPK_TEST", 20]
    words += ["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1]
    words += ["MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "SOLVER.MAX_ITER", 2]
    assert "AP50" in train_net(*words, "SOLVER.ACCUMULATE", 2)["bbox"]
    state = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)["model"]
    assert state["roi_heads.box_predictor.cls_score.weight"].shape == (2, 16)
    assert state["proposal_generator.normalizer.mean"] != 100


def test_fcos_trains_and_is_evaluated_from_the_command_line(train_net):
    words = ["MODEL.META_ARCHITECTURE", "FocalFCOS", "MODEL.FOCAL.CLS_LOSS.NAME", "HingeLoss", "SOLVER.MAX_ITER", 2]
    assert "AP50" in train_net(*words, "SOLVER.ACCUMULATE", 2)["bbox"]


def test_class_frequencies_are_counted_for_the_roi_heads(tiny_config):
    words = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.ROI_HEADS.NUM_CLASSES", 2]
    words += ["MODEL.RETINANET.NUM_CLASSES", 80, "MODEL.FOCAL.BIAS_INIT.NAME", "ClassFrequencyBiasInit"]
    cfg = load_config(tiny_config, words)
    counts = cfg.MODEL.FOCAL.CLASS_FREQUENCIES
    assert len(counts) == 2 and min(counts) > 0
    priors = FocalBoxPredictor(cfg, ShapeSpec(channels=4)).cls_score.bias.sigmoid()
    assert priors.tolist() == pytest.approx([0.01 * count / sum(counts) for count in counts])


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["Mask R-CNN", "FCOS"])
def test_on_a_gpu(small_config, draw_images, which):
    name, words = MODELS[which]
    model = build_model(small_config(name, *words, "MODEL.DEVICE", "cuda"))
    with torch.autocast("cuda", dtype=torch.float16):
        train_two_steps(model, draw_images([3, 0]))
    assert len(model.eval()(draw_images([0]))) == 1


def test_parameters_are_those_of_detectron2(small_config):
    """But for background's column, and for what a normaliser keeps."""
    name, words = MODELS["Mask R-CNN"]
    ours = build_model(small_config(name, *words)).state_dict()
    theirs = build_model(small_config(name, focal=False)).state_dict()
    assert set(ours) - set(theirs) == {
        "proposal_generator.normalizer.mean",
        "roi_heads.box_predictor.normalizer.mean",
    }
    different = {key for key, value in theirs.items() if value.shape != ours[key].shape}
    assert different == {"roi_heads.box_predictor.cls_score.weight", "roi_heads.box_predictor.cls_score.bias"}


def test_c4_needs_its_own_heads(small_config):
    name, _ = MODELS["C4"]
    with pytest.raises(ValueError, match="FocalRes5ROIHeads"):
        build_model(small_config(name, "MODEL.ROI_HEADS.NAME", "FocalROIHeads"))


@pytest.mark.parametrize("name", ["mask_rcnn_R_50_FPN_focal_1x.py", "fcos_R_50_FPN_focal_1x.py"])
def test_lazy_config_trains(name, draw_images):
    model = LazyConfig.load(str(ROOT / "configs/pipelines" / name)).model
    model.backbone.bottom_up.stages = {"_target_": ResNet.make_default_stages, "depth": 18, "norm": "GN"}
    model.backbone.bottom_up.freeze_at = 0
    if "roi_heads" in model:
        model.roi_heads.num_classes = 2
        model.proposal_generator.post_nms_topk = (40, 40)
    else:
        model.num_classes = 2
    model = instantiate(model)
    kinds = {type(module) for module in model.modules()}
    assert {FocalRPN, FocalBoxPredictor} <= kinds or FocalFCOS in kinds
    train_two_steps(model, draw_images([2]))
    assert "instances" in model.eval()(draw_images([0]))[0]


STOCK = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from detectron2 import model_zoo
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

def losses(add=None):
    cfg = model_zoo.get_config({name!r})
    if add is not None:
        add(cfg)
    cfg.merge_from_list({words!r})
    torch.manual_seed(0)
    model = build_model(cfg)
    instances = Instances((64, 96), gt_boxes=Boxes([[8.0, 8, 40, 40]]), gt_classes=torch.tensor([1]))
    with EventStorage():
        found = model([{{"image": torch.full((3, 64, 96), 9.0), "instances": instances}}])
    return {{name: loss.item() for name, loss in found.items()}}

before = losses()
assert "focal_plugin" not in sys.modules
from focal_plugin import add_focal_config
assert losses() == before == losses(add_focal_config)
print(sorted(before))
"""


@pytest.mark.slow
def test_a_stock_model_is_left_as_it_is(small_words):
    code = STOCK.format(name=FASTER, words=small_words(FASTER))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr
    assert re.findall(r"loss_\w+", run.stdout) == ["loss_box_reg", "loss_cls", "loss_rpn_cls", "loss_rpn_loc"]


@pytest.mark.parametrize("which", ["Faster R-CNN", "Cascade R-CNN", "C4"])
@pytest.mark.parametrize("sigmoid", [True, False])
def test_federated_loss_is_refused(small_config, which, sigmoid):
    name, words = MODELS[which]
    words = [*words, "MODEL.ROI_BOX_HEAD.USE_FED_LOSS", True, "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", sigmoid]
    with pytest.raises(ValueError, match=r"MODEL\.ROI_BOX_HEAD\.USE_FED_LOSS .*is True.*set it to False"):
        build_model(small_config(name, *words))
