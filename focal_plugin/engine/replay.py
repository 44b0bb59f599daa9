"""Compute the batch of a step again whose loss or gradient was not finite, from the file that the run left:

    python -m focal_plugin replay OUTPUT_DIR/diverged_0001234_process0.pth [KEY VALUE ...]

The model is that of config.yaml beside the file, changed by ``KEY VALUE`` pairs, with the weights from before the step.
It prints each loss, the largest gradient and where the numbers stop being finite; the exit code is then 1.

SOLVER.AMP.* and SOLVER.ACCUMULATE change how it is computed; without them it is computed as in the run. Other keys of
SOLVER do not change one step's losses and gradients, and are refused.

A LazyConfig's run has no such config: read its file with ``focal_plugin.engine.batch_file.load_batch`` in a program of
your own.
"""

import argparse
import math
import os
from collections.abc import Sequence

import torch
from detectron2.utils.events import EventStorage

from ..config import ConfigError
from ..config.load import load_config
from ..files.safe_load import WeightsError
from .batch_file import load_batch
from .divergence import find_cause, find_cause_in_gradients
from .step import StepTrainer, amp_precision, largest_gradient
from .trainer import Trainer
from .window import split

_COMPUTED = ("SOLVER.AMP.", "SOLVER.ACCUMULATE")  # the keys of SOLVER that a step's losses and gradients depend on


def replay(path: str, opts: list[str] | None = None) -> tuple[dict[str, float], float, str]:
    """Compute the batch in the file ``path`` again.

    Args:
        path: what a run left as diverged_*.pth.
        opts: ``KEY VALUE`` pairs that change the config.

    Returns:
        The losses by name, the largest absolute gradient, and where they stop being finite (empty if they do not).
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: there is no such file; expected a diverged_*.pth in a run's OUTPUT_DIR.")
    content, opts, config = load_batch(path), [*(opts or [])], os.path.join(os.path.dirname(path), "config.yaml")
    if not os.path.exists(config):
        raise FileNotFoundError(f"{config} is missing: expected the config.yaml of the run that left {path}.")
    if others := [key for key in map(str, opts[::2]) if key.startswith("SOLVER.") and not key.startswith(_COMPUTED)]:
        raise ConfigError(
            f"{', '.join(others)}: not a part of one step's losses and gradients, which are computed here. Of SOLVER, "
            f"{' and '.join(_COMPUTED)} can be changed; try the others in a training."
        )
    cfg = load_config(config, opts)
    model = Trainer.build_model(cfg).train()
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise ConfigError(f"{path} has the weights of another model than the config: {error}") from error
    precision = getattr(torch, content["precision"]) if content["precision"] else None
    amp = cfg.SOLVER.AMP
    if any(str(key).startswith("SOLVER.AMP.") for key in opts[::2]):
        precision = amp_precision(amp.ENABLED, amp.DTYPE, cfg.MODEL.DEVICE)
    accumulate = cfg.SOLVER.ACCUMULATE if "SOLVER.ACCUMULATE" in opts[::2] else content["accumulate"]
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = StepTrainer(model, [], sgd, precision=precision, accumulate=accumulate)
    trainer.grad_scaler = torch.amp.GradScaler(trainer.device_type, enabled=False)  # its scale was at its least
    with EventStorage(content["iteration"]):
        losses = {name: loss.item() for name, loss in trainer.forward_backward(content["batch"]).items()}
        gradient = float(largest_gradient(model))
        if all(map(math.isfinite, [*losses.values(), gradient])):
            return losses, gradient, ""
        parts = split(content["batch"], trainer.accumulate)
        cause = find_cause(model, parts, trainer.autocast)
        return losses, gradient, cause or find_cause_in_gradients(model, parts, 1.0, trainer.autocast)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Replay the file that the command line names. The exit code is 1 if a number is not finite."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="diverged_*.pth of a run")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="changes of the config")
    args = parser.parse_args(argv)
    try:
        losses, gradient, cause = replay(args.file, args.opts)
    except (OSError, WeightsError, ConfigError) as error:
        parser.error(str(error))
    for name, loss in losses.items():
        print(f"{name}: {loss:g}")
    print(f"largest gradient: {gradient:g}")
    print(cause or "All of it is finite.")
    return int(bool(cause))


if __name__ == "__main__":
    raise SystemExit(main())
