"""The command line: which runs are started and which are left, and what happens when the program is killed."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import pytest
from detectron2.data import DatasetCatalog

from focal_plugin.ablation.__main__ import main, make_launcher, parse
from focal_plugin.ablation.job import TrainJob
from focal_plugin.ablation.launch import LocalLauncher, train_command
from focal_plugin.ablation.rows import find_base, find_tables
from focal_plugin.ablation.runs import plan, versions

TRAIN_NET = Path(__file__).parents[2] / "train_net.py"


@pytest.fixture
def table(tmp_path):
    return tmp_path / "table"


@pytest.fixture
def runs(rows, tiny_config, table):
    """Of one seed, not run yet."""
    return plan(find_tables([str(rows.folder)])[0].rows, find_base(tiny_config), [], 1, table)


def starts(table):
    """How often each run was started."""
    return {
        str(path.parent.relative_to(table)): len(path.read_text().splitlines()) for path in table.glob("*/*/starts")
    }


def report(table):
    """{row: mean AP} of the report."""
    rows = json.loads((table / "report.json").read_text())["rows"]
    return {row["row"]: row["mean"].get("AP") for row in rows}


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def test_every_row_with_every_seed_once(ablation, table, capfd):
    assert ablation() == 0
    assert starts(table) == {f"gamma_{gamma}/seed1": 1 for gamma in (0, 1, 2)}
    assert report(table) == {"gamma_0": 1.0, "gamma_1": 11.0, "gamma_2": 21.0}
    screen = capfd.readouterr()
    assert "gamma_1 seed 1: AP 11.0" in screen.err
    assert "12/12" in screen.err  # steps, in the bar
    cores = len(os.sched_getaffinity(0))
    expected = os.environ.get("OMP_NUM_THREADS") or max(1, cores // 3)
    assert (table / "gamma_0/seed1/starts").read_text().split()[1] == str(expected)
    (attempt,) = json.loads((table / "gamma_0/seed1/job.json").read_text())
    assert attempt["exit_code"] == 0 and attempt["versions"]["torch"]

    # With another seed, what is there is not run again.
    assert ablation("--seeds", 2) == 0
    assert starts(table) == {f"gamma_{gamma}/seed{seed}": 1 for gamma in (0, 1, 2) for seed in (1, 2)}
    assert report(table) == {"gamma_0": 2.5, "gamma_1": 12.5, "gamma_2": 22.5}  # 10γ + 1 and 10γ + 4


def test_the_program_as_a_part_of_another(rows, tiny_config, train_net, table, capsys):
    """Its usage lines and the command of the report have the other one's name."""
    words = [str(rows.folder / "gamma_0.yaml"), "--data", tiny_config, "--train-net", str(train_net)]
    assert main([*words, "--output", str(table)], prog="focal ablation") == 0
    (start,) = json.loads((table / "ablation.json").read_text())["starts"]
    assert start["command"] == f"focal ablation {' '.join(words)} --output {table}"
    for prog, name in (("focal ablation", "focal ablation"), (None, "python -m focal_plugin.ablation")):
        with pytest.raises(SystemExit) as end:
            main(["--help"], prog)
        assert end.value.code == 0 and f"usage: {name} " in capsys.readouterr().out


def test_a_job_starts_without_pytorch(tmp_path):
    train = TrainJob(str(tmp_path), [sys.executable, "-c", "print('trained')"], str(tmp_path), {}, versions())
    (tmp_path / "job.pkl").write_bytes(cloudpickle.dumps(train))
    code = "import pickle, sys; pickle.load(open('job.pkl', 'rb'))(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("False\n", "")
    assert (tmp_path / "job.log").read_text() == "trained\n"


def test_a_changed_config_is_never_run_over(ablation, table, tiny_config, capfd):
    assert ablation() == 0
    before = {path: path.read_bytes() for path in table.rglob("*") if path.is_file()}
    for words in ([], ["--report-only"]):
        assert ablation(*words, "SOLVER.MAX_ITER", 5) == 1
        error = capfd.readouterr().err
        assert "SOLVER.MAX_ITER was 4 and is now 5:" in error and f"{table}/gamma_2/seed1\n" in error
    assert {path: path.read_bytes() for path in table.rglob("*") if path.is_file()} == before
    # Another spelling of the same is no change.
    assert ablation("SOLVER.MAX_ITER", 4, "SOLVER.MOMENTUM", 0.9) == 0
    assert set(starts(table).values()) == {1}


@pytest.mark.parametrize(
    "text, message", [("", "SOLVER.MAX_ITER was the default and is now 4"), ("SOLVER: {", "config-ablation.yaml: ")]
)
def test_a_config_that_was_cut_off(runs, tiny_config, table, text, message):
    """As a power cut, or an editor, leaves it: nobody knows what was run."""
    runs[0].prepare()
    (runs[0].folder / "metrics.json").write_text('{"iteration": 3, "total_loss": 1.0}\n')
    assert runs[0].changes() == ""
    runs[0].config_file.write_text(text)
    with pytest.raises(ValueError, match=message):
        plan([runs[0].row], find_base(tiny_config), [], 1, table)


def test_a_folder_that_is_someone_elses(ablation, table, capfd):
    folder = table / "gamma_1" / "seed1"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")
    assert ablation() == 1
    assert f"has metrics.json, but no config-ablation.yaml:\n    {folder}\n" in capfd.readouterr().err
    assert not (table / "gamma_0").exists()


def test_diverging_and_failing_are_told_apart(ablation, rows, table, capfd):
    rows.add("diverging", "MODEL: {WEIGHTS: diverge}")
    rows.add("failing", "MODEL: {WEIGHTS: fail}")
    assert ablation() == 1
    screen = capfd.readouterr()
    assert "diverging seed 1: diverged at step 2. It starts in the losses." in screen.err
    assert "failing seed 1: failed after 2 steps, exit code 1" in screen.err
    assert "RuntimeError: no space left" in screen.err and f"{table}/failing/seed1/job.log" in screen.err
    assert report(table) == {"diverging": None, "failing": None, "gamma_0": 1.0, "gamma_1": 11.0, "gamma_2": 21.0}
    assert "diverged at step 2" in screen.out and "no space left" in screen.out

    # What diverged is a result. What failed is tried again, and may go well now.
    (rows.folder / "failing.yaml").unlink()
    rows.add("failing", "MODEL: {WEIGHTS: ''}")
    (table / "failing/seed1/job.json").unlink()
    (table / "failing/seed1/metrics.json").unlink()
    assert ablation() == 0
    assert starts(table)["diverging/seed1"] == 1 and starts(table)["failing/seed1"] == 2


def test_what_failed_goes_on(ablation, rows, table, train_net):
    rows.add("failing", "MODEL: {WEIGHTS: fail}")
    assert ablation() == 1
    train_net.write_text(train_net.read_text().replace('end == "fail"', "False"))
    assert ablation() == 0
    lines = (table / "failing/seed1/metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, 1, 2, 3, 4]
    attempts = json.loads((table / "failing/seed1/job.json").read_text())
    assert [attempt["exit_code"] for attempt in attempts] == [1, 0]


def test_a_job_that_cannot_start_says_where_to_look(ablation, table, capfd):
    (table / "gamma_1/seed1/job.log").mkdir(parents=True)
    assert ablation() == 1
    folder = table / "gamma_1/seed1"
    where = f"see {folder}/job.log and {folder}/submitit"
    assert f"gamma_1 seed 1: unfinished, 0 steps done; {where}" in capfd.readouterr().err
    assert any("IsADirectoryError" in path.read_text() for path in table.glob("gamma_1/seed1/submitit/*.err"))
    assert report(table) == {"gamma_0": 1.0, "gamma_1": None, "gamma_2": 21.0}


def kill_all(runner, table):
    """As a power cut does."""
    os.killpg(runner.pid, signal.SIGKILL)
    for path in table.rglob("job.pid"):
        os.kill(int(path.read_text()), signal.SIGKILL)


@pytest.mark.parametrize(
    "whole_machine",
    [pytest.param(False, id="the runner"), pytest.param(True, id="all its processes")],
)
@pytest.mark.slow
def test_killed_and_started_again_it_finishes_the_same_table(
    start_ablation, ablation, table, monkeypatch, whole_machine
):
    monkeypatch.setenv("PACE", "0.1")
    runner = start_ablation("--jobs", 2, "SOLVER.MAX_ITER", 15)
    wait_for(lambda: len(starts(table)) == 2)
    first = set(starts(table))
    kill_all(runner, table) if whole_machine else runner.kill()
    runner.wait()
    assert len(starts(table)) == 2
    assert ablation("--jobs", 2, "SOLVER.MAX_ITER", 15) == 0
    assert report(table) == {"gamma_0": 1.0, "gamma_1": 11.0, "gamma_2": 21.0}
    # Those that were running went on, unless they were killed too; the others ran once in any case.
    expected = {name: 1 + (whole_machine and name in first) for name in starts(table)}
    assert starts(table) == expected and len(expected) == 3
    assert not list(table.rglob("twice"))
    for path in table.rglob("metrics.json"):
        assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == list(range(16))


def terminal(runner):
    os.killpg(runner.pid, signal.SIGINT)  # Ctrl+C is for all processes of the terminal


def kill(runner):
    runner.terminate()


@pytest.mark.slow
@pytest.mark.parametrize("how", [terminal, kill])
def test_interrupted_it_lets_its_jobs_save_and_says_so(start_ablation, ablation, table, monkeypatch, how):
    monkeypatch.setenv("PACE", "0.1")
    runner = start_ablation("--jobs", 2, "SOLVER.MAX_ITER", 100)
    wait_for(lambda: len(list(table.rglob("metrics.json"))) == 2)
    how(runner)
    screen, _ = runner.communicate(timeout=30)
    assert runner.returncode == 130
    assert "2 running jobs save and stop" in screen and "resumes them from their last checkpoints" in screen
    assert "Traceback" not in screen
    assert [path.read_text() for path in table.rglob("saved")] == [f"[{int(signal.SIGTERM)}]"] * 2  # told once
    for path in table.rglob("starts"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text().split()[0]), 0)
    monkeypatch.setenv("PACE", "0")
    assert ablation("SOLVER.MAX_ITER", 100) == 0
    assert sorted(starts(table).values()) == [1, 2, 2]


def test_a_job_that_ends_while_it_is_told_to(runs):
    """Its lock is still held and its process gone already: the other jobs are told all the same."""
    process = subprocess.Popen(["true"])
    process.wait()
    run = runs[0]
    run.prepare()
    (run.folder / "job.pid").write_text(str(process.pid))
    said = []
    with open(run.folder / "job.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        threading.Timer(0.3, fcntl.flock, (lock, fcntl.LOCK_UN)).start()
        LocalLauncher(1).interrupt({run: None}, said.append)
    assert "All jobs have stopped" in said[-1]


@pytest.mark.parametrize(("jobs", "threads"), [("2", "6"), ("3", "4"), ("8", "4")])
def test_jobs_share_the_cores(jobs, threads, monkeypatch):
    """All of them, also where there are fewer runs than jobs asked for."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    launcher = make_launcher(parse(["rows", "--jobs", jobs]), num_runs=3)
    assert launcher.environment(0)["OMP_NUM_THREADS"] == threads


@pytest.mark.slow
def test_two_runners_at_a_time(start_ablation, ablation, table, monkeypatch, capfd):
    monkeypatch.setenv("PACE", "0.1")
    runner = start_ablation("SOLVER.MAX_ITER", 1000)
    wait_for(lambda: starts(table))
    assert ablation("SOLVER.MAX_ITER", 1000) == 1
    assert "already running there" in capfd.readouterr().err
    assert ablation("--report-only", "SOLVER.MAX_ITER", 1000) == 0  # reading is no harm
    assert "unfinished" in capfd.readouterr().out
    runner.send_signal(signal.SIGINT)
    runner.wait(timeout=30)


FAKE_SLURM = {
    "sbatch": """
        [ "$(grep -c 'partition=tiny' "$1")" = 1 ] || exit 9
        grep -q 'time=10' "$1" || exit 9
        cp "$1" "$SLURM_STATE/$$.sh"
        SLURM_JOB_ID=$$ SLURM_PROCID=0 nohup bash "$SLURM_STATE/$$.sh" >"$SLURM_STATE/$$.log" 2>&1 &
        echo $! >"$SLURM_STATE/$$"
        echo "Submitted batch job $$"
    """,
    "srun": """
        while [ "$1" != "${1#-}" ]; do case "$1" in --output|--error) shift;; esac; shift; done
        exec "$@"
    """,
    "sacct": """
        echo 'JobID|State|NodeList'
        for job in "$SLURM_STATE"/*[0-9]; do
            kill -0 "$(cat "$job")" 2>/dev/null && state=RUNNING || state=COMPLETED
            echo "$(basename "$job")|$state|here"
        done
    """,
}


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """sbatch, srun and sacct of a cluster of one machine."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "slurm").mkdir()
    for name, text in FAKE_SLURM.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STATE", str(tmp_path / "slurm"))
    return ["--launcher", "slurm", "--slurm", "partition=tiny", "--slurm", "time=10"]


def test_on_slurm(fake_slurm, ablation, table, capfd):
    assert ablation("--launcher", "slurm") == 1
    assert "--slurm time=240" in capfd.readouterr().err
    assert ablation(*fake_slurm) == 0
    assert report(table) == {"gamma_0": 1.0, "gamma_1": 11.0, "gamma_2": 21.0}
    assert set(starts(table).values()) == {1}


def test_slurm_that_is_not_there(ablation, table, monkeypatch, capfd):
    monkeypatch.setenv("PATH", "/nowhere")
    words = ["--launcher", "slurm", "--slurm", "time=10"]
    assert ablation(*words) == 1
    assert "--launcher slurm: Could not detect" in capfd.readouterr().err
    assert not table.exists()
    assert ablation(*words, "--report-only") == 0  # which needs none


def test_an_option_that_slurm_does_not_have(fake_slurm, ablation, table, capfd):
    assert ablation(*fake_slurm, "--slurm", "colour=red") == 1
    assert "['colour']" in capfd.readouterr().err
    assert not table.exists()


@pytest.mark.slow
def test_on_slurm_jobs_outlive_the_runner(fake_slurm, start_ablation, ablation, table, monkeypatch, tmp_path):
    monkeypatch.setenv("PACE", "0.2")
    runner = start_ablation(*fake_slurm, "SOLVER.MAX_ITER", 20)
    wait_for(lambda: len(starts(table)) == 3)
    runner.send_signal(signal.SIGINT)
    screen, _ = runner.communicate(timeout=30)
    assert runner.returncode == 130 and "3 jobs stay in SLURM's queue" in screen
    assert ablation(*fake_slurm, "SOLVER.MAX_ITER", 20) == 0
    assert set(starts(table).values()) == {1}
    assert len([path for path in (tmp_path / "slurm").iterdir() if path.name.isdigit()]) == 3  # none submitted twice


def test_a_data_set_that_is_not_there_is_told_before_anything_runs(ablation, tiny_config, table, capfd):
    (Path(tiny_config).parent / "shapes_test.json").unlink()
    assert ablation() == 1
    assert "shapes_test.json" in capfd.readouterr().err
    assert not table.exists()


@pytest.mark.parametrize("key, known", [("CLS_LOSS", "SigmoidFocalLoss"), ("HEAD", "FocalRetinaNetHead")])
def test_an_unknown_component_is_told_before_anything_runs(ablation, rows, table, capfd, key, known):
    rows.add("mine", f"MODEL: {{FOCAL: {{{key}: {{NAME: Mine}}}}}}")
    assert ablation() == 1
    told = capfd.readouterr().err
    assert f"mine: MODEL.FOCAL.{key}.NAME is 'Mine', which is not registered" in told and known in told
    assert not table.exists()


def test_an_unknown_key_of_a_component_is_told_before_anything_runs(ablation, rows, table, capfd):
    rows.add("mine", "MODEL: {FOCAL: {CLS_LOSS: {ARGS: {GAMA: 2}}}}")
    assert ablation() == 1
    assert "mine: MODEL.FOCAL.CLS_LOSS.ARGS.GAMA: SigmoidFocalLoss has no such key" in capfd.readouterr().err
    assert not table.exists()


@pytest.mark.parametrize("annotations", [[], [{"iscrowd": 1}]], ids=["no box", "crowds alone"])
def test_a_test_set_without_boxes_is_told_before_anything_runs(ablation, tiny_config, table, capfd, annotations):
    path = Path(tiny_config).parent / "shapes_test.json"
    content = json.loads(path.read_text())
    content["annotations"] = [{**content["annotations"][0], **record} for record in annotations]
    path.write_text(json.dumps(content))
    assert ablation() == 1
    assert "shapes_test, the first of DATASETS.TEST, has no boxes" in capfd.readouterr().err
    assert not table.exists()


def test_no_test_set_is_told_before_anything_runs(ablation, table, capfd):
    assert ablation("DATASETS.TEST", "()") == 1
    assert "DATASETS.TEST is empty" in capfd.readouterr().err
    assert not table.exists()


def test_runs_of_other_lengths_are_no_ablation(ablation, table, capfd):
    assert ablation("TEST.PATIENCE", "2", "TEST.BEST_METRIC", "bbox/AP") == 1
    assert "TEST.PATIENCE is 2; expected 0" in capfd.readouterr().err and not table.exists()


@pytest.mark.slow
def test_a_run_without_an_ap_is_not_run_again(ablation, train_net, table, capfd):
    train_net.write_text(train_net.read_text().replace('"bbox/AP"', '"mine/AP"'))
    assert ablation() == 1
    assert "gamma_0 seed 1: no AP. " in capfd.readouterr().err
    assert ablation() == 1
    assert "has no bbox/AP of step 4, only bbox/AP50" in capfd.readouterr().out
    assert set(starts(table).values()) == {1}
    # An evaluator that is mended: only its evaluation is done again.
    train_net.write_text(train_net.read_text().replace('"mine/AP"', '"bbox/AP"'))
    for path in table.rglob("job.json"):
        path.unlink()
    assert ablation() == 0
    assert report(table) == {"gamma_0": 1.0, "gamma_1": 11.0, "gamma_2": 21.0}


@pytest.mark.slow
def test_several_tables_at_once(ablation, rows, table, capfd):
    (rows.folder / "results.csv").write_text("row,AP,baseline\ngamma_1,,x\nrate_1,,x\n")
    rows.add("rate_1", "SOLVER: {BASE_LR: 0.002}")
    assert ablation() == 0
    assert set(starts(table)) == {"gamma_0/seed1", "gamma_1/seed1", "gamma_2/seed1", "rate_1/seed1"}
    assert (report(table / "gamma"), report(table / "rate")) == (
        {"gamma_0": 1.0, "gamma_1": 11.0, "gamma_2": 21.0},
        {"rate_1": 21.0},
    )
    screen = capfd.readouterr().out
    assert f"{table}/gamma/report.html" in screen and f"{table}/rate/report.html" in screen
    assert not (table / "report.json").exists()


def test_rows_that_are_the_same_run_are_told_before_they_are_run(ablation, table, capfd):
    assert ablation("MODEL.RETINANET.FOCAL_LOSS_GAMMA", 1.0) == 0
    screen = capfd.readouterr()
    first, same = "gamma_0 seed 1: AP", "gamma_0, gamma_1, gamma_2: the same run"
    assert same in screen.out and same in screen.err.partition(first)[0]


def test_paths_with_spaces_and_other_letters(ablation, rows, tmp_path):
    rows.add("γ = 1 'x' {y}", "SOLVER: {BASE_LR: 0.002}")
    output = tmp_path / "mein Ergebnis, größer"
    assert ablation("--output", output) == 0
    assert report(output)["γ = 1 'x' {y}"] == 21.0


@pytest.mark.slow
def test_a_terminal_without_all_letters(start_ablation, table, monkeypatch):
    for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(name, value)
    runner = start_ablation("--report-only")
    screen, _ = runner.communicate(timeout=120)
    assert runner.returncode == 0 and "?: difference from gamma_0, and" in screen
    assert "Δ: difference from gamma_0, and" in (table / "report.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_folder_that_was_moved(ablation, table, tmp_path):
    assert ablation() == 0
    table.rename(tmp_path / "elsewhere")
    assert ablation("--output", tmp_path / "elsewhere") == 0
    assert set(starts(tmp_path / "elsewhere").values()) == {1}


@pytest.mark.parametrize("name", ["gamma_1/seed1/config-ablation.yaml", "report.json"])
def test_what_cannot_be_written_is_told(ablation, table, name, capfd):
    """As on a full disk."""
    (table / name).mkdir(parents=True)
    assert ablation() == 1
    error = capfd.readouterr().err
    assert f"{table}: [Errno 21]" in error and "continue with the same command" in error
    (table / name).rmdir()
    assert ablation() == 0
    assert set(starts(table).values()) == {1}


def test_data_sets_of_the_users_modules(ablation, table, tmp_path, monkeypatch, capfd):
    (tmp_path / "my_data_sets.py").write_text(
        "from detectron2.data import DatasetCatalog\nDatasetCatalog.register('of_a_module', lambda: [{}] * 7)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["MODEL.FOCAL.IMPORTS", "['my_data_sets']", "DATASETS.TRAIN", "('of_a_module',)"]
    try:
        assert ablation(*words) == 0
    finally:
        DatasetCatalog.remove("of_a_module")
        del sys.modules["my_data_sets"]
    assert json.loads((table / "ablation.json").read_text())["images"]["of_a_module"] == 7
    assert ablation("MODEL.FOCAL.IMPORTS", "['no_module']", "--output", tmp_path / "other") == 1
    assert "MODEL.FOCAL.IMPORTS names 'no_module', which is not found" in capfd.readouterr().err


def test_files_that_cannot_be_read_are_told(ablation, tmp_path, capfd):
    assert ablation("--data", tmp_path) == 1
    assert re.search(f"Is a directory.*{tmp_path}", capfd.readouterr().err)
    (tmp_path / "file").touch()
    assert ablation("--output", tmp_path / "file") == 1
    assert f"{tmp_path / 'file'}" in capfd.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["SOLVER.MAX_ITER", "4"], "name the rows"),
        (["rows", "SOLVER.MAX_ITER"], "an odd number"),
        (["rows", "SEED", "4"], "SEED: each run has its own"),
        (["rows", "--seeds", "0"], "expected 1 or more"),
        (["rows", "--slurm", "time"], "expected KEY=VALUE"),
    ],
)
def test_a_wrong_command_line(words, message, capsys):
    with pytest.raises(SystemExit):
        parse(words)
    assert message in capsys.readouterr().err


def test_the_command_line():
    args = parse(["configs/paper/table1b", "--data", "bccd", "SOLVER.MAX_ITER", "4", "SOLVER.BASE_LR", "-1"])
    assert (args.rows, args.opts) == (["configs/paper/table1b"], ["SOLVER.MAX_ITER", "4", "SOLVER.BASE_LR", "-1"])
    assert str(args.output) == "output/ablation/table1b-bccd"
    assert parse(["rows", "VIS.ENABLED", "True"]).opts == ["VIS.ENABLED", "True"]  # a key that Detectron2 has not
    assert str(parse(["a/x.yaml", "b", "--data", "c/mine.yaml"]).output) == "output/ablation/x-b-mine"
    many = [f"a/{'x' * 40}_{i}.yaml" for i in range(20)]  # as a shell's pattern gives them
    assert str(parse([*many, "--data", "bccd"]).output) == f"output/ablation/{'x' * 40}_0-and-19-more-bccd"


@pytest.mark.parametrize("word", [".", "../mine", "sub/.."])
def test_the_name_of_a_folder_that_is_not_named(word, tmp_path, monkeypatch):
    (tmp_path / "mine/sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine")
    assert str(parse([word, "--data", "bccd"]).output) == "output/ablation/mine-bccd"


def test_what_runs_a_run():
    """The package's own command, wherever it is installed, or the script that is asked for."""
    run = SimpleNamespace(config_file="run/config.yaml")
    words = ["--config-file", "run/config.yaml", "--resume"]
    assert train_command(run, parse(["rows"]).train_net) == [sys.executable, "-m", "focal_plugin", "train", *words]
    assert train_command(run, parse(["rows", "--train-net", "my.py"]).train_net) == [sys.executable, "my.py", *words]


@pytest.mark.slow
def test_with_the_real_train_net(rows, ablation, table):
    """One row finishes; the other one has a learning rate that makes it diverge."""
    (rows.folder / "gamma_1.yaml").unlink()
    (rows.folder / "gamma_2.yaml").unlink()
    rows.add("too_fast", "SOLVER: {BASE_LR: 1.0e+30, WARMUP_ITERS: 0}")
    assert ablation("--train-net", TRAIN_NET, "--jobs", 2) == 0
    result = json.loads((table / "report.json").read_text())
    finished, diverged = (row["runs"][0] for row in result["rows"])
    assert finished["status"] == "finished" and 0 <= finished["results"]["AP"] <= 100
    assert diverged["status"] == "diverged" and 1 <= diverged["step"] < 4 and diverged["reason"]
    assert (table / "gamma_0/seed1/model_final.pth").exists()

    # Where an AP is missing, the last checkpoint is evaluated again.
    (table / "gamma_0/seed1/job.json").unlink()
    metrics = table / "gamma_0/seed1/metrics.json"
    metrics.write_text(metrics.read_text().replace("bbox/AP", "mine/AP"))
    assert ablation("--train-net", TRAIN_NET, "--jobs", 2) == 0
    assert report(table)["gamma_0"] == finished["results"]["AP"]


@pytest.mark.slow
@pytest.mark.parametrize("interrupted", [True, False], ids=["interrupted", "killed"])
def test_going_on_with_the_real_train_net(start_ablation, ablation, table, interrupted):
    """An interrupted run saves; a killed one has its last checkpoint."""
    words = ["--train-net", TRAIN_NET, "--jobs", 2, "SOLVER.MAX_ITER", 60]
    words += [] if interrupted else ["SOLVER.CHECKPOINT_PERIOD", 5]
    runner = start_ablation(*words)
    wait_for(lambda: list(table.rglob("metrics.json" if interrupted else "last_checkpoint")), 120)
    if interrupted:
        terminal(runner)
    else:
        kill_all(runner, table)
    runner.communicate(timeout=60)
    assert ablation(*words) == 0
    assert all(isinstance(ap, float) for ap in report(table).values())
    starts = [
        re.findall(r"Starting training from iteration (\d+)", path.read_text()) for path in table.rglob("log.txt")
    ]
    assert any(0 < int(last) < 60 for *_, last in starts), starts
