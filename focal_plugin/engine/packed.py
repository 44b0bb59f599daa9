"""A batch whose tensors travel from a loading process in one piece.

PyTorch sends each tensor of a batch in shared memory of its own, and the training process opens and maps one after the
other: three an image, of which most have a few bytes. Here they lie in one buffer, which is mapped, and copied into
pinned memory, once a batch.
"""

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ALIGN = 64  # bytes, as PyTorch aligns tensors on a CPU


class Packed:
    """The batch ``content``, any object that can be pickled, with its CPU tensors in one buffer."""

    def __init__(self, content: Any):
        file = io.BytesIO()
        packer = _Packer(file)
        packer.dump(content)
        self.pickled = file.getvalue()
        self.places = []  # of each tensor: offset in bytes, dtype, shape
        size = 0
        for tensor in packer.tensors:
            self.places.append((size, tensor.dtype, tensor.shape))
            size += -(-tensor.nbytes // _ALIGN) * _ALIGN
        self.buffer = torch.empty(size, dtype=torch.uint8).share_memory_()  # before it is filled: nothing to copy
        for view, tensor in zip(self._views(), packer.tensors):
            view.copy_(tensor)

    def pin_memory(self) -> "Packed":
        """Move the buffer to pinned memory, for copies to a GPU that do not wait; a ``DataLoader`` calls this."""
        self.buffer = self.buffer.pin_memory()
        return self

    def unpack(self) -> Any:
        """Return the content; its tensors are views of the buffer."""
        return _Unpacker(io.BytesIO(self.pickled), self._views()).load()

    def _views(self) -> list[Tensor]:
        return [
            self.buffer[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for start, dtype, shape in self.places
        ]


class PackedCollate:
    """A ``collate_fn`` of a ``DataLoader``: ``collate``, and the result packed."""

    def __init__(self, collate: Callable[[list], Any]):
        self.collate = collate

    def __call__(self, images: list) -> Packed:
        """Collate and pack."""
        return Packed(self.collate(images))


class _Packer(pickle.Pickler):
    """Pickles all but plain CPU tensors, which it collects in ``tensors``."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self.known: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        """Return the number of a tensor; None for other objects."""
        plain = type(value) is Tensor and value.device.type == "cpu" and value.layout == torch.strided
        if not plain or value.requires_grad or value.is_quantized:
            return None
        if id(value) not in self.known:
            self.known[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self.known[id(value)]


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]):
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]
