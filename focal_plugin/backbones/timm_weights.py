"""Load the weights of a timm encoder: timm's own, or those in a file."""

import difflib
import importlib
import importlib.util
import logging
import os
import pickle
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ..config import ConfigError
from ..files.regular import regular_path
from ..files.safe_load import WeightsError, load_torch
from ..files.weights import check_values, missing_file

logger = logging.getLogger(__name__)

# timm warns that the weights of the classifier are unexpected; an encoder has no classifier.
logging.getLogger("timm.models._builder").addFilter(
    lambda record: not record.getMessage().startswith("Unexpected keys")
)


def import_timm() -> ModuleType:
    """Import timm, which only these encoders need.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ImportError(f"MODEL.FOCAL.TIMM needs the package timm ({error}): pip install timm") from error


def check_name(name: str) -> None:
    """Raise a ``ConfigError`` with the names nearest to ``name`` if timm has no such encoder."""
    timm = import_timm()
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise ConfigError(
            f"MODEL.FOCAL.TIMM.NAME is {name!r}, which timm {timm.__version__} does not have. "
            + (f"Near it: {', '.join(near)}." if near else "timm.list_models() lists what it has.")
        )


def create_encoder(name: str, weights: str, **arguments) -> nn.Module:
    """Return ``timm.create_model(name, features_only=True, **arguments)`` with these weights.

    Args:
        name: a name of ``timm.list_models()``.
        weights: "": random ones. "timm": timm's own for this name, downloaded. Else a file of tensors by name, of a
            classifier of this architecture: a path, a URL, or "package://<package>/<path in it>" for a file of an
            installed Python package. If its names are not timm's, its tensors must have timm's shapes in timm's order.
            Only tensors are unpickled.

    Raises:
        FileNotFoundError: there is no such file or package, or it could not be downloaded.
        ConfigError: timm has no weights of its own for this name.
        ValueError: the file's weights are not of this architecture, or have NaN or the like.
    """
    timm = import_timm()
    if weights == "timm" and not timm.is_model_pretrained(name):
        raise ConfigError(
            f"MODEL.FOCAL.TIMM.WEIGHTS is 'timm', but timm has no weights for {name!r}. Expected a file, or '' to "
            "start from random ones."
        )
    if weights not in ("", "timm"):  # timm loads the tensors from here, and adapts them
        arguments["pretrained_cfg_overlay"] = {"state_dict": _read_weights(name, weights)}
    try:
        return timm.create_model(name, features_only=True, pretrained=bool(weights), **arguments)
    except OSError as error:
        raise FileNotFoundError(
            f"timm's weights for {name!r} could not be downloaded: {error} Without a network, set "
            "MODEL.FOCAL.TIMM.WEIGHTS to a file; where a checkpoint follows, to '' (they are in it)."
        ) from error


def _read_weights(name: str, weights: str) -> dict[str, Tensor]:
    """Read the tensors of a file, by timm's names."""
    timm = import_timm()
    path = _local_file(weights)
    try:
        if not path.endswith(".safetensors"):
            load_torch(path)  # whose checks PyTorch's own reader, which timm calls, does not make
        tensors = timm.models.load_state_dict(path, weights_only=True)
    except (WeightsError, EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{weights} is no file of tensors by name (.pth or .safetensors): {error!r}") from error
    with torch.device("meta"):
        classifier = timm.create_model(name)
    wanted, found = _shapes(classifier.state_dict()), _shapes(tensors)
    head = classifier.pretrained_cfg["classifier"]
    head = (head,) if isinstance(head, str) else tuple(head or ())
    absent = [k for k, shape in wanted.items() if found.get(k) != shape and k.rpartition(".")[0] not in head]
    if absent and list(wanted.values()) == list(found.values()):
        logger.info(f"{weights}: its names are not timm's, but its order and shapes are; matched by these.")
        tensors, absent = {key: tensors[found_key] for key, found_key in zip(wanted, found)}, []
    if not absent:
        check_values(tensors, classifier.state_dict(), weights)
        return tensors
    raise ValueError(
        f"{weights} does not hold the weights of timm's {name}. Of its {len(wanted)} tensors, {len(absent)} are not "
        f"there by name and shape, such as {absent[0]} {tuple(wanted[absent[0]])}; nor are the file's {len(found)} "
        "the same ones by order and shape."
    )


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shapes of all tensors but batch norm's counters, which old files lack and frozen layers do not use."""
    return {key: tensor.shape for key, tensor in tensors.items() if not key.endswith("num_batches_tracked")}


def _local_file(weights: str) -> str:
    """Return the path of a file on this machine: found in a package, downloaded from a URL, or ``weights`` itself."""
    if not weights.startswith("package://"):
        expected = "timm, a path, a URL, package://..., or nothing for random weights"
        if problem := missing_file("MODEL.FOCAL.TIMM.WEIGHTS", weights, expected):
            raise FileNotFoundError(problem)
        try:
            return regular_path(weights)
        except FileNotFoundError as error:  # of a download
            raise FileNotFoundError(f"MODEL.FOCAL.TIMM.WEIGHTS is {weights}: {error}") from error
    package, _, inner = weights.removeprefix("package://").partition("/")
    folders = _package_folders(package)
    outside = os.path.isabs(inner) or ".." in Path(inner).parts
    for path in [folder / inner for folder in folders if inner and not outside]:
        if path.is_file():
            return str(path)
    problem = f"the package {package} has no file {inner!r}" if folders else f"there is no Python package {package!r}"
    raise FileNotFoundError(f"MODEL.FOCAL.TIMM.WEIGHTS is {weights}, but {problem}. Install it, or name another file.")


def _package_folders(package: str) -> list[Path]:
    """Return where a package's files are, without importing it; [] if there is no such package."""
    top, *below = package.split(".")
    if not all(name.isidentifier() for name in (top, *below)):
        return []
    try:
        spec = importlib.util.find_spec(top)  # of a name with dots it would import the packages above
    except ValueError:  # a module without a spec, such as __main__
        return []
    return [Path(folder, *below) for folder in (spec and spec.submodule_search_locations) or []]
