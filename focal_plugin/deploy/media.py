"""Images, videos and cameras by OpenCV: reading frames, drawing detections, writing videos of them."""

import logging
import math
import os
from collections.abc import Iterator, Sequence

import numpy as np
from detectron2.data import Metadata
from detectron2.structures import Instances
from matplotlib.colors import to_rgb

from ..evaluation.style import class_color
from .inputs import ImageError, Source

try:
    import cv2
    from detectron2.utils.visualizer import ColorMode, Visualizer
except ImportError as error:
    raise ImportError(f"Pictures and videos need OpenCV ({error}): pip install opencv-python-headless.") from error

logger = logging.getLogger(__name__)

VIDEO_CODECS = {".mp4": "mp4v", ".avi": "MJPG"}  # those that most builds of OpenCV can write, the preferred one first
LABELS = ("all", "score", "none")  # on boxes
_MOST_PIXELS = 40_000_000  # to draw on: Visualizer needs some 20 bytes a pixel
_DEFAULT_FPS = 25.0  # for cameras that report none


class Video:
    """The frames of a video file or a camera, (H, W, 3) uint8 arrays in BGR.

    Attributes:
        fps: frames a second.
        num_frames: the number of frames that the file announces, or None.

    Raises:
        ImageError: it cannot be opened, or, while iterating, has no frame.
    """

    def __init__(self, source: Source):
        self.name = f"camera {source.path}" if source.kind == "camera" else source.path
        self._capture = cv2.VideoCapture(int(source.path) if source.kind == "camera" else source.path)
        if not self._capture.isOpened():
            raise ImageError(f"{self.name} cannot be opened by OpenCV {cv2.__version__}; expected a video or a camera.")
        fps, count = self._capture.get(cv2.CAP_PROP_FPS), self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.fps = fps if 0 < fps < 1000 else _DEFAULT_FPS
        self.num_frames = int(count) if source.kind == "video" and 0 < count < 1e9 else None

    def __iter__(self) -> Iterator[np.ndarray]:
        number = 0
        try:
            while (read := self._capture.read())[0]:
                number += 1
                yield read[1]
        finally:
            self._capture.release()
        if number == 0:
            raise ImageError(f"{self.name} has no frame that OpenCV {cv2.__version__} can read.")
        if self.num_frames is not None and number < self.num_frames:
            logger.warning(f"{self.name} announces {self.num_frames} frames and ends after {number}.")


class _Visualizer(Visualizer):
    """Detectron2's, with a choice of labels, and scores such as 0.82, as ``--score-thresh`` takes them."""

    labels = "all"
    scores: Sequence[float] = ()

    def overlay_instances(self, *, labels=None, **shapes):
        # A label is "cat 82%".
        names = [f"{label.rpartition(' ')[0]} " if self.labels == "all" else "" for label in labels or ()]
        texts = None if self.labels == "none" else [f"{name}{s:.2f}" for name, s in zip(names, self.scores)]
        return super().overlay_instances(labels=texts, **shapes)


def draw(image: np.ndarray, instances: Instances, metadata: Metadata, labels: str = "all") -> np.ndarray:
    """Return a copy of an image with its detections drawn on it, (H, W, 3) uint8 RGB both, in the classes' colours.

    Boxes are labelled with class and score ("all"), with the score alone ("score"), or not ("none").

    An image of more than 40 megapixels is returned smaller, unless its detections have more than boxes.
    """
    scale = math.sqrt(_MOST_PIXELS / (image.shape[0] * image.shape[1]))
    if scale < 1 and instances.get_fields().keys() <= {"pred_boxes", "scores", "pred_classes"}:
        boxes = instances.pred_boxes.clone()
        boxes.scale(scale, scale)
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        instances = Instances(image.shape[:2], **(instances.get_fields() | {"pred_boxes": boxes}))
    return _draw(image, instances, metadata, labels)


def _draw(image: np.ndarray, instances: Instances, metadata: Metadata, labels: str) -> np.ndarray:
    num_classes = max(instances.pred_classes.tolist(), default=0) + 1
    colors = [[255 * part for part in to_rgb(class_color(k))] for k in range(num_classes)]
    metadata = Metadata(**metadata.as_dict() | {"thing_colors": colors})
    # Visualizer takes the classes' colours in this mode alone, and varies them at random unless told otherwise.
    visualizer = _Visualizer(image, metadata, instance_mode=ColorMode.SEGMENTATION)
    visualizer.labels, visualizer.scores = labels, instances.scores.tolist()
    return visualizer.draw_instance_predictions(instances, jittering=False).get_image()


class VideoOutput:
    """A video file of frames with their detections.

    Args:
        paths: candidates for the file, none of which exists, with suffixes of ``VIDEO_CODECS``. The first that OpenCV
            can write is used.
        fps: frames a second.
        metadata: the names of the classes.
        labels: see ``draw``.

    Attributes:
        path: of the file; None before the first frame.
    """

    def __init__(self, paths: Sequence[str], fps: float, metadata: Metadata, labels: str = "all"):
        self.path: str | None = None
        self._paths, self._fps, self._metadata, self._labels = paths, fps, metadata, labels
        self._writer: cv2.VideoWriter | None = None

    def add(self, frame: np.ndarray, instances: Instances) -> None:
        """Draw the detections on a frame, (H, W, 3) uint8 RGB, all of one size, and write it.

        Raises:
            OSError: OpenCV cannot write a video there.
        """
        if self._writer is None:
            self.path, self._writer = _open_writer(self._paths, self._fps, frame.shape[:2])
        drawn = _draw(frame, instances, self._metadata, self._labels)
        self._writer.write(np.ascontiguousarray(drawn[:, :, ::-1]))

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.release()


def _open_writer(paths: Sequence[str], fps: float, size: tuple[int, int]) -> tuple[str, "cv2.VideoWriter"]:
    height, width = size
    for path in paths:
        codec = VIDEO_CODECS[os.path.splitext(path)[1]]
        writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*codec), fps, (width, height))
        if writer.isOpened():
            return path, writer
        writer.release()
        if os.path.exists(path):
            os.remove(path)  # left by a writer that failed
    raise OSError(
        f"OpenCV {cv2.__version__} can write none of {', '.join(paths)}: {width}×{height}, {fps:g} frames a second."
    )
