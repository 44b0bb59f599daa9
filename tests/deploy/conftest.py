"""Weights for the tiny detector that are sure of some things and not of others."""

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from focal_plugin.config.load import load_config


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory):
    """Where the weights are, once a test has needed them."""
    return tmp_path_factory.mktemp("weights") / "weights.pth"


@pytest.fixture
def weights(tiny_config, weights_file):
    """The path of a checkpoint for ``tiny_config``, whose model finds a few boxes in any image with a score ≥ .5."""
    if not weights_file.exists():
        torch.manual_seed(0)
        model = build_model(load_config(tiny_config, ["MODEL.DEVICE", "cpu"]))
        nn.init.normal_(model.head.cls_score.weight, std=0.5)
        nn.init.normal_(model.head.bbox_pred.weight, std=0.05)
        nn.init.constant_(model.head.cls_score.bias, -4.0)
        torch.save({"model": model.state_dict()}, weights_file)
    return str(weights_file)
