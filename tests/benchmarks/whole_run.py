#!/usr/bin/env python
"""Compare whole runs of train_net.py: FocalRetinaNet and Detectron2's RetinaNet, one after the other, else the same.

    whole_run.py [--batch 16] [--iterations 80] [--workers 8] [--output output/whole_run] [KEY VALUE ...]

trains R50-FPN at 800 px in mixed precision on JPEGs of COCO's size, made once in the output folder, with the real
loader, augmentation, hooks and writers. KEY VALUE pairs change the config of both. The result is the median time of a
step after the first 20, and how much of it was spent waiting for images.
"""

# ruff: noqa: E402  # the folders come first: neither the package nor this folder need be installed

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

import focal_plugin  # noqa: F401  # before Detectron2, whose deprecation warnings it keeps away

# isort: split
import cv2
import numpy as np
import torch
import yaml
from rows_gpu import calm

from focal_plugin.config.load import build_model, load_config
from focal_plugin.files.write import free_paths

CONFIG = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
WARMUP = 20  # steps, the first window that metrics.json has medians of
CLASSES = 80


def make_images(folder: Path, count: int) -> Path:
    """Write ``count`` JPEGs of 640×480 with 8 boxes each, unless they are there; return their COCO JSON."""
    path = folder / "images.json"
    if path.is_file() and len(json.loads(path.read_text())["images"]) == count:
        return path
    rng, images, annotations = np.random.default_rng(0), [], []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = sum(  # noise of several scales: such a file is about as large as one of COCO's
            cv2.resize(rng.normal(0, 20, (480 // s, 640 // s, 3)), (640, 480), interpolation=cv2.INTER_CUBIC)
            for s in (1, 4, 16, 80)
        )
        image = np.clip(image + 120, 0, 255).astype(np.uint8)
        for _ in range(8):
            w, h = (int(v) for v in rng.integers(30, 300, 2))
            x, y = int(rng.integers(0, 640 - w)), int(rng.integers(0, 480 - h))
            cv2.rectangle(image, (x, y), (x + w, y + h), [int(v) for v in rng.integers(0, 255, 3)], 3)
            box = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "category_id": int(rng.integers(CLASSES)) + 1}
            annotations.append({**box, "id": len(annotations) + 1, "image_id": number})
        name = f"{number:05d}.jpg"
        cv2.imwrite(str(folder / "images" / name), image, [cv2.IMWRITE_JPEG_QUALITY, 85])
        images.append({"id": number, "file_name": name, "width": 640, "height": 480})
    categories = [{"id": k + 1, "name": f"class {k}"} for k in range(CLASSES)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def make_config(args: argparse.Namespace) -> Path:
    """Write the config of both runs, and the weights that both start from; return its path."""
    annotations = make_images(args.output, args.images)
    data = {"name": "whole_run", "format": "coco", "json": str(annotations), "images": str(args.output / "images")}
    content = {
        "DATASETS": {"LOCAL": [data], "TRAIN": ["whole_run"], "TEST": []},
        "DATALOADER": {"NUM_WORKERS": args.workers},
        "INPUT": {"MIN_SIZE_TRAIN": [800]},
        "SOLVER": {
            "AMP": {"ENABLED": True},
            "IMS_PER_BATCH": args.batch,
            "MAX_ITER": args.iterations,
            "STEPS": [],
            "BASE_LR": 1e-5,  # the weights, and so the work, stay the same
            "CHECKPOINT_PERIOD": 1_000_000,
        },
        "VIS": {"ENABLED": False},
        "SEED": 1,
    }
    cfg = load_config(CONFIG, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *args.opts])
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "RetinaNet", "cpu"
    torch.manual_seed(0)
    weights, path = args.output / "start.pth", args.output / "config.yaml"
    torch.save({"model": calm(build_model(cfg)).state_dict()}, weights)
    path.write_text(yaml.safe_dump({"_BASE_": str(base_config()), "MODEL": {"WEIGHTS": str(weights)}, **content}))
    return path


def base_config() -> Path:
    """Return the file of Detectron2's config, which the config of the runs is based on."""
    from detectron2 import model_zoo

    return Path(model_zoo.get_config_file(CONFIG))


def run(architecture: str, config: Path, output: Path, opts: list[str]) -> dict:
    """Train, and return the medians in seconds of ``time`` and ``data_time`` after the warm-up.

    Raises:
        RuntimeError: the run failed; its log says why.
    """
    folder = Path(free_paths(output, architecture)[0])
    folder.mkdir(parents=True)
    metrics = folder / "metrics.json"
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(config), *opts]
    command += ["MODEL.META_ARCHITECTURE", architecture, "OUTPUT_DIR", str(folder)]
    with (folder / "output.txt").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        tail = "\n".join((folder / "output.txt").read_text().splitlines()[-5:])
        raise RuntimeError(f"the run of {architecture} failed, see {folder}/output.txt:\n{tail}")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    late = [line for line in lines if line["iteration"] >= WARMUP and "time" in line]
    return {key: statistics.median(line[key] for line in late) for key in ("time", "data_time")}


def main(words: list[str] | None = None) -> dict[str, dict]:
    """Run the command line ``words``; return the medians of the two runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="images in a step (default: 16)")
    parser.add_argument("--iterations", type=int, default=80, help=f"steps, at least {2 * WARMUP} (default: 80)")
    parser.add_argument("--workers", type=int, default=8, help="processes that load images (default: 8)")
    parser.add_argument("--images", type=int, default=200, help="images to make (default: 200)")
    parser.add_argument("--output", type=Path, default=Path("output/whole_run"), help="folder for images and runs")
    parser.add_argument("--ours", default="", metavar="'KEY VALUE'", help="changes of FocalRetinaNet's config alone")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="changes of both configs")
    args = parser.parse_args(words)
    if args.iterations < 2 * WARMUP:
        parser.error(f"--iterations is {args.iterations}; expected at least {2 * WARMUP}.")
    args.output = args.output.resolve()
    config = make_config(args)
    results = {}
    for architecture in ("RetinaNet", "FocalRetinaNet"):
        opts = [*args.opts, *(args.ours.split() if architecture == "FocalRetinaNet" else [])]
        results[architecture] = found = run(architecture, config, args.output, opts)
        share = found["data_time"] / found["time"]
        print(
            f"{architecture}: {1000 * found['time']:.0f} ms a step, of it {1000 * found['data_time']:.0f} ms waiting "
            f"for images; {args.batch / found['time']:.1f} images/s",
            flush=True,
        )
        if share > 0.1:
            print(
                f"  The loader is the bottleneck ({share:.0%} of the time): this is the speed of {args.workers} "
                "workers and not of the model."
            )
    ratio = results["RetinaNet"]["time"] / results["FocalRetinaNet"]["time"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    print(f"FocalRetinaNet is {ratio:.2f} times as fast, on {device}, PyTorch {torch.__version__}.")
    (args.output / "whole_run.json").write_text(json.dumps({"device": device, **results}, indent=1))
    return results


if __name__ == "__main__":
    main()
