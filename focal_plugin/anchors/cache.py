"""The anchors of the last few image sizes, each built once.

Anchors depend on the size of the images alone. Training meets the same sizes again and again, and building the 200,000
anchors of an image costs as much as matching its boxes.
"""

from collections.abc import Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torch import Tensor, nn

from ..structures import Anchors

_SIZES_KEPT = 4  # of each generator; 7 MB each for images of 800 × 1333 pixels

# Beside the generator and not in it, so that copies and pickles of it have no anchors. Freed with the generator.
_cache: WeakKeyDictionary[nn.Module, dict[Hashable, Anchors]] = WeakKeyDictionary()


def cached_anchors(generator: Any, features: Sequence[Tensor]) -> Anchors:
    """Return ``Anchors.from_generator(generator, features)``, but the same object for the same sizes.

    They are built anew whenever they could differ: after the generator's cell anchors, strides or offset have changed
    or moved to another device; for a generator with another ``forward`` than ``DefaultAnchorGenerator``; while PyTorch
    traces, exports or compiles.
    """
    key = _key(generator, features)
    if key is None:
        return Anchors.from_generator(generator, features)
    kept = _cache.setdefault(generator, {})
    anchors = kept.pop(key, None)
    if anchors is None:
        anchors = Anchors.from_generator(generator, features)
    kept[key] = anchors  # a dict is in the order of insertion: the last is the newest
    while len(kept) > _SIZES_KEPT:
        kept.pop(next(iter(kept)), None)
    return anchors


def newest_anchors(generator: Any) -> Anchors | None:
    """Return what ``cached_anchors`` returned last for the generator; None if it was not kept."""
    return next(reversed(_cache.get(generator, {}).values()), None)


def _key(generator: Any, features: Sequence[Tensor]) -> Hashable | None:
    """Return everything that the anchors depend on; None if that is not known."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return None
    # A class that overrides one of these, an object whose `forward` was replaced or a hook may do anything.
    for name in ("forward", "_grid_anchors"):
        if getattr(getattr(generator, name, None), "__func__", None) is not getattr(DefaultAnchorGenerator, name):
            return None
    cells = list(generator.cell_anchors)
    if generator._forward_hooks or generator._forward_pre_hooks or any(x.requires_grad for x in cells):
        return None
    if any(type(x) is not Tensor or x.is_inference() for x in (*features, *cells)):  # a fake tensor has its own type
        return None
    # `_version` counts changes in place. Kept anchors hold their cell anchors, so no other tensor can get the same id.
    state = tuple((id(cell), cell._version) for cell in cells), tuple(generator.strides), generator.offset
    return state, tuple(tuple(feature.shape[-2:]) for feature in features)
