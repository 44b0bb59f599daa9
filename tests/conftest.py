"""The same numbers in each run, and a data set and a detector so small that a step takes a fraction of a second."""

import focal_plugin  # noqa: F401  # before Detectron2, whose deprecation warnings it keeps away

# isort: split
import importlib.util
import json
import logging
import random
import re
import shutil
import subprocess
from pathlib import Path

import cv2
import hypothesis
import numpy as np
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.utils.logger import setup_logger

TRAIN_NET = Path(__file__).parents[1] / "train_net.py"
CLASSES = ["square", "disc"]


# The tests run in several processes, on tensors too small for more threads than one.
torch.set_num_threads(1)
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")


def seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seeds():
    """The same numbers whichever tests run, in whatever order."""
    seed()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    seed()  # a module's fixtures are made before a test's, and so before the seeds


def write_shapes(folder: Path, name: str, num_images: int, seed: int) -> dict:
    """A COCO data set of 64 px images, each with one to three shapes, and its entry for ``DATASETS.LOCAL``."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    (folder / name).mkdir(parents=True)
    for number in range(num_images):
        image = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
        for _ in range(rng.integers(1, 4)):
            size, category = int(rng.integers(12, 32)), int(rng.integers(2))
            x, y = (int(v) for v in rng.integers(0, 64 - size, 2))
            color = [int(v) for v in rng.integers(120, 255, 3)]
            if category == 0:
                cv2.rectangle(image, (x, y), (x + size - 1, y + size - 1), color, -1)
            else:
                cv2.ellipse(image, (x + size // 2, y + size // 2), (size // 2, size // 2), 0, 0, 360, color, -1)
            box = {"bbox": [x, y, size, size], "area": size * size, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": category + 1, **box})
        images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 64})
        cv2.imwrite(str(folder / name / f"{number}.png"), image)
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (folder / f"{name}.json").write_text(json.dumps(content))
    return {"name": name, "format": "coco", "json": str(folder / f"{name}.json"), "images": str(folder / name)}


@pytest.fixture
def tiny_config(tmp_path):
    """The path of a YAML config: FocalRetinaNet on a frozen R18, 6 training and 4 test images, 4 steps of 2 images."""
    entries = [write_shapes(tmp_path, "shapes_train", 6, seed=0), write_shapes(tmp_path, "shapes_test", 4, seed=1)]
    config = {
        "VERSION": 2,
        "SEED": 1,
        "OUTPUT_DIR": str(tmp_path / "output"),
        "MODEL": {
            "META_ARCHITECTURE": "FocalRetinaNet",
            "BACKBONE": {"NAME": "build_retinanet_resnet_fpn_backbone", "FREEZE_AT": 5},
            "RESNETS": {"DEPTH": 18, "RES2_OUT_CHANNELS": 64, "OUT_FEATURES": ["res3", "res4", "res5"], "NORM": "GN"},
            "FPN": {"IN_FEATURES": ["res3", "res4", "res5"], "OUT_CHANNELS": 16},
            "ANCHOR_GENERATOR": {"SIZES": [[8, 12], [16, 24], [32, 48], [64, 96], [128, 192]]},
            "RETINANET": {"NUM_CLASSES": 2, "NUM_CONVS": 1, "SCORE_THRESH_TEST": 0.001},
        },
        "DATASETS": {"LOCAL": entries, "TRAIN": ["shapes_train"], "TEST": ["shapes_test"]},
        "INPUT": {"MIN_SIZE_TRAIN": [64], "MIN_SIZE_TEST": 64},
        "DATALOADER": {"NUM_WORKERS": 0},
        "SOLVER": {"IMS_PER_BATCH": 2, "BASE_LR": 0.001, "MAX_ITER": 4, "STEPS": [], "WARMUP_ITERS": 1},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    yield str(path)
    for entry in entries:
        if entry["name"] in DatasetCatalog:
            DatasetCatalog.remove(entry["name"])
            MetadataCatalog.remove(entry["name"])


@pytest.fixture
def loggers():
    """Undo what a run does to the loggers: handlers for its log file and this test's screen, and all levels."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "focal_plugin")]
    before = [(logger.level, logger.propagate) for logger in loggers]
    setup_logger.cache_clear()
    yield
    for logger, (level, propagate) in zip(loggers, before):
        logger.handlers.clear()
        logger.setLevel(level)
        logger.propagate = propagate
    setup_logger.cache_clear()


_LAZY = """
from detectron2.config import LazyCall as L, get_cfg
from detectron2.data import (DatasetMapper, build_detection_test_loader, build_detection_train_loader,
                             get_detection_dataset_dicts)
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler
import torch
from focal_plugin import load_config

yaml = {config!r}
model = L(build_model)(cfg=L(load_config)(config_file=yaml))
load_config(yaml)  # registers the data sets
dataloader = dict(
    train=L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="shapes_train"),
        mapper=L(DatasetMapper)(is_train=True, augmentations=[], image_format="BGR"),
        total_batch_size=2, num_workers=0),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="shapes_test", filter_empty=False),
        mapper=L(DatasetMapper)(is_train=False, augmentations=[], image_format="BGR"), num_workers=0),
    evaluator=L(COCOEvaluator)(dataset_name="shapes_test", output_dir={output!r}))
optimizer = L(torch.optim.SGD)(params=L(get_default_optimizer_params)(), lr=0.001)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[3], num_updates=4), warmup_length=0.25,
    warmup_factor=0.1)
train = dict(
    output_dir={output!r}, init_checkpoint="", max_iter=3, amp=dict(enabled=False), ddp=dict(broadcast_buffers=False),
    checkpointer=dict(period=5000, max_to_keep=100), eval_period=5000, log_period=20, device="cuda", seed=1)
"""


@pytest.fixture
def lazy_config(tiny_config, tmp_path):
    """``tiny_config`` as the path of a LazyConfig, writing to ``output``."""
    path = tmp_path / "tiny.py"
    path.write_text(_LAZY.format(config=tiny_config, output=str(tmp_path / "output")))
    return str(path)


@pytest.fixture
def train_net(tiny_config, loggers):
    """Run the script's ``main`` on a config in this process; words of a command line after it."""
    spec = importlib.util.spec_from_file_location("train_net", TRAIN_NET)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*words, config=tiny_config):
        return module.main(default_argument_parser().parse_args(["--config-file", config, *map(str, words)]))

    return run


@pytest.fixture
def browser(tmp_path):
    """Open a page in a browser of some width, light or dark; what is in it, and what ``probe``, an object, finds."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs chromium: the Debian package of that name")

    def open_page(page, width, dark, probe="{}"):
        script = f"""<script>addEventListener('load', () => {{
            const images = [...document.images];
            parent.postMessage(JSON.stringify({{...{probe}, width: innerWidth, images: images.length,
                broken: images.filter(image => !image.complete || !image.naturalWidth).length,
                overflow: document.documentElement.scrollWidth - innerWidth,
                color: getComputedStyle(document.body).backgroundColor, requests:
                performance.getEntriesByType('resource').filter(entry => !entry.name.startsWith('data:')).length
            }}), '*');
        }});</script>"""
        (tmp_path / "probed.html").write_text(page.replace('loading="lazy"', "").replace("</body>", f"{script}</body>"))
        frame = tmp_path / "frame.html"  # a window has at least 500 px
        frame.write_text(f"""<!DOCTYPE html><meta name="color-scheme" content="light dark"><body>
            <script>onmessage = event => document.body.dataset.found = event.data</script>
            <iframe src="probed.html" style="width: {width}px; height: 900px; border: 0"></iframe></body>""")
        result = subprocess.run(
            [
                *[found, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width + 100},1000"],
                *[f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={int(not dark)}"],
                *["--hide-scrollbars", "--virtual-time-budget=5000", "--dump-dom", frame.as_uri()],
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        (data,) = re.findall(r'data-found="([^"]*)"', result.stdout)
        return json.loads(data.replace("&quot;", '"'))

    return open_page
