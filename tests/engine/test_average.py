"""The moving average of the weights."""

import pytest
import torch
from tests.engine.same import assert_same, assert_same_run, final, metrics

EMA = ["MODEL.FOCAL.EMA.DECAY", 0.5]


def test_try(train_net, tmp_path):
    results = train_net("OUTPUT_DIR", tmp_path / "a", *EMA, "SOLVER.OPTIMIZER", "adamw", "SOLVER.LR_FACTORS", "[{'head': 0.5}]", "TEST.EVAL_PERIOD", 2)
    print(results)
    print(sorted(p.name for p in (tmp_path / "a").iterdir()))
    print(final(tmp_path / "a").keys())
    print(metrics(tmp_path / "a")[-1])
