"""A training loader that can start at any batch, so that a resumed run continues with the images that come next."""

import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from detectron2.data import DatasetFromList, MapDataset, build_detection_train_loader
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, default_collate

from ..config import ConfigError
from .packed import Packed, PackedCollate
from .rng import seeded

logger = logging.getLogger(__name__)


def build_train_loader(
    dataset: Sequence[dict],
    *,
    mapper: Callable[[dict], dict] | None,
    sampler: Iterable[int] | None = None,
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    collate_fn: Callable | None = None,
    **kwargs,
) -> Iterable[list[dict]]:
    """Build what Detectron2's ``build_detection_train_loader`` does from the same arguments, as a ``TrainLoader``.

    A data set that is no list of records gets Detectron2's own loader, which begins from the start when a run resumes.

    Raises:
        ConfigError: the batch cannot be divided among the processes.
        ValueError: a record has no size to group it by.
    """
    if not isinstance(dataset, list):
        logger.warning(f"The data set is a {type(dataset).__name__}: with --resume its order begins from the start.")
        return build_detection_train_loader(
            dataset,
            mapper=mapper,
            sampler=sampler,
            total_batch_size=total_batch_size,
            aspect_ratio_grouping=aspect_ratio_grouping,
            num_workers=num_workers,
            collate_fn=collate_fn,
            **kwargs,
        )
    processes = comm.get_world_size()
    if total_batch_size < processes or total_batch_size % processes:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {total_batch_size}; expected a multiple of {processes}, the number of processes, "
            "and not 0. (In a LazyConfig it is dataloader.train.total_batch_size.)"
        )
    groups = [_is_wide(record) for record in dataset] if aspect_ratio_grouping else None
    sampler = TrainingSampler(len(dataset)) if sampler is None else sampler
    records = DatasetFromList(dataset, copy=False)
    return TrainLoader(
        records if mapper is None else MapDataset(records, mapper),
        sampler,
        total_batch_size // processes,
        seed=comm.shared_random_seed(),
        groups=groups,
        num_workers=num_workers,
        collate_fn=collate_fn or trivial_batch_collator,
        **kwargs,
    )


def _is_wide(record: dict) -> bool:
    try:
        return record["width"] > record["height"]
    except KeyError:
        raise ValueError(
            f"The record of {record.get('file_name', 'an image')} has no width and height. Add them, or set "
            "DATALOADER.ASPECT_RATIO_GROUPING False."
        ) from None


_DEAD_WORKER = (
    "A process that loads images has died; perhaps it was killed for lack of memory. Fewer of them "
    "(DATALOADER.NUM_WORKERS) need less."
)


@contextmanager
def explained_dead_worker() -> Iterator[None]:
    """Explain PyTorch's error for a loader process that has died, which is raised even in the middle of a step."""
    try:
        yield
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):
            raise RuntimeError(_DEAD_WORKER) from error
        raise


class TrainLoader:
    """Endless batches, in the order of Detectron2's training loader without workers.

    The sampler alone decides the order. The mapper's random numbers depend only on the seed and on an image's position
    in that order. So any number of workers gives the same batches, and the loader can start at any of them.

    Args:
        dataset: maps an index to a mapped image.
        sampler: yields the indices for this process, without end, and the same ones each time it is iterated.
        batch_size: images per batch in this process.
        seed: of the mapper's random numbers; the same in all processes.
        groups: the group of each index; the images of a batch are of one group. None: all are one group.
        kwargs: further arguments of PyTorch's ``DataLoader``. With ``pin_memory`` the tensors of a batch are in pinned
            memory, from which a GPU copies while it computes.

    Attributes:
        position: the number of batches taken so far.
        failed: whether taking the next one has failed.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Iterable[int],
        batch_size: int,
        *,
        seed: int,
        groups: Sequence | None = None,
        **kwargs,
    ):
        self.dataset, self.sampler, self.batch_size, self.seed, self.groups = dataset, sampler, batch_size, seed, groups
        self.kwargs = kwargs
        self.position = 0
        self.failed = False

    def __iter__(self) -> Iterator[list[dict]]:
        kwargs = dict(self.kwargs)
        if kwargs.get("num_workers"):
            kwargs["collate_fn"] = PackedCollate(kwargs.get("collate_fn") or default_collate)
        loader = DataLoader(
            _Seeded(self.dataset, self.seed),
            batch_sampler=itertools.islice(self._batches(), self.position, None),
            generator=torch.Generator(),  # its own: each start would draw from the generator that the model uses
            worker_init_fn=_outlive_signals,
            **kwargs,
        )
        try:
            for batch in loader:
                self.position += 1
                yield batch.unpack() if isinstance(batch, Packed) else batch
        except Exception as error:
            self.failed = True
            # What the worker was sending may break off before PyTorch sees that the worker is gone.
            if isinstance(error, ConnectionError | EOFError):
                raise RuntimeError(_DEAD_WORKER) from error
            raise

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        """Yield each batch's images as (position in the order of all processes, index)."""
        rank, processes = comm.get_rank(), comm.get_world_size()
        waiting: dict = {}
        for number, index in enumerate(self.sampler):
            batch = waiting.setdefault(self.groups[index] if self.groups else None, [])
            batch.append((number * processes + rank, index))
            if len(batch) == self.batch_size:
                yield batch[:]
                batch.clear()

    def state_dict(self) -> dict:
        """Return the seed, and how many images all processes have taken."""
        return {"seed": self.seed, "images": self.position * self.batch_size * comm.get_world_size()}

    def load_state_dict(self, state: dict) -> None:
        """Continue after the images of ``state``; exactly so with the same batch size and number of processes."""
        self.seed = state["seed"]
        self.position = state["images"] // (self.batch_size * comm.get_world_size())


class _Seeded(Dataset):
    """Images by (position, index), mapped with random numbers that depend only on the seed and the position."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, where: tuple[int, int]) -> dict:
        position, index = where
        with seeded(self.seed, position):
            return self.dataset[index]


def _outlive_signals(worker_id: int) -> None:
    """Let a worker react only to SIGTERM from the process that started it.

    A signal that ends a run may reach all its processes, and the step that is to be finished needs data.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process().pid
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
