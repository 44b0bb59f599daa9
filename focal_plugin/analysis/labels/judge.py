"""The objects of an image whose loss is highest, by what may be wrong with their labels.

Each kind of mistake has a term of the training loss that it raises, and is measured by it. p = σ(logit) are the model's
scores, FL the focal loss of an (anchor, class) pair, and the positives of a label are the anchors matched to it.

- "missing", an object that nobody labelled: the FL of its hardest background anchor.
- "class", a label of another class: by how much the FL of its positives would be lower with the class that suits them
  best, on average. A label is only this if it would.
- "box", a label at another place: 1 − IoU of what its positives predict with it, averaged with weights p, since a box
  means little where the model sees nothing.
- "extra", a label without an object: the FL of its easiest positive, since those at an object's edge are always hard. A
  label is this if no positive has a score above ``SCORE_THRESH_TEST``, and else "box".
"""

from collections.abc import Iterator

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.evaluation import inference_context
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_ioa, pairwise_iou
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor
from torch.nn.functional import one_hot

from ...config import ConfigError
from ...data.images import check_image
from ...data.mapper import mapper_with_truth
from ...data.records import objects
from ...evaluation.numbers import IOU, match
from ...losses.functional import sigmoid_focal_loss
from ...retinanet import FocalRetinaNet
from ...structures import DenseTargets
from .suggestions import Suggestion, Verdict


class Judge:
    """Judges the labels of an image by a model.

    Args:
        model: on its device, with its weights.
        cfg: its config, for the size of images in tests, and for α and γ of the focal loss.
    """

    def __init__(self, model: FocalRetinaNet, cfg: CfgNode):
        self.model = model
        self.rates = {"alpha": cfg.MODEL.RETINANET.FOCAL_LOSS_ALPHA, "gamma": cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA}
        self.mapper = mapper_with_truth(cfg)

    @torch.no_grad()
    def __call__(self, record: dict) -> Verdict:
        """Return the verdict on a record in Detectron2's format.

        Raises:
            ConfigError: the model's logits are NaN. DataError: the image cannot be read.
        """
        record = _with_usable_labels(record)
        sample = self.mapper(record)
        with inference_context(self.model):
            logits, deltas, targets = self.model.predict([sample])
            (found,) = self.model([{"image": sample["image"]}])
        x = [level.float() for level in self.model.by_class(logits)]  # L × (1, A, K, H, W)
        if any(level.isnan().any() for level in x):
            raise ConfigError("The model gives logits that are NaN: its weights or its input are not finite.")
        given, found = sample["instances"].to(x[0].device), found["instances"]
        positives = _Positives(x, self.model.decode(deltas, targets), targets, given, self.rates)
        losses = [sigmoid_focal_loss(level, torch.zeros_like(level), **self.rates) for level in x]
        losses = torch.cat([level[0].permute(2, 3, 0, 1).flatten(0, 2) for level in losses])  # (R, K), of negatives
        labels = torch.cat([level[0].permute(1, 2, 0).flatten() for level in targets.labels])  # (R,)
        losses[labels != targets.num_classes] = 0
        mistakes = list(positives.mistakes(self.model.test_score_thresh))
        suggested = [mistake["predicted_box"] for mistake in mistakes if mistake["kind"] != "extra"]
        suggested = Boxes(torch.stack(suggested) if suggested else x[0].new_zeros(0, 4))
        free = _without_label(found, given, suggested, sample.get("ignore_boxes"))

        height, width = given.image_size
        scale = [record["width"] / width, record["height"] / height] * 2
        seen = [*_missing(found[free], losses, targets.grid.flat, self.rates), *mistakes]
        suggestions = [_in_image(suggestion, record, scale) for suggestion in seen]
        return Verdict(
            [s for s in suggestions if s.accepted[0][0] < s.accepted[0][2] and s.accepted[0][1] < s.accepted[0][3]],
            float(losses.sum() + positives.losses.sum()),
            len(given),
            len(given) - len(positives.of_label),
            *_agreement(found, given, sample.get("ignore_boxes")),
        )


def _with_usable_labels(record: dict) -> dict:
    """A copy with its size, without the labels of no size; each annotation with its ``place`` before."""
    record = dict(record)
    if "width" not in record or "height" not in record:
        record["width"], record["height"] = check_image(record["file_name"], None, "the data set")
    kept = []
    for place, annotation in enumerate(record.get("annotations", [])):
        box = torch.tensor(BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS))
        ends = torch.tensor([record["width"], record["height"]])
        sides = torch.minimum(box[2:], ends) - box[:2].clamp(min=0)
        if annotation.get("iscrowd", 0) or (sides > 0.01).all():  # the mapper drops others, and would shift the places
            kept.append({**annotation, "place": place})
    return record | {"annotations": kept}


def _agreement(found: Instances, given: Instances, crowds: Boxes | None) -> tuple[np.ndarray, np.ndarray]:
    """The scores of the detections, the best first, and whether each finds a label, as an evaluation counts it.

    Those in a crowd that find none are left out.
    """
    same = found.pred_classes[:, None] == given.gt_classes  # (D, G)
    right = match((pairwise_iou(found.pred_boxes, given.gt_boxes) * same).cpu().numpy()) >= 0
    scores = found.scores.cpu().numpy()
    if crowds is None:
        return scores, right
    boxes = found.pred_boxes
    kept = right | ~(pairwise_ioa(crowds.to(boxes.device), boxes) >= IOU).any(dim=0).cpu().numpy()
    return scores[kept], right[kept]


def _without_label(found: Instances, given: Instances, suggested: Boxes, crowds: Boxes | None) -> Tensor:
    """Return whether each detection, the best first, is of an object that has no label, (D,) bool.

    It is not if it lies on a label, in a crowd or on a better detection of another class; nor if it is what the
    positives of a label predict, the box ``suggested`` for that label.
    """
    boxes = found.pred_boxes
    free = ~torch.cat([pairwise_iou(boxes, given.gt_boxes), pairwise_iou(boxes, suggested)], dim=1).ge(IOU).any(dim=1)
    if crowds is not None:
        free &= ~(pairwise_ioa(crowds.to(boxes.device), boxes) >= IOU).any(dim=0)
    same = pairwise_iou(boxes, boxes) >= IOU
    for d in free.nonzero().flatten().tolist():
        free[d] &= not (same[d, :d] & free[:d]).any()
    return free


def _missing(found: Instances, losses: Tensor, anchors: Tensor, rates: dict) -> Iterator[dict]:
    """Yield what is missing, for detections without a label.

    Args:
        found: D detections.
        losses: the FL of the background anchors as such, (R, K), 0 for others.
        anchors: (R, 4).
        rates: α and γ.
    """
    if not len(found):
        return
    values = sigmoid_focal_loss(found.scores.logit(eps=1e-7), torch.zeros_like(found.scores), **rates)
    iou, nearest = pairwise_iou(found.pred_boxes, Boxes(anchors)).max(dim=0)  # (R,), an anchor is of one object
    for d, (box, k, score) in enumerate(zip(found.pred_boxes, found.pred_classes.tolist(), found.scores.tolist())):
        of_object = losses[(nearest == d) & (iou >= IOU), k]
        if of_object.any():  # else its anchors are ignored
            seen = {"predicted_box": box, "predicted_class": k, "score": score}
            yield {"kind": "missing", "value": float(values[d]), "loss": float(of_object.sum()), **seen}


class _Positives:
    """The P positives of an image, by their labels.

    Attributes:
        losses: their FL over all classes, (P,).
        of_label: the indices of the positives of each label that has any.
    """

    def __init__(self, x: list[Tensor], boxes: Tensor, targets: DenseTargets, given: Instances, rates: dict):
        x = targets.gather(x)  # (P, K)
        off, on = (sigmoid_focal_loss(x, torch.full_like(x, target), **rates) for target in (0.0, 1.0))
        self.with_class = off.sum(dim=1, keepdim=True) - off + on  # (P, K), the FL of a positive of each class
        classes = [labels.flatten()[chosen] for labels, chosen in zip(targets.labels, targets.positives)]
        self.classes = torch.cat(classes)  # (P,)
        self.losses = (self.with_class * one_hot(self.classes, x.shape[1])).sum(dim=1)
        self.scores, self.boxes = x.sigmoid(), boxes
        self.iou = matched_pairwise_iou(Boxes(boxes), Boxes(targets.gt_boxes)).nan_to_num(nan=0)  # (P,)
        is_of = (targets.gt_boxes[:, None] == given.gt_boxes.tensor).all(dim=2)  # (P, G)
        is_of &= self.classes[:, None] == given.gt_classes
        owners = is_of.int().argmax(dim=1) if len(given) else self.classes  # the first of equal labels
        self.of_label = {g: (owners == g).nonzero().flatten() for g in owners.unique().tolist()}

    def mistakes(self, score_thresh: float) -> Iterator[dict]:
        """Yield what may be wrong with each label: its class, else its box where the model sees something, else all."""
        for g, at in self.of_label.items():
            scores = self.scores[at]  # (n, K)
            gain = (self.losses[at, None] - self.with_class[at]).mean(dim=0)  # (K,), 0 for the label's class
            confidence = scores.max(dim=1).values
            best = int(confidence.argmax())
            if gain.max() > 0:
                other = int(gain.argmax())
                yield self._mistake("class", gain[other], g, int(scores[:, other].argmax()), other)
            elif confidence[best] > score_thresh:
                box = ((1 - self.iou[at]) * confidence).sum() / confidence.sum()
                yield self._mistake("box", box, g, best, int(scores[best].argmax()))
            else:
                easiest = int(self.losses[at].argmin())
                yield self._mistake("extra", self.losses[at[easiest]], g, easiest, int(scores[easiest].argmax()))

    def _mistake(self, kind: str, value: Tensor, label: int, best: int, predicted_class: int) -> dict:
        """``best`` is the positive that shows it, among those of the label."""
        at = self.of_label[label]
        return {
            "kind": kind,
            "value": float(value),
            "loss": float(self.losses[at].sum()),
            "predicted_box": self.boxes[at[best]],
            "predicted_class": predicted_class,
            "score": float(self.scores[at[best], predicted_class]),
            "label": label,
            "iou": float(self.iou[at[best]]),
        }


def _in_image(found: dict, record: dict, scale: list[float]) -> Suggestion:
    """A suggestion of a record, from what was found in the network's input, which is smaller by ``scale``."""
    ends = [record["width"], record["height"]] * 2
    box = [min(max(v * s, 0.0), end) for v, s, end in zip(found.pop("predicted_box").tolist(), scale, ends)]
    label = {}
    if (number := found.pop("label", None)) is not None:
        annotation = objects(record)[number]
        corners = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        place = {"label": annotation["place"], "label_class": annotation["category_id"]}
        label = {**place, "label_box": tuple(map(float, corners))}
    return Suggestion(**found, **label, record=record, predicted_box=tuple(box))
