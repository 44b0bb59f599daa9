"""A detector of torchvision's that finds something, and the comparison with its converted twin."""

import torch
from torch import nn


@torch.no_grad()
def lively(model):
    """The model with statistics of features, and with heads that find something, of many scores and sizes."""
    images = (torch.rand(2, 3, 128, 128) - 0.45) / 0.22
    images[1, :, 100:] = 0  # as padding is
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        nn.init.uniform_(norm.weight, 0.8, 1.2)
        nn.init.normal_(norm.bias, std=0.1)
    model.train()
    features = list(model.backbone(images).values())
    model.eval()
    for layer in model.head.modules():
        if isinstance(layer, nn.Conv2d) and layer.out_channels == 256:
            nn.init.kaiming_normal_(layer.weight)
    outputs = model.head(features)
    heads = model.head.classification_head.cls_logits, model.head.regression_head.bbox_reg
    for layer, output, most in zip(heads, (outputs["cls_logits"], outputs["bbox_regression"]), (5.0, 0.3)):
        bias = layer.bias.mean()
        layer.weight *= most / output.abs().max()
        layer.bias.copy_(torch.randn_like(layer.bias) * 0.1 + bias.clamp(min=-2.5))
    return model


def assert_same_detections(theirs, ours, images):
    """Box by box to 1e-3 of a pixel, scores to 1e-3. Boxes of no size, which Detectron2 drops, are passed over.

    In double precision: in single, large boxes differ by some 1e-3, as between any two libraries.
    """
    theirs, ours, images = theirs.double(), ours.double(), [image.double() for image in images]
    with torch.no_grad():
        expected = theirs([image / 255 for image in images])
        found = ours([{"image": image} for image in images])
    for one, other in zip(expected, (result["instances"] for result in found), strict=True):
        w, h = (one["boxes"][:, 2:] - one["boxes"][:, :2]).unbind(1)
        real = (w > 0) & (h > 0)
        scores, labels, boxes = (one[key][real] for key in ("scores", "labels", "boxes"))
        assert min(len(scores), len(scores.unique())) > 50
        assert len(labels.unique()) > 1
        one = torch.cat([labels[:, None], scores[:, None], boxes], dim=1)  # (D, 6)
        other = torch.cat([other.pred_classes[:, None], other.scores[:, None], other.pred_boxes.tensor], dim=1)
        assert len(other) == len(one)
        distances, partners = torch.cdist(one, other.double(), p=torch.inf).min(dim=1)
        assert distances.max() < 1e-3
        assert len(partners.unique()) == len(one)  # in the same order but for scores as good as equal
        assert (scores - scores[partners]).abs().max() < 1e-6
