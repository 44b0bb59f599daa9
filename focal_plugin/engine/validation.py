"""The losses of training on data that are not trained on."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from ..config import ConfigError
from ..data import leave_out_broken_images
from ..data.mapper import mapper_with_truth
from ..normalizer import NumPositives
from .console import off_screen
from .processes import unwrapped
from .rng import rng_state, seeded, set_rng_state
from .step import StepTrainer

NAME = "validation"  # what the losses' names begin with


class ValidationLoss:
    """Computes the losses of training on other data, and changes nothing of training: not even its random numbers.

    Batch norm and dropout work as in evaluation. A dense detector's losses are the sums over all images, divided by the
    number of their positives; those of other models are means over the images. What a loss draws at random is the same
    in each evaluation.

    Args:
        trainer: computes the losses, in its precision.
        loader: gives batches with ground truth, each image once; of several processes, each has a part of them.
    """

    def __init__(self, trainer: StepTrainer, loader: Iterable[list[dict]]):
        self.trainer, self.loader = trainer, loader

    def __call__(self) -> dict[str, float]:
        """Return each loss, and ``total_loss``. For all processes, which return the same."""
        model = unwrapped(self.trainer.model)
        sums: Counter[str] = Counter()
        images = 0
        with untouched(model):
            count = _give_losses(model)
            for batch in self.loader:
                share = 1 if count is not None else len(batch)
                losses = self.trainer.forward(model, batch)
                sums.update({name: float(loss) * share for name, loss in losses.items()})
                images += len(batch)
        everyone = comm.all_gather((dict(sums), images if count is None else count.positives))
        divisor = max(sum(part for _, part in everyone), 1)
        names = dict.fromkeys(name for losses, _ in everyone for name in losses)
        means = {name: sum(losses.get(name, 0.0) for losses, _ in everyone) / divisor for name in names}
        return {**means, "total_loss": sum(means.values())}


def build_validation_loader(cfg: CfgNode) -> Iterable[list[dict]]:
    """Build a loader of ``DATASETS.VALIDATION`` with ground truth: image by image, resized as in evaluation.

    Raises:
        ConfigError: as ``check_truth``.
    """
    for name in cfg.DATASETS.VALIDATION:
        leave_out_broken_images(name)
    with off_screen("detectron2"):
        records = get_detection_dataset_dicts(list(cfg.DATASETS.VALIDATION), filter_empty=False)
    check_truth(cfg, records)
    return build_detection_test_loader(records, mapper=mapper_with_truth(cfg), num_workers=cfg.DATALOADER.NUM_WORKERS)


def check_truth(cfg: CfgNode, records: Iterable[dict]) -> None:
    """Check that losses can be computed on the ``records`` of ``DATASETS.VALIDATION``.

    Raises:
        ConfigError: an image has no annotations, not even an empty list; or the model takes proposals from files.
    """
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ConfigError("DATASETS.VALIDATION is set, and MODEL.LOAD_PROPOSALS: expected (), or a model with an RPN.")
    if bare := [record["file_name"] for record in records if "annotations" not in record]:
        names = ", ".join(cfg.DATASETS.VALIDATION)
        raise ConfigError(
            f"DATASETS.VALIDATION names {names}, where {bare[0]} has no annotations; expected data with ground truth."
        )


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Undo afterwards what is done inside to a model's attributes and buffers, the random generators and the storage.

    Inside, random numbers are those of a fixed seed, and no gradients are computed.
    """
    attributes = [(module, vars(module) | {"_modules": dict(module._modules)}) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    rng = rng_state()
    try:
        with torch.no_grad(), EventStorage(), seeded(0):
            torch.cuda.manual_seed(0)
            yield
    finally:
        set_rng_state(rng)
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)
        for buffer, before in buffers:
            buffer.copy_(before)


class _Positives(nn.Module):
    """A normaliser that divides by 1, and counts."""

    def __init__(self):
        super().__init__()
        self.positives = 0

    def forward(self, num_positives: int, device: torch.device | None = None) -> Tensor:
        self.positives += num_positives
        return torch.ones((), device=device)


def _give_losses(model: nn.Module) -> _Positives | None:
    """Make a model return losses, without a running mean; a dense detector's are sums, and the positives are counted.

    Returns:
        What counts them; None for other models, whose losses are divided by the positives of a batch.
    """
    model.train()
    for module in model.modules():
        # The backbone gives no losses, and may have a layer of any kind.
        if module is getattr(model, "backbone", None) or isinstance(module, _NormBase | _DropoutNd):
            module.eval()
        if callable(getattr(module, "normalizer", None)):
            module.normalizer = NumPositives()
    if hasattr(model, "compiled"):  # recorded for training
        model.compiled = None
    if not isinstance(model, DenseDetector):
        return None
    count = _Positives()
    if hasattr(model, "normalizer"):
        model.normalizer = count
    else:  # Detectron2's own dense detectors
        model._ema_update = lambda name, value, *settings: count(value)
    return count
