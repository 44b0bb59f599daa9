"""Train, evaluate or check a config from a command line: `train_net.py`, and the commands train, eval and doctor."""

import argparse
import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from ..analysis.__main__ import main as analyse
from ..analysis.common import MISTAKES
from ..config.load import find_config, load_config
from ..deploy import evaluate_with_tta, model_for_inference
from ..engine import (
    AtomicCheckpointer,
    Trainer,
    evaluation_folder,
    launch,
    lazy,
    settled_seed,
    sole_training,
    start_run,
    training_folder,
)
from ..files.write import kept_on_error

logger = logging.getLogger(__name__)

_TRAIN = """Examples:

    %(prog)s --config-file quickstart/trees.yaml
    %(prog)s --config-file COCO-Detection/focal_retinanet_R_50_FPN_1x.yaml --num-gpus 8
    %(prog)s --config-file COCO-Detection/retinanet_R_50_FPN_1x.yaml MODEL.META_ARCHITECTURE FocalRetinaNet
    %(prog)s --config-file my.yaml --resume OUTPUT_DIR output/mine
"""
_EVAL = "Example: %(prog)s --config-file output/config.yaml MODEL.WEIGHTS output/model_final.pth"
_DOCTOR = """Example: %(prog)s --config-file my.yaml

The flags of training are accepted too, so that a command line can be checked before it trains.
"""


def evaluate(cfg: CfgNode, resume: bool, trainer_class: type[Trainer] = Trainer, run_folder: str = "") -> dict:
    """Evaluate ``MODEL.WEIGHTS``, or with ``resume`` the last checkpoint of a run, and return the results.

    Args:
        cfg: the config; what is written goes to its ``OUTPUT_DIR``.
        resume: whether to take the last checkpoint.
        trainer_class: what builds the model and the evaluators.
        run_folder: where the run's checkpoints are; ``OUTPUT_DIR`` if empty.
    """
    model = trainer_class.build_model(cfg)
    AtomicCheckpointer(model, run_folder or cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    model = model_for_inference(cfg, model)
    results = trainer_class.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results |= evaluate_with_tta(cfg, model)
    if comm.is_main_process():
        trainer_class.report(cfg, model, results)
        verify_results(cfg, results)
    return results


def train(cfg: CfgNode, args: argparse.Namespace, trainer_class: type[Trainer] = Trainer) -> dict | None:
    """Train, as the only one in ``OUTPUT_DIR``, and return the results of the last evaluation."""
    cfg.OUTPUT_DIR = training_folder(cfg.OUTPUT_DIR, args.resume)
    with sole_training(cfg.OUTPUT_DIR):
        with kept_on_error(os.path.join(cfg.OUTPUT_DIR, "config.yaml")):
            _start(cfg, args, cfg.OUTPUT_DIR)
            trainer = trainer_class(cfg, functools.partial(evaluate_with_tta, cfg) if cfg.TEST.AUG.ENABLED else None)
            trainer.resume_or_load(resume=args.resume)
        return trainer.train()


def _start(cfg: CfgNode, args: argparse.Namespace, run_folder: str) -> None:
    """Settle the seed, freeze the config and open the run's log files."""
    cfg.SEED = settled_seed(cfg.SEED, run_folder, args.resume or args.eval_only)
    cfg.freeze()
    start_run(cfg, args)


def run(args: argparse.Namespace, trainer_class: type[Trainer] = Trainer) -> dict | None:
    """Train or evaluate in this process, which is one of a run's.

    Args:
        args: the command line that ``build_parser`` describes.
        trainer_class: what trains a YAML config. A LazyConfig (``.py``) names its parts itself.

    Returns:
        The results of the last evaluation, as far as this process has them.
    """
    if args.config_file.endswith(".py"):
        return lazy.main(args)
    if args.config_file:
        args.config_file = find_config(args.config_file)
    cfg = load_config(args.config_file, args.opts)
    if not args.eval_only:
        return train(cfg, args, trainer_class)
    run_folder = training_folder(cfg.OUTPUT_DIR, args.resume) if args.resume else cfg.OUTPUT_DIR
    cfg.OUTPUT_DIR = evaluation_folder(run_folder)
    _start(cfg, args, run_folder)
    return evaluate(cfg, args.resume, trainer_class, run_folder)


def build_parser(prog: str | None = None, epilog: str = _TRAIN) -> argparse.ArgumentParser:
    """Return Detectron2's flags for training and ``--doctor``; the help ends with ``epilog``, that of a command."""
    parser = default_argument_parser(epilog)
    parser.prog = prog or parser.prog
    parser.add_argument("--doctor", action="store_true", help="check config, data and weights instead, on the CPU")
    if epilog != _TRAIN:  # eval and doctor do one thing
        told = {
            "eval_only": argparse.SUPPRESS,
            "doctor": argparse.SUPPRESS,
            "resume": "take the last checkpoint in OUTPUT_DIR",
        }
        for action in parser._actions:
            action.help = told.get(action.dest, action.help)
    return parser


def main(
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    process: Callable[[argparse.Namespace], object] = run,
    epilog: str = _TRAIN,
) -> int:
    """Train or evaluate in as many processes as the command line asks for.

    Args:
        argv: the words of the command line; those of this process if not given.
        prog: the name of the program in its help.
        process: what each process does with the parsed command line: a function of a module, for processes to import.
        epilog: the end of the help.

    Returns:
        0; 2 if the user has to correct the command line, the config or a file; with ``--doctor``, the exit code of the
        checks.
    """
    args = build_parser(prog, epilog).parse_args(argv)
    if args.doctor:
        return check(args)
    try:
        launch(
            process,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except MISTAKES as error:
        if getattr(error, "errno", None) or getattr(error, "name", None):  # Python's own: a program's mistake, perhaps
            raise
        logger.debug("The traceback of the error:", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def eval_main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Evaluate: ``main`` with ``--eval-only``."""
    return main(["--eval-only", *(sys.argv[1:] if argv is None else argv)], prog, epilog=_EVAL)


def doctor_main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Check what a command line of ``main`` would train. 0, 1 for an error found, 2 for a wrong command line."""
    parser = build_parser(prog, _DOCTOR)
    parser.add_argument("--weights", metavar="FILE", help="what training starts from (default: MODEL.WEIGHTS)")
    parser.add_argument("--num-images", metavar="N", help="images that anchors are matched on; 0: all (default: 1000)")
    return check(parser.parse_args(argv))


def check(args: argparse.Namespace) -> int:
    """Run ``analysis doctor`` on a command line, and return its exit code."""
    words = ["doctor", "--config-file", args.config_file, *["--resume"] * args.resume]
    if (gpus := args.num_gpus * args.num_machines) > 1:
        words += ["--num-gpus", str(gpus)]
    for flag, value in (("--weights", "weights"), ("--num-images", "num_images")):
        if (given := getattr(args, value, None)) is not None:
            words += [flag, given]
    return analyse([*words, *args.opts])
