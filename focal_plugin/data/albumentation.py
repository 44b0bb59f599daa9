"""Augmentations of the package ``albumentations`` among Detectron2's."""

import inspect
import os

import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import Transform

from ..config import ConfigError

PREFIX = "albumentations."
# What transforms choose their parameters by besides the image, where they do not say so themselves.
_NEEDS = {
    "AtLeastOneBBoxRandomCrop": {"bboxes"},
    "BBoxSafeRandomCrop": {"bboxes"},
    "ConstrainedCoarseDropout": {"bboxes", "mask"},
    "CropNonEmptyMaskIfExists": {"mask"},
    "RandomSizedBBoxSafeCrop": {"bboxes"},
}


def build_albumentation(name: str, args: dict, where: str, image_format: str) -> "Albumentation":
    """Return the augmentation of a class in ``albumentations``.

    Args:
        name: of the class, after ``PREFIX``.
        args: of the class.
        where: the entry in the config, for messages.
        image_format: ``INPUT.FORMAT``; the class is given RGB where it is BGR.

    Raises:
        ConfigError: the package is not installed, has no such class, or the class does not take the arguments, needs
            more than an image, or does not say what becomes of boxes.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # importing it asks PyPI for newer versions otherwise
    try:
        import albumentations
    except ImportError:
        raise ConfigError(f"{where} needs albumentations: pip install albumentations==2.0.8") from None
    kind = getattr(albumentations, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, albumentations.BasicTransform)):
        raise ConfigError(f"{where}: albumentations has no transform {name!r}.")
    takes = inspect.signature(kind)
    if unknown := [str(key) for key in args if key not in takes.parameters]:  # it warns of these and goes on
        raise ConfigError(f"{where}: {name} does not take {', '.join(unknown)}. It is {name}{takes}.")
    try:
        transform = kind(**args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {name} does not take {args} ({error}). It is {name}{takes}.") from error
    if needed := set(transform.targets_as_params) - {"image"} or _NEEDS.get(name):
        raise ConfigError(f"{where}: {name} needs {', '.join(sorted(needed))}; expected a transform of images alone.")
    is_dual = isinstance(transform, albumentations.DualTransform)
    if is_dual and "bboxes" not in transform.targets:
        raise ConfigError(f"{where}: {name} does not say what becomes of boxes; expected one that does.")
    return Albumentation(transform, moves_boxes=is_dual, is_bgr=image_format == "BGR")


class Albumentation(T.Augmentation):
    """A transform of ``albumentations``, which draws from NumPy's generator as Detectron2's augmentations do.

    Args:
        transform: its parameters may depend on the image alone.
        moves_boxes: whether it transforms boxes; if not, they stay as they are.
        is_bgr: whether images have the channels blue, green, red; the transform gets red, green, blue.
    """

    def __init__(self, transform, moves_boxes: bool, is_bgr: bool) -> None:
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw the parameters for an image, (H, W, C)."""
        transform = self.transform
        transform.set_random_seed(int(np.random.randint(2**31)))
        if not transform.should_apply():
            return T.NoOpTransform()
        data = {"image": _reversed(image) if self.is_bgr else image}
        params = transform.update_transform_params(params=transform.get_params(), data=data)
        params |= transform.get_params_dependent_on_data(params=params, data=data)
        return _Applied(transform, params, self.moves_boxes, self.is_bgr, image.shape[:2])


class _Applied(Transform):
    """A transform with its parameters. Boxes follow an image, whose new size they depend on."""

    def __init__(self, transform, params: dict, moves_boxes: bool, is_bgr: bool, size: tuple[int, int]) -> None:
        super().__init__()
        self._set_attributes(locals())
        self.new_size = size

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Return the transformed image.

        Raises:
            ValueError: it has another dtype, or another number of channels.
        """
        given = _reversed(img) if self.is_bgr else np.ascontiguousarray(img)
        image = self.transform.apply_with_params(self.params, image=given)["image"]
        if image.dtype != img.dtype or image.shape[2:] != img.shape[2:]:
            name = f"{PREFIX}{type(self.transform).__name__}"
            raise ValueError(
                f"{name} made of {img.dtype} {img.shape} an image of {image.dtype} {image.shape}; expected the same "
                "dtype and channels."
            )
        self.new_size = image.shape[:2]
        return _reversed(image) if self.is_bgr else image

    def apply_box(self, box: np.ndarray) -> np.ndarray:
        """Transform (N, 4) XYXY boxes; of one that the transform drops, nothing is left: four zeros."""
        if not self.moves_boxes:
            return np.asarray(box, dtype=np.float64)
        boxes = []
        for one in np.asarray(box, dtype=np.float64) / np.tile(self.size[::-1], 2):
            found = self.transform.apply_to_bboxes(one[None].astype(np.float32), **self.params)
            boxes.append(found[0, :4] if len(found) else np.zeros(4))
        return np.array(boxes, dtype=np.float64).reshape(-1, 4) * np.tile(self.new_size[::-1], 2)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Return points as they are, where the transform moves none.

        Raises:
            NotImplementedError: it moves them. Masks and keypoints are not supported.
        """
        if self.moves_boxes:
            raise NotImplementedError(f"{PREFIX}{type(self.transform).__name__} moves boxes alone, no points.")
        return coords


def _reversed(image: np.ndarray) -> np.ndarray:
    """The image with its channels in the other order."""
    return np.ascontiguousarray(image[..., ::-1])
