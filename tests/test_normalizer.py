import pytest
import torch
import torch.multiprocessing as mp

from focal_plugin import EMANumPositives, NumPositives

CPU = torch.device("cpu")


@pytest.mark.parametrize("count, expected", [(0, 1.0), (1, 1.0), (7, 7.0), (10**6, 1e6)])
def test_num_positives(count, expected):
    for sync in (False, True):
        assert NumPositives(sync=sync)(count, CPU).item() == expected


@pytest.mark.gpu
@pytest.mark.parametrize("normalizer", [NumPositives(), EMANumPositives()])
def test_does_not_wait_for_a_gpu(normalizer):
    normalizer = normalizer.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = normalizer(7, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.is_cuda


def test_ema_by_hand():
    normalizer = EMANumPositives(initial=100, momentum=0.9)
    mean = 100.0
    for count in (5, 0, 300, 40):
        mean = 0.9 * mean + 0.1 * max(count, 1)
        assert normalizer(count, CPU).item() == pytest.approx(mean, rel=1e-6)


def test_ema_is_in_the_checkpoint():
    first, second = EMANumPositives(), EMANumPositives()
    first(50, CPU)
    second.load_state_dict(first.state_dict())
    assert second(7, CPU) == first(7, CPU)


def test_a_later_batch_does_not_change_an_earlier_result():
    normalizer = EMANumPositives()
    before = normalizer(10, CPU)
    value = before.item()
    normalizer(1000, CPU)
    assert before.item() == value


# (positives of each of two processes, what each divides by). Gradients are averaged over the processes, so dividing by
# the mean count gives the sum of the losses over the sum of the counts.
JOINT = [((30, 10), 20.0), ((0, 1), 0.5), ((0, 0), 0.5)]


def _rank(rank, init_file, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    normalizer = NumPositives(sync=True)
    results[rank] = [normalizer(counts[rank], CPU).item() for counts, _ in JOINT]
    torch.distributed.destroy_process_group()


def test_sync_divides_by_the_joint_count(tmp_path):
    results = mp.get_context("spawn").Manager().dict()
    mp.spawn(_rank, args=(tmp_path / "init", results), nprocs=2)
    expected = [value for _, value in JOINT]
    assert dict(results) == {0: expected, 1: expected}
