"""What the pipelines share: a config to build components from, and targets for boxes without a grid."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ..registry import import_user_modules
from ..structures import Anchors, DenseTargets


@contextmanager
def components_config(cfg: CfgNode, **stand_ins: str) -> Iterator[CfgNode]:
    """A copy of ``cfg`` to build components from, where other keys replace some of ``MODEL.RETINANET``.

    User modules are imported first. A ValueError inside the ``with`` block gets a note that says which key replaces
    which.

    Args:
        cfg: a config with the plugin's keys.
        stand_ins: the full name of the other key for each that is replaced, as in
            ``IOU_LABELS="MODEL.RPN.IOU_LABELS"``.

    Raises:
        ConfigError: ``cfg`` has no ``MODEL.FOCAL``.
    """
    import_user_modules(cfg)
    copy = cfg.clone()
    copy.defrost()
    for key, other in stand_ins.items():
        copy.MODEL.RETINANET[key] = reduce(getattr, other.split("."), cfg)
    try:
        yield copy
    except ValueError as error:
        for key, other in stand_ins.items():
            error.add_note(f"{other} stands in for MODEL.RETINANET.{key} here.")
        raise


def row_targets(
    boxes: Sequence[Tensor], labels: Sequence[Tensor], gt_boxes: Sequence[Tensor], num_classes: int
) -> DenseTargets:
    """Build targets for boxes without a grid: each level counts as R_l locations, one below the other, of one anchor.

    Args:
        boxes: one (R_l, 4) tensor a level, the same for all images.
        labels: one (N, R_l) int64 tensor a level: a class in [0, K), K for background, −1 for ignored.
        gt_boxes: one (N, R_l, 4) tensor a level, the matched boxes; any values where there is none.
        num_classes: K.
    """
    is_positive = [((level >= 0) & (level < num_classes)).flatten() for level in labels]  # L × (N·R_l,)
    positives = [level.nonzero().squeeze(1) for level in is_positive]  # L × (P_l,)
    return DenseTargets(
        labels=[level[:, None, :, None].contiguous() for level in labels],  # L × (N, 1, R_l, 1)
        num_classes=num_classes,
        positives=positives,
        anchors=torch.cat([level[index % max(len(level), 1)] for level, index in zip(boxes, positives)]),
        gt_boxes=torch.cat([level.flatten(0, 1)[index] for level, index in zip(gt_boxes, positives)]),
        grid=Anchors(list(boxes), [(len(level), 1) for level in boxes], [1] * len(boxes)),
    )


def rows_as_dense(predictions: Tensor) -> Tensor:
    """Return (N, R, C) predictions as a view (N, 1, C, R, 1), the layout of the logits for ``row_targets``."""
    return predictions.transpose(1, 2)[:, None, :, :, None]
