"""The look of all figures and pictures: one palette, and axes without clutter."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people can tell apart, without yellow, which is too pale on white.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
GRAY = "#8A8A8A"
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
DASHES = ["-", "--", "-.", ":"]

_ON_PHOTOS = [PALETTE[i] for i in (1, 4, 5, 3, 2, 0)]  # the most visible first; black is hard to see
_SHADES = [(0.0, 0.0), (1.0, 0.45), (0.0, 0.4)]  # (grey level, its share): the colour itself, paler, darker


def color(index: int) -> str:
    """Return the colour of the series ``index`` of a figure, "#rrggbb". Paler and darker ones follow after seven."""
    return _shade(PALETTE, index)


def class_color(index: int) -> str:
    """Return the colour of a class, "#rrggbb", the same in every picture of detections. Colours repeat after 18."""
    return _shade(_ON_PHOTOS, index)


def _shade(colors: list[str], index: int) -> str:
    level, share = _SHADES[index // len(colors) % len(_SHADES)]
    return to_hex([(1 - share) * part + share * level for part in to_rgb(colors[index % len(colors)])])


def panels(columns: int, *, width: float = 4.6, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """Return a white figure with a row of axes, of ``width`` × ``height`` inches each."""
    figure = Figure(figsize=(width * columns, height), layout="constrained", facecolor="white")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: str | Path) -> None:
    """Write ``figure`` to a PNG."""
    figure.savefig(path, dpi=130)
