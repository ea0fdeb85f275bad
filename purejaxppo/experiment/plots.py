"""Pictures of results."""

import matplotlib.pyplot as plt
import numpy as np
import xarray
from matplotlib.ticker import EngFormatter
from scipy import stats

from purejaxppo.experiment.results import learning_curve


def plot_learning_curve(metrics: xarray.Dataset, title: str = "", ax=None):
    """Draws return against environment steps: the mean over runs with its 95 % interval, and each run thin behind it.

    `metrics` has dimensions (`run` or `seed`,) `update`. Returns the matplotlib axes.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
    curve = learning_curve(metrics)
    returns = curve.values.reshape(-1, curve.sizes["update"])
    steps = curve["step"].values
    color = "#1f6fb4"
    counts = (~np.isnan(returns)).sum(0)
    shown = counts > 0
    steps, returns, counts = steps[shown], returns[:, shown], counts[shown]
    if len(returns) > 1:
        ax.plot(steps, returns.T, color=color, alpha=0.25, linewidth=0.7)
    mean = np.nanmean(returns, axis=0) if steps.size else steps
    ax.plot(steps, mean, color=color, linewidth=2, label="mean" if len(returns) > 1 else None)
    if len(returns) > 1 and steps.size:
        several = counts > 1
        half = np.nanstd(returns[:, several], axis=0, ddof=1) / np.sqrt(counts[several])
        half = half * stats.t.ppf(0.975, counts[several] - 1)
        band = mean[several] - half, mean[several] + half
        ax.fill_between(steps[several], *band, color=color, alpha=0.25, linewidth=0, label="95 % interval")
        ax.legend(frameon=False, loc="best", title=f"{len(returns)} runs")
    if not steps.size:
        ax.text(0.5, 0.5, "no episode ended", transform=ax.transAxes, ha="center")
    ax.set(xlabel="environment steps", ylabel="episode return", title=title)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    return ax
