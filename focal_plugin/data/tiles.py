"""Tiles of an image along one of its sides."""

import math


def overlapping_spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Return the spans (start, stop) that cover a side of ``length`` pixels: as few as can, evenly spread.

    Args:
        length: the side's length.
        tile: the length of each span. A side no longer than this is one span.
        overlap: the least number of pixels that neighbours share, less than ``tile``.
    """
    if length <= tile:
        return [(0, length)]
    steps = math.ceil((length - tile) / (tile - overlap))
    starts = [round(i * (length - tile) / steps) for i in range(steps + 1)]
    return [(start, start + tile) for start in starts]
