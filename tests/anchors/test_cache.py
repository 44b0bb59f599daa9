"""Anchors of a size are built once, and never served where they could be others."""

import copy
import gc
import pickle

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import BufferList, DefaultAnchorGenerator
from detectron2.structures import Boxes, Instances
from torch import nn
from torch._subclasses import FakeTensorMode

from focal_plugin import Anchors, TorchvisionAnchorGenerator
from focal_plugin.anchors import cache
from focal_plugin.anchors.cache import cached_anchors
from focal_plugin.kernels.grid_pairs import GridPairs
from tests.small_retinanet import small_config

SIZES = {"sizes": [[16, 20], [32, 40]], "aspect_ratios": [[0.5, 2.0]]}


def make_generator(cls=DefaultAnchorGenerator):
    return cls(**SIZES, strides=[8, 16])


def first_cells(generator):
    return next(iter(generator.cell_anchors))


def features_of(height, width, **kwargs):
    return [torch.zeros(2, 3, height, width, **kwargs), torch.zeros(2, 3, height // 2, width // 2, **kwargs)]


def check(generator, features):
    """What is served is what would be built."""
    found, expected = cached_anchors(generator, features), Anchors.from_generator(generator, features)
    assert found.grid_sizes == expected.grid_sizes and found.strides == expected.strides
    assert found.num_cell_anchors == expected.num_cell_anchors and found.offset == expected.offset
    assert all(map(torch.equal, found.boxes, expected.boxes))
    assert all(a is b for a, b in zip(found.cell_anchors or [], expected.cell_anchors or []))
    return found


def test_a_size_is_built_once():
    generator = make_generator()
    first = check(generator, features_of(4, 6))
    assert check(generator, features_of(4, 6)) is first
    assert check(generator, features_of(6, 4)) is not first
    assert check(generator, features_of(4, 6)) is first
    assert check(make_generator(), features_of(4, 6)) is not first


def test_the_oldest_size_goes():
    generator = make_generator()
    sizes = [(4, 2 * width) for width in range(1, cache._SIZES_KEPT + 2)]
    first, second, *_ = [cached_anchors(generator, features_of(*size)) for size in sizes[:-1]]
    assert cached_anchors(generator, features_of(*sizes[0])) is first  # used again: the second is the oldest now
    cached_anchors(generator, features_of(*sizes[-1]))
    assert len(cache._cache[generator]) == cache._SIZES_KEPT
    assert cached_anchors(generator, features_of(*sizes[0])) is first
    assert cached_anchors(generator, features_of(*sizes[1])) is not second


def test_it_is_forgotten_with_its_generator():
    gc.collect()  # those of other tests
    generator = make_generator()
    cached_anchors(generator, features_of(4, 6))
    before = len(cache._cache)
    del generator
    gc.collect()
    assert len(cache._cache) == before - 1


def change_in_place(generator):
    first_cells(generator).mul_(2)


def change_the_buffers(generator):
    generator.cell_anchors = BufferList([2 * cell for cell in generator.cell_anchors])


def change_the_strides(generator):
    generator.strides = [4, 8]


def change_an_element_of_the_strides(generator):
    generator.strides[0] = 4


def change_the_offset(generator):
    generator.offset = 0.25


@pytest.mark.parametrize(
    "change",
    [change_in_place, change_the_buffers, change_the_strides, change_an_element_of_the_strides, change_the_offset],
)
def test_a_changed_generator(change):
    generator = make_generator()
    before = check(generator, features_of(4, 6))
    change(generator)
    after = check(generator, features_of(4, 6))
    assert not torch.equal(after.flat, before.flat)
    assert check(generator, features_of(4, 6)) is after


def test_a_generator_that_moves():
    generator = make_generator()
    check(generator, features_of(4, 6))
    on_meta = cached_anchors(generator.to("meta"), features_of(4, 6, device="meta"))
    assert all(boxes.is_meta for boxes in on_meta.boxes)
    on_cpu = make_generator()
    before = check(on_cpu, features_of(4, 6))
    assert check(on_cpu.half(), features_of(4, 6)) is not before


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_begins_anew(copy_of):
    generator = make_generator()
    first = check(generator, features_of(4, 6))
    other = copy_of(generator)
    first_cells(other).mul_(2)
    assert not torch.equal(check(other, features_of(4, 6)).flat, first.flat)
    assert check(generator, features_of(4, 6)) is first


class Own(DefaultAnchorGenerator):
    """A user's, whose anchors depend on what is in the features."""

    def forward(self, features):
        return [Boxes(boxes.tensor + features[0].mean()) for boxes in super().forward(features)]


class OwnGrid(DefaultAnchorGenerator):
    def _grid_anchors(self, grid_sizes):
        return [torch.rand_like(boxes) for boxes in super()._grid_anchors(grid_sizes)]


@pytest.mark.parametrize("cls", [Own, OwnGrid, TorchvisionAnchorGenerator])
def test_of_a_generator_that_is_not_known_nothing_is_kept(cls):
    generator = make_generator(cls)
    first = cached_anchors(generator, features_of(4, 6))
    second = cached_anchors(generator, [feature + 1 for feature in features_of(4, 6)])
    assert second is not first and generator not in cache._cache
    if cls is Own:
        torch.testing.assert_close(second.flat, first.flat + 1)


def test_of_a_replaced_forward_or_a_hook_nothing_is_kept(monkeypatch):
    generator = make_generator()
    first = cached_anchors(generator, features_of(4, 6))
    hook = generator.register_forward_hook(lambda module, args, boxes: [Boxes(b.tensor + 1) for b in boxes])
    torch.testing.assert_close(cached_anchors(generator, features_of(4, 6)).flat, first.flat + 1)
    hook.remove()
    assert cached_anchors(generator, features_of(4, 6)) is first
    monkeypatch.setattr(generator, "forward", lambda features: [Boxes(torch.zeros(48, 4)), Boxes(torch.zeros(12, 4))])
    assert not cached_anchors(generator, features_of(4, 6)).flat.any()


def test_learnt_cell_anchors_get_their_gradient_each_time():
    generator = make_generator()
    first_cells(generator).requires_grad_()
    for _ in range(2):
        cached_anchors(generator, features_of(4, 6)).flat.sum().backward()
    assert first_cells(generator).grad.eq(2 * 4 * 6).all()


def test_inference_mode_leaves_nothing_for_training():
    generator = make_generator()
    with torch.inference_mode():
        assert cached_anchors(generator, features_of(4, 6)).flat.is_inference()
    assert not cached_anchors(generator, features_of(4, 6)).flat.is_inference()


def test_fake_tensors():
    """Neither come from real ones, nor are served for them."""
    generator = make_generator()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = cached_anchors(generator, features_of(4, 6))
        assert isinstance(fake.flat, torch._subclasses.FakeTensor)
    real = check(generator, features_of(4, 6))
    with mode:
        assert isinstance(cached_anchors(generator, features_of(4, 6)).flat, torch._subclasses.FakeTensor)
    assert check(generator, features_of(4, 6)) is real


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = make_generator()

    def forward(self, x):
        return cached_anchors(self.generator, [x, x[..., ::2, ::2]]).flat + 0 * x.mean()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:FutureWarning")
def test_tracing_export_and_compiling():
    module, x = Flat(), torch.rand(1, 3, 4, 6)
    expected = module(x)
    kept = dict(cache._cache[module.generator])
    assert torch.equal(torch.jit.trace(module, x, check_trace=False)(x), expected)
    assert torch.equal(torch.export.export(module, (x,)).module()(x), expected)
    assert torch.equal(torch.compile(module, backend="eager")(x), expected)
    assert cache._cache[module.generator] == kept
    assert torch.equal(module(x), expected)


def test_what_a_matcher_derives_is_derived_once(monkeypatch):
    """Through the model: one Anchors, one GridPairs, for images and steps."""
    model, made = build_model(small_config()).train(), []
    monkeypatch.setattr(
        GridPairs, "__init__", lambda self, *args, init=GridPairs.__init__: made.append(init(self, *args))
    )
    instances = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[8.0, 8, 40, 40]])), gt_classes=torch.tensor([1]))
    batch = [{"instances": instances}] * 2
    with torch.no_grad():
        features = [model.backbone(torch.zeros(2, 3, 64, 64))[name] for name in model.head_in_features]
    first, second = (model.label_batch(features, batch) for _ in range(2))
    assert len(made) == 1 and first.grid is second.grid
    assert first.num_positives and torch.equal(first.gt_boxes, second.gt_boxes)
