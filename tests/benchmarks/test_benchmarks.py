"""The benchmark runs on tiny inputs, whose speed is not tested."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

FOLDER = Path(__file__).parent


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import timing

    return timing


@pytest.fixture
def run(timing):
    import run

    return run


@pytest.fixture
def measure_gpu(timing):
    import measure_gpu

    return measure_gpu


@pytest.mark.slow
def test_every_row_and_both_files(run, tmp_path, monkeypatch, capsys):
    peak = run.peak_in_new_process
    monkeypatch.setattr(  # each takes a start
        run, "peak_in_new_process", lambda row, who, words: peak(row, who, words) if who == "ours" else 1
    )
    assert run.main(["--tiny", "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "bench.json").read_text())
    names = [row["name"].split(",")[0] for row in content["rows"]]
    assert names == ["class loss", "matching", "train step", "inference", "evaluation"]
    for row in content["rows"]:
        theirs = "pycocotools" if row["name"].startswith("evaluation") else "Detectron2"
        assert {theirs, "ours"} <= row["variants"].keys()
        assert theirs == "pycocotools" or any("floor" in name for name in row["variants"])
        assert all(numbers["seconds"] > 0 for numbers in row["variants"].values())
        assert row["variants"][theirs]["times_faster"] == 1
    assert content["rows"][0]["variants"]["ours"]["peak_bytes"] is not None
    table = (tmp_path / "bench.md").read_text()
    assert table in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert "| **train step, 8 images, CUDA** |\n" in table  # left blank, not estimated


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


@pytest.mark.slow
def test_every_row_of_a_gpu_runs_on_a_cpu_too(run, measure_gpu, monkeypatch):
    monkeypatch.setattr(measure_gpu, "WARMUP", 1)
    monkeypatch.setattr(measure_gpu, "PROFILED", 1)
    setting = run.rows_gpu.Setting(device="cpu", **run.TINY)
    saved = []
    results = run.measure_on_gpu(list(run.rows_gpu.rows(setting)), 1, 300, lambda rows: saved.append(len(rows)))
    assert saved == list(range(1, len(results) + 1))
    kinds = ["matching", "labels", "class loss", "train step", "inference", "inference"]
    assert [row["name"].split(",")[0] for row in results] == kinds
    for row in results:
        assert {"Detectron2", "ours"} <= row["variants"].keys()
        assert all(numbers["seconds"] > 0 and "error" not in numbers for numbers in row["variants"].values()), row
        assert row["variants"]["Detectron2"]["times_faster"] == 1
    assert results[4]["variants"]["ours"]["note"] == results[4]["variants"]["Detectron2"]["note"] == "100 detections"


@pytest.mark.gpu
def test_the_rows_of_a_gpu(tmp_path):
    command = [sys.executable, str(FOLDER / "run.py"), "--tiny", "--rows", "CUDA", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for row in json.loads((tmp_path / "bench.json").read_text())["gpu_rows"]:
        ours = row["variants"]["ours"]
        assert ours["gpu_seconds"] > 0 and ours["launches"] > 0 and ours["peak_bytes"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_rows_of_a_gpu_need_one(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["--rows", "CUDA"])
    assert stop.value.code == 2
    assert "--rows CUDA: these rows need a GPU, and PyTorch" in capsys.readouterr().err


def test_a_variant_that_fails_is_named_in_its_place_and_the_rest_is_measured(timing, measure_gpu):
    def fail():
        raise ValueError("no such\nkernel")

    variants = {"Detectron2": lambda: fail, "ours": lambda: lambda: time.sleep(0.001), "theirs": fail}
    row = measure_gpu.measure(timing.Row("sleep", "1 ms", variants, images=2), rounds=2, seconds=20)
    assert row["variants"]["Detectron2"] == row["variants"]["theirs"] == {"error": "ValueError: no such kernel"}
    assert 0.001 <= row["variants"]["ours"]["seconds"] < 0.5
    assert "times_faster" not in row["variants"]["ours"]  # there is nothing to compare with
    assert "| **sleep** 1 ms; 2 rounds | Detectron2 | | | | | | | ValueError: no such kernel |" in measure_gpu.table(
        [row]
    )


def test_what_is_over_the_budget_is_left_out(timing, run, capsys):
    rows = [timing.Row(name, "", {"Detectron2": lambda: lambda: time.sleep(0.1)}) for name in ("first", "second")]
    rows.insert(1, timing.Row("slow", "", {"Detectron2": lambda: lambda: time.sleep(60)}))
    results = run.measure_on_gpu(rows, 2, 4.0, lambda _: None)
    assert [row["name"] for row in results] == ["first", "slow"]
    assert "seconds" in results[0]["variants"]["Detectron2"]
    assert "over the time budget" in results[1]["variants"]["Detectron2"]["error"]
    assert "Not measured, over the budget of 4 s: second." in capsys.readouterr().out


def test_launches_waits_and_busy_time_of_a_profile(measure_gpu):
    def event(name, device, microseconds=1.0, annotation=False):
        time_range = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=device, time_range=time_range, is_user_annotation=annotation)

    step = [
        event("cudaLaunchKernel", DeviceType.CPU),
        event("cuLaunchKernelEx", DeviceType.CPU),
        event("cudaMemcpyAsync", DeviceType.CPU),
        event("cudaStreamSynchronize", DeviceType.CPU),
        event("aten::add", DeviceType.CPU),
        event("add_kernel", DeviceType.CUDA, 30.0),
        event("Memcpy HtoD", DeviceType.CUDA, 10.0),
        event("Optimizer.step", DeviceType.CUDA, 999.0, annotation=True),
    ]
    numbers = measure_gpu.summary([*step, *step, event("cudaDeviceSynchronize", DeviceType.CPU)], steps=2)
    assert numbers == {"gpu_seconds": pytest.approx(40e-6), "launches": 2, "waits": 1}


@pytest.mark.slow
def test_whole_runs(tmp_path):
    small = "MODEL.DEVICE cpu MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 INPUT.MIN_SIZE_TRAIN (64,)"
    flags = ["--batch", "2", "--iterations", "40", "--workers", "1", "--images", "4"]
    command = [sys.executable, str(FOLDER / "whole_run.py"), *flags, "--output", str(tmp_path), *small.split()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FocalRetinaNet is " in result.stdout
    times = json.loads((tmp_path / "whole_run.json").read_text())
    assert all(0 < times[name]["data_time"] < times[name]["time"] for name in ("RetinaNet", "FocalRetinaNet"))
