"""The plot of a training run, and the colours, lines and axes that all plots share."""

from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import scipy
import xarray
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import ArrayLike

from purejaxppo.experiment.report.metrics import learning_curve
from purejaxppo.experiment.report.statistics import lost, without_lost

COLORS = "#0072b2 #e69f00 #009e73 #d55e00 #cc79a7 #56b4e9 #7a5230 #333333 #a6cee3 #999999".split()  # after Okabe, Ito


def plot_learning_curve(metrics: xarray.Dataset, title: str = "", ax: Axes | None = None) -> Figure:
    """Draws return against environment steps: the mean over runs with its 95 % interval, and each run as a thin line.

    The line of a run that turned nan ends there, and a cross on the horizontal axis marks the place.
    `metrics` has dimensions (`run` or `seed`,) `updates`. Draws into `ax`, or by default into a new figure.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
    steps, returns, mean, low, high = curve_of_runs(metrics)
    if len(returns) > 1:
        ax.plot(steps, returns.T, color=COLORS[0], alpha=0.25, linewidth=0.7)
    draw_line(ax, steps, mean, COLORS[0], "mean" if len(returns) > 1 and steps.size else None)
    if len(returns) > 1 and steps.size:
        several = ~np.isnan(low)
        draw_band(ax, steps[several], low[several], high[several], COLORS[0], "95 % interval")
    where = steps_of_failures(metrics)
    draw_failures(ax, where, COLORS[3], f"turned nan: {where.size}")
    if len(returns) > 1 and steps.size:
        ax.legend(frameon=False, loc="best", title=f"{len(returns)} runs")
    elif where.size:
        ax.legend(frameon=False, loc="best")
    if not steps.size:
        ended = "all runs turned nan" if where.size == len(returns) else "no episode ended"
        ax.text(0.5, 0.5, ended, transform=ax.transAxes, ha="center")
    ax.set(xlabel="environment steps", ylabel="episode return", title=title)
    tidy(ax)
    return figure_of(ax)


class Curve(NamedTuple):
    """Returns of R runs at the P points of their learning curve at which some run has one."""

    steps: np.ndarray  # [P], environment steps
    returns: np.ndarray  # [R, P], nan where no episode ended, and after the run turned nan
    mean: np.ndarray  # [P], over runs
    low: np.ndarray  # [P], end of the 95 % interval of the mean, nan for fewer than two runs
    high: np.ndarray  # [P]


def curve_of_runs(metrics: xarray.Dataset) -> Curve:
    """The learning curve of runs, which differ in nothing but their seeds, and its mean with an interval.

    `metrics` has dimensions (`run` or `seed`,) `updates`.
    """
    curve = learning_curve(without_lost(metrics))
    returns = curve.values.reshape(-1, curve.sizes["updates"])
    counts = (~np.isnan(returns)).sum(0)
    shown = counts > 0
    returns, counts = returns[:, shown], counts[shown]
    mean = np.nansum(returns, axis=0) / counts
    half, several = np.full(mean.shape, np.nan), counts > 1
    error = np.nanstd(returns[:, several], axis=0, ddof=1) / np.sqrt(counts[several])
    half[several] = error * scipy.stats.t.ppf(0.975, counts[several] - 1)
    return Curve(curve["step"].values[shown], returns, mean, mean - half, mean + half)


def steps_of_failures(metrics: xarray.Dataset) -> np.ndarray:
    """The environment steps after which runs turned nan, one number for each that did."""
    gone = lost(metrics)
    steps = metrics["step"].broadcast_like(gone).where(gone).min("updates").values.reshape(-1)
    return steps[~np.isnan(steps)]


def draw_failures(ax: Axes, steps: ArrayLike, color: Any, label: str | None = None) -> None:
    """Draws a cross on the horizontal axis for every failed run.

    Args:
        ax: where to draw.
        steps: environment steps, one per failed run.
        color: any colour of matplotlib.
        label: text for the legend.
    """
    steps = np.asarray(steps)
    if steps.size:
        style = {"marker": "x", "markersize": 8, "markeredgewidth": 2, "linestyle": "none", "clip_on": False}
        ax.plot(steps, np.zeros_like(steps), color=color, transform=ax.get_xaxis_transform(), label=label, **style)


def figure_of(ax: Axes) -> Figure:
    """The whole figure that holds the axes, also if they lie in a subfigure of it."""
    return ax.figure.figure


def draw_line(ax: Axes, steps: ArrayLike, values: ArrayLike, color: Any, label: str | None = None) -> None:
    """Draws a curve of values [U] over environment steps [U].

    Args:
        ax: where to draw.
        steps: environment steps [U].
        values: heights [U].
        color: any colour of matplotlib.
        label: text for the legend.
    """
    ax.plot(steps, values, color=color, linewidth=2, label=label)


def draw_band(
    ax: Axes, steps: ArrayLike, low: ArrayLike, high: ArrayLike, color: Any, label: str | None = None
) -> None:
    """Draws an interval around a curve.

    Args:
        ax: where to draw.
        steps: environment steps [U].
        low: lower ends [U].
        high: upper ends [U].
        color: any colour of matplotlib.
        label: text for the legend.
    """
    ax.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0, label=label)


def tidy(ax: Axes) -> None:
    """Writes steps with SI prefixes (100k), hides two of the four frame lines and draws a faint grid."""
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
