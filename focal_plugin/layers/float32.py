"""Islands of float32 in a model that is trained in bfloat16."""

import torch
from torch import Tensor, nn

from .replace import like_conv, replace_modules


class Float32Conv2d(nn.Conv2d):
    """A convolution that ignores autocast: it computes in its weights' dtype and returns its input's."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H', W'), as ``nn.Conv2d``."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def compute_top_blocks_in_float32(model: nn.Module) -> nn.Module:
    """Replace the convolutions of the levels above the pyramid, P6 and P7, by ``Float32Conv2d``; in place.

    For training in bfloat16 on a CPU. P6 and P7 of an image of up to 64 px have one cell, and there oneDNN's bfloat16
    gradient of a kernel of stride 2 reads memory that was never written (seen in PyTorch 2.14: NaN in most steps).
    These levels are a thousandth of a detector's work. Convolutions with a stride above 1 in modules named
    ``top_block`` are replaced. Returns ``model``.
    """
    for name, module in list(model.named_modules()):
        if name.split(".")[-1] == "top_block":
            replace_modules(module, _float32_twin)
    return model


def _float32_twin(module: nn.Module) -> nn.Module | None:
    if type(module) is not nn.Conv2d or max(module.stride) == 1:
        return None
    return like_conv(Float32Conv2d, module)
