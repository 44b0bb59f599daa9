#!/usr/bin/env python
"""Train or evaluate a detector from a config.

As Detectron2's tools/train_net.py and lazyconfig_train_net.py, for YAML and .py configs, on GPUs or on the CPU:

    train_net.py --config-file configs/COCO-Detection/focal_retinanet_R_50_FPN_1x.yaml --num-gpus 8
    train_net.py --config-file COCO-Detection/retinanet_R_50_FPN_1x.yaml MODEL.META_ARCHITECTURE FocalRetinaNet
    train_net.py --config-file my.yaml --doctor
    train_net.py --config-file my.yaml --eval-only MODEL.WEIGHTS output/model_final.pth

`python -m focal_plugin train` does the same. Copy this file to train in another way.
"""

import os
import sys

from focal_plugin.commands import train
from focal_plugin.engine import Trainer


def main(args):
    """What each process does: give `run` a subclass of Trainer, or write out here what it does."""
    return train.run(args, Trainer)


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # so that MODEL.FOCAL.IMPORTS finds modules of the folder it is run from
    sys.exit(train.main(process=main, epilog=__doc__))
