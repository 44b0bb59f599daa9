"""The classification loss, forward and backward, from a head's outputs to their gradients."""

import torch
import torch.nn.functional as F
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from fvcore.nn import sigmoid_focal_loss_jit
from timing import Row
from torchvision.ops import sigmoid_focal_loss

from focal_plugin.losses.dense_focal import dense_focal_loss

STRIDES, A = (8, 16, 32, 64, 128), 9


def inputs(images, height, width, classes, device, dtype):
    """Logits (N, A·K, H, W) about the prior, and labels (N, A, H, W): 0.1 % positive, 0.2 % ignored."""
    generator = torch.Generator(device).manual_seed(0)  # on a GPU: it takes seconds to draw as many on a CPU
    logits, labels = [], []
    for stride in STRIDES:
        h, w = -(-height // stride), -(-width // stride)
        values = torch.randn(images, A * classes, h, w, generator=generator, device=device) - 4.6
        logits.append(values.to(dtype).requires_grad_())
        draw = torch.rand(images, A, h, w, generator=generator, device=device)
        level = torch.randint(classes, draw.shape, generator=generator, device=device)
        level[draw > 0.001] = classes
        level[draw > 0.998] = -1
        labels.append(level)
    return logits, labels


def rows(images=2, height=800, width=1216, classes=80, device="cpu"):
    dtype = torch.float32 if device == "cpu" else torch.float16

    def given():
        return inputs(images, height, width, classes, device, dtype)

    def backward(loss, logits):
        return torch.autograd.grad(loss, logits)

    def flat(loss_function):
        """Compute it as Detectron2's RetinaNet does: permute, concatenate, mask, one-hot."""

        def prepare():
            logits, labels = given()
            flat_labels = torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in labels], dim=1)

            def run():
                predicted = torch.cat([permute_to_N_HWA_K(x, classes) for x in logits], dim=1)
                valid = flat_labels >= 0
                onehot = F.one_hot(flat_labels[valid], num_classes=classes + 1)[:, :-1].to(predicted.dtype)
                loss = loss_function(predicted[valid], onehot, alpha=0.25, gamma=2.0, reduction="sum")
                return backward(loss, logits)

            return run

        return prepare

    def ours():
        logits, labels = given()

        def run():
            views = [x.view(images, A, classes, *x.shape[-2:]) for x in logits]
            return backward(dense_focal_loss(views, labels, alpha=0.25, gamma=2.0), logits)

        return run

    def floor():
        sources = [x.detach() for x in given()[0]]
        return lambda: [torch.empty_like(x).copy_(x) for x in sources]

    count = sum(A * classes * -(-height // s) * -(-width // s) for s in STRIDES) * images
    yield Row(
        name=f"class loss, forward + backward, {device.upper()}",
        size=f"{images}×{height}×{width}, {classes} classes, {count / 1e6:.1f}M logits, {str(dtype)[6:]}",
        variants={
            "Detectron2": flat(sigmoid_focal_loss_jit),
            "torchvision": flat(sigmoid_focal_loss),
            "ours": ours,
            "floor (a copy)": floor,
        },
        target={"ours": "≥ 20×, memory ≤ 1.3× the logits"} if device == "cpu" else {"ours": "≤ 1.5× the floor"},
        logits_bytes=count * dtype.itemsize,
    )
