"""Test-time augmentation by Detectron2's ``TEST.AUG`` keys, for one-stage models too."""

import logging
from collections.abc import Callable

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import DatasetMapperTTA, GeneralizedRCNNWithTTA
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Instances
from torch import nn

from ..engine import Trainer
from ..inference import suppress

logger = logging.getLogger(__name__)


class DenseTTA(nn.Module):
    """Test-time augmentation for a one-stage model: each image is detected in resized and flipped copies.

    It is called as the model is, in eval mode. The copies are made from the image as it comes, so it is best not
    resized before (``INPUT.MIN_SIZE_TEST 0``). The detections in all copies, in coordinates of the original image, go
    through the model's NMS and limit of detections together. ``DenseTTA(cfg, model)`` makes one from ``TEST.AUG``.

    Args:
        model: a FocalRetinaNet, RetinaNet or FCOS, or its ``optimize_for_inference``.
        mapper: returns the dicts of an image's copies, each with its ``transforms``, as Detectron2's
            ``DatasetMapperTTA`` does.
        batch_size: the number of copies that go through the model together.

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
        """Return a dict with ``instances`` for each image, as Detectron2's models do in inference.

        Args:
            batched_inputs: dicts with ``image``, a (C, H, W) tensor on the CPU, and, where the original image has
                another size, its ``height`` and ``width``.
        """
        assert not self.training, "Test-time augmentation is for inference: call eval() first."
        return [{"instances": self._detect(inputs)} for inputs in batched_inputs]

    @torch.no_grad()
    def _detect(self, inputs: dict) -> Instances:
        image = inputs["image"]  # (C, H, W)
        size = inputs.get("height", image.shape[1]), inputs.get("width", image.shape[2])
        copies = self.mapper({"image": image, "height": size[0], "width": size[1]})
        boxes, scores, classes = [], [], []
        for start in range(0, len(copies), self.batch_size):
            batch = copies[start : start + self.batch_size]
            outputs = self.model([{"image": copy["image"]} for copy in batch])  # boxes in pixels of the copy
            for copy, output in zip(batch, outputs):
                found = output["instances"]
                original = copy["transforms"].inverse().apply_box(found.pred_boxes.tensor.cpu().numpy())  # (D, 4)
                boxes.append(torch.as_tensor(original, dtype=torch.float32, device=found.scores.device))
                scores.append(found.scores)
                classes.append(found.pred_classes)
        return suppress(
            size,
            *map(torch.cat, (boxes, scores, classes)),
            iou_thresh=self.model.test_nms_thresh,
            max_detections=self.model.max_detections_per_image,
            clip=True,
        )


def with_tta(cfg: CfgNode, model: nn.Module, *, batch_size: int = 1) -> nn.Module:
    """Wrap ``model`` in the test-time augmentation of ``TEST.AUG``.

    That is ``DenseTTA`` for a one-stage model and Detectron2's ``GeneralizedRCNNWithTTA`` for a two-stage one.

    Raises:
        ValueError: the model is neither, or predicts keypoints.
    """
    bare = getattr(model, "module", model)
    if isinstance(bare, GeneralizedRCNN):
        if cfg.MODEL.KEYPOINT_ON:
            raise ValueError("MODEL.KEYPOINT_ON is True, and Detectron2 has no test-time augmentation for keypoints.")
        return GeneralizedRCNNWithTTA(cfg, bare, batch_size=batch_size).eval()
    return DenseTTA(cfg, bare, batch_size=batch_size).eval()


def evaluate_with_tta(cfg: CfgNode, model: nn.Module) -> dict:
    """Evaluate ``model`` with test-time augmentation on ``DATASETS.TEST``; ``_TTA`` is added to the results' names.

    As in Detectron2's tools/train_net.py, but copies are made from an image's own size, not that of
    ``INPUT.MIN_SIZE_TEST``. The evaluators write to ``inference_TTA`` in ``OUTPUT_DIR``.
    """
    logger.info("Evaluating with test-time augmentation (TEST.AUG) ...")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TEST = 0
    return Trainer.test_beside(cfg, with_tta(cfg, model), "_TTA")
