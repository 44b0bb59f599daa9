"""A training loader that can start at any batch, so that a resumed run continues with the images that come next."""

import functools
import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.data import DatasetFromList, MapDataset, build_detection_train_loader
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, default_collate

from ..config import ConfigError
from ..data import DataError
from .packed import Packed, PackedCollate
from .rng import seeded

logger = logging.getLogger(__name__)

# Of a set with ``on_error: skip``. A run stops when more files than this share of its images, or this number if that is
# more, could not be read as they were tried last; and where so many in a row cannot be read for one place in a batch.
_MOST_SHARE, _MOST_FILES, _MOST_IN_A_ROW = 0.1, 10, 10
_POOL = 10_000  # the images at the beginning of the order, which are substitutes for others


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
    Records with ``on_error: "skip"``, which those of ``DATASETS.LOCAL`` take from their set, may be unreadable (see
    ``TrainLoader``).

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
    check_batch(total_batch_size, comm.get_world_size())
    groups = [_is_wide(record) for record in dataset] if aspect_ratio_grouping else None
    sampler = TrainingSampler(len(dataset)) if sampler is None else sampler
    records = DatasetFromList(dataset, copy=False)
    return TrainLoader(
        records if mapper is None else MapDataset(records, mapper),
        sampler,
        total_batch_size // comm.get_world_size(),
        seed=comm.shared_random_seed(),
        groups=groups,
        may_skip=[record.get("on_error") == "skip" for record in dataset],
        num_workers=num_workers,
        collate_fn=collate_fn or trivial_batch_collator,
        **kwargs,
    )


def check_batch(images: int, processes: int, accumulate: int = 1) -> None:
    """Check that the images of a step can be divided among processes and micro-batches.

    Raises:
        ConfigError: they cannot.
    """
    if images < processes or images % processes:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {images}; expected a multiple of {processes}, the number of processes, "
            "and not 0. (In a LazyConfig it is dataloader.train.total_batch_size.)"
        )
    if accumulate > images // processes:
        raise ConfigError(
            f"SOLVER.ACCUMULATE is {accumulate}; expected 1 to {images // processes}, the images a process has in a "
            f"step (SOLVER.IMS_PER_BATCH {images} over {processes} processes). (In a LazyConfig train.accumulate.)"
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
    except (RuntimeError, OSError) as error:
        cause = error  # of a checkpoint that could not be written to its end, it may be a cause
        while cause is not None and not str(cause).startswith("DataLoader worker"):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise RuntimeError(_DEAD_WORKER) from error
        raise


class TrainLoader:
    """Endless batches, in the order of Detectron2's training loader without workers.

    The sampler alone decides the order. The mapper's random numbers depend only on the seed and on an image's position
    in that order. So any number of workers gives the same batches, and the loader can start at any of them.

    Where an image cannot be read (a ``DataError`` of the data set) and may be skipped, another one of its group takes
    its place, which depends only on the seed and the position. Such files are logged once each, and counted.

    Args:
        dataset: maps an index to a mapped image.
        sampler: yields the indices for this process, without end, and the same ones each time it is iterated.
        batch_size: images per batch in this process.
        seed: of the mapper's random numbers; the same in all processes.
        groups: the group of each index; the images of a batch are of one group. None: all are one group.
        may_skip: whether the image of each index may be skipped. None: none may.
        collate_fn: makes a batch of a list of mapped images.
        kwargs: further arguments of PyTorch's ``DataLoader``. With ``pin_memory`` the tensors of a batch are in pinned
            memory, from which a GPU copies while it computes.

    Attributes:
        position: the number of batches taken so far.
        failed: whether taking the next one has failed.
        unread: how many times each index could not be read, since this loader was made.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Iterable[int],
        batch_size: int,
        *,
        seed: int,
        groups: Sequence | None = None,
        may_skip: Sequence[bool] | None = None,
        collate_fn: Callable = default_collate,
        **kwargs,
    ):
        self.dataset, self.sampler, self.batch_size, self.seed = dataset, sampler, batch_size, seed
        self.groups, self.may_skip = groups or [None] * len(dataset), may_skip or [False] * len(dataset)
        self.collate_fn, self.kwargs = collate_fn, kwargs
        self.position = 0
        self.failed = False
        self.unread: Counter[int] = Counter()
        self._broken: dict[int, str] = {}  # those that could not be read when they were tried last

    def __iter__(self) -> Iterator[list[dict]]:
        """Yield the batches from ``position`` on.

        Raises:
            DataError: an image cannot be read and may not be skipped, or too many cannot be read.
        """
        collate = functools.partial(collate_unread, self.collate_fn)
        loader = DataLoader(
            _Reader(self.dataset, self.seed, self.sampler, self.groups, self.may_skip),
            batch_sampler=itertools.islice(self._batches(), self.position, None),
            generator=torch.Generator(),  # its own: each start would draw from the generator that the model uses
            worker_init_fn=_outlive_signals,
            collate_fn=PackedCollate(collate) if self.kwargs.get("num_workers") else collate,
            **self.kwargs,
        )
        try:
            for loaded in loader:
                batch, read, unread = loaded.unpack() if isinstance(loaded, Packed) else loaded
                self._count(read, unread)
                self.position += 1
                yield batch
        except Exception as error:
            self.failed = True
            # What the worker was sending may break off before PyTorch sees that the worker is gone.
            if isinstance(error, ConnectionError | EOFError):
                raise RuntimeError(_DEAD_WORKER) from error
            raise

    def _count(self, read: Sequence[int], unread: dict[int, str]) -> None:
        most = max(int(_MOST_SHARE * len(self.dataset)), _MOST_FILES)
        for index in read:  # it may have been repaired
            self._broken.pop(index, None)
        for index, message in unread.items():
            self._broken[index] = message
            self.unread[index] += 1
            if self.unread[index] == 1:
                logger.warning(
                    f"{message} Another image takes its place (on_error: skip). {len(self._broken)} images of at most "
                    f"{most} cannot be read now."
                )
        if len(self._broken) > most:
            raise DataError(
                "too many broken images",
                f"{len(self._broken)} of {len(self.dataset)} cannot be read; on_error: skip allows {most} at a time. "
                f"Correct or remove those that the log names, such as {' '.join(list(self._broken.values())[:3])}",
            )

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        """Yield each batch's images as (position in the order of all processes, index)."""
        rank, processes = comm.get_rank(), comm.get_world_size()
        waiting: dict = {}
        for number, index in enumerate(self.sampler):
            batch = waiting.setdefault(self.groups[index], [])
            batch.append((number * processes + rank, index))
            if len(batch) == self.batch_size:
                yield batch[:]
                batch.clear()

    def state_dict(self) -> dict:
        """Return the seeds, how many images all processes have taken, and how many the set has."""
        taken = self.position * self.batch_size * comm.get_world_size()
        order = getattr(self.sampler, "_seed", None)  # of Detectron2's samplers
        return {"seed": self.seed, "order": order, "images": taken, "size": len(self.dataset)}

    def load_state_dict(self, state: dict) -> None:
        """Continue after the images of ``state``; exactly so with the same batch size and number of processes."""
        self.seed, size = state["seed"], state.get("size", len(self.dataset))
        if state.get("order") is not None and hasattr(self.sampler, "_seed"):
            self.sampler._seed = state["order"]
        if size != len(self.dataset):
            now = f"The training set has {len(self.dataset)} images, and had {size} when the checkpoint was written"
            logger.warning(f"{now}: from here on, the images come in another order.")
        self.position = state["images"] // (self.batch_size * comm.get_world_size())


class _Reader(Dataset):
    """Images by (position, index), mapped with random numbers that depend only on the seed and the position."""

    def __init__(self, dataset: Dataset, seed: int, sampler: Iterable[int], groups: Sequence, may_skip: Sequence[bool]):
        self.dataset, self.seed, self.sampler, self.groups, self.may_skip = dataset, seed, sampler, groups, may_skip

    def __getitem__(self, where: tuple[int, int]) -> tuple[dict, int, dict[int, str]]:
        """Return the image or its substitute, its index, and what was wrong with those that could not be read."""
        position, index = where
        unread: dict[int, str] = {}
        for candidate in itertools.chain([index], self._substitutes(position, index)):
            try:
                with seeded(self.seed, position):
                    return self.dataset[candidate], candidate, unread
            except DataError as error:
                if not self.may_skip[candidate]:
                    raise
                unread[candidate] = str(error)
        raise DataError(
            "no image to train on",
            f"None of {len(unread)} images can be read for one place in a batch (of one group, where aspect ratios are "
            f"grouped). The first of them: {' '.join(list(unread.values())[:3])}",
        )

    def _substitutes(self, position: int, index: int) -> Iterator[int]:
        """Yield other images of the group of ``index``: one at random, and those that follow it."""
        others = [other for other in self._pool if self.groups[other] == self.groups[index] and other != index]
        if others:
            start = np.random.default_rng([self.seed, position]).integers(len(others))
            yield from [*others[start:], *others[:start]][:_MOST_IN_A_ROW]

    @functools.cached_property
    def _pool(self) -> list[int]:
        """The indices at the beginning of the order, sorted: in any number of processes the same, for a small set."""
        return sorted(set(itertools.islice(self.sampler, _POOL)))


def collate_unread(
    collate_fn: Callable, samples: list[tuple[dict, int, dict[int, str]]]
) -> tuple[object, list[int], dict[int, str]]:
    """Return the batch that ``collate_fn`` makes of what a ``_Reader`` read, its indices, and what it did not read."""
    unread = {index: message for _, _, each in samples for index, message in each.items()}
    return collate_fn([sample for sample, _, _ in samples]), [index for _, index, _ in samples], unread


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
