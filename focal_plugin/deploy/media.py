"""What OpenCV reads, draws and writes: frames of videos and cameras, pictures with their detections, videos of them."""

import logging
import math
import os
from collections.abc import Iterator, Sequence

import numpy as np
from detectron2.data import Metadata
from detectron2.structures import Instances

from .inputs import Source

try:
    import cv2
    from detectron2.utils.video_visualizer import VideoVisualizer
    from detectron2.utils.visualizer import Visualizer
except ImportError as error:
    raise ImportError(f"Pictures and videos need OpenCV ({error}): pip install opencv-python-headless.") from error

logger = logging.getLogger(__name__)

VIDEO_CODECS = {".mp4": "mp4v", ".avi": "MJPG"}  # what most builds of OpenCV write, in the order of preference
_MOST_PIXELS = 40_000_000  # that are drawn on: Visualizer needs some 20 bytes for each
_DEFAULT_FPS = 25.0  # where a camera does not tell


class VideoError(ValueError):
    """A video or camera that cannot be read. The message names it."""


class Video:
    """The frames of a video file or a camera, (H, W, 3) uint8 arrays in BGR.

    Attributes:
        fps: frames a second. num_frames: as the file announces it; None where it does not.

    Raises:
        VideoError: it cannot be opened, or, while iterating, has no frame.
    """

    def __init__(self, source: Source):
        self.name = f"camera {source.path}" if source.kind == "camera" else source.path
        self._capture = cv2.VideoCapture(int(source.path) if source.kind == "camera" else source.path)
        if not self._capture.isOpened():
            raise VideoError(f"{self.name} cannot be opened by OpenCV {cv2.__version__}; expected a video or a camera.")
        fps, count = self._capture.get(cv2.CAP_PROP_FPS), self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.fps = fps if 0 < fps < 1000 else _DEFAULT_FPS
        self.num_frames = int(count) if source.kind == "video" and 0 < count < 1e9 else None

    def __iter__(self) -> Iterator[np.ndarray]:
        number = 0
        try:
            while True:
                is_there, frame = self._capture.read()
                if not is_there:
                    break
                number += 1
                yield frame
        finally:
            self._capture.release()
        if number == 0:
            raise VideoError(f"{self.name} has no frame that OpenCV {cv2.__version__} can read.")
        if self.num_frames is not None and number < self.num_frames:
            logger.warning(f"{self.name} announces {self.num_frames} frames and ends after {number}.")


def draw(image: np.ndarray, instances: Instances, metadata: Metadata) -> np.ndarray:
    """An image with detections drawn on it, (H, W, 3) uint8 RGB both.

    One of more than 40 megapixels comes out smaller, unless its detections have more than boxes.
    """
    scale = math.sqrt(_MOST_PIXELS / (image.shape[0] * image.shape[1]))
    if scale < 1 and instances.get_fields().keys() <= {"pred_boxes", "scores", "pred_classes"}:
        boxes = instances.pred_boxes.clone()
        boxes.scale(scale, scale)
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        instances = Instances(image.shape[:2], **(instances.get_fields() | {"pred_boxes": boxes}))
    return Visualizer(image, metadata).draw_instance_predictions(instances).get_image()


class VideoOutput:
    """A video of frames with their detections, in which objects keep their colours where it is easy to tell.

    Args:
        paths: files that are not there yet, with suffixes of ``VIDEO_CODECS``; the first that OpenCV can write is it.
        fps: frames a second.
        metadata: the names of the classes.

    Attributes:
        path: of the file; None before the first frame.
    """

    def __init__(self, paths: Sequence[str], fps: float, metadata: Metadata):
        self.path: str | None = None
        self._paths, self._fps = paths, fps
        self._visualizer = VideoVisualizer(metadata)
        self._writer: cv2.VideoWriter | None = None

    def add(self, frame: np.ndarray, instances: Instances) -> None:
        """Draw the detections on a frame, (H, W, 3) uint8 RGB, all of one size, and write it.

        Raises:
            OSError: OpenCV cannot write a video there.
        """
        if self._writer is None:
            self.path, self._writer = _open_writer(self._paths, self._fps, frame.shape[:2])
        drawn = self._visualizer.draw_instance_predictions(frame, instances).get_image()
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
            os.remove(path)  # what a writer that failed left
    raise OSError(
        f"OpenCV {cv2.__version__} can write none of {', '.join(paths)}: {width}×{height}, {fps:g} frames a second."
    )
