"""Models that have not seen what they judge: the images are cut into parts, and each part has a model of the others."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.env import seed_all_rng
from tqdm import tqdm

from ...config import ConfigError
from ...data import class_names
from ...data.splits import groups_of, split_records
from ...engine import Trainer, settled_seed
from ...engine.changes import changes, describe, plain_config
from ...files.write import replace_file

_NOTES = "folds.json"


def cut(records: Sequence[dict], count: int, by: str = "image") -> list[list[dict]]:
    """Cut records into ``count`` parts of about the same number of images, the same ones in every call.

    Args:
        records: in Detectron2's format.
        count: K, at least 2.
        by: which images stay together, see ``groups_of``.

    Raises:
        ConfigError: there are fewer than two parts to make. DataError: there are fewer groups of images than parts.
    """
    if count < 2:
        raise ConfigError(f"--folds is {count}; expected at least 2: each image needs a model that has not seen it.")
    groups = groups_of([record["file_name"] for record in records], by)
    return list(split_records(records, groups, {str(i): 1 / count for i in range(count)}, seed=0).values())


def train_folds(cfg: CfgNode, parts: Sequence[list[dict]], folder: Path) -> Iterator[CfgNode]:
    """Train a model for each part on the other parts; yield its config, with ``MODEL.WEIGHTS`` set, when it is trained.

    What is there already is kept, and a training that was interrupted goes on where it was.

    Args:
        cfg: the config, whose ``DATASETS.TRAIN`` the parts are of.
        parts: the records of each part.
        folder: where the runs are, one folder each.

    Raises:
        ConfigError: the folder holds models of another config or of other labels.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TEST, cfg.DATASETS.PROPOSAL_FILES_TEST, cfg.DATASETS.VALIDATION = (), (), ()
    cfg.TEST.BEST_METRIC, cfg.TEST.PATIENCE = "", 0  # nothing is evaluated
    cfg.TEST.EVAL_PERIOD, cfg.TEST.AUG.ENABLED, cfg.VIS.ENABLED = 0, False, False
    folder.mkdir(parents=True, exist_ok=True)
    cfg.SEED = _check_notes(folder / _NOTES, cfg, parts)
    seconds: list[float] = []
    for number, part in enumerate(parts, start=1):
        run = cfg.clone()
        run.OUTPUT_DIR = str(folder / f"{number}_of_{len(parts)}")
        weights = Path(run.OUTPUT_DIR) / "model_final.pth"
        if not weights.exists():
            others = [record for other in parts if other is not part for record in other]
            left = f"; time left for the models: {_time_left(seconds, len(parts) - number + 1)}" if seconds else ""
            print(f"Model {number} of {len(parts)} learns from {len(others)} images to judge {len(part)} others{left}.")
            started = time.monotonic()
            _train(run, others)
            seconds.append(time.monotonic() - started)
        run.MODEL.WEIGHTS = str(weights)
        yield run


def _time_left(seconds: Sequence[float], models: int) -> str:
    return tqdm.format_interval(sum(seconds) / len(seconds) * models)


def _train(cfg: CfgNode, records: list[dict]) -> None:
    with _registered(cfg, records) as name:
        cfg = cfg.clone()
        cfg.DATASETS.TRAIN, cfg.DATASETS.PROPOSAL_FILES_TRAIN = (name,), ()
        cfg.freeze()
        seed_all_rng(cfg.SEED)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=True)
        trainer.train()


@contextmanager
def _registered(cfg: CfgNode, records: list[dict]) -> Iterator[str]:
    """A data set of ``records``, with the classes of those of ``DATASETS.TRAIN``."""
    name = f"{'+'.join(cfg.DATASETS.TRAIN)}, model {Path(cfg.OUTPUT_DIR).name}"
    DatasetCatalog.register(name, lambda: records)
    if names := class_names(cfg.DATASETS.TRAIN[0]):
        MetadataCatalog.get(name).thing_classes = names
    try:
        yield name
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def _check_notes(path: Path, cfg: CfgNode, parts: Sequence[list[dict]]) -> int:
    """Note what the models of a folder are of, or compare it with the note that is there; return the seed."""
    before = json.loads(path.read_text()) if path.exists() else None
    if cfg.SEED < 0:
        cfg.SEED = before["config"]["SEED"] if before else settled_seed(cfg.SEED, "", False)
    labels = [
        [[r["file_name"], [[a["category_id"], *a["bbox"]] for a in r.get("annotations", [])]] for r in p] for p in parts
    ]
    digest = hashlib.sha256(json.dumps(labels, default=float).encode()).hexdigest()
    now = {"config": json.loads(json.dumps(plain_config(cfg))), "labels": digest}
    if before is None:
        replace_file(str(path), lambda file: file.write(json.dumps(now, indent=2).encode()))
        return cfg.SEED
    changed = changes(before["config"], now["config"])
    if changed or before["labels"] != digest:
        what = describe(changed) or "images or labels have changed since"
        raise ConfigError(
            f"{path.parent} holds models of another start: {what}. Remove it, or choose another --output."
        )
    return cfg.SEED
