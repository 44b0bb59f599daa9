"""Images of an ``on_error: skip`` set that cannot be read in training: others take their places, reproducibly."""

import itertools
import json
import logging
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.data.samplers import RandomSubsetTrainingSampler, TrainingSampler
from PIL import Image, UnidentifiedImageError

from focal_plugin import add_focal_config
from focal_plugin.data import DataError, FocalDatasetMapper
from focal_plugin.engine import TrainLoader, build_train_loader
from focal_plugin.engine.loader import collate_unread, explained_dead_worker
from focal_plugin.files.write import replace_file
from tests.engine.same import assert_same_run

NUM_IMAGES = 40


@pytest.fixture
def dataset(tmp_path):
    """Records of images whose pixels all have the value of their number; one in four is tall."""
    records = []
    for i in range(NUM_IMAGES):
        size = (4, 6) if i % 4 == 0 else (6, 4)
        Image.new("RGB", size, (i, i, i)).save(tmp_path / f"{i}.png")
        record = {"file_name": str(tmp_path / f"{i}.png"), "image_id": i, "width": size[0], "height": size[1]}
        records.append({**record, "annotations": [], "on_error": "skip"})
    return records


def spoil(dataset, *numbers):
    for number in numbers:
        Path(dataset[number]["file_name"]).write_text("not an image")


def build(dataset, sampler=None, workers=0, batch=4, mapper=FocalDatasetMapper, **kwargs):
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN = (4,)
    cfg.INPUT.AUGMENTATIONS = [{"name": "RandomBrightness", "intensity_min": 0.5, "intensity_max": 1.5}]
    mapper = mapper(cfg, is_train=True)
    sampler = sampler or TrainingSampler(len(dataset), seed=3)
    loader = build_train_loader(
        dataset, mapper=mapper, sampler=sampler, total_batch_size=batch, num_workers=workers, **kwargs
    )
    loader.seed = 5
    return loader


def take(loader, count):
    """The next batches, as each image's number and pixels."""
    batches = itertools.islice(loader, count)
    return [[(sample["image_id"], sample["image"].numpy().tobytes()) for sample in batch] for batch in batches]


def numbers(batches):
    return [[number for number, _ in batch] for batch in batches]


BROKEN = (3, 8, 21)


def test_another_image_of_the_group_takes_the_place(dataset):
    whole = numbers(take(build(dataset), 60))
    spoil(dataset, *BROKEN)
    found = numbers(take(build(dataset), 60))
    assert any(number in BROKEN for batch in whole for number in batch)
    replaced = 0
    for before, after in zip(whole, found):
        for old, new in zip(before, after):
            assert new == old or old in BROKEN
            assert new not in BROKEN and (new % 4 == 0) == (old % 4 == 0)
            replaced += new != old
    assert replaced == sum(number in BROKEN for batch in whole for number in batch)
    substitutes = {new for before, after in zip(whole, found) for old, new in zip(before, after) if new != old}
    assert len(substitutes) > 5  # not always the same one


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_batches(dataset, workers):
    spoil(dataset, *BROKEN)
    assert take(build(dataset, workers=workers), 30) == take(build(dataset), 30)


@pytest.mark.parametrize("stop", [1, 7, 20])
def test_a_resumed_run_goes_on_with_the_same_batches(dataset, stop):
    spoil(dataset, *BROKEN)
    first = build(dataset)
    begun = take(first, stop)
    second = build(dataset)
    second.load_state_dict(first.state_dict())
    assert begun + take(second, 30 - stop) == take(build(dataset), 30)


def test_a_set_of_another_size_is_reported(dataset, caplog):
    caplog.set_level(logging.WARNING, logger="focal_plugin")
    state = build(dataset).state_dict()
    build(dataset[:-1]).load_state_dict(state)
    (message,) = caplog.messages
    assert "has 39 images, and had 40" in message
    del state["size"]  # of an earlier version
    build(dataset[:-1]).load_state_dict(state)
    build(dataset).load_state_dict(build(dataset).state_dict())
    assert len(caplog.messages) == 1


def test_any_number_of_processes_gives_the_same_substitutes(dataset, monkeypatch):
    """Of each place in the order of all processes, whose images they share."""
    spoil(dataset, *BROKEN)

    def places(processes):
        found = {}
        for rank in range(processes):
            monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
            monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: processes)
            loader = build(dataset, TrainingSampler(NUM_IMAGES, seed=3), batch=processes, aspect_ratio_grouping=False)
            for step, ((number, pixels),) in enumerate(take(loader, 60 // processes)):
                found[step * processes + rank] = number, pixels
        return found

    monkeypatch.setattr("detectron2.utils.comm.shared_random_seed", lambda: 5)
    assert places(2) == places(1)
    assert places(3) == places(1)


def test_only_images_of_the_sampler_take_the_place(dataset):
    sampler = RandomSubsetTrainingSampler(NUM_IMAGES, 0.3, seed_shuffle=1, seed_subset=2)
    chosen = set(itertools.islice(sampler, 200))
    assert len(chosen) == 12
    spoil(dataset, *sorted(chosen)[:2])
    found = {number for batch in numbers(take(build(dataset, sampler), 40)) for number in batch}
    assert found == chosen - set(sorted(chosen)[:2])


def test_an_image_that_is_whole_again_is_read_again(dataset):
    original = Path(dataset[3]["file_name"]).read_bytes()
    whole = take(build(dataset), 20)
    spoil(dataset, 3)
    loader = iter(build(dataset))
    begun = take(loader, 10)
    Path(dataset[3]["file_name"]).write_bytes(original)
    assert take(loader, 10) == whole[10:]
    assert begun != whole[:10]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_file_is_logged_once_and_all_are_counted(dataset, caplog, workers):
    spoil(dataset, *BROKEN)
    caplog.set_level(logging.WARNING, logger="focal_plugin")
    loader = build(dataset, workers=workers)
    take(loader, 60)
    for number in BROKEN:
        (line,) = [message for message in caplog.messages if dataset[number]["file_name"] in message]
        assert "image that does not open" in line and "of at most 10" in line
    assert set(loader.unread) == set(BROKEN) and min(loader.unread.values()) >= 5  # an epoch is 10 batches


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_stop_the_run(dataset, workers):
    spoil(dataset, *range(1, 24, 2))  # 12, and 10 is the most
    loader = build(dataset, workers=workers)
    with pytest.raises(DataError, match=r"1\d of 40 cannot be read.* allows 10 at a time.*\d\.png") as error:
        take(loader, 1000)
    assert loader.failed and len(str(error.value).splitlines()) <= 2
    assert str(error.value).count(".png") == 3


def test_a_tenth_of_a_large_set_may_be_broken(dataset):
    spoil(dataset, 1, 2, 3, 5)
    take(build(dataset * 5), 150)  # 20 of 200 records
    spoil(dataset, 6)
    with pytest.raises(DataError, match=r"21 of 200 cannot be read; .* allows 20 at a time"):
        take(build(dataset * 5), 150)


def test_images_that_are_repaired_do_not_count(dataset):
    """Each is broken for a while: many in the run, few at a time."""
    loader = build(dataset, aspect_ratio_grouping=False)
    batches = iter(loader)
    for number in range(NUM_IMAGES):
        original = Path(dataset[number]["file_name"]).read_bytes()
        spoil(dataset, number)
        take(batches, 10)  # an epoch
        Path(dataset[number]["file_name"]).write_bytes(original)
    assert len(loader.unread) >= 30


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_that_vanishes_stops_the_run_at_once(dataset, tmp_path, workers):
    for record in dataset:
        os.remove(record["file_name"])
    with pytest.raises((DataError, RuntimeError), match=r"None of 11 images can be read.*does not exist"):
        take(build(dataset, workers=workers), 1)


def test_the_last_image_of_its_group(dataset):
    spoil(dataset, *range(4, NUM_IMAGES, 4))  # 0 is left
    found = {number for batch in numbers(take(build(dataset), 100)) for number in batch if number % 4 == 0}
    assert found == {0}
    spoil(dataset, 0)
    with pytest.raises(DataError, match="None of 10 images can be read"):
        take(build(dataset), 100)


@pytest.mark.parametrize("workers", [0, 2])
def test_raise_stops_at_the_first(dataset, workers):
    spoil(dataset, *BROKEN)
    for record in dataset:
        del record["on_error"]
    with pytest.raises((DataError, RuntimeError), match=r"image that does not open.*\d\.png"):
        take(build(dataset, workers=workers), 60)


def test_detectron2s_mapper_raises_pillows_errors(dataset):
    spoil(dataset, *BROKEN)
    with pytest.raises(UnidentifiedImageError):
        take(build(dataset, mapper=DatasetMapper), 60)


def test_a_mixture_of_sets(dataset):
    """The one whose bad records are to be left out does not hide those of the other."""
    del dataset[3]["on_error"]
    spoil(dataset, 8)
    take(build(dataset), 10)
    spoil(dataset, 3)
    with pytest.raises(DataError, match=r"/3\.png"):
        take(build(dataset), 60)


@pytest.mark.slow
def test_a_spawned_worker(dataset):
    """Where workers are not forked, what they need is sent to them."""
    spoil(dataset, *BROKEN)
    context = multiprocessing.get_context("spawn")
    assert take(build(dataset, workers=1, multiprocessing_context=context), 4) == take(build(dataset), 4)


def test_samples_of_any_kind():
    """A loader that is given no records of its own."""

    class Squares:
        def __getitem__(self, index):
            return index**2

        def __len__(self):
            return 10

    loader = TrainLoader(Squares(), TrainingSampler(10, shuffle=False), 5, seed=0, collate_fn=list)
    assert list(itertools.islice(loader, 2)) == [[0, 1, 4, 9, 16], [25, 36, 49, 64, 81]]
    samples = [(np.zeros(2), 7, {}), (np.ones(2), 8, {3: "gone"})]
    assert collate_unread(np.stack, samples)[1:] == ([7, 8], {3: "gone"})


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_with_broken_images_ends_and_resumes(train_net, tiny_config, tmp_path, capfd, workers):
    """One broken image in the training set, one in the test set, that open as the annotations are read."""
    for name in ("shapes_train/2.png", "shapes_test/1.png"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:2000])
    config = Path(tiny_config)
    config.write_text(config.read_text().replace("format: coco", "format: coco\n    on_error: skip"))
    words = ["DATALOADER.NUM_WORKERS", workers, "SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 3]
    train_net("OUTPUT_DIR", tmp_path / "whole", *words)
    screen = capfd.readouterr().out
    assert screen.count("Another image takes its place") == 1 and "shapes_train/2.png" in screen
    assert "1 images could not be read, " in screen
    assert "images left out: 1 (image that does not open: 1)" in screen
    for folder in ("whole", "resumed"):
        (tmp_path / folder).mkdir(exist_ok=True)
    for name in ("config.yaml", "model_0000002.pth", "metrics.json"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "resumed" / name)
    (tmp_path / "resumed/last_checkpoint").write_text("model_0000002.pth")
    train_net("--resume", "OUTPUT_DIR", tmp_path / "resumed", *words)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


@pytest.mark.parametrize("words", [[], ["DATALOADER.FILTER_EMPTY_ANNOTATIONS", False]])
@pytest.mark.parametrize("crowds", [False, True])
def test_a_training_set_without_boxes(train_net, tmp_path, words, crowds):
    path = tmp_path / "shapes_train.json"
    content = json.loads(path.read_text())
    content["annotations"] = [box | {"iscrowd": 1} for box in content["annotations"]] if crowds else []
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"DATASETS\.TRAIN names shapes_train: 6 images without a box to learn from"):
        train_net(*words)


def test_a_worker_that_dies_while_a_checkpoint_is_written(tmp_path):
    """PyTorch's error comes in the middle of it; what closes the file then raises another."""

    def write(file):
        try:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1730176 vs 1730096")

    with pytest.raises(RuntimeError, match="A process that loads images has died"), explained_dead_worker():
        replace_file(str(tmp_path / "model.pth"), write)
    with pytest.raises(OSError, match="could not be written"), explained_dead_worker():
        replace_file(str(tmp_path / "none" / "model.pth"), write)


def test_the_order_goes_on_whatever_was_drawn_before(dataset):
    """A run of one's own program need not have a seed; the state has that of the order, too."""

    def batches(loader, count):
        return [[image["image_id"] for image in batch] for batch in itertools.islice(loader, count)]

    loaders = [build_train_loader(dataset, mapper=None, total_batch_size=2) for _ in range(2)]
    expected = batches(loaders[0], 9)
    assert batches(loaders[1], 9) != expected
    loaders[0].position, loaders[1].position = 3, 0
    loaders[1].load_state_dict(loaders[0].state_dict())
    assert batches(loaders[1], 6) == expected[3:]
