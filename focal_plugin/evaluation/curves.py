"""Curves of a run's loss, learning rate and AP."""

import json

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from . import style

_LOSSES = {
    "total_loss": "total",
    "loss_cls": "classification",
    "loss_box_reg": "box",
    "validation/total_loss": "total, validation",
}
_METRICS = ("AP", "AP50")


def read_metrics(path: str) -> dict[str, tuple[list[int], list[float]]]:
    """Return the series in one of Detectron2's ``metrics.json``: for each name its iterations and values, in order.

    A run that starts again, or resumes from an earlier iteration, appends to the file; the later lines of an iteration
    replace the earlier ones. A line that a killed run left incomplete, or a disk damaged, is skipped.

    Raises:
        ValueError: a line has no integer ``iteration``; the message names the line.
    """
    lines: list[dict] = []
    with open(path, errors="replace") as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if not isinstance(line, dict) or not isinstance(line.get("iteration"), int):
                raise ValueError(
                    f"{path}, line {number}: expected an 'iteration' and values, found {text.strip()[:80]}."
                )
            while lines and lines[-1]["iteration"] >= line["iteration"]:
                lines.pop()
            lines.append(line)
    series: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        for name, value in line.items():
            iterations, values = series.setdefault(name, ([], []))
            iterations.append(line["iteration"])
            values.append(value)
    return series


def save_curves(path: str, metrics_json: str) -> None:
    """Draw the losses, the learning rate and, if there was an evaluation, the AP in ``metrics_json`` to a PNG."""
    series = read_metrics(metrics_json)
    # "bbox/AP", or "<data set>/bbox/AP" if there are several test sets
    metrics = [name for name in series if name.rpartition("/")[2] in _METRICS]
    figure, panels = style.panels(3 if metrics else 2, width=4.4, height=3.4)

    losses = {name: label for name, label in _LOSSES.items() if name in series}
    for name, label in losses.items():
        panels[0].plot(*series[name], label=label, linewidth=2 if name == "total_loss" else 1.3)
    panels[0].set(title="Loss")
    use_log_scale(panels[0])
    panels[1].plot(*series.get("lr", ([], [])), color="tab:gray", linewidth=2)
    panels[1].set(title="Learning rate", ylim=(0, None))
    for name in metrics:
        iterations, values = series[name]
        label = name.replace("/bbox/", " ").removeprefix("bbox/")
        panels[2].plot(iterations, values, marker="o", markersize=4, linewidth=2, label=f"{label}  {values[-1]:.1f}")
    if metrics:
        panels[2].set(title="AP on the test set (%)", ylim=(0, None))
    for panel in panels:
        panel.set(xlabel="iteration", xlim=(0, None))
        if panel.get_legend_handles_labels()[1]:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18)}  # where no curve is
            panel.legend(frameon=False, fontsize=8, ncols=2, **below)
    style.save(figure, path)


def use_log_scale(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers at 1, 2 and 5 in each decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
