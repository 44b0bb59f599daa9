"""The largest values of rows of millions: what is fast on a CPU is not on a GPU."""

import math

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def top(values: Tensor, count: int, floor: float) -> tuple[Tensor, Tensor]:
    """Return the ``count`` largest of each row of (N, M) ``values``, in descending order, and their indices.

    Both are (N, C). Values of at most ``floor`` may be missing; rows with fewer than C are padded with −∞.
    """
    # How many values are above the floor depends on the data: a GPU would synchronise to tell, a trace would fix it.
    if values.is_cuda or torch.jit.is_tracing():
        size = values.shape[1]  # a tensor while PyTorch traces
        best, indices = values.topk(size.clamp(max=count) if isinstance(size, Tensor) else min(count, size))
        return best.float(), indices
    rows = []
    for row in values:  # on a CPU: millions of values are slow to sort, the few above the floor are not
        indices = (row > floor).nonzero().squeeze(1)
        best, order = row[indices].float().topk(min(count, len(indices)))
        rows.append((best, indices[order]))
    all_values = pad_sequence([best for best, _ in rows], batch_first=True, padding_value=-math.inf)
    return all_values, pad_sequence([indices for _, indices in rows], batch_first=True)


def floor_of_logits(score_thresh: float) -> float:
    """A floor for ``top`` below which no logit has a sigmoid above ``score_thresh``.

    The sigmoid is monotonic, so a threshold on the logits spares computing it for all. The margin of .1 allows for
    rounding, also that of bfloat16: the caller compares the scores.
    """
    if not 0 < score_thresh < 1:
        return -math.inf if score_thresh <= 0 else math.inf
    return math.log(score_thresh / (1 - score_thresh)) - 0.1
