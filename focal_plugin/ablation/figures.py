"""Figures of the report: results with their spread over the seeds, and training curves."""

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..evaluation import style
from ..evaluation.curves import use_log_scale
from .runs import Run

_COLORS = [to_rgb(style.color(index)) for index in range(14)]
_CURVES = {  # titles of series of metrics.json
    "total_loss": "Training loss",
    "background_share": "Background's share of the class loss",
    "bbox/AP": "AP on the test set (%)",
}
_DARK = {
    "axes.prop_cycle": cycler(color=[[0.7 * part + 0.3 for part in color] for color in _COLORS]),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), "#d6d9de"),
    "grid.color": "#565b63",
}
_LIGHT = {"axes.prop_cycle": cycler(color=_COLORS), "axes.edgecolor": "#444444"}


def save_picture(path: Path, summary: dict, runs: Sequence[Run]) -> None:
    """Draw results and losses side by side to a PNG."""
    with _figure(_LIGHT, 12, summary) as figure:
        left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
        draw_results(left, summary)
        draw_curves(right.subplots(), summary, runs, "total_loss")
        figure.savefig(path, dpi=110)


def themed_svgs(summary: dict, runs: Sequence[Run]) -> list[dict[str, str]]:
    """Return the figures of the page, each with a ``title`` and data URIs of an SVG for ``light`` and for ``dark``."""
    figures = [("Results", lambda figure: draw_results(figure, summary))]
    for series, title in _CURVES.items():
        if any(len(run.series().get(series, ([],))[0]) > 1 for run in runs):
            figures.append((title, lambda figure, s=series: draw_curves(figure.subplots(), summary, runs, s)))
    pages = [{"title": title} for title, _ in figures]
    for page, (_, draw) in zip(pages, figures):
        for theme, look in (("light", _LIGHT), ("dark", _DARK)):
            with _figure(look, 6.2, summary) as figure:
                draw(figure)
                figure.savefig(buffer := io.BytesIO(), format="svg", transparent=True, metadata={"Date": None})
            page[theme] = _data_uri("image/svg+xml", buffer.getvalue())
    return pages


@contextmanager
def _figure(look: dict, width: float, summary: dict) -> Iterator[Figure]:
    """A figure of ``width`` inches, as high as the rows need; inside, ``look`` is the style."""
    with matplotlib.rc_context({**look, "svg.hashsalt": "focal_plugin"}):
        figure = Figure(figsize=(width, max(3.0, 0.36 * len(summary["rows"]) + 1.2)), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def draw_results(figure: Figure, summary: dict) -> None:
    """Draw the AP of each row: ours of each seed, with mean ± standard deviation, and the paper's on its own axis."""
    rows = summary["rows"]
    has_paper = any(row["paper"] or row["paper_diverged"] for row in rows)
    panels = figure.subplots(1, 2 if has_paper else 1, sharey=True, squeeze=False)[0]
    for y, row in enumerate(rows):
        color = _color(y)
        seeds = [run["results"]["AP"] for run in row["runs"] if run["status"] == "finished"]
        panels[0].plot(seeds, [y] * len(seeds), ".", color=color, alpha=0.5, markersize=5)
        if "AP" in row["mean"]:
            spread = row["std"].get("AP")
            panels[0].errorbar(row["mean"]["AP"], y, xerr=spread, fmt="o", color=color, capsize=4, markersize=6)
        else:
            _write(panels[0], y, row["remark"])
        if has_paper and "AP" in row["paper"]:
            panels[1].plot(row["paper"]["AP"], y, "D", color=color, markersize=6)
        elif has_paper and row["paper_diverged"]:
            _write(panels[1], y, "diverged")
    panels[0].set(yticks=range(len(rows)), yticklabels=[row["label"] for row in rows], ylim=(len(rows) - 0.5, -0.5))
    several = any(row["std"] for row in rows)
    panels[0].set(title="Ours", xlabel="AP (%), mean ± std over seeds" if several else "AP (%)")
    if has_paper:
        panels[1].set(title="The paper's", xlabel="AP (%)")
    for panel in panels:
        _tidy(panel)
        panel.margins(x=0.15)
        panel.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def draw_curves(axes: Axes, summary: dict, runs: Sequence[Run], series: str) -> None:
    """Draw a series of metrics.json, with a line for each run and a colour for each row."""
    for index, row in enumerate(summary["rows"]):
        label = row["label"]
        for run in runs:
            if run.row.name == row["row"] and series in (found := run.series()):
                axes.plot(*found[series], color=_color(index), linewidth=1.2, alpha=0.8, label=label)
                label = None  # once in the legend
    axes.set(title=f"{_CURVES[series]}, all seeds", xlabel="step")
    if series == "total_loss" and axes.lines:
        use_log_scale(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.lines:
        axes.legend(frameon=False, fontsize=8, ncols=2)
    _tidy(axes)


def detections(runs: Sequence[Run], width: int = 800) -> list[dict]:
    """Return each row's first ``detections.png`` that can be read, as a small JPEG in a data URI."""
    pictures: dict[str, dict] = {}
    for run in runs:
        path = run.folder / "detections.png"
        if path.exists() and run.row.name not in pictures and run.outcome().status == "finished":
            try:
                with Image.open(path) as image:
                    small = image.convert("RGB")
            except (OSError, SyntaxError):  # Pillow's for an incomplete file, which a killed run leaves
                continue
            small.thumbnail((width, 10 * width))
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=65, optimize=True)
            uri = _data_uri("image/jpeg", buffer.getvalue())
            pictures[run.row.name] = {"row": run.row.name, "seed": run.seed, "uri": uri, "size": small.size}
    return list(pictures.values())


def _color(index: int) -> str:
    return f"C{index % len(_COLORS)}"  # of the theme


def _write(axes: Axes, y: int, text: str) -> None:
    """Write a text in place of a point that has no value."""
    axes.text(0.5, y, text, transform=axes.get_yaxis_transform(), ha="center", va="center", fontsize=8, style="italic")


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
