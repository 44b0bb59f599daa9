"""Mini-batches of anchors against brute force over all anchors."""

import pytest
import torch
from detectron2.config import get_cfg
from torchvision.ops import nms

from focal_plugin import (
    IGNORED,
    BCELoss,
    DenseTargets,
    MiniBatchLoss,
    OHEMLoss,
    SampledBCELoss,
    add_focal_config,
    build_cls_loss,
)
from focal_plugin.losses import mining
from tests.losses.batches import BATCHES, draw_logits, draw_targets, views

K = 3
# R = 2 · (7·9 + 4·5) anchors an image, that overlap by up to .6; the batch of 16 has to look at more than 64 of them
GRIDS = [(7, 9), (4, 5)]
LOSSES = [OHEMLoss(batch_size_per_image=16), OHEMLoss(positive_fraction=0.25), SampledBCELoss(batch_size_per_image=16)]
all_losses = pytest.mark.parametrize("loss", LOSSES, ids=repr)


def anchors_of_image(logits, targets, image):
    """Of one image, in the order of ``targets.grid.boxes``: (R, K) logits, (R,) labels and (R, 4) boxes."""
    rows = torch.cat([x[image].permute(2, 3, 0, 1).reshape(-1, x.shape[2]) for x in views(logits, targets)])
    labels = torch.cat([x[image].permute(1, 2, 0).flatten() for x in targets.labels])
    return rows, labels, torch.cat(targets.grid.boxes)


def cross_entropy(rows, labels):
    """(R,) in float64 from probabilities."""
    p = torch.sigmoid(rows.double())
    onehot = torch.nn.functional.one_hot(labels.clamp(min=0), p.shape[1] + 1)[:, :-1]
    return -(onehot * p.log() + (1 - onehot) * (1 - p).log()).sum(dim=1)


def nms_among(which, boxes, loss, thresh):
    """The indices that NMS leaves of the anchors that ``which`` is True of, hardest first."""
    which = which.nonzero().squeeze(1)
    return which[nms(boxes[which].double(), loss[which].detach(), thresh)]


def brute_force(logits, targets, size, thresh, fraction):
    """The sum of the mini-batches, from an NMS over all anchors; and how many positives and negatives they have."""
    total, counts = 0, []
    for image in range(len(logits[0])):
        rows, labels, boxes = anchors_of_image(logits, targets, image)
        used = labels != IGNORED
        rows, labels, boxes = rows[used], labels[used], boxes[used]
        loss = cross_entropy(rows, labels)
        if fraction:
            positives = nms_among(labels != K, boxes, loss, thresh)[: int(size * fraction)]
            negatives = nms_among(labels == K, boxes, loss, thresh)[: round(len(positives) * (1 / fraction - 1))]
            kept = torch.cat([positives, negatives])
        else:
            kept = nms_among(labels >= 0, boxes, loss, thresh)[:size]
        total = total + loss[kept].sum()
        counts.append(((labels[kept] != K).sum().item(), (labels[kept] == K).sum().item()))
    return total, counts


@pytest.mark.parametrize("size", [4, 8, 16, 1000])
@pytest.mark.parametrize("thresh", [0.0, 0.31, 0.51, 0.7, 1.0])  # none of them the IoU of two anchors
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_ohem_against_nms_over_all_anchors(size, thresh, fraction, seed):
    targets = draw_targets([2, 3], K, GRIDS, seed=seed)
    logits = draw_logits(targets, seed=seed)
    expected, _ = brute_force(logits, targets, size, thresh, fraction)
    loss = OHEMLoss(batch_size_per_image=size, nms_thresh=thresh, positive_fraction=fraction)
    found = loss(views(logits, targets), targets)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for mine, wanted in zip(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits)):
        torch.testing.assert_close(mine, wanted, rtol=1e-8, atol=1e-12)


def test_three_negatives_a_positive():
    targets = draw_targets([2, 3, 0], K, GRIDS, seed=1)
    logits = draw_logits(targets)
    _, counts = brute_force(logits, targets, 16, 0.7, 0.25)
    assert counts == [(4, 12), (4, 12), (0, 0)]  # what the comparison above compares with
    loss = OHEMLoss(batch_size_per_image=16, positive_fraction=0.25)
    loss(views(logits, targets), targets).backward()
    assert [rows_with_gradient(logits, targets, image) for image in range(3)] == [16, 16, 0]


def rows_with_gradient(logits, targets, image):
    rows, _, _ = anchors_of_image([x.grad for x in logits], targets, image)
    assert torch.equal(rows.any(dim=1), rows.all(dim=1))
    return rows.all(dim=1).sum().item()


def test_a_tiny_batch_still_has_a_positive():
    targets = draw_targets([3], K, GRIDS)
    logits = draw_logits(targets)
    OHEMLoss(batch_size_per_image=2, positive_fraction=0.25)(views(logits, targets), targets).backward()
    assert rows_with_gradient(logits, targets, 0) == 4  # and three negatives


def test_nms_looks_at_no_more_than_it_must(monkeypatch):
    """The first anchors by their loss, then twice as many, until the mini-batch is full."""
    looked_at = []
    monkeypatch.setattr(mining, "nms", lambda boxes, *args: looked_at.append(len(boxes)) or nms(boxes, *args))
    targets = draw_targets([3], K, [(30, 40)])
    logits = views(draw_logits(targets), targets)
    (labels,) = targets.labels
    OHEMLoss(batch_size_per_image=8, nms_thresh=0.5)(logits, targets)
    assert looked_at == [32]
    looked_at.clear()
    OHEMLoss(batch_size_per_image=200, nms_thresh=0.0)(logits, targets)
    assert looked_at == [800, 1600, (labels != IGNORED).sum()]  # there are not as many that do not overlap
    looked_at.clear()
    OHEMLoss(batch_size_per_image=8, nms_thresh=0.5, positive_fraction=0.25)(logits, targets)
    assert looked_at == [8, 24]  # for 2 positives and 6 negatives
    looked_at.clear()
    OHEMLoss(batch_size_per_image=10**4, nms_thresh=0.0, positive_fraction=1.0)(logits, targets)
    assert looked_at == [targets.num_positives, 0]


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_anchors_of_one_loss(fraction):
    """At the start many anchors are as hard as each other: each image still has its mini-batch, the same each time."""
    targets = draw_targets([2, 2], K, GRIDS)
    logits = [torch.full_like(x, -4.6).requires_grad_() for x in draw_logits(targets)]
    loss = OHEMLoss(batch_size_per_image=8, nms_thresh=1.0, positive_fraction=fraction)
    first, second = (torch.autograd.grad(loss(views(logits, targets), targets), logits) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert sum(x.any(dim=2).sum().item() for x in views(first, targets)) == 16


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "loss",
    [
        OHEMLoss(batch_size_per_image=10**6, nms_thresh=1.0),
        SampledBCELoss(batch_size_per_image=10**6, positive_fraction=1.0),
    ],
    ids=repr,
)
def test_a_batch_of_all_is_the_cross_entropy(loss, batch):
    targets = draw_targets(**BATCHES[batch])
    logits = draw_logits(targets)
    found, expected = (each(views(logits, targets), targets) for each in (loss, BCELoss()))
    torch.testing.assert_close(found, expected)
    for mine, wanted in zip(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits)):
        torch.testing.assert_close(mine, wanted)


@all_losses
@pytest.mark.parametrize("batch", ["all ignored", "no boxes", "no positives", "one level", "one class"])
def test_empties(loss, batch):
    targets = draw_targets(**BATCHES[batch])
    logits = draw_logits(targets, torch.float32)
    total = loss(views(logits, targets), targets)
    gradients = torch.autograd.grad(total, logits)
    assert total.shape == () and total.dtype == torch.float32 and total.isfinite()
    nothing = batch == "all ignored" or (targets.num_positives == 0 and getattr(loss, "positive_fraction", 0) == 0.25)
    assert (total == 0) == nothing
    for gradient, labels in zip(views(gradients, targets), targets.labels):
        assert not gradient[(labels == IGNORED).unsqueeze(2).expand_as(gradient)].any()


@all_losses
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_low_precision_and_extreme_logits(loss, dtype, scale):
    targets = draw_targets([3, 2], K, GRIDS)
    logits = [x.detach().clamp(-1, 1).mul(scale).to(dtype).requires_grad_() for x in draw_logits(targets)]
    total = loss(views(logits, targets), targets)
    gradients = torch.autograd.grad(total, logits)
    assert total.dtype == torch.float32 and total.isfinite() and total > 0
    assert all(gradient.dtype == dtype and gradient.isfinite().all() for gradient in gradients)


@all_losses
def test_gradcheck(loss):
    targets = draw_targets([1, 2], K, [(2, 2), (1, 1)])
    logits = draw_logits(targets)

    def seeded(*x):
        torch.manual_seed(0)
        return loss(views(x, targets), targets)

    assert torch.autograd.gradcheck(seeded, logits)


def test_images_add_up():
    """A batch in parts has the loss of the whole: what divides the loss is not the mini-batch's matter."""
    targets = draw_targets([2, 0, 3], K, GRIDS)
    logits = [x.detach() for x in draw_logits(targets)]
    loss = OHEMLoss(batch_size_per_image=16)
    parts = [loss(views([x[i : i + 1] for x in logits], t), t) for i, t in enumerate(one_image_each(targets))]
    torch.testing.assert_close(sum(parts), loss(views(logits, targets), targets))


def one_image_each(targets):
    for image in range(len(targets.labels[0])):
        labels = [level[image : image + 1] for level in targets.labels]
        positives = [((x >= 0) & (x < K)).flatten().nonzero().squeeze(1) for x in labels]
        empty = torch.zeros(sum(len(p) for p in positives), 4)  # the loss has no use for boxes of positives
        yield DenseTargets(labels, K, positives, empty, empty, grid=targets.grid)


@pytest.mark.parametrize("size, fraction", [(16, 0.5), (16, 0.0), (40, 0.1), (64, 1.0), (10**4, 0.5)])
@pytest.mark.parametrize("boxes", [[3, 0, 1]])
def test_samples_are_of_the_right_kind_and_number(size, fraction, boxes):
    targets = draw_targets(boxes, K, GRIDS)
    logits = draw_logits(targets)
    loss = SampledBCELoss(batch_size_per_image=size, positive_fraction=fraction)
    found = loss(views(logits, targets), targets)
    found.backward()
    total = 0
    for image in range(len(boxes)):
        rows, labels, _ = anchors_of_image(logits, targets, image)
        sampled = anchors_of_image([x.grad for x in logits], targets, image)[0].any(dim=1)
        positives, negatives = (labels >= 0) & (labels < K), labels == K
        num_positives = min(int(size * fraction), positives.sum().item())
        assert (sampled & positives).sum() == num_positives
        assert (sampled & negatives).sum() == min(size - num_positives, negatives.sum().item())
        assert not (sampled & (labels == IGNORED)).any()
        total += cross_entropy(rows, labels)[sampled].sum()
    torch.testing.assert_close(found, total)


def test_samples_are_drawn_anew_and_by_the_seed():
    targets = draw_targets([3, 2], K, GRIDS)
    logits, loss = views(draw_logits(targets), targets), SampledBCELoss(batch_size_per_image=16)

    def draw(seed):
        torch.manual_seed(seed)
        return loss(logits, targets).item(), loss(logits, targets).item()

    assert draw(0) == draw(0) and len({*draw(0), *draw(1)}) == 4


def test_an_own_choice():
    """A loss over a sample of one's own is one method."""

    class FirstAnchor(MiniBatchLoss):
        def choose(self, labels, logits, targets):
            assert not torch.is_grad_enabled()
            chosen = torch.zeros_like(labels, dtype=torch.bool)
            chosen[:, 0] = True
            return chosen

    targets = draw_targets([1, 2], K, GRIDS, codes=(0,))
    logits = views(draw_logits(targets), targets)
    expected = torch.logaddexp(logits[0][:, 0, :, 0, 0], torch.zeros(2, K)).sum()
    torch.testing.assert_close(FirstAnchor()(logits, targets), expected)


def test_ohem_needs_the_anchors():
    targets = draw_targets([1], K)
    logits = views(draw_logits(targets), targets)
    bare = DenseTargets(targets.labels, K, targets.positives, targets.anchors, targets.gt_boxes)
    with pytest.raises(ValueError, match="grid"):
        OHEMLoss()(logits, bare)
    SampledBCELoss()(logits, bare)


def test_keys():
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.MODEL.FOCAL.CLS_LOSS.NAME = "OHEMLoss"
    assert repr(build_cls_loss(cfg)) == "OHEMLoss(batch_size_per_image=512, nms_thresh=0.7, positive_fraction=0.0)"
    cfg.MODEL.FOCAL.CLS_LOSS.OHEM.BATCH_SIZE_PER_IMAGE = 128
    cfg.MODEL.FOCAL.CLS_LOSS.OHEM.NMS_THRESH = 0.5
    cfg.MODEL.FOCAL.CLS_LOSS.OHEM.POSITIVE_FRACTION = 0.25
    assert repr(build_cls_loss(cfg)) == "OHEMLoss(batch_size_per_image=128, nms_thresh=0.5, positive_fraction=0.25)"
    cfg.MODEL.FOCAL.CLS_LOSS.NAME = "SampledBCELoss"
    assert repr(build_cls_loss(cfg)) == "SampledBCELoss(batch_size_per_image=256, positive_fraction=0.5)"
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 64
    cfg.MODEL.RPN.POSITIVE_FRACTION = 0.2
    assert repr(build_cls_loss(cfg)) == "SampledBCELoss(batch_size_per_image=64, positive_fraction=0.2)"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size_per_image": 0}, "BATCH_SIZE_PER_IMAGE is 0"),
        ({"positive_fraction": -0.1}, "POSITIVE_FRACTION is -0.1"),
        ({"positive_fraction": 25}, "POSITIVE_FRACTION is 25"),
        ({"nms_thresh": 1.5}, "NMS_THRESH is 1.5"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=rf"MODEL\.FOCAL\.CLS_LOSS\.OHEM\.{message}"):
        OHEMLoss(**arguments)
    if "nms_thresh" not in arguments:
        with pytest.raises(ValueError, match=rf"MODEL\.RPN\.{message}"):
            SampledBCELoss(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_ohem_on_a_gpu(fraction):
    """The loss of a CPU."""
    targets = draw_targets([2, 3], K, GRIDS)
    logits = [x.detach().float() for x in draw_logits(targets)]
    loss = OHEMLoss(batch_size_per_image=16, positive_fraction=fraction)
    expected = loss(views(logits, targets), targets)
    on_gpu = DenseTargets(
        [x.cuda() for x in targets.labels],
        K,
        [x.cuda() for x in targets.positives],
        targets.anchors.cuda(),
        targets.gt_boxes.cuda(),
        grid=type(targets.grid)(
            [x.cuda() for x in targets.grid.boxes], targets.grid.grid_sizes, targets.grid.num_cell_anchors
        ),
    )
    torch.testing.assert_close(loss(views([x.cuda() for x in logits], on_gpu), on_gpu).cpu(), expected)
