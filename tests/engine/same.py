"""Whether two runs are the same, bit for bit."""

import json

import torch

TIMES = {"time", "data_time", "rank_data_time", "eta_seconds"}


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def final(folder, name="model_final.pth"):
    return torch.load(folder / name, weights_only=True)


def assert_same(found, expected, where=""):
    """Bit for bit, whatever it consists of."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found.nan_to_num(9.9e9), expected.nan_to_num(9.9e9)), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected)):
            assert_same(one, other, f"{where}/{number}")
    else:
        assert found == expected or (found != found and expected != expected), where


def assert_same_run(found, expected, name="model_final.pth"):
    """The last checkpoints, or those of a ``name``, and what is in metrics.json up to them."""
    one, other = final(found, name), final(expected, name)
    for state in (one, other):  # the length of metrics.json depends on its times, which are numbers of any length
        del state["trainer"]["hooks"]["CheckpointHook"]["metrics"]["bytes"]
    assert_same(one, other)
    until = [line for line in metrics(expected) if name == "model_final.pth" or line["iteration"] < one["iteration"]]
    assert_same(metrics(found)[: len(until)], until)
    assert name != "model_final.pth" or len(metrics(found)) == len(until)
