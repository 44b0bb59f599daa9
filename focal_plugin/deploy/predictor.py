"""A trained model for images in files and arrays, of any size, in tiles, with test-time augmentation."""

import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation, convert_PIL_to_numpy, read_image
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..data import DataError
from ..data.images import any_size, readable_image
from ..evaluation.evaluator import read_threshold
from ..files.progress import progress
from .inputs import ImageError
from .loading import class_metadata, load_model, read_config
from .optimize import optimize_for_inference
from .tiles import Window, merge_tiles, tile_windows
from .tta import with_tta

SCORE_THRESH = 0.5  # by default, of the command too
_WITHOUT_INSTANCES = ("ProposalNetwork", "SemanticSegmentor")  # of Detectron2's models


class Predictor:
    """Detects objects in images: ``Predictor("config.yaml", "model_final.pth")("street.jpg")`` → ``Instances``.

    Images are read, turned by their EXIF orientation and resized (``INPUT.{FORMAT, MIN_SIZE_TEST, MAX_SIZE_TEST}``) as
    in Detectron2's evaluation, so detections are the same as there.

    Args:
        config: a config, or a YAML file by its path or a name that ``find_config`` finds.
        weights: of the model; empty, those of ``MODEL.WEIGHTS``.
        opts: ``KEY VALUE`` pairs that change the config.
        score_thresh: the lowest score of a detection, as in the command ``predict``: a number, the path of an
            evaluation.json for the best F1 there, or None (or "config") for evaluation's threshold in the config,
            ``MODEL.RETINANET.SCORE_THRESH_TEST``.
        tile: cut larger images into overlapping tiles with this side, in pixels; 0, never. With tiles, files of more
            than 179 million pixels, Pillow's limit, are read too. Each tile is resized and detected as an image. So is
            the whole image, for objects larger than a tile, unless ``INPUT.MIN_SIZE_TEST`` is 0 and nothing is resized.
            Of its boxes, those that are larger than a tile are used.
            ``focal_plugin.deploy.tiles.merge_tiles`` merges the detections; of these, boxes alone remain.
        overlap: the least number of pixels that neighbouring tiles share; None, a fifth of a tile.
        whole_image: with tiles, detect in the whole image too.
        optimize: use ``optimize_for_inference`` of the model, with ``MODEL.FOCAL.INFERENCE.{COMPILE, CUDA_GRAPHS}``.
        tta: test-time augmentation by the keys of ``TEST.AUG``; None, as ``TEST.AUG.ENABLED``. Its copies are made from
            an image's own size, not that of ``INPUT.MIN_SIZE_TEST``.
        batch_size: the number of images, tiles or augmented copies that go through the network together.

    Attributes:
        cfg: the config.
        metadata: Detectron2's ``Metadata`` of the classes, with their names in ``thing_classes``.
        model: the network, optimised and augmented.
        batch_size: as given.
        score_thresh: the lowest score of a detection; None, the config's.

    Raises:
        FileNotFoundError: the config or the weights are no file.
        ValueError: they do not fit each other, the model is no detector, or an option is out of range; or a
            ``WeightsError`` or ``ConfigError``.
    """

    def __init__(
        self,
        config: CfgNode | str | os.PathLike,
        weights: str | os.PathLike = "",
        *,
        opts: Sequence[str] = (),
        score_thresh: float | str | os.PathLike | None = SCORE_THRESH,
        tile: int = 0,
        overlap: int | None = None,
        whole_image: bool = True,
        optimize: bool = True,
        tta: bool | None = None,
        batch_size: int = 1,
    ):
        overlap = tile // 5 if overlap is None else overlap
        score_thresh = _read_threshold(score_thresh, opts)
        _check_options(score_thresh, tile, overlap, batch_size)
        cfg = read_config(config, opts)
        cfg.MODEL.WEIGHTS = os.fspath(weights) or cfg.MODEL.WEIGHTS
        if score_thresh is not None:  # models drop scores that are equal to theirs
            below = float(np.nextafter(np.float32(score_thresh), np.float32(0)))
            cfg.MODEL.RETINANET.SCORE_THRESH_TEST = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = below
        if tta is not None:
            cfg.TEST.AUG.ENABLED = tta
        cfg.freeze()
        if cfg.MODEL.META_ARCHITECTURE in _WITHOUT_INSTANCES:
            raise ValueError(
                f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, which finds no instances of classes; "
                "expected a detector, such as FocalRetinaNet or GeneralizedRCNN."
            )

        model = load_model(cfg)
        self.metadata = class_metadata(cfg, model)
        self._nms_thresh = getattr(model, "test_nms_thresh", cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST)
        if optimize:
            wanted = cfg.MODEL.FOCAL.INFERENCE
            model = optimize_for_inference(model, compile=wanted.COMPILE, graphs=wanted.CUDA_GRAPHS)
        if cfg.TEST.AUG.ENABLED:
            model = with_tta(cfg, model, batch_size=batch_size)
        self.cfg = cfg
        self.model = model
        self._resize = T.AugmentationList([] if cfg.TEST.AUG.ENABLED else build_augmentation(cfg, is_train=False))
        self.score_thresh = score_thresh
        self._tile, self._overlap, self.batch_size = tile, overlap, batch_size
        self._whole_image = whole_image and (cfg.TEST.AUG.ENABLED or cfg.INPUT.MIN_SIZE_TEST > 0)  # else not resized

    def __call__(self, images) -> Instances | list[Instances]:
        """Return the detections in an image, or a list of those in several; best first, on the CPU.

        Args:
            images: an image or a sequence of them, each a path or an (H, W, 3) uint8 array in BGR, as OpenCV's are.

        Returns:
            ``Instances`` with ``pred_boxes`` (XYXY in pixels of the image), ``scores``, ``pred_classes``, and other
            predictions of the model.

        Raises:
            ImageError: a file is no image, is damaged, or has more than 8 bits a channel; an image is too narrow to be
                resized.
            FileNotFoundError: there is no such file.
            ValueError: an array of another shape or dtype. TypeError: neither an array nor a path.
        """
        single = isinstance(images, np.ndarray | str | os.PathLike) or not isinstance(images, Iterable)
        found = self.detect([self.read(image) for image in ([images] if single else images)])
        return found[0] if single else found

    def read(self, image: np.ndarray | str | os.PathLike) -> np.ndarray:
        """Return an image, a path or an (H, W, 3) uint8 array in BGR, as (H, W, C) in ``INPUT.FORMAT``.

        Raises:
            ImageError, FileNotFoundError, ValueError, TypeError: see ``__call__``.
        """
        if isinstance(image, str | os.PathLike):
            with any_size() if self._tile else nullcontext():
                return read_file(os.fspath(image), self.cfg.INPUT.FORMAT)
        if not isinstance(image, np.ndarray):
            raise TypeError(
                f"An image is of type {type(image).__name__}; expected a path or an (H, W, 3) uint8 array in BGR, as "
                "cv2.imread makes of a file that it can read."
            )
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(
                f"An image is an array of {image.dtype} and shape {image.shape}; expected uint8 and (H, W, 3) in BGR. "
                "Others are converted by cv2.cvtColor, or read from their files."
            )
        if self.cfg.INPUT.FORMAT == "BGR":
            return image
        rgb = Image.fromarray(np.ascontiguousarray(image[:, :, ::-1]))
        return convert_PIL_to_numpy(rgb, self.cfg.INPUT.FORMAT)

    @torch.no_grad()
    def detect(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """Return the detections in each of several images that ``read`` returned; see ``__call__``."""
        windows = [self._windows(*image.shape[:2]) for image in images]
        views = [(image, window) for image, here in zip(images, windows) for window in here]
        found = []
        starts = range(0, len(views), self.batch_size)
        for start in progress(starts, desc="Tiles", unit="batch"):
            batch = [self._view(*view) for view in views[start : start + self.batch_size]]
            found += [output["instances"].to("cpu") for output in self.model(batch)]
        results = []
        for image, here in zip(images, windows):
            parts, found = found[: len(here)], found[len(here) :]
            merged = merge_tiles(parts, here, image.shape[:2], self._nms_thresh) if len(here) > 1 else parts[0]
            results.append(merged[merged.scores >= (self.score_thresh or 0)])
        return results

    def _windows(self, height: int, width: int) -> list[Window]:
        """The windows of an image that go through the network: its tiles, and the whole image."""
        whole = (0, 0, width, height)
        if not self._tile or max(height, width) <= self._tile:
            return [whole]
        windows = tile_windows(height, width, self._tile, self._overlap)
        return windows + [whole] * self._whole_image

    def _view(self, image: np.ndarray, window: Window) -> dict:
        """The model's input for a window of an image."""
        x0, y0, x1, y1 = window
        view = T.AugInput(image[y0:y1, x0:x1])
        try:
            self._resize(view)
        except ValueError as error:  # Pillow's, of a side that is rounded to 0
            raise ImageError(
                f"{x1 - x0} × {y1 - y0} pixels are too long and narrow to be resized by INPUT.MIN_SIZE_TEST "
                f"{self.cfg.INPUT.MIN_SIZE_TEST} and INPUT.MAX_SIZE_TEST {self.cfg.INPUT.MAX_SIZE_TEST}: {error}"
            ) from error
        tensor = torch.from_numpy(np.array(view.image.transpose(2, 0, 1), order="C"))  # (C, H, W)
        return {"image": tensor, "height": y1 - y0, "width": x1 - x0}


def read_file(path: str, image_format: str) -> np.ndarray:
    """Return the image in a file as Detectron2 reads it: (H, W, C) in ``image_format``, by its EXIF orientation.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: it is no image, is damaged, or has more than 8 bits a channel, which training refuses as well.
    """
    if not PathManager.exists(path):
        raise FileNotFoundError(f"There is no image {path} (current folder: {os.getcwd()}).")
    try:
        with readable_image(path):
            return read_image(path, image_format)
    except DataError as error:
        raise ImageError(str(error)) from error
    except Exception as error:  # Pillow raises many types for damaged files
        raise ImageError(f"{path} cannot be read as an image: {type(error).__name__}: {error}") from error


def _read_threshold(score_thresh: float | str | os.PathLike | None, opts: Sequence[str]) -> float | None:
    """The lowest score of a detection; None for the config's.

    Raises:
        OSError, ValueError: see ``read_threshold``; or ``opts`` change the config's, and it is not asked for.
    """
    if score_thresh in (None, "config"):
        return None
    if named := [key for key in opts[::2] if str(key).endswith(".SCORE_THRESH_TEST")]:
        raise ValueError(
            f"{named[0]} is evaluation's threshold; prediction's is score_thresh (--score-thresh), {score_thresh}: "
            "give the number there, or config for evaluation's."
        )
    return read_threshold(os.fspath(score_thresh)) if isinstance(score_thresh, str | os.PathLike) else score_thresh


def _check_options(score_thresh: float | None, tile: int, overlap: int, batch_size: int) -> None:
    if score_thresh is not None and not 0 <= score_thresh <= 1:
        raise ValueError(f"score_thresh is {score_thresh}; expected a number in [0, 1].")
    if tile < 0 or not 0 <= overlap < max(tile, 1):
        raise ValueError(f"tile is {tile} and overlap {overlap}; expected tile ≥ 0, and 0 ≤ overlap < tile, in pixels.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1.")
