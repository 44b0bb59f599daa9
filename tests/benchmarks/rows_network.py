"""Whole training steps and whole detections, from images to weights and from images to boxes."""

import copy
from contextlib import nullcontext

import torch
from detectron2 import model_zoo
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from timing import Row
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from focal_plugin import add_focal_config
from focal_plugin.deploy import fast_dtype, optimize_for_inference
from focal_plugin.engine.trainer import use_channels_last


def config(device, depth=50):
    cfg = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    add_focal_config(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.RESNETS.DEPTH = device, "", depth
    if depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    return cfg


def batch(images, height, width, classes=80, boxes=8):
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([width, height])
    result = []
    for _ in range(images):
        extent = (0.05 + 0.4 * torch.rand(boxes, 2, generator=generator)) * size
        corner = torch.rand(boxes, 2, generator=generator) * (size - extent)
        instances = Instances((height, width), gt_boxes=Boxes(torch.cat([corner, corner + extent], dim=1)))
        instances.gt_classes = torch.randint(classes, (boxes,), generator=generator)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        result.append({"image": image, "instances": instances, "height": height, "width": width})
    return result


def build(architecture, cfg):
    cfg = cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = architecture
    torch.manual_seed(0)
    return build_model(cfg)


def torchvision_model(height, width, device):
    """torchvision's RetinaNet with the norm, the frozen layers and the anchors of the others."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50",
        weights=None,
        norm_layer=FrozenBatchNorm2d,
        trainable_layers=3,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    sizes = tuple(tuple(int(size * 2 ** (i / 3)) for i in range(3)) for size in (32, 64, 128, 256, 512))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    low, high = sorted((height, width))
    return RetinaNet(backbone, num_classes=80, min_size=low, max_size=high, anchor_generator=anchors).to(device)


def for_torchvision(images, device):
    inputs = [image["image"].to(device).float() / 255 for image in images]
    instances = [image["instances"].to(device) for image in images]
    return inputs, [{"boxes": x.gt_boxes.tensor, "labels": x.gt_classes} for x in instances]


@torch.no_grad()
def give_it_detections(model, images, candidates=1000):
    """Scale an untrained model so that its logits spread, and about ``candidates`` of them pass the threshold."""
    model.eval()
    for name, buffer in model.named_buffers():
        if name.endswith("conv3.norm.weight"):
            buffer.fill_(0.2)  # else each residual block doubles the variance
    for module in model.head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    nn.init.zeros_(model.head.cls_score.bias)

    def outputs():
        features = model.backbone(model.preprocess_image(images).tensor)
        logits, deltas = model.head([features[name] for name in model.head_in_features])
        return (torch.cat([x.flatten() for x in level]) for level in (logits, deltas))

    logits, deltas = outputs()
    model.head.cls_score.weight /= logits.std()
    model.head.bbox_pred.weight *= 0.3 / deltas.std()
    logits, _ = outputs()
    nn.init.constant_(model.head.cls_score.bias, -2.944 - logits.topk(min(candidates, len(logits))).values[-1].item())
    return model


def convolutions(model, images, dtype, training):
    """Return a function that runs only the model's convolutions on inputs of their sizes, and their gradients."""
    model, calls = copy.deepcopy(model), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda module, args: calls.append((module, args[0])))
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(images).tensor)
        model.head([features[name] for name in model.head_in_features])
    work = []
    for module, x in calls:
        learns = training and module.weight.requires_grad
        layout = {"dtype": dtype, "memory_format": torch.channels_last}
        x, weight = (torch.randn(y.shape, device=y.device).to(**layout) for y in (x, module.weight))
        work.append((x.requires_grad_(learns), weight.requires_grad_(learns), module.stride, module.padding))

    def run():
        for x, weight, stride, padding in work:
            y = nn.functional.conv2d(x, weight, None, stride, padding)
            if y.requires_grad:
                torch.autograd.grad(y, (x, weight), torch.empty_like(y).fill_(1))

    return run


def train_rows(images=2, height=480, width=640, depth=50):
    cfg, best = config("cpu", depth), fast_dtype("cpu")
    inputs = batch(images, height, width)

    def step(architecture, dtype, channels_last):
        def prepare():
            model = build(architecture, cfg).train()
            if channels_last:
                use_channels_last(model)
            optimizer = build_optimizer(cfg, model)
            precision = torch.autocast("cpu", dtype) if dtype else nullcontext()

            def run():
                with EventStorage(), precision:
                    loss = sum(model(inputs).values())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

            return run

        return prepare

    def torchvisions():
        model = torchvision_model(height, width, "cpu").train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.001, momentum=0.9)
        given = for_torchvision(inputs, "cpu")

        def run():
            loss = sum(model(*given).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return run

    variants = {"Detectron2": step("RetinaNet", None, False)}
    if depth == 50:
        variants["torchvision"] = torchvisions
    variants["ours"] = step("FocalRetinaNet", None, True)
    if best != torch.float32:
        variants[f"ours, {str(best)[6:]}"] = step("FocalRetinaNet", best, True)
    for dtype in dict.fromkeys([torch.float32, best]):
        variants[f"floor ({str(dtype)[6:]} convolutions)"] = lambda dtype=dtype: convolutions(
            build("RetinaNet", cfg).train(), inputs, dtype, True
        )
    yield Row(
        name="train step, CPU",
        size=f"R{depth}, {images}×{height}×{width}, 80 classes, float32 unless said",
        variants=variants,
        target={"ours": "≥ 1.2×", f"ours, {str(best)[6:]}": "≥ 3×"},
    )


def inference_rows(height=480, width=640, depth=50):
    cfg, best = config("cpu", depth), fast_dtype("cpu")
    inputs = batch(1, height, width)

    def theirs():
        model = give_it_detections(build("RetinaNet", cfg), inputs)
        return torch.no_grad()(lambda: model(inputs))

    def optimized(dtype, compile=False):
        def prepare():
            model = build("FocalRetinaNet", cfg)
            state = give_it_detections(build("RetinaNet", cfg), inputs).state_dict()
            model.load_state_dict(state, strict=False)
            model = optimize_for_inference(model, dtype, compile=compile)
            return torch.no_grad()(lambda: model(inputs))

        return prepare

    def torchvisions():
        model = torchvision_model(height, width, "cpu").eval()
        given = for_torchvision(inputs, "cpu")[0]
        return torch.no_grad()(lambda: model(given))

    variants = {"Detectron2": theirs}
    if depth == 50:
        variants["torchvision"] = torchvisions
    variants["ours"] = optimized(torch.float32)
    if best != torch.float32:
        variants[f"ours, {str(best)[6:]}"] = optimized(best)
    if depth == 50:  # in a test, compiling would take longest
        variants["ours, compiled"] = optimized(torch.float32, compile=True)
        if best != torch.float32:
            variants[f"ours, {str(best)[6:]}, compiled"] = optimized(best, compile=True)
    for dtype in dict.fromkeys([torch.float32, best]):
        variants[f"floor ({str(dtype)[6:]} convolutions)"] = lambda dtype=dtype: convolutions(
            build("RetinaNet", cfg).eval(), inputs, dtype, False
        )
    name = f"ours, {str(best)[6:]}"
    yield Row(
        name="inference, CPU",
        size=f"R{depth}, 1×{height}×{width}, about 1,000 candidates",
        variants=variants,
        target={"ours": "≥ 1.35×", name: "≥ 2.7×", "ours, compiled": "≥ 1.35×", f"{name}, compiled": "≥ 2.7×"},
    )
