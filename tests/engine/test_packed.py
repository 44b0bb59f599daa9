"""A packed batch is the batch, in one piece of memory."""

import pickle

import pytest
import torch
from detectron2.data.build import trivial_batch_collator
from detectron2.structures import BitMasks, Boxes, Instances
from torch.utils.data import DataLoader

from focal_plugin.config.load import load_config
from focal_plugin.engine import Trainer, TrainLoader
from focal_plugin.engine.packed import Packed, PackedCollate


def image(height, width, boxes, crowds=0):
    instances = Instances((height, width), gt_boxes=Boxes(torch.rand(boxes, 4)), gt_classes=torch.arange(boxes))
    instances.gt_masks = BitMasks(torch.rand(boxes, height, width) > 0.5)
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    found = {"file_name": "a.jpg", "image_id": 7, "image": pixels, "instances": instances}
    return found | ({"ignore_boxes": Boxes(torch.rand(crowds, 4))} if crowds else {})


def sent(content):
    """What arrives of ``content`` at another process."""
    return pickle.loads(pickle.dumps(Packed(content))).unpack()


def test_a_batch_of_images():
    batch = [image(5, 7, boxes=2), image(3, 9, boxes=0, crowds=1)]
    found = sent(batch)
    for before, after in zip(batch, found, strict=True):
        assert before.keys() == after.keys()
        assert (after["file_name"], after["image_id"]) == ("a.jpg", 7)
        assert torch.equal(after["image"], before["image"])
        assert after["instances"].image_size == before["instances"].image_size
        for name, value in before["instances"].get_fields().items():
            kept = after["instances"].get(name)
            assert type(kept) is type(value)
            assert torch.equal(getattr(kept, "tensor", kept), getattr(value, "tensor", value))
    assert torch.equal(found[1]["ignore_boxes"].tensor, batch[1]["ignore_boxes"].tensor)
    storages = {x.untyped_storage().data_ptr() for each in found for x in (each["image"], each["instances"].gt_classes)}
    assert len(storages) == 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 5)])
def test_shapes_and_dtypes(dtype, shape):
    first, second = torch.ones(3, dtype=torch.uint8), torch.randint(0, 2, shape).to(dtype)
    found = sent([first, second])
    assert torch.equal(found[0], first) and torch.equal(found[1], second)
    assert found[1].dtype == dtype and found[1].shape == shape


def test_what_is_no_plain_tensor_is_pickled():
    weight = torch.nn.Parameter(torch.rand(2))
    rows = torch.eye(3)[:2].t()
    found = sent({"weight": weight, "sparse": torch.eye(2).to_sparse(), "none": None, "transposed": rows})
    assert type(found["weight"]) is torch.nn.Parameter and torch.equal(found["weight"], weight)
    assert torch.equal(found["sparse"].to_dense(), torch.eye(2)) and found["none"] is None
    assert torch.equal(found["transposed"], rows)
    assert sent([]) == []


def test_a_tensor_that_is_there_twice_is_one():
    x = torch.rand(3)
    first, second = sent([x, x])
    assert first is second
    first[0] = 2  # writable, as what a mapper returns
    assert second[0] == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_lists_of_images(workers):
    images = [image(4, 6, boxes=number) for number in range(4)]
    args = {"num_workers": workers, "collate_fn": trivial_batch_collator}
    batch = next(iter(TrainLoader(images, [3, 0, 1, 2], 2, seed=0, **args)))
    assert type(batch) is list and type(batch[0]) is dict
    assert [len(each["instances"]) for each in batch] == [3, 0]
    assert torch.equal(batch[0]["image"], images[3]["image"])


def test_the_loader_collates_as_pytorch_where_nothing_else_is_asked_for():
    numbers = [torch.tensor([float(number)]) for number in range(4)]
    batch = next(iter(TrainLoader(numbers, [3, 0, 1, 2], 2, seed=0, num_workers=1)))
    assert torch.equal(batch, torch.tensor([[3.0], [0.0]]))


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True), ("cuda:1", True)])
def test_batches_for_a_gpu_are_pinned(tiny_config, device, pinned):
    cfg = load_config(tiny_config, ["MODEL.DEVICE", "cpu"])
    cfg.MODEL.DEVICE = device
    assert Trainer.build_train_loader(cfg).kwargs["pin_memory"] is pinned


@pytest.mark.gpu
def test_a_pinned_batch_is_in_one_piece():
    images = [torch.ones(3), torch.ones(5)]
    loader = DataLoader(images, batch_size=2, collate_fn=PackedCollate(list), num_workers=1, pin_memory=True)
    (packed,) = loader
    assert all(x.is_pinned() and torch.equal(x, y) for x, y in zip(packed.unpack(), images, strict=True))
