"""Any convolutional encoder of timm under Detectron2's feature pyramid."""

import fnmatch
import logging
import math
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import ConfigError
from .pyramid import build_pyramid
from .timm_weights import check_name, create_encoder, import_timm

logger = logging.getLogger(__name__)

NORMS = ("FrozenBN", "BN", "SyncBN")


class TimmEncoder(Backbone):
    """An encoder of timm as a Detectron2 ``Backbone``: images (N, C, H, W) → {"c3": (N, C3, H/8, W/8), ...}.

    The feature ``c<k>`` is the encoder's last one of stride 2^k. Layers behind the last feature are dropped.

    Args:
        name: a name of ``timm.list_models()``; a tag chooses among timm's weights, as in "resnet18.a1_in1k".
        out_features: the features to return, from fine to coarse.
        weights: "" for random ones, "timm" for timm's own, or a file: see ``create_encoder``.
        in_channels: channels of the images.
        norm: "FrozenBN": batch norm keeps its statistics and scales, which small batches need; "BN" or "SyncBN": it is
            trained as usual.
        freeze_at: layers up to the feature of stride 2^freeze_at are not trained, nor is their batch norm. 0: all are.
        freeze: further parameters not to train, as patterns like those of file names, such as "*.conv_dw.weight".

    Raises:
        ImportError: timm is not installed.
        ConfigError: an argument names something that does not exist.
        ValueError: the weights are not this encoder's.
    """

    def __init__(
        self,
        name: str,
        *,
        out_features: Sequence[str] = ("c3", "c4", "c5"),
        weights: str = "",
        in_channels: int = 3,
        norm: str = "FrozenBN",
        freeze_at: int = 0,
        freeze: Sequence[str] = (),
    ) -> None:
        super().__init__()
        timm = import_timm()
        check_name(name)
        if norm not in NORMS:
            raise ConfigError(f"MODEL.FOCAL.TIMM.NORM (norm) is {norm!r}; expected one of {', '.join(NORMS)}.")
        with torch.device("meta"):  # without memory, only to read its features
            features = _features_by_level(timm.create_model(name, features_only=True).feature_info.info)
        unknown = [feature for feature in out_features if feature not in features]
        if unknown or not out_features:
            has = ", ".join(f"{feature} (stride {info['reduction']})" for feature, info in features.items())
            raise ConfigError(
                f"The timm encoder {name!r} has no feature {', '.join(unknown) or '(none was named)'}; "
                f"it has {has or 'none whose stride is a power of two'}. MODEL.FPN.IN_FEATURES names those to use."
            )
        self.net = create_encoder(
            name, weights, out_indices=[features[feature]["index"] for feature in out_features], in_chans=in_channels
        )
        self._out_features = list(out_features)
        self._out_feature_strides = {feature: features[feature]["reduction"] for feature in out_features}
        self._out_feature_channels = {feature: features[feature]["num_chs"] for feature in out_features}

        _cut_behind(self.net, features[out_features[-1]]["module"])
        if norm == "SyncBN":
            self.net = timm.layers.convert_sync_batchnorm(self.net)
        frozen = [info["module"] for feature, info in features.items() if _level(info) <= freeze_at]
        self._freeze(_layers_up_to(self.net, frozen[-1]) if frozen else [], freeze, all_norms=norm == "FrozenBN")

    def _freeze(self, layers: list[nn.Module], patterns: Sequence[str], all_norms: bool) -> None:
        """Freeze these layers, the parameters that match the patterns, and batch norm there or everywhere."""
        norms = self.net.modules() if all_norms else layers
        # In many encoders batch norm and the activation behind it are one layer. Detectron2's FrozenBatchNorm2d would
        # drop the activation, so the layer stays, and `train` keeps it in eval mode.
        self._frozen_norms = [module for module in norms if isinstance(module, _BatchNorm)]
        for module in [*layers, *self._frozen_norms]:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        parameters = dict(self.net.named_parameters())
        for pattern in patterns:
            names = fnmatch.filter(parameters, pattern)
            if not names:
                raise ConfigError(
                    f"MODEL.FOCAL.TIMM.FREEZE: the encoder has no parameter like {pattern!r}; "
                    f"it has {', '.join(list(parameters)[:4])}, ..."
                )
            for name in names:
                parameters[name].requires_grad_(False)

    def train(self, mode: bool = True) -> "TimmEncoder":
        """Set the mode as any module does, except that frozen batch norm stays in eval mode."""
        super().train(mode)
        for norm in self._frozen_norms:
            norm.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features by name, from fine to coarse, (N, C, H/stride, W/stride) each."""
        features = self.net(images)
        if getattr(self.net, "output_fmt", "NCHW") == "NHWC":
            features = [feature.permute(0, 3, 1, 2) for feature in features]  # (N, H, W, C) → (N, C, H, W)
        return dict(zip(self._out_features, features))


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build the encoder of ``MODEL.FOCAL.TIMM`` under a feature pyramid with the levels of ``MODEL.FOCAL.TOP_BLOCK``.

    ``MODEL.FPN.IN_FEATURES`` names the encoder's features by their level, e.g. ``[c3, c4, c5]``;
    ``MODEL.BACKBONE.FREEZE_AT`` counts stages by level too.

    Raises:
        ImportError: timm is not installed.
        ConfigError, ValueError: as ``TimmEncoder`` and ``build_pyramid``.
    """
    options = cfg.MODEL.FOCAL.TIMM
    encoder = TimmEncoder(
        options.NAME,
        out_features=cfg.MODEL.FPN.IN_FEATURES,
        weights=options.WEIGHTS,
        in_channels=input_shape.channels,
        norm=options.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        freeze=options.FREEZE,
    )
    _warn_of_mismatch(cfg, encoder)
    return build_pyramid(cfg, encoder)


def _warn_of_mismatch(cfg: CfgNode, encoder: TimmEncoder) -> None:
    """Warn of images in another format than the weights expect, and of random layers that would never be trained."""
    options = cfg.MODEL.FOCAL.TIMM
    if not options.WEIGHTS and not cfg.MODEL.WEIGHTS and (cfg.MODEL.BACKBONE.FREEZE_AT or options.NORM == "FrozenBN"):
        logger.warning(
            "The encoder starts from random weights, and some of them are frozen: from scratch, set "
            "MODEL.BACKBONE.FREEZE_AT 0 and MODEL.FOCAL.TIMM.NORM BN."
        )
    mean, std = ([255 * value for value in encoder.net.pretrained_cfg[key]] for key in ("mean", "std"))
    given = [*cfg.MODEL.PIXEL_MEAN, *cfg.MODEL.PIXEL_STD]
    as_trained = cfg.INPUT.FORMAT == "RGB" and all(
        math.isclose(a, b, abs_tol=2) for a, b in zip(given, [*mean, *std], strict=True)
    )
    if options.WEIGHTS and len(given) == 6 and not as_trained:
        logger.warning(
            f"The weights of {options.NAME} were trained with INPUT.FORMAT RGB, "
            f"MODEL.PIXEL_MEAN {[round(value, 3) for value in mean]} and "
            f"MODEL.PIXEL_STD {[round(value, 3) for value in std]}; this config has other values."
        )


def _level(info: dict) -> float:
    return math.log2(info["reduction"])


def _features_by_level(infos: list[dict]) -> dict[str, dict]:
    """Map c3, c4, ... to timm's description of the last feature of that stride; only strides that are powers of 2."""
    return {f"c{int(_level(info))}": info for info in infos if _level(info).is_integer()}


def _cut_behind(net: nn.Module, module: str) -> None:
    """Drop the blocks behind ``module``, e.g. "blocks.4": some of timm's encoders compute them for nothing."""
    parent, _, index = module.rpartition(".")
    blocks = getattr(net, parent, None) if parent else None
    if isinstance(blocks, nn.Sequential) and index.isdigit():
        setattr(net, parent, blocks[: int(index) + 1])


def _layers_up_to(net: nn.Module, module: str) -> list[nn.Module]:
    """List the modules up to the end of ``module``, e.g. "stages.1"; timm registers them in the order of their use."""
    names = [name.replace(".", "_") for name, _ in net.named_modules()]  # timm renames stages.1 to stages_1
    end = module.replace(".", "_")
    inside = [index for index, name in enumerate(names) if f"{name}_".startswith(f"{end}_")]
    if not inside:
        raise ConfigError(
            f"MODEL.BACKBONE.FREEZE_AT: the end of {module!r} cannot be found in this timm encoder. Set it to 0, and "
            "name what not to train in MODEL.FOCAL.TIMM.FREEZE."
        )
    return list(net.modules())[: inside[-1] + 1]
