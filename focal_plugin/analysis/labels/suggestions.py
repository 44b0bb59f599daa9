"""What may be wrong with the labels of a data set: suggestions, and the ranking of those of many images."""

from dataclasses import dataclass

import numpy as np

from ...evaluation.numbers import IOU, best_f1

KINDS = ("missing", "class", "box", "extra")
Box = tuple[float, ...]


@dataclass(frozen=True)
class Suggestion:
    """A change of the labels, with its evidence. Boxes are XYXY in pixels of the image.

    Attributes:
        kind: one of ``KINDS``.
        value: what suggestions of this kind are ranked by, the highest first.
        loss: the FL of all anchors of the object.
        record: the image, in Detectron2's format, with its width and height.
        predicted_box, predicted_class, score: what the model sees there.
        label: the place of the label among the record's annotations; None for "missing", as are its box and class.
        iou: of the predicted box with the label's; None for "missing".
    """

    kind: str
    value: float
    loss: float
    record: dict
    predicted_box: Box
    predicted_class: int
    score: float
    label: int | None = None
    label_box: Box | None = None
    label_class: int | None = None
    iou: float | None = None

    @property
    def accepted(self) -> tuple[Box, int]:
        """The box and the class after the change; for "extra" those of the label that goes."""
        box = self.predicted_box if self.kind in ("missing", "box") else self.label_box
        return box, self.predicted_class if self.kind in ("missing", "class") else self.label_class

    def is_sure(self, score_thresh: float) -> bool:
        """Return whether an evaluation at this threshold would count the labels as wrong, if the model were right."""
        return self.score >= score_thresh and (self.kind != "box" or self.iou < IOU)


@dataclass(frozen=True)
class Verdict:
    """What is found in an image.

    Attributes:
        suggestions: in no order, one of a label at most.
        loss: the FL of all anchors that are not ignored.
        labels: the number of labels, without crowds.
        unjudged: of these without a positive anchor.
        scores, right: of the D detections, (D,), and whether each finds a label, (D,) bool.
    """

    suggestions: list[Suggestion]
    loss: float
    labels: int
    unjudged: int
    scores: np.ndarray
    right: np.ndarray


class Ranking:
    """The best suggestions of each kind, from the verdicts on many images.

    Args:
        top: the number of suggestions of each kind.

    Attributes:
        images, labels, unjudged, loss: the sums over the verdicts.
    """

    def __init__(self, top: int):
        self.top = top
        self.images = self.labels = self.unjudged = 0
        self.loss = 0.0
        self._detections: list[tuple[np.ndarray, np.ndarray]] = []
        self._pool: dict[str, list[Suggestion]] = {kind: [] for kind in KINDS}

    def add(self, verdict: Verdict) -> None:
        """Count a verdict."""
        self.images += 1
        self.labels += verdict.labels
        self.unjudged += verdict.unjudged
        self.loss += verdict.loss
        self._detections.append((verdict.scores, verdict.right))
        for suggestion in verdict.suggestions:
            pool = self._pool[suggestion.kind]
            pool.append(suggestion)
            if len(pool) >= 2 * self.top:  # for millions of labels
                self._pool[suggestion.kind] = self._best(pool)

    def _best(self, pool: list[Suggestion]) -> list[Suggestion]:
        return sorted(pool, key=lambda suggestion: -suggestion.value)[: self.top]

    def agreement(self) -> dict | None:
        """Return how well detections and labels agree, see ``best_f1``; None if no label was found."""
        scores, right = (np.concatenate(parts) for parts in zip(*self._detections))
        return best_f1(scores, right, self.labels)

    def best(self) -> dict[str, list[Suggestion]]:
        """Return the best of each kind, the best first."""
        return {kind: self._best(pool) for kind, pool in self._pool.items()}
