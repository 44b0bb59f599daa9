"""Detectron2's mapper with more of Detectron2's own augmentations, by config, and with the crowds that it drops."""

import inspect
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import transform_instance_annotations
from detectron2.structures import Boxes
from detectron2.utils.file_io import PathManager
from PIL import Image

from .records import DataError

# fvcore's vertical flip makes a tensor of an image that it only reads.
warnings.filterwarnings(
    "ignore", "The given NumPy array is not writable", UserWarning, r"fvcore\.transforms\.transform$"
)


class FocalDatasetMapper(DatasetMapper):
    """Detectron2's ``DatasetMapper``; in training ``INPUT.AUGMENTATIONS`` follow the resizing and the flip.

    Annotations with ``iscrowd``, which Detectron2 drops, become the image's ``ignore_boxes``: (M, 4) ``Boxes``, moved
    and clipped as the image is. An image without any has no such key.
    """

    def __call__(self, dataset_dict: dict) -> dict:
        """As Detectron2's.

        Raises:
            DataError: the image cannot be read whole, or only by losing most of its values.
        """
        with readable_image(dataset_dict["file_name"]):
            return super().__call__(dataset_dict)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        """As Detectron2's, with the further augmentations."""
        args = super().from_config(cfg, is_train)
        if is_train:
            args["augmentations"] += build_augmentations(cfg)
        return args

    def _transform_annotations(self, dataset_dict: dict, transforms: T.TransformList, image_shape: tuple) -> None:
        crowds = [
            {key: annotation[key] for key in ("bbox", "bbox_mode")}
            for annotation in dataset_dict["annotations"]
            if annotation.get("iscrowd", 0) != 0
        ]
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        crowds = [transform_instance_annotations(crowd, transforms, image_shape)["bbox"] for crowd in crowds]
        boxes = Boxes(np.array(crowds).reshape(-1, 4))  # (M, 4)
        boxes = boxes[boxes.nonempty(threshold=1e-5)]  # as Detectron2 does with the others: cropped away
        if len(boxes):
            dataset_dict["ignore_boxes"] = boxes


@contextmanager
def readable_image(path: str) -> Iterator[None]:
    """Around the reading of an image: what goes wrong names the file.

    Raises:
        DataError: the image is missing, broken or cut off, or has values that do not fit 8 bits.
    """
    try:
        with PathManager.open(path, "rb") as file, Image.open(file) as image:
            mode = image.mode
        if mode.startswith(("I", "F")):  # PIL would keep the values to 255 and make the others white
            raise DataError(
                "image of more than 8 bits",
                f"{path} has values of PIL's mode {mode}, which do not fit the 8 bits of a channel. Save it as 8 bits, "
                "in a range of your choice.",
            )
        yield
    except FileNotFoundError:
        raise DataError("missing image", f"{path} does not exist (any more).") from None
    except (OSError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise DataError("image that does not open", f"{path}: {error}") from error


def build_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """The augmentations of ``INPUT.AUGMENTATIONS``, in order.

    Each entry has a ``name`` of ``detectron2.data.transforms``; its other keys are that class's arguments, as in
    ``{name: RandomFlip, horizontal: False, vertical: True}``.

    Raises:
        ValueError: an entry has no such name, or arguments that the class does not take.
    """
    known = {
        name: kind
        for name, kind in vars(T).items()
        if inspect.isclass(kind) and issubclass(kind, T.Augmentation) and kind is not T.Augmentation
    }
    augmentations = []
    for index, entry in enumerate(cfg.INPUT.AUGMENTATIONS):
        where = f"INPUT.AUGMENTATIONS[{index}]"
        args = dict(entry) if isinstance(entry, dict) else {}
        name = args.pop("name", None)
        if name not in known:
            raise ValueError(f"{where} is {entry!r}; expected a name of {', '.join(sorted(known))}, and its arguments.")
        try:
            augmentations.append(known[name](**args))
        except (TypeError, AssertionError, ValueError) as error:
            takes = inspect.signature(known[name])
            raise ValueError(f"{where}: {name} does not take {args} ({error}). It is {name}{takes}.") from error
    return augmentations
