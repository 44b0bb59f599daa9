"""What keeps training in bfloat16 on a CPU right where feature maps have shrunk to one cell."""

import torch
from torch import Tensor, nn


class Float32Conv2d(nn.Conv2d):
    """A convolution that autocast does not reach: in the dtype of its weights, with a result in that of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Conv2d``."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def compute_top_blocks_in_float32(model: nn.Module) -> None:
    """Let the levels above the pyramid, P6 and P7, be computed in float32 under autocast; in place.

    For images of up to 64 px their maps have one cell, and there oneDNN's bfloat16 gradient of a kernel of stride 2
    holds memory that was never written (seen in PyTorch 2.14: NaN in most steps). These levels are a thousandth of a
    detector's work.

    Args:
        model: the convolutions of a stride above 1 in its modules named ``top_block`` become ``Float32Conv2d``.
    """
    for name, module in model.named_modules():
        if "top_block" in name.split(".") and type(module) is nn.Conv2d and max(module.stride) > 1:
            module.__class__ = Float32Conv2d
