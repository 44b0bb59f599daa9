"""The campaign of faults: whole with `make test-faults`, a tenth of it among the slow tests.

KINDS="files bits" in the environment chooses methods of ``Campaign``.
"""

import os
import time

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from focal_plugin.config.load import load_config
from tests.faults.campaign import Campaign


@pytest.mark.slow
def test_nothing_is_lost(tiny_config, tmp_path, capsys):
    torch.manual_seed(0)
    model = build_model(load_config(tiny_config, ["MODEL.DEVICE", "cpu"]))
    nn.init.normal_(model.head.cls_score.weight, std=0.5)  # finds a few boxes in any image
    nn.init.constant_(model.head.cls_score.bias, -4.0)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    began = time.monotonic()
    campaign = Campaign(tiny_config, str(tmp_path / "weights.pth"), tmp_path / "runs", seed=0)
    table = campaign.run(float(os.environ.get("FAULTS", "0.1")), os.environ.get("KINDS", "").split())
    with capsys.disabled():
        print(f"\n{campaign}\n{time.monotonic() - began:.0f} s, a run takes {campaign.duration:.1f} s")
    problems = [problem for row in table.values() for problem in row.problems]
    assert not problems, "\n\n".join(problems)
