"""Small batches of targets and logits, and what a loss should see of them, anchor by anchor."""

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, Instances

from focal_plugin import IGNORED, NEGATIVE, POSITIVE, Anchors, DenseTargets

MIXED = (IGNORED, NEGATIVE, NEGATIVE, NEGATIVE, POSITIVE)
# Two levels of 2 anchors a location; one level; a batch without boxes; nothing but ignored anchors.
BATCHES = {
    "two levels": {"boxes": [2, 3]},
    "one level": {"boxes": [1], "grids": [(3, 4)]},
    "one class": {"boxes": [2, 1], "num_classes": 1},
    "an image without boxes": {"boxes": [0, 2]},
    "no boxes": {"boxes": [0, 0]},
    "no positives": {"boxes": [2, 2], "codes": (NEGATIVE, IGNORED)},
    "all ignored": {"boxes": [2, 2], "codes": (IGNORED,)},
    "all positive": {"boxes": [1, 2], "codes": (POSITIVE,)},
}


def stacked(matches):
    """The (N, R) indices and the (N, R) labels of matches image by image."""
    return tuple(map(torch.stack, zip(*matches)))


def draw_targets(boxes, num_classes=3, grids=((3, 5), (2, 3)), codes=MIXED, seed=0) -> DenseTargets:
    """Targets of images with so many boxes, each anchor's code drawn from ``codes``, and a quality of each positive."""
    generator = torch.Generator().manual_seed(seed)
    strides = [8 * 2**level for level in range(len(grids))]
    make = DefaultAnchorGenerator(sizes=[[2 * s, 3 * s] for s in strides], aspect_ratios=[[1.0]], strides=strides)
    anchors = Anchors.from_generator(make, [torch.zeros(len(boxes), 1, *grid) for grid in grids])
    matches, instances = [], []
    for count in boxes:
        corners = torch.rand(count, 2, generator=generator) * 20
        sizes = torch.rand(count, 2, generator=generator) * 20 + 4
        classes = torch.randint(num_classes, (count,), generator=generator)
        gt_boxes = Boxes(torch.cat([corners, corners + sizes], dim=1))
        instances.append(Instances((64, 64), gt_boxes=gt_boxes, gt_classes=classes))
        labels = torch.tensor(codes)[torch.randint(len(codes), (len(anchors),), generator=generator)].to(torch.int8)
        if count == 0:
            labels[labels == POSITIVE] = NEGATIVE
        matches.append((torch.randint(max(count, 1), (len(anchors),), generator=generator), labels))
    targets = DenseTargets.from_matches(anchors, stacked(matches), instances, num_classes)
    return targets.with_quality(targets.gt_boxes + torch.rand(targets.num_positives, 4, generator=generator) * 4)


def draw_logits(targets, dtype=torch.float64, scale=3.0, seed=1) -> list[torch.Tensor]:
    """One (N, A·K, H, W) leaf a level, which wants a gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, a * targets.num_classes, h, w) for n, a, h, w in (labels.shape for labels in targets.labels)]
    return [(torch.randn(s, generator=generator) * scale).to(dtype).requires_grad_() for s in shapes]


def views(logits, targets):
    """The (N, A, K, H, W) views of the logits that a loss is called with."""
    return [x.view(len(x), -1, targets.num_classes, *x.shape[-2:]) for x in logits]


def elements(logits, targets, soft=False):
    """Each logit of the anchors that are not ignored, its target and its class, as three vectors of E elements."""
    found = []
    for level, labels, positives in zip(views(logits, targets), targets.labels, targets.positives):
        start = sum(len(p) for p in targets.positives[: len(found)])
        x = level.permute(0, 1, 3, 4, 2).reshape(-1, targets.num_classes)  # (N·A·H·W, K), in the order of the labels
        classes = labels.flatten()
        wanted = torch.nn.functional.one_hot(classes.clamp(min=0), targets.num_classes + 1)[:, :-1].double()
        if soft:
            for i, place in enumerate(positives.tolist()):
                wanted[place, classes[place]] = targets.quality[start + i].double()
        used = classes != IGNORED
        numbers = torch.arange(targets.num_classes).expand_as(x)
        found.append((x[used].flatten(), wanted[used].flatten(), numbers[used].flatten()))
    return [torch.cat(parts) for parts in zip(*found)]
