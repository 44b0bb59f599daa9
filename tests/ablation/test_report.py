"""The report's numbers against ones computed by hand, and its page in a browser."""

import base64
import csv
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from focal_plugin.ablation.report import write_report
from focal_plugin.ablation.rows import compared_with, find_base, find_tables
from focal_plugin.ablation.runs import plan
from focal_plugin.ablation.summary import interval
from focal_plugin.ablation.unread import without_effect

CONFIGS = Path(__file__).parents[2] / "configs"

# AP of the seeds 1, 2, 3. By hand: 40, 41, 45 has mean 42 and std √((4 + 1 + 9) / 2) = √7; 50, 53 has 51.5 and √4.5.
GAMMA_0, GAMMA_1 = (40.0, 41.0, 45.0), (50.0, 53.0)
PAPER = "row,AP,baseline,note\ngamma_0,31.0,x,\ngamma_1,33.5,,\ngamma_2,,,diverged\ngamma_5,30.0,,\n"


ATTEMPT = {"processor": "Abacus 3000", "cores": 4, "gpus": [], "versions": {"torch": "9.9"}}


def write_run(run, ap=None, exit_code=0, **files):
    """A finished run of an AP, or the files of another one."""
    run.prepare()
    lines = [{"iteration": i, "total_loss": 2.0 - 0.1 * i, "time": 0.5} for i in range(4)]
    if ap is not None:
        values = {"AP": ap, "AP50": 2 * ap, "AP75": ap / 2, "APs": float("nan"), "APm": ap, "APl": ap}
        lines.append({"iteration": 4, **{f"bbox/{name}": value for name, value in values.items()}})
    notes = json.dumps([{**ATTEMPT, "exit_code": exit_code}])
    files = {"metrics.json": "\n".join(map(json.dumps, lines)), "job.json": notes, **files}
    for name, text in files.items():
        (run.folder / name).write_text(text)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A table of which all three seeds of the first row have finished, two of the second, none of the third."""
    folder = tmp_path_factory.mktemp("rows")
    for gamma in (0, 1, 2):
        (folder / f"gamma_{gamma}.yaml").write_text(f"MODEL: {{RETINANET: {{FOCAL_LOSS_GAMMA: {gamma}.0}}}}")
    (folder / "results.csv").write_text(PAPER)
    (folder / "Base.yaml").write_text(
        "VERSION: 2\nSOLVER: {MAX_ITER: 4, IMS_PER_BATCH: 2}\nDATASETS: {TRAIN: [shapes_train], TEST: [shapes_test]}"
    )
    output = folder / "my table"
    (table,), base = find_tables([str(folder)]), find_base(str(folder / "Base.yaml"))
    runs = plan(table.rows, base, ["SOLVER.BASE_LR", "0.5"], 3, output)
    named = {(run.row.name, run.seed): run for run in runs}
    for seed, ap in enumerate(GAMMA_0, 1):
        write_run(named["gamma_0", seed], ap)
    for seed, ap in enumerate(GAMMA_1, 1):
        write_run(named["gamma_1", seed], ap)
    write_run(named["gamma_1", 3], exit_code=9, **{"job.log": "a\nb <script>alert(1)</script>\n"})
    record = json.dumps({"iteration": 3, "cause": "It starts in the losses."})
    write_run(named["gamma_2", 1], **{"diverged.json": record})
    noise = np.random.default_rng(0).integers(0, 255, (400, 1600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(named["gamma_0", 1].folder / "detections.png")
    notes = {"images": {"shapes_train": 6, "shapes_test": 4}, "starts": [{"time": 0, "command": "python -m it rows"}]}
    (output / "ablation.json").write_text(json.dumps(notes))
    summary = write_report(table, runs, base, ["SOLVER.BASE_LR", "0.5"], output)
    return SimpleNamespace(summary=summary, output=output)


def read(reported, name):
    return (reported.output / name).read_text()


def test_numbers(reported):
    summary = json.loads(read(reported, "report.json"))
    assert summary == reported.summary
    first, second, third = summary["rows"]
    assert (first["mean"]["AP"], first["std"]["AP"]) == pytest.approx((42.0, 7**0.5))
    assert (second["mean"]["AP"], second["std"]["AP"]) == pytest.approx((51.5, 4.5**0.5))
    assert (second["mean"]["AP50"], second["std"]["AP50"]) == pytest.approx((103.0, 2 * 4.5**0.5))
    assert "APs" not in first["mean"]  # the set has no such boxes
    assert third["mean"] == {} and third["difference"] is None
    assert (first["difference"], second["difference"]) == (0.0, pytest.approx(9.5))
    low, high = second["difference_interval"]
    assert low < 9.5 < high and low + high == pytest.approx(19)
    assert first["difference_interval"] is None and third["difference_interval"] is None
    assert (second["paper_difference"], third["paper_difference"]) == (2.5, None)
    assert first["minutes"] == pytest.approx(4 * 0.5 / 60)
    assert [row["remark"] for row in summary["rows"]] == [
        "",
        "1 failed",
        "1 of 3 diverged at step 3; 2 not started",
    ]
    assert [run["status"] for run in second["runs"]] == ["finished", "finished", "failed"]


@pytest.mark.parametrize(
    ("values", "others", "half"),
    [  # t's 97.5 % quantile from a printed table, times √(s²/n + s²/n)
        ([11, 12, 13], [1, 2, 3], 2.776 * (2 / 3) ** 0.5),  # 4 degrees of freedom
        ([10, 12], [0, 2], 4.303 * 2**0.5),  # 2
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], 2.228 * (2 * 3.5 / 6) ** 0.5),  # 10
        ([5.0, 5.0, 5.0], [1, 3], 12.706),  # 1: one side alone varies, by √2
    ],
)
def test_interval(values, others, half):
    difference = sum(values) / len(values) - sum(others) / len(others)
    low, high = interval(values, others)
    assert (low + high) / 2 == pytest.approx(difference)
    assert (high - low) / 2 == pytest.approx(half, rel=1e-3)
    assert interval(others, values) == pytest.approx([-high, -low])


@pytest.mark.parametrize("others", [[], [3.0], [3.0, 3.0]])
def test_seeds_that_tell_nothing_have_no_interval(others):
    assert interval([5.0, 5.0], others) is None and interval(others, [5.0, 5.0]) is None


@pytest.fixture
def table(rows):
    (table,) = find_tables([str(rows.folder)])
    return table


@pytest.fixture
def runs(table, tiny_config, tmp_path):
    """Of one seed, not run yet."""
    return plan(table.rows, find_base(tiny_config), [], 1, tmp_path / "table")


@pytest.mark.parametrize(
    ("sets", "folder", "prefix"),
    [
        (("shapes_test",), "inference", "bbox/"),
        (("shapes_test", "shapes_train"), "inference/shapes_test", "shapes_test/bbox/"),
    ],
    ids=["one test set", "two"],
)
def test_a_model_that_finds_nothing_has_an_ap_of_zero(table, tiny_config, tmp_path, sets, folder, prefix):
    """Detectron2 says NaN of it, where pycocotools would say 0."""
    run = plan(table.rows, find_base(tiny_config), ["DATASETS.TEST", str(sets)], 1, tmp_path / "table")[0]
    (run.folder / folder).mkdir(parents=True)
    write_run(run, float("nan"), **{f"{folder}/coco_instances_results.json": "[]"})
    metrics = run.folder / "metrics.json"
    metrics.write_text(metrics.read_text().replace("bbox/", prefix))
    assert (run.outcome().status, run.outcome().results["AP"], run.outcome().results["AP50"]) == ("finished", 0.0, 0.0)
    assert math.isnan(run.outcome().results["APs"])


@pytest.mark.parametrize("found", ['[{"image_id": 0}]', None], ids=["detections", "unknown"])
def test_a_test_set_without_boxes_has_no_ap(table, runs, tmp_path, found):
    (runs[0].folder / "inference").mkdir(parents=True)
    write_run(runs[0], float("nan"), **({"inference/coco_instances_results.json": found} if found else {}))
    write_run(runs[1], 50.0)
    summary = write_report(table, runs, None, [], tmp_path / "table")
    row, other, _ = summary["rows"]
    assert (row["mean"], row["num_finished"], row["remark"], other["difference"]) == ({}, 0, "no AP", None)
    assert row["runs"][0]["status"] == "no AP" and runs[0].outcome().over
    for name in ("report.md", "report.html"):
        assert "NaN" in (tmp_path / "table" / name).read_text()
    with (tmp_path / "table/report.csv").open(newline="") as file:
        line = next(csv.DictReader(file))
    assert (line["AP"], line["finished"], line["no_AP"]) == ("", "0", "1")


def test_a_run_that_ended_well_without_an_ap(runs):
    """It cannot go on: what is missing, and what to do, is said."""
    write_run(runs[0])
    with (runs[0].folder / "metrics.json").open("a") as file:
        file.write('\n{"iteration": 4, "segm/AP": 7.0}\n')
    outcome = runs[0].outcome()
    assert (outcome.status, outcome.step, outcome.over) == ("no AP", 4, True)
    for part in (f"{runs[0].folder}/metrics.json has no bbox/AP of step 4, only segm/AP", "shapes_test", "job.json"):
        assert part in outcome.reason


def test_several_tables_are_reported_each_by_itself(rows, tiny_config, tmp_path):
    results = "row,AP,baseline\ngamma_1,30.0,x\ngamma_2,31.0,\nalpha_1,40.0,\nalpha_2,42.0,x\nalpha_3,1,\n"
    (rows.folder / "results.csv").write_text(results)
    rows.add("alpha_1", "MODEL: {RETINANET: {FOCAL_LOSS_ALPHA: 0.1}}")
    rows.add("alpha_2", "MODEL: {RETINANET: {FOCAL_LOSS_ALPHA: 0.2}}")
    tables = find_tables([str(rows.folder)])
    assert [(table.name, table.baseline, table.missing) for table in tables] == [
        ("gamma", "gamma_1", []),
        ("alpha", "alpha_2", ["alpha_3"]),
    ]
    output = tmp_path / "all"
    for table, aps in zip(tables, [(50.0, 51.0, 49.0), (20.0, 23.0)]):
        own = plan(table.rows, find_base(tiny_config), [], 1, output)
        for run, ap in zip(own, aps, strict=True):
            write_run(run, ap)
        write_report(table, own, None, [], output)
    gamma, alpha = (json.loads((output / name / "report.json").read_text()) for name in ("gamma", "alpha"))
    assert (gamma["title"], alpha["title"]) == ("all: gamma", "all: alpha")
    assert [(row["row"], row["difference"]) for row in gamma["rows"]] == [
        ("gamma_1", 0.0),
        ("gamma_2", 1.0),
        ("gamma_0", -1.0),
    ]
    assert [(row["difference"], row["paper_difference"]) for row in alpha["rows"]] == [(-3.0, -2.0), (0.0, 0.0)]
    assert "Δ: difference from alpha_2, and" in (output / "alpha/report.md").read_text()


def test_keys_without_effect_are_told(table, tmp_path):
    """Rows that vary the ResNet's depth, on an encoder of timm's."""
    paper = CONFIGS / "paper"
    (table,) = find_tables([str(paper / f"table1e_{name}.yaml") for name in ("R50_400", "R101_400", "R50_500")])
    runs = plan(table.rows, find_base("quickstart"), [], 2, tmp_path / "table")
    advice, same = write_report(table, runs, None, [], tmp_path / "table")["without_effect"]
    assert advice.startswith("table1e_R101_400: MODEL.RESNETS.DEPTH is set to 101, but build_timm_fpn_backbone")
    assert same.startswith("table1e_R50_400, table1e_R101_400: the same run")
    assert "MODEL.RESNETS.DEPTH" in same
    for name in ("report.md", "report.html"):
        assert "the same run" in (tmp_path / "table" / name).read_text()


def test_the_other_keys_of_an_encoder_that_is_not_made(tmp_path):
    (table,) = find_tables([str(CONFIGS / "paper/table2")])
    runs = plan(table.rows, find_base("quickstart"), [], 1, tmp_path)
    assert any(line.startswith("table2_R101, table2_X101: the same run") for line in without_effect(runs))
    assert without_effect(plan(table.rows, None, [], 1, tmp_path)) == []


def test_rows_that_the_command_line_makes_the_same(table, tiny_config, tmp_path):
    opts = ["MODEL.RETINANET.FOCAL_LOSS_GAMMA", "1.0"]
    runs = plan(table.rows, find_base(tiny_config), opts, 1, tmp_path)
    (same,) = without_effect(runs)
    assert same.startswith("gamma_0, gamma_1, gamma_2: the same run") and "no key" in same
    assert without_effect(plan(table.rows, find_base(tiny_config), [], 2, tmp_path)) == []


@pytest.mark.parametrize("name", ["detections.png", "diverged.json", "job.json", "../../ablation.json"])
@pytest.mark.parametrize("part", [0, 0.5])
def test_a_file_that_was_cut_off(table, runs, tmp_path, name, part):
    """As a kill, a full disk or a power cut leaves it: the rest is reported."""
    run = runs[0]
    write_run(run, 40.0)
    Image.new("RGB", (64, 64)).save(run.folder / "detections.png")
    (run.folder / "diverged.json").write_text(json.dumps({"iteration": 3, "cause": "It starts in the losses."}))
    (tmp_path / "table/ablation.json").write_text(json.dumps({"images": {}, "starts": []}))
    path = run.folder / name
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    if name != "diverged.json":
        (run.folder / "diverged.json").unlink()
    summary = write_report(table, runs, None, [], tmp_path / "table")
    assert summary["rows"][0]["mean"]["AP"] == 40.0


def test_a_row_that_is_edited_or_gone_when_it_is_reported(rows, table, runs, tmp_path):
    """The report has what was run."""
    (rows.folder / "gamma_1.yaml").unlink()
    rows.add("gamma_2", "MODEL: {RETINANET: {FOCAL_LOSS_GAMMA: 9.0}}")
    summary = write_report(table, runs, None, [], tmp_path / "table")
    assert [row["keys"]["MODEL.RETINANET.FOCAL_LOSS_GAMMA"] for row in summary["rows"]] == ["0.0", "1.0", "2.0"]


def test_without_a_number_of_the_papers_there_is_no_column_for_it(table, runs, tmp_path):
    """And the row to compare with may be any."""
    (other,) = compared_with([table], "gamma_2.yaml")
    for run, ap in zip(runs, (10.0, 20.0, 40.0)):
        write_run(run, ap)
    summary = write_report(other, runs, None, [], tmp_path / "table")
    assert [row["difference"] for row in summary["rows"]] == [-30.0, -20.0, 0.0]
    assert "Δ: difference from gamma_2, and" in summary["legend"]
    report = (tmp_path / "table" / "report.md").read_text()
    assert "gamma_2 (baseline)" in report and "−30.0" in report
    for name in ("report.md", "report.csv", "report.html"):
        assert "paper" not in (tmp_path / "table" / name).read_text().lower()


def test_one_seed_has_no_spread(table, runs, tmp_path):
    write_run(runs[0], 40.0)
    summary = write_report(table, runs, None, [], tmp_path / "table")
    assert summary["rows"][0]["std"] == {}
    text = (tmp_path / "table/report.md").read_text()
    (line,) = [line for line in text.splitlines() if "(baseline)" in line]
    assert [cell.strip() for cell in line.split("|")[1:6]] == ["gamma_0 (baseline)", "40.0", "", "80.0", "20.0"]
    assert "paper" not in text.partition("## What was not run")[0]
    assert "```" not in text  # no command has been noted
    assert "WarmupMultiStepLR (of the baseline" in text  # which has no SOLVER.STEPS


def test_ap_by_class(table, runs, tmp_path):
    for number, run in enumerate(runs[:2]):
        write_run(run, 40.0)
        metrics = run.folder / "metrics.json"
        metrics.write_text(metrics.read_text().replace('"bbox/AP":', f'"bbox/AP-disc": {number + 1}, "bbox/AP":'))
    summary = write_report(table, runs, None, [], tmp_path / "table")
    assert [row["mean"].get("AP-disc") for row in summary["rows"]] == [1, 2, None]
    with (tmp_path / "table" / "report.csv").open() as file:
        assert [line["AP-disc"] for line in csv.DictReader(file)] == ["1.0", "2.0", ""]
    heading, _, first, *_ = (tmp_path / "table" / "report.md").read_text().split("\n\n")[1].splitlines()
    assert "| AP-disc" in heading and " 1.0 " in first


def test_the_ap_of_averaged_weights(table, runs, tmp_path):
    """Beside that of the weights, by which rows are compared: else rows that differ in EMA alone would look alike."""
    write_run(runs[0], 40.0)
    write_run(runs[1], 40.0)
    metrics = runs[1].folder / "metrics.json"
    metrics.write_text(
        metrics.read_text().replace('"bbox/AP":', '"bbox_EMA/AP": 43.5, "bbox_EMA/AP50": 50, "bbox/AP":')
    )
    summary = write_report(table, runs, None, [], tmp_path / "table")
    assert [row["mean"].get("AP of the average") for row in summary["rows"]] == [None, 43.5, None]
    assert summary["rows"][1]["mean"]["AP"] == 40.0 and summary["rows"][1]["difference"] == 0
    heading, _, first, second, *_ = (tmp_path / "table" / "report.md").read_text().split("\n\n")[1].splitlines()
    assert "| AP of the average" in heading and " 43.5 " in second and " 43.5 " not in first


def test_the_ap_of_many_classes_is_in_the_csv_alone(table, runs, tmp_path):
    write_run(runs[0], 40.0)
    metrics = runs[0].folder / "metrics.json"
    many = "".join(f'"bbox/AP-{k}": {k}, ' for k in range(11))
    metrics.write_text(metrics.read_text().replace('"bbox/AP":', f'{many}"bbox/AP":'))
    write_report(table, runs, None, [], tmp_path / "table")
    assert "AP-10" not in (tmp_path / "table" / "report.md").read_text()
    assert "AP-10" in (tmp_path / "table" / "report.csv").read_text()


def test_markdown(reported):
    text = read(reported, "report.md")
    lines = [line.strip("|") for line in text.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert table[0][:6] == ["row", "paper AP", "paper Δ", "AP", "Δ", "AP50"]
    assert table[2][1:6] == ["31.0", "", "42.0 ± 2.6", "", "84.0 ± 5.3"]
    assert table[3][1:5] == ["33.5", "+2.5", "51.5 ± 2.1", "+9.5 (+2.2 to +16.8)"]
    assert table[4][1:5] == ["diverged", "", "diverged", ""]
    for fact in (
        "shapes_train (6 images)",
        "4 steps of 2 images (1.33 epochs)",
        "SOLVER.BASE_LR 0.5",
        "Seeds: 1, 2, 3",
        "torch 9.9",
        "Abacus 3000, 4 cores",
        "python -m it rows",
        "Rows of the paper's table: gamma_5",
        "gamma_2 seed 2: not started",
        "gamma_1 seed 3 failed: exit code 9",
    ):
        assert fact in text


def test_csv(reported):
    with (reported.output / "report.csv").open(newline="") as file:
        first, second, third = csv.DictReader(file)
    assert float(first["AP_std"]) == pytest.approx(7**0.5)
    assert (first["baseline"], second["baseline"], second["failed"], second["finished"]) == ("x", "", "1", "2")
    assert (third["paper_AP"], third["AP"], third["diverged"], third["not_started"]) == ("diverged", "", "1", "2")


def test_the_page_needs_nothing_else(reported):
    page = read(reported, "report.html")
    links = re.findall(r"""(?:src|srcset|href|url)\s*[=(]\s*["']?([^"'\s>)]+)""", page)
    assert len(links) >= 5 and all(link.startswith("data:image/") for link in links)
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    (jpeg,) = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    assert len(base64.b64decode(jpeg)) < 300_000  # of noise, the worst there is
    assert Image.open(reported.output / "report.png").size[0] > 1000


def test_the_page_in_a_browser(reported, browser):
    """Light and dark, on a screen and on a phone: all is drawn, and nothing is wider than the screen."""
    page = read(reported, "report.html")
    probe = """{svg: document.images[0].currentSrc.slice(-3000),
        rows: document.querySelectorAll('.results tbody tr').length}"""
    light, dark = browser(page, 1200, False, probe), browser(page, 390, True, probe)
    for found in (light, dark):
        assert (found["broken"], found["images"], found["rows"], found["requests"]) == (0, 3, 3, 0)
        assert found["overflow"] <= 0
    assert light["color"] == "rgb(255, 255, 255)" and dark["color"] == "rgb(22, 24, 28)"
    assert light["svg"] != dark["svg"]  # each theme has pictures of its own
