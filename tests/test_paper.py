"""The paper's tables as configs: each row is there, says only what it changes, builds and trains."""

import csv
import math
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from focal_plugin.config.load import load_config

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "paper"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml")) if not path.stem.startswith("Base")}
with (FOLDER / "results.csv").open(newline="") as file:
    LINES = list(csv.DictReader(file))
RESULTS = {line["row"]: line for line in LINES}


def named(template, names, values):
    return {template.format(name): value for name, value in zip(names, values, strict=True)}


ALPHAS, GAMMAS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999), (0, 0.1, 0.2, 0.5, 1, 2, 5)
BATCHES, PIXELS = (128, 256, 512), (400, 500, 600, 700, 800)
# AP in the order of the paper's tables; None: it diverged.
TABLES = {
    "table1a": {"ce_no_prior": None, "ce_prior": 30.2}
    | named("alpha_{}", ALPHAS, (0, 10.8, 30.2, 31.1, 30.8, 28.7, 25.1)),
    "table1b": named("gamma_{}", GAMMAS, (31.1, 31.4, 31.9, 32.9, 33.7, 34.0, 32.2)),
    "table1c": {"1x1": 30.3, "2x1": 31.9, "3x1": 31.8, "1x3": 32.4, "2x3": 34.2, "3x3": 34.0, "4x3": 33.8},
    "table1d": named("ohem_{}_nms_0.7", BATCHES, (31.1, 31.8, 30.6))
    | named("ohem_{}_nms_0.5", BATCHES, (32.8, 31.0, 27.6))
    | named("ohem_{}_nms_0.5_1to3", BATCHES, (31.1, 28.3, 24.0))
    | {"focal": 36.0},
    "table1e": named("R50_{}", PIXELS, (30.5, 32.5, 34.3, 35.1, 35.7))
    | named("R101_{}", PIXELS, (31.9, 34.4, 36.0, 37.1, 37.8)),
    "table2": {"R101": 39.1, "X101": 40.8},
    "table3": {"fl_gamma_2": 34.0, "fl_star_gamma_2_beta_1": 33.8, "fl_star_gamma_4_beta_0": 33.9},
}
PAPER = {f"{table}_{row}": ap for table, rows in TABLES.items() for row, ap in rows.items()}
BASELINES = {
    "table1a": "alpha_0.5", "table1b": "gamma_0", "table1c": "3x3", "table1d": "focal", "table1e": "R50_600",
    "table2": "R101", "table3": "fl_gamma_2",
}  # fmt: skip
NUMBERS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "ms"]


def own_keys(row):
    """What the file says itself, by whole keys."""

    def flat(node, prefix=""):
        for key, value in node.items():
            yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]

    keys = yaml.safe_load(FILES[row].read_text())
    assert keys.pop("_BASE_").startswith("Base-")
    return dict(flat(keys))


@pytest.fixture(autouse=True)
def catalogs():
    """Forget the data sets that a config registers."""
    before = set(DatasetCatalog)
    yield
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def load(row, *opts):
    return load_config(str(FILES[row]), ["MODEL.WEIGHTS", "", *opts])


def build_without_weights(cfg):
    """The model, its parameters shapes only: a ResNeXt-101 in no time."""
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


# Of the rows of anchors and of OHEM, which differ in numbers alone, the first are in the default tier.
ALIKE = {table: [row for row in FILES if row.startswith(table)][2:] for table in ("table1c", "table1d")}
STEPPED = [pytest.param(row, marks=[pytest.mark.slow] * any(row in rows for rows in ALIKE.values())) for row in FILES]


def test_every_row_is_there():
    assert sorted(FILES) == sorted(PAPER)


def test_the_results_are_the_papers():
    """Every row once, in the paper's order; no figure that is not a number; what diverged says so and has none."""
    assert [line["row"] for line in LINES] == list(PAPER)
    for row, ap in PAPER.items():
        line = RESULTS[row]
        assert set(line) == {"row", *NUMBERS, "baseline", "note"}
        assert [float(line[name]) for name in NUMBERS if line[name]] >= [0.0] or ap is None
        assert (line["note"] == "diverged") == (ap is None)
        assert (float(line["AP"]) if line["AP"] else None) == ap
    marked = [row for row, line in RESULTS.items() if line["baseline"]]
    assert marked == [f"{table}_{row}" for table, row in BASELINES.items()]
    assert {line["baseline"] for line in LINES} == {"", "x"}


@pytest.mark.parametrize("row", FILES)
def test_a_row_says_only_what_it_changes(row):
    """At most eight lines; and nothing of data, weights or schedule, so that it can be laid upon any config."""
    assert len(FILES[row].read_text().splitlines()) <= 8
    losses = ("MODEL.RETINANET.FOCAL_LOSS_", "MODEL.FOCAL.CLS_LOSS.")
    allowed = {
        "table1a": (*losses, "MODEL.FOCAL.BIAS_INIT.NAME"),
        "table1c": ("MODEL.ANCHOR_GENERATOR.NAME", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "MODEL.FOCAL.ANCHORS."),
        "table1e": ("MODEL.RESNETS.", "INPUT.M"),
        "table2": ("MODEL.RESNETS.",),
    }
    keys = own_keys(row)
    assert keys
    assert [key for key in keys if not key.startswith(allowed.get(row.partition("_")[0], losses))] == []


def test_the_shared_setting_is_the_papers():
    """Section 4.1: 16 images a step, 90k steps, .01 and a tenth at 60k and 80k, 600 px, flips; table 2's is longer."""
    cfg = load("table1b_gamma_2")
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER, solver.BASE_LR) == (16, 90000, 0.01)
    assert (solver.STEPS, solver.GAMMA, solver.WEIGHT_DECAY, solver.MOMENTUM) == ((60000, 80000), 0.1, 1e-4, 0.9)
    assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.RANDOM_FLIP) == ((600,), 600, "horizontal")
    assert cfg.INPUT.AUGMENTATIONS == []
    for row in PAPER:
        other, long = load(row).SOLVER, row.startswith("table2")
        assert solver.MAX_ITER * (1.5 if long else 1) == other.MAX_ITER
        assert tuple(int(step * (1.5 if long else 1)) for step in solver.STEPS) == other.STEPS


ARCHITECTURES = {"R50": (50, 1), "R101": (101, 1), "X101": (101, 32)}  # depth, groups


def architecture_of(row):
    table, _, name = row.partition("_")
    return name.partition("_")[0] if table in ("table1e", "table2") else "R101" if table == "table1d" else "R50"


@pytest.mark.parametrize("row", FILES)
def test_a_row_builds_at_its_full_architecture(row):
    name = architecture_of(row)
    depth, groups = ARCHITECTURES[name]
    cfg = load_config(str(FILES[row]))
    assert {"R50": "R-50.pkl", "R101": "R-101.pkl", "X101": "X-101-32x8d.pkl"}[name] in cfg.MODEL.WEIGHTS
    model = build_without_weights(cfg)
    blocks = [len(stage) for stage in model.backbone.bottom_up.stages]
    assert blocks == {50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}[depth]
    assert model.backbone.bottom_up.res2[0].conv2.groups == groups
    scales, ratios = (int(n) for n in row.removeprefix("table1c_").split("x")) if "table1c" in row else (3, 3)
    assert model.head.cls_score.out_channels == 80 * scales * ratios
    sizes = [cell[:, 2:] - cell[:, :2] for cell in model.anchor_generator.cell_anchors]
    assert len(sizes) == 5 and all(len(level) == scales * ratios for level in sizes)


SIZES = {1: [1], 2: [1, 2**0.5], 3: [1, 2 ** (1 / 3), 2 ** (2 / 3)], 4: [1, 2**0.25, 2**0.5, 2**0.75]}


@pytest.mark.parametrize("row", [row for row in FILES if row.startswith("table1c")])
def test_the_anchors_of_table_1c(row):
    """Areas from 32² at P3 to 512² at P7, each times the scales of an octave; ratios of 1:2, 1:1 and 2:1, or 1:1."""
    scales, ratios = (int(n) for n in row.removeprefix("table1c_").split("x"))
    generator = build_anchor_generator(load(row), [ShapeSpec(stride=8 << level) for level in range(5)])
    for level, cell in enumerate(generator.cell_anchors):
        width, height = (cell[:, 2:] - cell[:, :2]).unbind(dim=1)
        expected = [(32 * 2**level * s, r) for s in SIZES[scales] for r in ([0.5, 1, 2] if ratios == 3 else [1])]
        found = torch.stack([(width * height).sqrt(), height / width], dim=1)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=0)


@pytest.mark.parametrize("base", ["bccd/focal_retinanet_R_18_FPN_scratch.yaml", "quickstart/trees.yaml"])
@pytest.mark.parametrize("row", FILES)
def test_a_row_on_other_data(row, base):
    """Its own keys upon another config: that builds, and has what the row says."""
    cfg = load_config(str(ROOT / "configs" / base), ["MODEL.FOCAL.TIMM.WEIGHTS", ""])
    classes = cfg.MODEL.RETINANET.NUM_CLASSES
    keys = yaml.safe_load(FILES[row].read_text())
    del keys["_BASE_"]
    cfg.merge_from_other_cfg(CfgNode(keys))
    model = build_without_weights(cfg)
    assert model.num_classes == classes
    assert type(model.cls_loss).__name__ == cfg.MODEL.FOCAL.CLS_LOSS.NAME
    for key, value in own_keys(row).items():
        found = cfg
        for part in key.split("."):
            found = found[part]
        assert found == (tuple(eval(value)) if isinstance(value, str) and value.startswith("(") else value), key


@pytest.mark.parametrize("row", STEPPED)
def test_a_row_takes_two_steps(row):
    """Two steps of its own schedule from random weights, on one small image.

    To save time, the depth is 18, and 50 in the rows that are about the encoder; in these alone it is trained. Of a row
    that diverged in the paper, the second loss may be anything.
    """
    cfg = load(row, "MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "50")
    if not any(key.startswith("MODEL.RESNETS") for key in own_keys(row)):
        cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 5, 18, 64
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    boxes = Boxes(torch.tensor([[8.0, 8, 50, 44], [30, 2, 62, 60]]))
    instances = Instances((64, 64), gt_boxes=boxes, gt_classes=torch.tensor([3, 70]))
    images = [{"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8), "instances": instances}]
    weights = [model.head.cls_score.weight, model.head.bbox_pred.weight, model.backbone.fpn_lateral3.weight]
    before = [weight.detach().clone() for weight in weights]
    losses = []
    with EventStorage():
        for _ in range(2):
            loss = sum(model(images).values())
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    assert math.isfinite(losses[0])
    if RESULTS[row]["note"] != "diverged":
        assert math.isfinite(losses[1])
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert all((weight != old).any() for weight, old in zip(weights, before))
