"""The two subnets of RetinaNet (section 4)."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import CycleBatchNormList, ShapeSpec, get_norm
from detectron2.modeling.anchor_generator import build_anchor_generator
from torch import Tensor, nn

from ..contracts import fill_bias
from ..kernels.conv_relu import subnet
from ..kernels.sparse import Cells, convs_at
from ..registry import DENSE_HEAD_REGISTRY, build_bias_init
from ..structures import DenseTargets, unravel

# If the box subnet is needed at more than this share of all cells, whole maps are about as cheap.
_MAX_SHARE = 0.5

Norm = str | Callable[[int], nn.Module]  # what detectron2.layers.get_norm takes


@DENSE_HEAD_REGISTRY.register()
class FocalRetinaNetHead(nn.Module):
    """A class subnet and a box subnet of the same shape with separate weights, both shared by all levels.

    Its parameters have the names, the shapes and, from one seed, the initial values of Detectron2's ``RetinaNetHead``.

    Args:
        input_shape: the features' ``ShapeSpec``, one a level; all of one number of channels.
        num_classes: K foreground classes; background has no channel.
        num_anchors: A anchors a location, the same on every level.
        conv_dims: the channels of each 3×3 conv of a subnet; four of 256 in the paper.
        norm: the norm after each of those convs: "" for none, as in the paper, or a name or callable that
            ``detectron2.layers.get_norm`` takes.
        norm_sharing: what the levels share of each norm. "shared": everything, its statistics too; "per_level":
            nothing; "auto", as in Detectron2: everything, except that "BN" and "SyncBN" have statistics for each level.
        bias_init: fills the classifier's bias; an entry of ``BIAS_INIT_REGISTRY``.
    """

    takes_targets = True

    @configurable
    def __init__(
        self,
        *,
        input_shape: Sequence[ShapeSpec],
        num_classes: int,
        num_anchors: int,
        conv_dims: Sequence[int],
        norm: Norm = "",
        norm_sharing: str = "auto",
        bias_init: Callable[[nn.Conv2d, int, int], None],
    ):
        super().__init__()
        self.num_levels = len(input_shape)
        self.has_norm = bool(norm)
        norm = _norm_of_levels(norm, norm_sharing, self.num_levels)
        dims = [input_shape[0].channels, *conv_dims]
        # Two subnets of one shape that share no parameters, each applied to all levels (section 4).
        self.cls_subnet = _subnet(dims, norm)
        self.bbox_subnet = _subnet(dims, norm)
        # K·A outputs a location, each a sigmoid of its own, with none for background. The 4·A deltas serve all classes:
        # fewer parameters than deltas for each class, and as good (section 4).
        self.cls_score = nn.Conv2d(dims[-1], num_anchors * num_classes, kernel_size=3, padding=1)
        self.bbox_pred = nn.Conv2d(dims[-1], num_anchors * 4, kernel_size=3, padding=1)

        for module in self.modules():  # section 4.1: N(0, .01²) and bias 0, except for the classifier's
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        fill_bias(bias_init, self.cls_score, num_anchors, num_classes)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Sequence[ShapeSpec]) -> dict[str, object]:
        num_anchors = build_anchor_generator(cfg, input_shape).num_anchors
        if len(set(num_anchors)) != 1:
            raise ValueError(
                f"MODEL.ANCHOR_GENERATOR gives {num_anchors} anchors a location on the levels "
                f"{list(cfg.MODEL.RETINANET.IN_FEATURES)}; the subnets are shared, so all levels need the same number: "
                "give SIZES and ASPECT_RATIOS as many entries on each level."
            )
        return {
            "input_shape": input_shape,
            "num_classes": cfg.MODEL.RETINANET.NUM_CLASSES,
            "num_anchors": num_anchors[0],
            "conv_dims": [input_shape[0].channels] * cfg.MODEL.RETINANET.NUM_CONVS,
            "norm": cfg.MODEL.RETINANET.NORM,
            "norm_sharing": cfg.MODEL.FOCAL.HEAD.NORM_SHARING,
            "bias_init": build_bias_init(cfg),
        }

    def forward(
        self, features: Sequence[Tensor], targets: DenseTargets | None = None
    ) -> tuple[list[Tensor], list[Tensor] | Tensor]:
        """Return logits (N, A·K, H, W) and deltas (N, A·4, H, W) of each level, from its (N, C, H, W) features.

        With ``targets``, the deltas are those of the positives alone, (P, 4): the box loss needs no others. On a CPU
        the box subnet is then computed only around the positives, unless it has norms, which need whole maps, or the
        positives are nearly everywhere. Another number of levels than the head was built for is a ValueError.
        """
        if len(features) != self.num_levels:
            raise ValueError(f"The head was built for {self.num_levels} levels and was given {len(features)}.")
        logits = [self.cls_score(x) for x in subnet(self.cls_subnet, features)]
        if targets is None:
            return logits, self._deltas(features)
        # On a GPU whole maps are cheaper than finding the cells, whose number also depends on the data.
        whole = self.has_norm or features[0].is_cuda
        deltas = None if whole else self._deltas_around_positives(features, targets)
        return logits, targets.gather(self._deltas(features)) if deltas is None else deltas

    def _deltas(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [self.bbox_pred(x) for x in subnet(self.bbox_subnet, features)]

    def _deltas_around_positives(self, features: Sequence[Tensor], targets: DenseTargets) -> Tensor | None:
        """Return the positives' deltas, (P, 4); None if so many cells are needed that whole maps are cheaper."""
        cells, numbers, anchors = Cells(features), [], []
        for level, (positives, labels) in enumerate(zip(targets.positives, targets.labels)):
            image, anchor, y, x = unravel(positives, labels.shape)  # (P_l,) each
            numbers.append(cells.numbers(level, image, y, x))
            anchors.append(anchor)
        convs = [*(layer for layer in self.bbox_subnet if isinstance(layer, nn.Conv2d)), self.bbox_pred]
        outputs = convs_at(convs, features, cells, torch.cat(numbers), max_share=_MAX_SHARE)  # (P, A·4)
        if outputs is None:
            return None
        anchor = torch.cat(anchors)  # (P,)
        return outputs.unflatten(1, (-1, 4))[torch.arange(len(anchor), device=anchor.device), anchor]  # (P, 4)


def _subnet(dims: Sequence[int], norm: Norm) -> nn.Sequential:
    """3×3 convs with ``dims[0]`` inputs and ``dims[1:]`` outputs, each followed by ``norm``, if any, and ReLU."""
    layers: list[nn.Module] = []
    for c_in, c_out in pairwise(dims):
        layers.append(nn.Conv2d(c_in, c_out, kernel_size=3, padding=1))
        if norm:
            layers.append(get_norm(norm, c_out))
        layers.append(nn.ReLU(inplace=True))  # the conv does not need its output for backward
    return nn.Sequential(*layers)


class LevelNorms(nn.ModuleList):
    """One norm a level, used in turn: a subnet is applied to all levels, always in the same order.

    Like Detectron2's ``CycleBatchNormList``, but for any norm, and with a scale and a shift for each level.
    """

    def __init__(self, norms: Iterable[nn.Module]):
        super().__init__(norms)
        self._next = 0

    def forward(self, x: Tensor) -> Tensor:
        norm = self[self._next]
        self._next = (self._next + 1) % len(self)
        return norm(x)


def _norm_of_levels(norm: Norm, sharing: str, num_levels: int) -> Norm:
    """Return a norm for ``get_norm`` that the levels share as ``sharing`` says."""
    if sharing not in ("auto", "shared", "per_level"):
        raise ValueError(
            f"MODEL.FOCAL.HEAD.NORM_SHARING (norm_sharing) is {sharing!r}; expected 'auto', 'shared' or 'per_level'."
        )
    if norm and sharing == "per_level":
        return lambda channels: LevelNorms(get_norm(norm, channels) for _ in range(num_levels))
    batch_norms = {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm}
    if norm in batch_norms and sharing == "auto":  # the levels' features have different distributions
        return lambda channels: CycleBatchNormList(num_levels, bn_class=batch_norms[norm], num_features=channels)
    return norm
