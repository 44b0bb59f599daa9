"""Find what would go wrong with a run before it starts: a line for each check, with what to change.

The checks cover the config, the output folder, the training set and the anchors of its boxes, the components, the
weights and the first loss; the last one estimates the time and the memory of a step, on the GPU if there is one. The
others run on the CPU. They take less than a minute for 1,000 images, and write nothing. The exit code is 1 if a check
found an error.
"""

import argparse
import logging
import os
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence

from ..config import ConfigError
from ..engine.console import off_screen
from .checks import cost, data, model, schedule, settings
from .checks.case import ERROR, OK, SKIPPED, WARNING, Case, Check, Finding
from .common import MISTAKES, add_flags

logger = logging.getLogger(__name__)

CHECKS = (
    Check("config", settings.check_config),
    Check("learning rate", settings.check_learning_rate, needs=["config"]),
    Check("sizes", schedule.check_sizes, needs=["config"]),
    Check("gradient clipping", settings.check_clipping, needs=["config"]),
    Check("unread keys", settings.check_unread_keys, needs=["config"]),
    Check("evaluations", settings.check_evaluations, needs=["config"]),
    Check("output folder", settings.check_output_dir, needs=["config"]),
    Check("training data", data.check_data, needs=["config"]),
    Check("test data", data.check_test_data, needs=["config"]),
    Check("schedule", schedule.check_schedule, needs=["training data"]),
    Check("images", data.check_images, needs=["training data", "test data"]),
    Check("classes", data.check_classes, needs=["training data", "test data"]),
    Check("boxes", data.check_boxes, needs=["training data"]),
    Check("empty images", data.check_empty_images, needs=["training data"]),
    Check("crowds", data.check_crowds, needs=["training data"]),
    Check("components", model.check_components, needs=["config"]),
    Check("anchors", data.check_coverage, needs=["training data", "components"]),
    Check("positives", data.check_positives, needs=["anchors"]),
    Check("weights", model.check_weights, needs=["components"]),
    Check("first loss", model.check_first_loss, needs=["classes", "positives", "weights"]),
    Check("time and memory", cost.check_cost, needs=["images", "classes", "components"]),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this analysis."""
    parser.add_argument("--weights", metavar="FILE", default="", help="weights to start from (default: MODEL.WEIGHTS)")
    parser.add_argument("--resume", action="store_true", help="check a run that resumes the one in its OUTPUT_DIR")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="GPUs to train on (default: 1)")
    add_flags(parser, num_images=1000, writes=False)


def main(args: argparse.Namespace) -> int:
    """Run the checks and print their findings. Returns 1 if there is an error."""
    if args.config_file.endswith(".py"):
        raise ConfigError(f"--config-file {args.config_file}: a LazyConfig; the checks expect a YAML config.")
    if args.num_images < 0:
        raise ConfigError(f"--num-images is {args.num_images}; expected a number ≥ 0, where 0 stands for all.")
    numbers = {"num_images": args.num_images, "num_gpus": max(1, args.num_gpus)}
    case = Case(args.config_file, args.opts, weights=args.weights, resume=args.resume, **numbers)
    start, counts = time.perf_counter(), Counter()
    with off_screen("detectron2"), off_screen("focal_plugin"):
        for check, finding in examine(case):
            counts[finding.level] += 1
            print(line(check, finding), flush=True)
            if check.name == "config" and finding.level == ERROR:
                break  # all others need it
    plurals = {ERROR: "errors", WARNING: "warnings"}
    found = [(level, counts[level]) for level in (ERROR, WARNING, SKIPPED, OK) if counts[level]]
    listed = ", ".join(f"{count} {level if count == 1 else plurals.get(level, level)}" for level, count in found)
    print(f"{listed}, in {time.perf_counter() - start:.0f} s")
    return 1 if counts[ERROR] else 0


def examine(case: Case, checks: Sequence[Check] = CHECKS) -> Iterator[tuple[Check, Finding]]:
    """Yield each check with each of its findings, in the order of ``checks``."""
    failed = set()
    for check in checks:
        if missing := [name for name in check.needs if name in failed]:
            findings = [Finding(SKIPPED, f"needs {' and '.join(missing)}")]
            failed.add(check.name)
        else:
            findings = _findings(check, case)
        for finding in findings:
            if finding.level == ERROR:
                failed.add(check.name)
            yield check, finding


def _findings(check: Check, case: Case) -> Iterator[Finding]:
    try:
        yield from check.function(case)
    except Exception as error:  # it would stop the training, but not the other checks
        logger.debug("The check %r failed.", check.name, exc_info=True)
        text = str(error) if isinstance(error, MISTAKES) else f"{type(error).__name__}: {error} ({_place(error)})"
        yield Finding(ERROR, text)


def _place(error: Exception) -> str:
    """Return the last line of an error's traceback that is of no installed package: of a user's component, perhaps."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = [frame for frame in frames if "site-packages" not in frame.filename][-1]
    return f"{os.path.relpath(frame.filename)}, line {frame.lineno}"


def line(check: Check, finding: Finding) -> str:
    """Return a finding as a line: the level, the name of the check and the text."""
    return f"{finding.level:8} {check.name:18} {' '.join(finding.text.split())}"
