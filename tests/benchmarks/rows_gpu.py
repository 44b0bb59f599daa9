"""What a GPU is measured on: labels, class loss, whole training steps and whole detections, in mixed precision.

All of Detectron2's and torchvision's run under float16 autocast. A training step is all that a run does for a batch,
by each package's own trainer: zeroing, forward, backward, its checks, the loss scale and the optimiser.
"""

import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import rows_loss
import rows_matching
import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.modeling.matcher import Matcher
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.events import EventStorage
from rows_network import batch, build, config, convolutions, for_torchvision, give_it_detections, torchvision_model
from timing import Row
from torch import nn
from torchvision.models.detection._utils import Matcher as TorchvisionMatcher

from focal_plugin.anchors.cache import cached_anchors
from focal_plugin.deploy import optimize_for_inference
from focal_plugin.engine import StepTrainer, Trainer
from focal_plugin.engine.balance import BalanceHook
from focal_plugin.engine.trainer import use_channels_last
from focal_plugin.matchers.batch import match_images, to_device

D2, D2_NHWC, TORCHVISION = "Detectron2", "Detectron2, channels last", "torchvision"
LOSS_SCALE = 256.0  # so low that no gradient of an untrained model overflows, and the optimiser runs in each step


@dataclass(frozen=True)
class Setting:
    """The sizes of the inputs. The defaults are what the results are about; a test takes small ones on a CPU."""

    device: str = "cuda"
    height: int = 800
    width: int = 1216
    depth: int = 50
    boxes: int = 8
    counts: tuple[int, ...] = (8, 100, 1000)  # of boxes an image, for matching
    images: tuple[int, ...] = (8, 1, 16, 32)  # of a training step
    compile: bool = True

    @property
    def where(self) -> str:
        return self.device.upper()

    @property
    def size(self) -> str:
        return f"R{self.depth}-FPN, {self.height}×{self.width}, 80 classes, {self.boxes} boxes an image"


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the rows, the most important ones first; nothing is built before it is measured."""
    models = Models(setting)
    for count in setting.counts:
        yield from label_rows(models, count)
    yield from loss_rows(setting)
    first, *others = setting.images
    yield step_row(models, first)
    yield detect_row(models, 1)
    for images in others:
        yield step_row(models, images)
    yield detect_row(models, 8 if setting.device == "cuda" else 2)
    if setting.compile:  # last, since compiling takes long
        yield compiled_detect_row(models, 1)


class Models:
    """Builds each model once, on first use."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.cfg = config(setting.device, setting.depth)
        self.cfg.SOLVER.BASE_LR = 1e-7  # hundreds of steps on noise: the weights, and so the work, stay the same
        self.cfg.MODEL.FOCAL.CHANNELS_LAST = True
        self.dtype = torch.float16 if setting.device == "cuda" else None
        self.batch = functools.cache(self.batch)
        self.trainer = functools.cache(self.trainer)
        self.detector = functools.cache(self.detector)
        self.stock = functools.cache(self.stock)

    def batch(self, images: int, boxes: int | None = None) -> list[dict]:
        return batch(images, self.setting.height, self.setting.width, boxes=boxes or self.setting.boxes)

    def autocast(self):
        return torch.autocast(self.setting.device, self.dtype) if self.dtype else nullcontext()

    # Training

    def trainer(self, name: str) -> SimpleTrainer:
        """Return the trainer that users of ``name`` train with, its model in it."""
        cfg = self.cfg.clone()
        if name == TORCHVISION:
            model = TorchvisionLosses(torchvision_model(self.setting.height, self.setting.width, self.setting.device))
        elif name in (D2, D2_NHWC):
            model = build("RetinaNet", cfg)
            if name == D2_NHWC:
                use_channels_last(model)
        else:
            cfg.MODEL.META_ARCHITECTURE = "FocalRetinaNet"
            if "compiled" in name:
                cfg.MODEL.FOCAL.COMPILE = True
            torch.manual_seed(0)
            model = Trainer.build_model(cfg)
        calm(model)
        optimizer = build_optimizer(cfg, model)
        scaler = torch.amp.GradScaler(self.setting.device, init_scale=LOSS_SCALE, enabled=self.dtype is not None)
        if name.startswith("ours"):
            trainer = StepTrainer(model, [], optimizer, precision=self.dtype)
            trainer.grad_scaler = scaler
            trainer.register_hooks([BalanceHook(model)])  # as Trainer does
        elif self.dtype:
            trainer = AMPTrainer(model, [], optimizer, grad_scaler=scaler, precision=self.dtype)
        else:
            trainer = SimpleTrainer(model, [], optimizer)
        trainer.iter, trainer.storage = 1, EventStorage(1)
        return trainer

    def step(self, name: str, images: int) -> Callable[[], "Step"]:
        return lambda: Step(self.trainer(name), self.batch(images))

    # Inference

    def stock(self) -> nn.Module:
        """Return Detectron2's model with scores as a trained one has them; the others get its weights."""
        return give_it_detections(build("RetinaNet", self.cfg), self.batch(1))

    def detector(self, name: str, compile: bool = False, graphs: bool = False) -> nn.Module:
        if name == TORCHVISION:
            model = torchvision_model(self.setting.height, self.setting.width, self.setting.device)
            return give_torchvision_detections(model, for_torchvision(self.batch(1), self.setting.device)[0])
        if name == D2:
            return self.stock()
        if name == D2_NHWC:
            model = build("RetinaNet", self.cfg).eval()
            model.load_state_dict(self.stock().state_dict())
            use_channels_last(model)
            return model
        model = build("FocalRetinaNet", self.cfg)
        model.load_state_dict(self.stock().state_dict(), strict=False)
        return optimize_for_inference(model, self.dtype, compile=compile, **({"graphs": True} if graphs else {}))

    def detect(self, name: str, images: int, **options: bool) -> Callable[[], "Detect"]:
        precision = nullcontext if name.startswith("ours") else self.autocast

        def prepare() -> Detect:
            inputs = self.batch(images)
            if name == TORCHVISION:
                inputs = [image["image"] for image in inputs]  # on the CPU as for the others, divided by 255 in Detect
            return Detect(self.detector(name, **options), inputs, precision, self.setting.device)

        return prepare

    def convolutions(self, images: int, training: bool) -> Callable[[], Callable]:
        def prepare() -> Callable:
            model = build("RetinaNet", self.cfg).train(training)
            return convolutions(calm(model), self.batch(images), self.dtype or torch.float32, training)

        return prepare


class Step:
    """A step of ``trainer`` on the images of ``batch``."""

    def __init__(self, trainer: SimpleTrainer, batch: list[dict]):
        self.trainer, self.batch = trainer, batch

    def __call__(self) -> None:
        self.trainer.reset_data_loader(lambda: itertools.repeat(self.batch))
        with self.trainer.storage as storage:
            self.trainer.run_step()
            storage.step()
        self.trainer.iter += 1

    def own_bytes(self) -> int:
        """Return the memory of the model, its gradients and the optimiser."""
        tensors = [x for state in self.trainer.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
        for parameter in self.trainer.model.parameters():
            tensors += [parameter] if parameter.grad is None else [parameter, parameter.grad]
        return sum(x.nbytes for x in [*tensors, *self.trainer.model.buffers()])

    def note(self) -> str:
        scaler = getattr(self.trainer, "grad_scaler", None)
        fell = scaler is not None and scaler.is_enabled() and scaler.get_scale() < LOSS_SCALE
        return "gradients overflowed: some steps had no update" if fell else ""


class Detect:
    """The detections of ``model`` for images that are on the CPU, as a loader gives them."""

    def __init__(self, model: nn.Module, images: list, precision: Callable, device: str):
        self.model, self.images, self.precision, self.device = model, images, precision, device

    def __call__(self) -> list:
        images = self.images
        if torch.is_tensor(images[0]):
            images = [image.to(self.device).float() / 255 for image in images]
        with torch.no_grad(), self.precision():
            return self.model(images)

    def own_bytes(self) -> int:
        return sum(x.nbytes for x in [*self.model.parameters(), *self.model.buffers()])

    def note(self) -> str:
        first = self()[0]
        return f"{len(first.get('instances', first.get('scores')))} detections"


class TorchvisionLosses(nn.Module):
    """torchvision's RetinaNet, called as Detectron2's models are."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: list[dict]) -> dict:
        return self.model(*for_torchvision(images, next(self.parameters()).device))


@torch.no_grad()
def calm(model: nn.Module) -> nn.Module:
    """Keep the residual blocks of an untrained model from doubling the variance: float16 would overflow."""
    for name, buffer in model.named_buffers():
        if name.endswith(("conv3.norm.weight", "bn3.weight")):
            buffer.fill_(0.2)
    return model


@torch.no_grad()
def give_torchvision_detections(model: nn.Module, images: list, candidates: int = 1000) -> nn.Module:
    """As ``give_it_detections``, for torchvision's model."""
    head = calm(model.eval()).head
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    logits_of, deltas_of = head.classification_head.cls_logits, head.regression_head.bbox_reg
    nn.init.zeros_(logits_of.bias)
    features = list(model.backbone(model.transform(images)[0].tensors).values())
    outputs = head(features)
    logits_of.weight /= outputs["cls_logits"].std()
    deltas_of.weight *= 0.3 / outputs["bbox_regression"].std()
    logits = head(features)["cls_logits"].flatten()
    nn.init.constant_(logits_of.bias, -2.944 - logits.topk(min(candidates, len(logits))).values[-1].item())
    return model


def label_rows(models: Models, boxes: int) -> Iterator[Row]:
    """Yield matching alone, and all that is made of the ground truth, for a batch of 8 images."""
    setting, images = models.setting, 8
    size = f"{images} images of {boxes} boxes, {setting.height}×{setting.width}"

    def given(instances_on_device: bool = True):
        generator = models.trainer(D2).model.anchor_generator
        features = [
            torch.empty(1, 1, -(-setting.height // s), -(-setting.width // s), device=setting.device)
            for s in rows_matching.STRIDES
        ]
        inputs = models.batch(images, boxes)
        if instances_on_device:
            inputs = [to_device(image["instances"], torch.device(setting.device)) for image in inputs]
        return generator, features, inputs

    def their_matcher():
        generator, features, instances = given()
        anchors = Boxes.cat(generator(features))
        matcher = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
        return lambda: [matcher(pairwise_iou(image.gt_boxes, anchors)) for image in instances]

    def torchvisions_matcher():
        generator, features, instances = given()
        anchors = Boxes.cat(generator(features))
        matcher = TorchvisionMatcher(0.5, 0.4, allow_low_quality_matches=True)
        return lambda: [matcher(pairwise_iou(image.gt_boxes, anchors)) for image in instances]

    def our_matcher():
        model = models.trainer("ours").model
        _, features, instances = given()
        anchors = cached_anchors(model.anchor_generator, features)
        return lambda: match_images(model.anchor_matcher, anchors, instances)

    def floor():
        generator, features, _ = given()
        return Boxes.cat(generator(features)).tensor.clone

    def their_labels():
        model, (generator, features, inputs) = models.trainer(D2).model, given(instances_on_device=False)

        @torch.no_grad()
        def run():
            anchors = generator(features)
            return model.label_anchors(anchors, [image["instances"].to(setting.device) for image in inputs])

        return run

    def our_labels():
        model, (_, features, inputs) = models.trainer("ours").model, given(instances_on_device=False)
        return lambda: model.label_batch(features, inputs)

    yield Row(
        name=f"matching, {boxes} boxes, {setting.where}",
        size=size,
        variants={
            D2: their_matcher,
            TORCHVISION: torchvisions_matcher,
            "ours": our_matcher,
            "floor (a copy of the anchors)": floor,
        },
    )
    yield Row(
        name=f"labels, {boxes} boxes, {setting.where}",
        size=f"{size}, from boxes on the host to the targets of the losses",
        variants={D2: their_labels, "ours": our_labels},
    )


def loss_rows(setting: Setting) -> Iterator[Row]:
    """Yield the class loss of 2 and of 16 images, in float16 on a GPU."""
    for images in (2, 16) if setting.device == "cuda" else (1,):
        for row in rows_loss.rows(images, setting.height, setting.width, device=setting.device):
            row.name = f"class loss, {images} images, forward + backward, {setting.where}"
            yield row


def step_row(models: Models, images: int) -> Row:
    """Return a whole training step. At most 8 images for torchvision, which is not what is compared there."""
    names = [D2, D2_NHWC, "ours"]
    if models.setting.device == "cuda":
        names.append("ours, compiled")
    if models.setting.depth == 50 and images <= 8:
        names.insert(2, TORCHVISION)
    variants = {name: models.step(name, images) for name in names}
    if images <= 8:
        variants["floor (convolutions)"] = models.convolutions(images, training=True)
    return Row(f"train step, {images} images, {models.setting.where}", models.setting.size, variants, images=images)


def detect_row(models: Models, images: int) -> Row:
    """Return whole detections, from images on the host to boxes."""
    names = [D2, D2_NHWC, TORCHVISION] if models.setting.depth == 50 else [D2, D2_NHWC]
    variants = {name: models.detect(name, images) for name in [*names, "ours"]}
    if has_graphs() and models.setting.device == "cuda":
        variants["ours, CUDA graphs"] = models.detect("ours, CUDA graphs", images, graphs=True)
    variants["floor (convolutions)"] = models.convolutions(images, training=False)
    name = f"inference, {images} images, {models.setting.where}"
    return Row(name, f"{models.setting.size}, about 1,000 candidates", variants, images=images)


def compiled_detect_row(models: Models, images: int) -> Row:
    variants = {D2: models.detect(D2, images), "ours": models.detect("ours", images)}
    variants["ours, compiled"] = models.detect("ours, compiled", images, compile=True)
    name = f"inference compiled, {images} images, {models.setting.where}"
    return Row(name, models.setting.size, variants, images=images)


def has_graphs() -> bool:
    return "graphs" in inspect.signature(optimize_for_inference).parameters


warnings.filterwarnings("ignore", category=FutureWarning)  # Detectron2's AMPTrainer uses torch.cuda.amp
