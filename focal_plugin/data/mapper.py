"""Detectron2's mapper, with augmentations from the config, and with crowds, which Detectron2 drops."""

import inspect
import warnings

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import transform_instance_annotations
from detectron2.structures import Boxes

from .albumentation import PREFIX, build_albumentation
from .images import readable_image

# fvcore's vertical flip makes a tensor of an image that it only reads.
warnings.filterwarnings(
    "ignore", "The given NumPy array is not writable", UserWarning, r"fvcore\.transforms\.transform$"
)


class FocalDatasetMapper(DatasetMapper):
    """Detectron2's ``DatasetMapper`` with ``INPUT.AUGMENTATIONS``, which in training follow the resizing and the flip.

    Boxes in whole pixels are scaled exactly; Detectron2 cuts them off to whole pixels of the resized image.

    The boxes of crowds become the image's ``ignore_boxes``: (M, 4) ``Boxes``, transformed as the image is. An image
    without crowds has no such key.
    """

    def __call__(self, dataset_dict: dict) -> dict:
        """Return Detectron2's training or test sample.

        Raises:
            DataError: see ``readable_image``.
        """
        with readable_image(dataset_dict["file_name"]):
            return super().__call__(dataset_dict)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        """Return Detectron2's arguments, with the further augmentations."""
        args = super().from_config(cfg, is_train)
        if is_train:
            args["augmentations"] += build_augmentations(cfg)
        return args

    def _transform_annotations(self, dataset_dict: dict, transforms: T.TransformList, image_shape: tuple) -> None:
        for annotation in dataset_dict["annotations"]:  # Detectron2 would scale whole numbers to whole numbers
            annotation["bbox"] = np.asarray(annotation["bbox"], dtype=np.float64).tolist()
        crowds = [
            {key: annotation[key] for key in ("bbox", "bbox_mode")}
            for annotation in dataset_dict["annotations"]
            if annotation.get("iscrowd", 0) != 0
        ]
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        crowds = [transform_instance_annotations(crowd, transforms, image_shape)["bbox"] for crowd in crowds]
        boxes = Boxes(np.array(crowds).reshape(-1, 4))  # (M, 4)
        boxes = boxes[boxes.nonempty(threshold=1e-5)]  # those cropped away, by Detectron2's rule
        if len(boxes):
            dataset_dict["ignore_boxes"] = boxes


def mapper_with_truth(cfg: CfgNode) -> FocalDatasetMapper:
    """Return a mapper for images as in evaluation, with their ground truth."""
    mapper = FocalDatasetMapper(cfg, is_train=False)
    mapper.is_train = True  # keeps the annotations
    return mapper


def build_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """Return the augmentations of ``INPUT.AUGMENTATIONS``, in order.

    Each entry has the ``name`` of a class in ``detectron2.data.transforms``, and its arguments, as in
    ``{name: RandomFlip, horizontal: False, vertical: True}``; or one of albumentations', as in
    ``{name: albumentations.GaussianBlur, p: 0.2}``.

    Raises:
        ValueError: there is no such class, or it does not take these arguments.
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
        if isinstance(name, str) and name.startswith(PREFIX):
            augmentations.append(build_albumentation(name.removeprefix(PREFIX), args, where, cfg.INPUT.FORMAT))
            continue
        if name not in known:
            raise ValueError(
                f"{where} is {entry!r}; expected a name of {', '.join(sorted(known))}, or {PREFIX} and a name of its "
                "transforms; and arguments."
            )
        try:
            augmentations.append(known[name](**args))
        except (TypeError, AssertionError, ValueError) as error:
            takes = inspect.signature(known[name])
            raise ValueError(f"{where}: {name} does not take {args} ({error}). It is {name}{takes}.") from error
    return augmentations
