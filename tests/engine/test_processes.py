"""Two processes compute what one does, however they were started."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from focal_plugin.engine import launch, processes
from tests.engine import pair

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_pair(folder, job, *args):
    """What ``job(*args)`` returns in each of two processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.engine.pair"])  # two processes for the price of one import
    port = free_port()
    folder.mkdir()
    processes = [
        context.Process(target=pair.start, args=(rank, port, job, str(folder), *args), daemon=True) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in (0, 1)]


def test_losses_and_gradients_are_those_of_the_joint_batch(tiny_config, tmp_path):
    images = {"boxes": [2, 1, 3, 1], "no box on one": [2, 0, 3, 0], "one empty image": [2, 1, 0, 3], "none": [0] * 4}
    opts = ["MODEL.FOCAL.NORMALIZER", "num_fg_sync", "SOLVER.ACCUMULATE"]
    cases = [(name, parts) for name in images for parts in (1, 2)]
    results = run_pair(tmp_path / "pair", pair.steps, tiny_config, [([*opts, n], images[name]) for name, n in cases])
    for (name, parts), (losses, gradients), (_, others) in zip(cases, *results):
        expected_losses, expected = pair.step(tiny_config, [*opts, 1], images[name])
        case = f"{name}, in {parts} parts"
        assert losses == pytest.approx(expected_losses, rel=1e-5, abs=1e-7), case
        assert gradients.keys() == expected.keys() and any(gradient.any() for gradient in expected.values())
        for parameter, gradient in expected.items():
            for found in (gradients[parameter], others[parameter]):
                scale = float(gradient.abs().max())
                torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5 * scale, msg=f"{case}: {parameter}")


def test_a_step_makes_one_collective_call_which_carries_the_signals(tmp_path):
    """DistributedDataParallel's own calls, which it makes from C++, are not counted."""
    one, other = run_pair(tmp_path / "pair", pair.stop, str(tmp_path))
    assert one == other and one["average"] > one["weight"]
    assert one["code"] == 143 and one["steps"] == [0, 1, 2, 3] and one["calls"] == [1, 1, 1]


def leave_one_out(path):
    """Three images for two processes."""
    content = json.loads(path.read_text())
    last = content["images"].pop()["id"]
    content["annotations"] = [box for box in content["annotations"] if box["image_id"] != last]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("as_file", [True, False], ids=["a COCO file", "records alone"])
def test_evaluation_takes_every_image_once(as_file, tiny_config, tmp_path):
    path = tmp_path / "shapes_test.json"
    leave_one_out(path)
    if not as_file:  # COCO's metric needs an area: Detectron2 writes a file of its own in each process
        path.write_text(path.read_text().replace('"area"', '"surface"'))
    results, nothing = run_pair(tmp_path / "pair", pair.evaluate, tiny_config, str(tmp_path / "two"))
    expected = pair.evaluate(tiny_config, str(tmp_path / "one"))
    assert nothing == {} and results["bbox"] == pytest.approx(expected["bbox"], nan_ok=True)
    found, reference = (
        torch.load(tmp_path / name / "0" / "inference" / "instances_predictions.pth", weights_only=True)
        for name in ("two", "one")
    )
    assert [each["image_id"] for each in found] == [each["image_id"] for each in reference] == [0, 1, 2]
    for mine, theirs in zip(found, reference):
        assert len(mine["instances"]) == len(theirs["instances"]) > 0
    other = [path.suffixes for path in (tmp_path / "two" / "1").rglob("*") if path.is_file()]
    assert sorted(other) == ([] if as_file else [[".json"], [".json", ".lock"]])  # else the main process alone writes


@pytest.fixture
def calls(monkeypatch):
    """What ``launch`` hands to Detectron2's, which starts nothing, and what it does itself."""
    calls = []
    monkeypatch.setattr(processes, "detectron2_launch", lambda main, *args, **kwargs: calls.append((args, kwargs)))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return calls


def torchrun(monkeypatch, size):
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}.items():
        monkeypatch.setenv(name, str(value))


def test_without_torchrun_detectron2_starts_them(calls, monkeypatch):
    launch(print, 1, args=("a",), machine_rank=0)
    monkeypatch.setenv("RANK", "0")  # as some schedulers set for a machine
    monkeypatch.setenv("WORLD_SIZE", "2")
    launch(print, 2, num_machines=2, machine_rank=1, args=("a",))
    assert calls[0] == ((1,), {"machine_rank": 0, "args": ("a",)})
    assert calls[1] == ((2,), {"num_machines": 2, "machine_rank": 1, "args": ("a",)})


def test_a_run_without_gpus_gets_its_signals_itself(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores SIGINT for what it runs behind
    try:
        with pytest.raises(KeyboardInterrupt):
            launch(signal.raise_signal, 0, args=(signal.SIGINT,))
    finally:
        signal.signal(signal.SIGINT, before)


def test_one_process_of_torchruns_needs_no_group(calls, monkeypatch):
    torchrun(monkeypatch, 1)
    launch(calls.append, 1, args=("run",))
    assert calls == ["run"] and not torch.distributed.is_initialized()


def test_processes_are_started_once(calls, monkeypatch):
    torchrun(monkeypatch, 2)
    with pytest.raises(ValueError, match=r"torchrun has started 2 processes, and --num-gpus 2"):
        launch(calls.append, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"--nproc-per-node is 2, and this machine has 1 GPUs"):
        launch(calls.append, 1)
    assert calls == []


def run_together(*commands):
    """Run command lines of train_net.py at the same time, as on a machine without a GPU; all must succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment, "cwd": ROOT}
    processes = [subprocess.Popen([sys.executable, *map(str, command)], **pipes) for command in commands]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output
        assert "Warning" not in output, output
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("way", ["torchrun", "two machines"])
def test_train_net(way, tiny_config, tmp_path):
    """Training and evaluation in two processes are those of one, and the main process alone writes."""
    leave_one_out(tmp_path / "shapes_test.json")
    words = ["--config-file", tiny_config, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.BASE_LR", 0.02]
    words += ["INPUT.RANDOM_FLIP", "none", "MODEL.FOCAL.NORMALIZER", "num_fg_sync", "OUTPUT_DIR"]
    folders = [tmp_path / name for name in ("main", "other")]
    if way == "torchrun":
        agent = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
        outputs = run_together([*agent, "train_net.py", *words, folders[0]])
    else:
        machines = ["--num-machines", 2, "--dist-url", f"tcp://127.0.0.1:{free_port()}", "--machine-rank"]
        outputs = run_together(*(["train_net.py", *machines, rank, *words, folders[rank]] for rank in (0, 1)))
        assert [path.name for path in folders[1].iterdir()] == ["log.txt.rank1"]
    assert "".join(outputs).count("Results on shapes_test") == 1 and "2 processes of 1 thread" in outputs[0]

    run_together(["train_net.py", *words, tmp_path / "one"])
    (metrics, weights), (expected_metrics, expected) = (outcome(folder) for folder in (folders[0], tmp_path / "one"))
    assert [line["iteration"] for line in metrics] == [line["iteration"] for line in expected_metrics]
    for line, reference in zip(metrics, expected_metrics):
        names = [name for name in reference if name.startswith(("bbox/", "loss_", "total_loss"))]
        assert names and [line[name] for name in names] == pytest.approx(
            [reference[name] for name in names], rel=1e-3, nan_ok=True
        )
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-6)


def outcome(folder):
    """The lines of metrics.json, and the last weights."""
    lines = (folder / "metrics.json").read_text().splitlines()
    return [json.loads(line) for line in lines], torch.load(folder / "model_final.pth", weights_only=True)["model"]
