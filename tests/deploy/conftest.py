"""A photograph, and weights for the tiny detector that are sure of some things and not of others."""

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from torch import nn

from focal_plugin.config.load import load_config
from focal_plugin.data.quickstart import source_folder


@pytest.fixture(scope="session")
def photo():
    """A part of a photograph of the quickstart's, (3, 700, 700), BGR."""
    try:
        path = next(source_folder().glob("*541000_4977000_image_crop.png"))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return np.asarray(Image.open(path).convert("RGB"))[:700, :700, ::-1].transpose(2, 0, 1).astype(np.float32)


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
