"""Save a batch with the weights it was computed with, as tensors and plain containers alone."""

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..files.safe_load import WeightsError, load_torch
from ..files.write import replace_file

_PLAIN = (str, int, float, bool, type(None))


def save_batch(path: str, batch: list[dict], model: nn.Module, **settings) -> None:
    """Write a batch and the weights of ``model`` to ``path``, whole or not at all.

    Fields of an image that are no tensor, ``Boxes``, ``Instances`` or plain value are left out.

    Args:
        path: the file.
        batch: images as a Detectron2 model takes them.
        model: the model that computed it.
        settings: plain values to save with it.
    """
    images = [
        {key: plain for key, value in image.items() if (plain := _to_plain(value)) is not NotImplemented}
        for image in batch
    ]
    content = {"batch": images, "model": model.state_dict(), **settings}
    replace_file(path, lambda file: torch.save(content, file))


def load_batch(path: str) -> dict:
    """Return what ``save_batch`` wrote: ``batch``, ``model`` (a state dict) and the settings, on the CPU.

    Raises:
        OSError: the file cannot be opened.
        WeightsError: it is damaged, no such file, or asks for anything but tensors and plain containers.
    """
    content = load_torch(path)
    if "batch" not in content:
        raise WeightsError(f"{path} holds no batch but {', '.join(map(str, content))[:80]}; expected a diverged_*.pth.")
    try:
        batch = [{key: _from_plain(value) for key, value in image.items()} for image in content["batch"]]
    except Exception as error:  # what is not a batch fails in any way, as in Detectron2's assertions
        problem = f"{path} holds no batch as it was saved ({error!r:.200})"
        raise WeightsError(f"{problem}; expected a diverged_*.pth.") from error
    return {**content, "batch": batch}


def _to_plain(value: object):
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Boxes):
        return {"Boxes": value.tensor.cpu()}
    if isinstance(value, Instances):
        fields = {name: _to_plain(field) for name, field in value.get_fields().items()}
        fields = {name: field for name, field in fields.items() if field is not NotImplemented}
        return {"Instances": fields, "image_size": list(value.image_size)}
    return NotImplemented


def _from_plain(value: object):
    if isinstance(value, dict) and "Boxes" in value:
        return Boxes(value["Boxes"])
    if isinstance(value, dict) and "Instances" in value:
        fields = {name: _from_plain(field) for name, field in value["Instances"].items()}
        return Instances(tuple(value["image_size"]), **fields)
    return value
