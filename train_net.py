#!/usr/bin/env python
"""Train or evaluate a detector from a config.

As Detectron2's tools/train_net.py and lazyconfig_train_net.py, for YAML and .py configs, on GPUs or on the CPU:

    train_net.py --config-file configs/COCO-Detection/focal_retinanet_R_50_FPN_1x.yaml --num-gpus 8
    train_net.py --config-file COCO-Detection/retinanet_R_50_FPN_1x.yaml MODEL.META_ARCHITECTURE FocalRetinaNet
    train_net.py --config-file my.yaml --doctor
    train_net.py --config-file my.yaml --eval-only MODEL.WEIGHTS output/model_final.pth
"""

import functools
import os
import sys

from focal_plugin.analysis.__main__ import main as analyse
from focal_plugin.config.load import find_config, load_config
from focal_plugin.deploy import evaluate_with_tta, model_for_inference
from focal_plugin.engine import AtomicCheckpointer, Trainer, launch, lazy, settled_seed, start_run

# isort: split
# After the plugin, which imports Detectron2 without its deprecation warnings.
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm


def setup(args) -> CfgNode:
    """The config of the command line, frozen, with the run's log files open."""
    if args.config_file:
        args.config_file = find_config(args.config_file)
    cfg = load_config(args.config_file, args.opts)
    cfg.SEED = settled_seed(cfg.SEED, cfg.OUTPUT_DIR, args.resume or args.eval_only)
    cfg.freeze()
    start_run(cfg, args)
    return cfg


def evaluate(cfg: CfgNode, resume: bool) -> dict:
    """Evaluate ``MODEL.WEIGHTS``, or with ``resume`` the last checkpoint in ``OUTPUT_DIR``."""
    model = Trainer.build_model(cfg)
    AtomicCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    model = model_for_inference(cfg, model)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results |= evaluate_with_tta(cfg, model)
    if comm.is_main_process():
        Trainer.report(cfg, model, results)
        verify_results(cfg, results)
    return results


def main(args):
    """What each process does."""
    if args.config_file.endswith(".py"):
        return lazy.main(args)
    cfg = setup(args)
    if args.eval_only:
        return evaluate(cfg, args.resume)
    trainer = Trainer(cfg, functools.partial(evaluate_with_tta, cfg) if cfg.TEST.AUG.ENABLED else None)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # so that MODEL.FOCAL.IMPORTS finds modules of the folder it is run from
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument("--doctor", action="store_true", help="check config, data and weights instead, on the CPU")
    args = parser.parse_args()
    if args.doctor:
        resume = ["--resume"] * args.resume
        sys.exit(analyse(["doctor", "--config-file", args.config_file, *resume, *args.opts]))
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
