"""The picture shows each box where it is, in the colours that the legend names."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, BoxMode, Instances

from focal_plugin.deploy import media
from focal_plugin.evaluation import style
from focal_plugin.evaluation.detections import Sample, sample_detections, save_detections


def sample(gt=((8, 8, 40, 40),), boxes=((10, 10, 42, 42),), scores=(0.9,), size=(64, 64), name="a.png"):
    gt, boxes = np.array(gt, dtype=np.float32).reshape(-1, 4), np.array(boxes, dtype=np.float32).reshape(-1, 4)
    return Sample(
        name=name,
        image=np.full((*size, 3), 128, dtype=np.uint8),
        size=size,
        gt_boxes=gt,
        gt_classes=np.arange(len(gt)) % 2,
        boxes=boxes,
        classes=np.arange(len(boxes)) % 2,
        scores=np.array(scores, dtype=np.float32),
    )


def num_pixels_like(image, color, tolerance=12):
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(image[:, :, ::-1].astype(int) - rgb).max(axis=2) <= tolerance).sum())


def draw(tmp_path, samples, class_names, score_thresh=0.5):
    path = str(tmp_path / "detections.png")
    save_detections(path, samples, class_names, score_thresh=score_thresh)
    return cv2.imread(path)


@pytest.mark.parametrize("num_samples", [1, 2, 3, 8])
@pytest.mark.parametrize("class_names", [["tree"], ["square", "disc"], None], ids=["one", "two", "unnamed"])
def test_any_number_of_images_and_classes(tmp_path, num_samples, class_names):
    image = draw(tmp_path, [sample(name=f"{i}.png") for i in range(num_samples)], class_names)
    assert image.std() > 5


def test_nothing_there_and_nothing_found(tmp_path):
    assert draw(tmp_path, [sample(gt=(), boxes=(), scores=())], ["square", "disc"]) is not None


def test_ground_truth_left_detections_right_above_the_threshold(tmp_path):
    from focal_plugin.evaluation.detections import _DETECTED, _TRUTH

    image = draw(tmp_path, [sample()], ["tree"])
    rows, middle = image.shape[0] * 9 // 10, image.shape[1] // 2  # without the legend
    left, right = image[:rows, :middle], image[:rows, middle:]
    assert num_pixels_like(left, _TRUTH) > 100 and num_pixels_like(right, _DETECTED) > 100
    assert num_pixels_like(left, _DETECTED) == num_pixels_like(right, _TRUTH) == 0
    right = draw(tmp_path, [sample()], ["tree"], score_thresh=0.95)[:rows, middle:]
    assert num_pixels_like(right, _DETECTED) == 0


class Detector(torch.nn.Module):
    """Finds one box in each image, and remembers whether it was asked in eval mode."""

    def forward(self, batch):
        assert not self.training and not torch.is_grad_enabled()
        found = Instances((64, 48))
        found.pred_boxes = Boxes(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        found.scores, found.pred_classes = torch.tensor([0.75]), torch.tensor([0])
        return [{"instances": found} for _ in batch]


class Loader:
    """As much of a data loader as is needed: 8 images at half their size."""

    dataset = [  # noqa: RUF012
        {
            "image": torch.stack([torch.full((32, 24), float(c * i)) for c in (10, 1, 0)]),
            "file_name": f"/images/{i}.png",
            "height": 64,
            "width": 48,
        }
        for i in range(8)
    ]


def annotation(crowd=0):
    return {"bbox": [4, 5, 10, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1, "iscrowd": crowd}


def test_samples_are_spread_over_the_images_with_boxes():
    records = [{"annotations": [annotation(), annotation(crowd=1)] if i % 2 else []} for i in range(8)]
    model = Detector().train()
    samples = sample_detections(model, Loader, records, num_images=2, image_format="BGR")
    assert [s.name for s in samples] == ["1.png", "5.png"]
    assert model.training
    np.testing.assert_array_equal(samples[0].gt_boxes, [[4, 5, 14, 25]])  # without the crowd, as XYXY
    np.testing.assert_array_equal(samples[0].gt_classes, [1])
    np.testing.assert_array_equal(samples[0].boxes, [[1, 2, 3, 4]])
    np.testing.assert_array_equal(samples[1].image[0, 0], [0, 5, 50])  # RGB
    assert samples[0].size == (64, 48) and samples[0].image.shape == (32, 24, 3)


@pytest.mark.parametrize(("num_images", "expected"), [(3, 3), (20, 8)])
def test_no_more_than_there_are(num_images, expected):
    records = [{"annotations": []} for _ in range(8)]
    assert len(sample_detections(Detector(), Loader, records, num_images=num_images, image_format="RGB")) == expected


def test_a_class_has_one_colour_in_every_picture(tmp_path):
    """In the picture of a run and in the annotated copy of an image; 18 classes can be told apart."""
    colors = [style.class_color(k) for k in range(18)]
    assert len(set(colors)) == 18 and style.class_color(18) == colors[0]
    image = draw(tmp_path, [sample(gt=[(8, 8, 40, 40)] * 2, boxes=(), scores=())], ["square", "disc", "star"])
    assert num_pixels_like(image, colors[1]) > 100
    black = np.zeros((64, 64, 3), np.uint8)
    boxes = Boxes(torch.tensor([[8.0, 8, 40, 40]]))
    found = Instances((64, 64), pred_boxes=boxes, scores=torch.ones(1), pred_classes=torch.ones(1).long())
    drawn = media.draw(black, found, Metadata(thing_classes=["square", "disc"], thing_colors=[(0, 0, 0)] * 2))
    hue = cv2.cvtColor(drawn, cv2.COLOR_RGB2HSV)[20, 7:9, 0]  # the left side of the box
    expected = cv2.cvtColor(np.uint8([[[int(colors[1][i : i + 2], 16) for i in (1, 3, 5)]]]), cv2.COLOR_RGB2HSV)[
        0, 0, 0
    ]
    assert abs(int(hue.max()) - int(expected)) <= 3
