"""The registries whose entries a config chooses by name. A registry's docstring is the contract of its entries."""

import importlib
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry

from .config import ConfigError

DENSE_HEAD_REGISTRY = Registry("DENSE_HEAD")
DENSE_HEAD_REGISTRY.__doc__ = """
Heads of a dense detector: the two subnets of the paper's section 4.

Built with ``(cfg, input_shape)``, where ``input_shape`` is a list of ``ShapeSpec``, one a level. Called with the
features, one (N, C, H, W) tensor a level, a head returns ``(logits, deltas)``: one (N, A·K, H, W) and one
(N, A·4, H, W) tensor a level, channel ``a·K + k``. This is the contract of Detectron2's ``RetinaNetHead``.
``build_anchor_generator(cfg, input_shape).num_anchors`` lists A of each level, K is
``cfg.MODEL.RETINANET.NUM_CLASSES``, and ``build_bias_init(cfg)`` builds what fills the classifier's bias.
A head with the class attribute ``takes_targets = True`` is called with ``(features, targets)`` in training, where
``targets`` is the batch's ``DenseTargets``. It then returns the deltas of the positives alone, (P, 4), in the order of
``targets.gt_boxes``.
With ``__init__(self, cfg, input_shape, *, gamma=2.0)`` it has a key of its own, ``MODEL.FOCAL.HEAD.ARGS.GAMMA``.
"""

CLS_LOSS_REGISTRY = Registry("CLS_LOSS")
CLS_LOSS_REGISTRY.__doc__ = """
Classification losses: modules built with ``(cfg)`` and called with ``(logits, targets)``.

``logits``: one (N, A, K, H, W) view a level, of any strides and floating dtype. ``targets``: a ``DenseTargets``.
The result is the scalar float32 sum over every anchor that is not ignored; the meta-architecture normalises it.
A loss of each logit by itself derives from ``ElementwiseLoss`` and defines only ``elementwise(logits, targets)``; a
loss over a sample of the anchors derives from ``MiniBatchLoss`` and defines only ``choose``.
A loss with the class attribute ``needs_quality = True`` finds in ``targets.quality`` the IoU of each positive's
predicted box with its ground truth.
With ``__init__(self, cfg, *, gamma=2.0)`` it has a key of its own, ``MODEL.FOCAL.CLS_LOSS.ARGS.GAMMA``.
"""

BOX_LOSS_REGISTRY = Registry("BOX_LOSS")
BOX_LOSS_REGISTRY.__doc__ = """
Box losses: modules built with ``(cfg)`` and called with ``(deltas, anchors, gt_boxes, box2box_transform)``.

The first three are (P, 4) tensors, positives only (P may be 0): predicted deltas, anchors and matched boxes in
absolute XYXY pixels. The result is one loss a positive, (P,) float32.
With ``__init__(self, cfg, *, gamma=2.0)`` it has a key of its own, ``MODEL.FOCAL.BOX_LOSS.ARGS.GAMMA``.
"""

ANCHOR_MATCHER_REGISTRY = Registry("ANCHOR_MATCHER")
ANCHOR_MATCHER_REGISTRY.__doc__ = """
Rules that assign ground truth to anchors, built with ``(cfg)`` and called with ``(anchors, instances)``.

``anchors``: an ``Anchors``, whose ``flat`` are the boxes of all levels, an (R, 4) tensor of XYXY pixels; ``instances``:
the ``Instances`` of one image, with ``gt_boxes``, of which there may be none. The result is ``(matched, labels)``, both
(R,) in the order of ``anchors.flat`` and on its device: the int64 index of the matched box, and an int8 label,
``focal_plugin.IGNORED``, ``NEGATIVE`` or ``POSITIVE``. ``matched`` is meaningful where the label is POSITIVE.
A matcher need not handle crowds: ``FocalRetinaNet`` ignores the negatives in them afterwards (``ignore_regions``).
For GPUs a matcher may also have a method ``match_batch(anchors, gt_instances, regions, min_ioa)``. It matches all
images and ignores the negatives in ``regions``, without synchronising, and returns ``matched`` and ``labels``, both
(N, R); or None if it cannot.
A matcher that needs only IoU can also be called with a (G, R) matrix of IoU, like Detectron2's ``Matcher``, so that
Detectron2's own models can use it. Any other matcher raises a TypeError for a matrix.
With ``__init__(self, cfg, *, gamma=2.0)`` it has a key of its own, ``MODEL.FOCAL.MATCHER.ARGS.GAMMA``.
"""

BIAS_INIT_REGISTRY = Registry("BIAS_INIT")
BIAS_INIT_REGISTRY.__doc__ = """
Initialisations of the classifier's bias (section 3.3), built with ``(cfg)`` and called with
``(conv, num_anchors, num_classes)``: each fills the (A·K,) ``conv.bias`` in place, under ``torch.no_grad()`` or with
``nn.init``, channel ``a·K + k``.
With ``__init__(self, cfg, *, gamma=2.0)`` it has a key of its own, ``MODEL.FOCAL.BIAS_INIT.ARGS.GAMMA``.
"""

# A component that reads the class frequencies (class_weights.class_shares) has a class method
# needs_class_frequencies(cfg) → bool. If it returns True and the config has none, load_config counts the boxes.

CONFIG_KEYS = {
    "DENSE_HEAD": "MODEL.FOCAL.HEAD.NAME",
    "CLS_LOSS": "MODEL.FOCAL.CLS_LOSS.NAME",
    "BOX_LOSS": "MODEL.FOCAL.BOX_LOSS.NAME",
    "ANCHOR_MATCHER": "MODEL.FOCAL.MATCHER.NAME",
    "BIAS_INIT": "MODEL.FOCAL.BIAS_INIT.NAME",
}


def get_component(registry: Registry, name: str) -> Callable[..., Any]:
    """Return ``registry.get(name)``, or raise a ConfigError that lists the names and says how to add one."""
    if name in registry:
        return registry.get(name)
    key = CONFIG_KEYS[registry._name]
    known = ", ".join(sorted(known for known, _ in registry))
    raise ConfigError(
        f"{key} is {name!r}, which is not registered. Registered: {known}. "
        "If it is defined in a module of yours, add that module to MODEL.FOCAL.IMPORTS."
    )


def args_of(registry: Registry, cfg: CfgNode) -> CfgNode:
    """Return the section ``ARGS`` of the component of this kind, its own keys: see ``config.components``."""
    return cfg.MODEL.FOCAL[CONFIG_KEYS[registry._name].split(".")[2]].ARGS


def _build(registry: Registry, name: str, cfg: CfgNode, *more: Any) -> Any:
    """Return the component of that name, built with ``(cfg, *more)`` and its own keys."""
    component = get_component(registry, name)
    own = {key.lower(): value for key, value in args_of(registry, cfg).items() if value is not None}
    key, arguments = CONFIG_KEYS[registry._name], ", ".join(["cfg", *["input_shape"] * len(more), *own])
    try:
        return component(cfg, *more, **own)
    except Exception as error:
        if not isinstance(error, TypeError) or getattr(error.__traceback__, "tb_next", None) is not None:
            error.add_note(f"In the constructor of {key} {name}, called with ({arguments}).")
            raise
        raise TypeError(
            f"{key} {name} is built with ({arguments}), which it does not take: {error}. Give it __init__(self, "
            f"{arguments}), and further arguments defaults; or @configurable and from_config(cls, {arguments})."
        ) from error


def import_user_modules(cfg: CfgNode) -> None:
    """Import every module named in ``MODEL.FOCAL.IMPORTS``, so that the components they define are registered.

    Raises:
        ConfigError: ``cfg`` lacks the plugin's keys, one of these is no name, or a component's name is taken.
        ImportError: a module is not found; the message names the key and the module.
    """
    if "FOCAL" not in cfg.MODEL:
        raise ConfigError("The config has no MODEL.FOCAL: call focal_plugin.add_focal_config(cfg) after get_cfg().")
    for module in cfg.MODEL.FOCAL.IMPORTS:
        if not isinstance(module, str) or not all(map(str.isidentifier, module.split("."))):
            raise ConfigError(f"MODEL.FOCAL.IMPORTS has {module!r:.80}; expected a dotted name, as of a module.")
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
                raise  # the module exists; one of its own imports is missing
            raise ImportError(
                f"MODEL.FOCAL.IMPORTS names {module!r}, which is not found. Expected a dotted name that "
                "`python -c 'import NAME'` accepts from this folder; put its folder on PYTHONPATH."
            ) from error
        except AssertionError as error:
            if "already registered" not in str(error):  # in the words of a registry
                raise
            raise ConfigError(f"MODEL.FOCAL.IMPORTS, {module!r}: {error} Give the one in it another name.") from error


def build_dense_head(cfg: CfgNode, input_shape: list[ShapeSpec]) -> Any:
    """Build the head ``MODEL.FOCAL.HEAD.NAME`` for features of shapes ``input_shape`` (a list of ``ShapeSpec``)."""
    return _build(DENSE_HEAD_REGISTRY, cfg.MODEL.FOCAL.HEAD.NAME, cfg, input_shape)


def build_cls_loss(cfg: CfgNode) -> Any:
    """Build the classification loss ``MODEL.FOCAL.CLS_LOSS.NAME``."""
    return _build(CLS_LOSS_REGISTRY, cfg.MODEL.FOCAL.CLS_LOSS.NAME, cfg)


# Detectron2's names for its box losses, so that its configs work unchanged.
STOCK_BOX_LOSSES = {"smooth_l1": "SmoothL1BoxLoss", "giou": "GIoUBoxLoss"}
STOCK_BOX_LOSSES |= {"diou": "DIoUBoxLoss", "ciou": "CIoUBoxLoss"}


def build_box_loss(cfg: CfgNode) -> Any:
    """Build the box loss ``MODEL.FOCAL.BOX_LOSS.NAME``; if empty, what ``MODEL.RETINANET.BBOX_REG_LOSS_TYPE`` names."""
    name = cfg.MODEL.FOCAL.BOX_LOSS.NAME
    if not name:
        stock = cfg.MODEL.RETINANET.BBOX_REG_LOSS_TYPE
        if stock not in STOCK_BOX_LOSSES:
            raise ConfigError(
                f"MODEL.RETINANET.BBOX_REG_LOSS_TYPE is {stock!r}; expected one of {', '.join(STOCK_BOX_LOSSES)}, "
                "or name a registered loss in MODEL.FOCAL.BOX_LOSS.NAME."
            )
        name = STOCK_BOX_LOSSES[stock]
    return _build(BOX_LOSS_REGISTRY, name, cfg)


def build_matcher(cfg: CfgNode) -> Any:
    """Build the anchor matcher ``MODEL.FOCAL.MATCHER.NAME``."""
    return _build(ANCHOR_MATCHER_REGISTRY, cfg.MODEL.FOCAL.MATCHER.NAME, cfg)


def build_bias_init(cfg: CfgNode) -> Any:
    """Build the bias initialisation ``MODEL.FOCAL.BIAS_INIT.NAME``."""
    return _build(BIAS_INIT_REGISTRY, cfg.MODEL.FOCAL.BIAS_INIT.NAME, cfg)
