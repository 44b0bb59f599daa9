"""The optimiser of a config: SGD or AdamW, with weight decay by kind of parameter and learning rates by part."""

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from detectron2.config import CfgNode
from detectron2.layers import CycleBatchNormList
from detectron2.layers.batch_norm import LayerNorm
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping, reduce_param_groups
from torch import nn

from ..config import ConfigError

_UNKNOWN_NORMS = (CycleBatchNormList, LayerNorm)  # Detectron2's own, which its function takes for other layers


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser of ``SOLVER``; with ``OPTIMIZER`` sgd and no ``LR_FACTORS`` it is Detectron2's.

    Args:
        cfg: the config.
        model: on its device, and not in DistributedDataParallel.

    Raises:
        ConfigError: a pattern of ``LR_FACTORS`` fits no parameter that is trained.
    """
    solver = cfg.SOLVER
    factors = lr_factors(solver.LR_FACTORS, model)

    def factor(name: str) -> float:  # of a bias too, which Detectron2's own factor would set to the rate of all biases
        return factors.get(name.lstrip("."), 1.0) * (solver.BIAS_LR_FACTOR if name.endswith(".bias") else 1.0)

    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=factor,
    )
    settings = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY, "foreach": True}
    if solver.OPTIMIZER == "adamw":  # not fused: Detectron2's clipping would see gradients times the loss scale
        norms = {"params": list(_unknown_norms(cfg, model)), "weight_decay": solver.WEIGHT_DECAY_NORM}
        optimizer = torch.optim.AdamW(reduce_param_groups([*groups, norms]), **settings)
    else:
        optimizer = torch.optim.SGD(groups, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, **settings)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:  # so that a state is not resumed by other parameters
        group["param_names"] = [names[parameter] for parameter in group["params"]]
    return maybe_add_gradient_clipping(cfg, optimizer)


def lr_factors(entries: list[dict[str, float]], model: nn.Module) -> dict[str, float]:
    """Return the factor of each parameter that one of ``SOLVER.LR_FACTORS`` fits, by name; the last that does counts.

    Args:
        entries: {pattern: factor}, where a pattern fits the names of parameters, or of modules for all in them.
        model: not in DistributedDataParallel.

    Raises:
        ConfigError: a pattern fits no parameter that is trained.
    """
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    factors: dict[str, float] = {}
    for pattern, factor in (item for entry in entries for item in entry.items()):
        fitting = [name for name in trained if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if not any(trained[name] for name in fitting):
            problem = "nothing that is trained: all of it is frozen" if fitting else "no parameter of the model"
            parts = ", ".join(name for name, part in model.named_children() if any(True for _ in part.parameters()))
            raise ConfigError(
                f"SOLVER.LR_FACTORS: {pattern!r} fits {problem}. Expected a part ({parts}), the name of a module in "
                "one, such as backbone.bottom_up, or a pattern, such as *.bias."
            )
        factors |= dict.fromkeys(fitting, factor)
    return factors


@contextmanager
def parameters_with_gradients(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the optimizer has only those parameters that have a gradient; it would pass over the others.

    Clipping by value does not: in PyTorch 2.14 ``clip_grad_value_`` of a parameter without a gradient is an error, and
    Detectron2 clips each parameter by itself. A level of a pyramid that no head sees has such parameters.
    """
    before = [group["params"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter.grad is not None]
        yield
    finally:
        for group, parameters in zip(optimizer.param_groups, before):
            group["params"] = parameters


def _unknown_norms(cfg: CfgNode, model: nn.Module) -> Iterator[nn.Parameter]:
    """The trained parameters of norms that ``get_default_optimizer_params`` does not know as such."""
    for norm in (module for module in model.modules() if isinstance(module, _UNKNOWN_NORMS)):
        for name, parameter in norm.named_parameters(recurse=False):
            if parameter.requires_grad and (name != "bias" or cfg.SOLVER.WEIGHT_DECAY_BIAS is None):
                yield parameter
