"""Test-time augmentation for one-stage models, by Detectron2's ``TEST.AUG`` keys."""

import logging
import os
from collections.abc import Callable

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms
from detectron2.modeling import DatasetMapperTTA, GeneralizedRCNNWithTTA
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, Instances
from torch import nn

from ..engine import Trainer

logger = logging.getLogger(__name__)


class DenseTTA(nn.Module):
    """A one-stage model that looks at each image several times: resized and flipped, as ``TEST.AUG`` says.

    It is called as the model is, in eval mode. Each image is resized from the size it comes in, so images for it are
    best not resized before (``INPUT.MIN_SIZE_TEST 0``). The detections of all looks, in the coordinates of the original
    image, go through the model's own NMS and limit of detections together. ``DenseTTA(cfg, model)`` makes one.

    Args:
        model: a FocalRetinaNet, RetinaNet or FCOS, or what ``optimize_for_inference`` makes of it.
        mapper: makes of an image's dict those of its looks, each with its ``transforms``, as Detectron2's
            ``DatasetMapperTTA`` does.
        batch_size: how many looks go through the model together.

    Raises:
        ValueError: the model is not one-stage, or ``TEST.AUG.MIN_SIZES`` is empty.
    """

    @configurable
    def __init__(self, *, model: nn.Module, mapper: Callable[[dict], list[dict]], batch_size: int = 1):
        super().__init__()
        model = getattr(model, "module", model)  # one in DistributedDataParallel
        if not isinstance(model, DenseDetector):
            raise ValueError(
                f"DenseTTA got a {type(model).__name__}; expected a one-stage model (FocalRetinaNet, RetinaNet, FCOS). "
                "For a GeneralizedRCNN there is detectron2.modeling.GeneralizedRCNNWithTTA."
            )
        self.model = model
        self.mapper = mapper
        self.batch_size = batch_size

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module, *, batch_size: int = 1) -> dict:
        if not cfg.TEST.AUG.MIN_SIZES:
            raise ValueError("TEST.AUG.MIN_SIZES is empty; expected the lengths of the shorter side, in pixels.")
        return {"model": model, "mapper": DatasetMapperTTA(cfg), "batch_size": batch_size}

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """A dict with ``instances`` for each image, as Detectron2's models return in inference.

        Args:
            batched_inputs: dicts with ``image``, a (C, H, W) tensor on the CPU, and ``height`` and ``width`` of the
                original image where it is of another size.
        """
        assert not self.training, "Test-time augmentation is for inference: call eval() first."
        return [{"instances": self._detect(inputs)} for inputs in batched_inputs]

    @torch.no_grad()
    def _detect(self, inputs: dict) -> Instances:
        image = inputs["image"]  # (C, H, W)
        size = inputs.get("height", image.shape[1]), inputs.get("width", image.shape[2])
        looks = self.mapper({"image": image, "height": size[0], "width": size[1]})
        boxes, scores, classes = [], [], []
        for start in range(0, len(looks), self.batch_size):
            batch = looks[start : start + self.batch_size]
            images = [look["image"] for look in batch]  # without a size, for boxes in the pixels of the look
            for look, output in zip(batch, self.model([{"image": image} for image in images])):
                found = output["instances"]
                original = look["transforms"].inverse().apply_box(found.pred_boxes.tensor.cpu().numpy())  # (D, 4)
                boxes.append(torch.as_tensor(original, dtype=torch.float32, device=found.scores.device))
                scores.append(found.scores)
                classes.append(found.pred_classes)
        return self._merged(size, torch.cat(boxes), torch.cat(scores), torch.cat(classes))

    def _merged(
        self, size: tuple[int, int], boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor
    ) -> Instances:
        """The detections of an image of ``size`` among (D, 4) boxes, (D,) scores and (D,) classes of all looks."""
        boxes = Boxes(boxes)
        boxes.clip(size)
        keep = batched_nms(boxes.tensor, scores, classes, self.model.test_nms_thresh)
        keep = keep[: self.model.max_detections_per_image]
        return Instances(size, pred_boxes=boxes[keep], scores=scores[keep], pred_classes=classes[keep])


def with_tta(cfg: CfgNode, model: nn.Module, *, batch_size: int = 1) -> nn.Module:
    """``model`` with the test-time augmentation of ``TEST.AUG``: ``DenseTTA`` of a one-stage model, Detectron2's own
    ``GeneralizedRCNNWithTTA`` of a two-stage one.

    Raises:
        ValueError: it is neither, or finds keypoints.
    """
    bare = getattr(model, "module", model)
    if isinstance(bare, GeneralizedRCNN):
        if cfg.MODEL.KEYPOINT_ON:
            raise ValueError("MODEL.KEYPOINT_ON is True, and Detectron2 has no test-time augmentation for keypoints.")
        return GeneralizedRCNNWithTTA(cfg, bare, batch_size=batch_size).eval()
    return DenseTTA(cfg, bare, batch_size=batch_size).eval()


def evaluate_with_tta(cfg: CfgNode, model: nn.Module) -> dict:
    """The results of ``model`` with test-time augmentation on ``DATASETS.TEST``, each under its name and ``_TTA``.

    As in Detectron2's tools/train_net.py, but augmented from the images' own size, not from ``INPUT.MIN_SIZE_TEST``.
    What the evaluators write goes to ``inference_TTA`` in ``OUTPUT_DIR``.
    """
    logger.info("Evaluating with test-time augmentation (TEST.AUG) ...")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TEST = 0
    folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
    evaluators = [Trainer.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
    results = Trainer.test(cfg, with_tta(cfg, model), evaluators)
    return {f"{name}_TTA": result for name, result in results.items()}
