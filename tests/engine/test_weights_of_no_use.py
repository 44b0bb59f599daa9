"""Weights that are no dense finite numbers of the model's kind are refused by name before any is copied."""

import pickle

import numpy as np
import pytest
import timm
import torch

from focal_plugin.backbones.timm_weights import create_encoder
from focal_plugin.engine import AtomicCheckpointer
from focal_plugin.files.safe_load import WeightsError

W = torch.ones(2, 3)
WRONG = {
    "NaN": (W * torch.nan, "a value that is not finite"),
    "Inf": (W * torch.inf, "a value that is not finite"),
    "one NaN in half": (torch.tensor([[1, 2, 3], [4, torch.nan, 6]]).half(), "a value that is not finite"),
    "integers": (W.long(), "torch.int64"),
    "bytes": (W.byte(), "torch.uint8"),
    "bools": (W.bool(), "torch.bool"),
    "complex": (W.to(torch.complex64), "torch.complex64"),
    "sparse": (W.to_sparse(), "torch.sparse_coo"),
    "compressed": (W.to_sparse_csr(), "torch.sparse_csr"),
    "meta": (W.to("meta"), "meta"),
    "quantised": (torch.quantize_per_tensor(W, 0.1, 0, torch.qint8), "torch.qint8"),
}
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.*quantize")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "norm": torch.nn.BatchNorm1d(2)})


@pytest.mark.parametrize(("value", "says"), WRONG.values(), ids=WRONG)
def test_a_weight_that_is_refused(value, says, model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save({"model": model.state_dict() | {"a.weight": value}}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=rf"w\.pth: a\.weight .*{says}.*expected finite"):
        AtomicCheckpointer(model).load(str(tmp_path / "w.pth"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_any_size_are_loaded(dtype, model, tmp_path):
    torch.save({"model": model.state_dict() | {"a.weight": W.to(dtype)}}, tmp_path / "w.pth")
    AtomicCheckpointer(model).load(str(tmp_path / "w.pth"))
    assert torch.equal(model["a"].weight, W)


def test_numbers_beyond_the_models_kind(model, tmp_path):
    torch.save({"model": model.state_dict() | {"a.weight": W.double() * 1e300}}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"a\.weight.*not finite"):
        AtomicCheckpointer(model).load(str(tmp_path / "w.pth"))


def test_what_the_model_has_no_place_for_is_not_looked_at(model, tmp_path):
    """Neither another name nor another shape: 10^12 values that take no memory would take it now."""
    other = {"b": W * torch.nan, "norm.weight": torch.zeros(1).expand(10**12)}
    torch.save({"model": model.state_dict() | other}, tmp_path / "w.pth")
    AtomicCheckpointer(model).load(str(tmp_path / "w.pth"))


def test_counters_are_whole_numbers(model, tmp_path):
    torch.save({"model": model.state_dict() | {"norm.num_batches_tracked": torch.tensor(7)}}, tmp_path / "w.pth")
    AtomicCheckpointer(model).load(str(tmp_path / "w.pth"))
    assert model["norm"].num_batches_tracked == 7
    torch.save({"model": model.state_dict() | {"norm.num_batches_tracked": torch.tensor(7.5)}}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"norm\.num_batches_tracked is torch\.float32"):
        AtomicCheckpointer(model).load(str(tmp_path / "w.pth"))


def test_arrays_of_a_zoo(model, tmp_path):

    array = np.full((2, 3), np.nan, np.float32)
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": {"a.weight": array}, "__author__": "someone"}))
    with pytest.raises(WeightsError, match=r"w\.pkl: a\.weight .*not finite"):
        AtomicCheckpointer(model).load(str(tmp_path / "w.pkl"))


@pytest.mark.parametrize("name", ["NaN", "integers", "sparse", "complex", "meta"])
def test_an_encoder(name, tmp_path):

    tensors = timm.create_model("test_efficientnet").state_dict()
    key = next(iter(tensors))
    make = {"NaN": lambda t: t * torch.nan, "integers": torch.Tensor.long, "sparse": torch.Tensor.to_sparse}
    make |= {"complex": lambda t: t.to(torch.complex64), "meta": lambda t: t.to("meta")}
    torch.save(tensors | {key: make[name](tensors[key])}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=rf"w\.pth: {key} .*expected finite"):
        create_encoder("test_efficientnet", str(tmp_path / "w.pth"))
