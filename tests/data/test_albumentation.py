"""Transforms of albumentations in ``INPUT.AUGMENTATIONS``."""

import sys

import numpy as np
import pytest
from detectron2.data import transforms as T
from fvcore.transforms.transform import CropTransform
from PIL import Image

from focal_plugin.config import ConfigError
from focal_plugin.data import FocalDatasetMapper, build_augmentations
from tests.data import test_mapper
from tests.data.test_mapper import make_cfg

try:
    import albumentations
except ImportError:
    albumentations = None
record = test_mapper.record
needs_package = pytest.mark.skipif(albumentations is None, reason="needs pip install -e .[augment]")


def entry(name, **args):
    return {"name": f"albumentations.{name}", **args}


def sample(record, *augmentations, seed=0, **keys):
    cfg = make_cfg(*augmentations)
    for key, value in keys.items():
        cfg.INPUT[key] = value
    np.random.seed(seed)
    return FocalDatasetMapper(cfg, True)(record)


@needs_package
@pytest.mark.parametrize("crowd", [0, 1])
@pytest.mark.parametrize(
    ("theirs", "detectron2s"),
    [
        (entry("HorizontalFlip", p=1.0), {"name": "RandomFlip", "prob": 1.0}),
        (entry("VerticalFlip", p=1), {"name": "RandomFlip", "prob": 1.0, "horizontal": False, "vertical": True}),
        (entry("Crop", x_min=2, y_min=3, x_max=20, y_max=30, p=1), {"name": "Crop"}),
        (entry("Resize", height=80, width=90, p=1), {"name": "Resize", "shape": [80, 90]}),
    ],
)
def test_boxes_and_regions_as_detectron2_moves_them(record, theirs, detectron2s, crowd, monkeypatch):
    """The image too, where no pixel is interpolated."""
    monkeypatch.setattr(T, "Crop", Crop, raising=False)
    record["annotations"][0]["iscrowd"] = crowd
    found, expected = sample(record, theirs), sample(record, detectron2s)
    boxes, others = (s["ignore_boxes"] if crowd else s["instances"].gt_boxes for s in (found, expected))
    np.testing.assert_allclose(boxes.tensor, others.tensor, atol=1e-4)
    assert found["image"].shape == expected["image"].shape
    if "Resize" not in theirs["name"]:
        assert (found["image"] == expected["image"]).all()


class Crop(T.Augmentation):
    def get_transform(self, image):
        return CropTransform(2, 3, 18, 27)


@needs_package
def test_colours_leave_boxes_and_are_of_rgb(record, tmp_path):
    """A channel shift of red alone changes red, in either order of the channels."""
    Image.new("RGB", (60, 40), (10, 20, 30)).save(tmp_path / "a.png")
    shift = entry("RGBShift", r_shift_limit=[50, 50], g_shift_limit=[0, 0], b_shift_limit=[0, 0], p=1)
    for order, expected in (("RGB", [60, 20, 30]), ("BGR", [30, 20, 60])):
        found = sample(record, shift, FORMAT=order)
        assert found["image"][:, 0, 0].tolist() == expected
        np.testing.assert_allclose(found["instances"].gt_boxes.tensor, [[3, 4, 9, 16]])


RANDOM = [
    entry("Affine", rotate=[-20, 20], scale=[0.8, 1.2], p=0.9),
    entry("RandomBrightnessContrast", p=0.7),
    entry("GaussNoise", p=0.7),
    entry("CoarseDropout", p=0.5),
    entry("RandomCrop", height=30, width=40, p=0.5),
    entry("RandomResizedCrop", size=[30, 40], p=0.5),
]


@needs_package
def test_the_generator_decides_and_nothing_else(record):
    mapper = FocalDatasetMapper(make_cfg(*RANDOM), True)

    def draw(seed):
        np.random.seed(seed)
        found = mapper(record)
        return found["image"].numpy().tobytes(), found["instances"].gt_boxes.tensor.tolist()

    first = [draw(seed) for seed in range(10)]
    assert len({image for image, _ in first}) > 5
    assert [draw(seed) for seed in reversed(range(10))] == first[::-1]


@needs_package
def test_probability(record):
    mapper = FocalDatasetMapper(make_cfg(entry("HorizontalFlip", p=0.3)), True)
    np.random.seed(0)
    flipped = sum(mapper(record)["instances"].gt_boxes.tensor[0, 0].item() != 3 for _ in range(200))
    assert 40 <= flipped <= 80  # three standard deviations about 60


@needs_package
def test_the_box_follows_the_pixels(record):
    """A turned and scaled box holds the bright pixels."""
    for seed in range(10):
        found = sample(record, entry("Affine", rotate=[-30, 30], scale=[0.7, 1.3], p=1), seed=seed)
        ys, xs = np.nonzero(found["image"][0].numpy() > 127)
        if len(xs):
            x0, y0, x1, y1 = found["instances"].gt_boxes.tensor[0].tolist()
            assert x0 - 1 <= xs.min() and xs.max() <= x1 + 1 and y0 - 1 <= ys.min() and ys.max() <= y1 + 1


@needs_package
def test_boxes_that_are_cropped_away(record):
    found = sample(record, entry("Crop", x_min=20, y_min=20, x_max=60, y_max=40, p=1))
    assert len(found["instances"]) == 0
    record["annotations"][0]["iscrowd"] = 1
    assert "ignore_boxes" not in sample(record, entry("Crop", x_min=20, y_min=20, x_max=60, y_max=40, p=1))


@needs_package
@pytest.mark.parametrize(
    ("item", "says"),
    [
        (entry("Nothing"), "albumentations has no transform 'Nothing'"),
        (entry("Compose"), "albumentations has no transform 'Compose'"),
        (entry("HorizontalFlip", prob=1), r"HorizontalFlip does not take prob. It is HorizontalFlip\(p"),
        (entry("GaussianBlur", blur_limit="x"), "GaussianBlur does not take"),
        (entry("HorizontalFlip", p=2), "HorizontalFlip does not take"),
        (entry("MaskDropout"), "MaskDropout needs mask"),
        (entry("CoarseDropout3D"), "CoarseDropout3D does not say what becomes of boxes"),
        (entry("BBoxSafeRandomCrop"), "BBoxSafeRandomCrop needs bboxes; expected a transform of images alone"),
    ],
)
def test_what_cannot_be(item, says):
    with pytest.raises(ConfigError, match=rf"INPUT\.AUGMENTATIONS\[0\].*{says}"):
        build_augmentations(make_cfg(item))


@needs_package
def test_a_transform_that_changes_the_dtype(record):
    with pytest.raises(ValueError, match=r"albumentations\.ToFloat made of uint8 .* an image of float32"):
        sample(record, entry("ToFloat", p=1))


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "albumentations", None)
    with pytest.raises(ConfigError, match=r"INPUT\.AUGMENTATIONS\[0\] needs albumentations: pip install"):
        build_augmentations(make_cfg(entry("HorizontalFlip")))
