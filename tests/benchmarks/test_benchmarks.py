"""The benchmark runs on tiny inputs, whose speed is not tested."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import timing

    return timing


def test_every_row_and_both_files(tmp_path):
    command = [sys.executable, str(FOLDER / "run.py"), "--tiny", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "bench.json").read_text())
    names = [row["name"].split(",")[0] for row in content["rows"]]
    assert names == ["class loss", "matching", "train step", "inference"]
    for row in content["rows"]:
        assert {"Detectron2", "ours"} <= row["variants"].keys()
        assert any("floor" in name for name in row["variants"])
        assert all(numbers["seconds"] > 0 for numbers in row["variants"].values())
        assert row["variants"]["Detectron2"]["times_faster"] == 1
    assert content["rows"][0]["variants"]["ours"]["peak_bytes"] is not None
    table = (tmp_path / "bench.md").read_text()
    assert table in result.stdout
    if not torch.cuda.is_available():
        assert "| **train step, CUDA** | | | | | |" in table  # left blank, not estimated


def test_functions_take_turns_and_the_first_round_does_not_count(timing):
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    result = timing.interleave(functions, repeats=2)
    assert calls == list("ababab")
    assert all(len(numbers["rounds"]) == 2 for numbers in result.values())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_is_what_a_call_takes_on_top():
    """In a new process, as in the benchmark, because an older one reuses memory that it has freed."""
    code = """
        import timing, torch
        kept = torch.ones(2_000_000)
        print(timing.extra_peak_bytes(lambda: torch.ones(16_000_000).sum() + kept.sum()))
    """
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(FOLDER)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert 63e6 < int(result.stdout) < 80e6
