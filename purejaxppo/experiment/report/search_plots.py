"""Plots of searches: rungs of halving, lineage and schedule of a population, trials of an Optuna study."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from purejaxppo.experiment.report.curve import COLORS, tidy
from purejaxppo.text import count, in_words, show_setting

WINNER, OTHERS = COLORS[3], "0.6"
THIN = {"color": OTHERS, "linewidth": 0.6, "alpha": 0.6}
MAX_COLUMNS = 300  # of a lineage; more cannot be seen


def plot_rungs(
    scores: np.ndarray, steps: Sequence[int], settings: Sequence[Mapping[str, Any]], title: str = ""
) -> Figure:
    """Draws the score of every setting on every rung of halving; the best setting is orange, and named.

    A line ends on the rung where its setting was stopped. A setting that failed is a cross at the bottom.

    Args:
        scores: [settings, rungs], nan where a setting did not get to the rung, -inf where it failed.
        steps: environment steps of an agent at each rung.
        settings: field -> value.
        title: first line of the heading.
    """
    figure, ax = plt.subplots(figsize=(6.4, 4), layout="constrained")
    reached, places = (~np.isnan(scores)).sum(1), np.arange(len(steps))
    last = np.array([row[max(n - 1, 0)] for row, n in zip(scores, reached)])
    order = np.lexsort((-np.arange(len(last)), np.nan_to_num(last, nan=-np.inf, neginf=-np.inf), reached))
    best = order[-1]
    for setting in order:
        shown = np.where(np.isfinite(scores[setting]), scores[setting], np.nan)
        style = {"color": OTHERS, "linewidth": 1, "markersize": 4, "alpha": 0.35 + 0.65 * reached[setting] / len(steps)}
        if setting == best:
            style = {"color": WINNER, "linewidth": 2.5, "markersize": 6, "label": show_setting(settings[setting])}
        ax.plot(places, shown, marker="o", clip_on=False, **style)
    failed, rung = np.nonzero(np.isneginf(scores))
    if failed.size:
        style = {"marker": "x", "linestyle": "none", "color": OTHERS, "markersize": 7, "clip_on": False}
        ax.plot(
            rung, np.zeros(failed.size), transform=ax.get_xaxis_transform(), label=f"failed: {failed.size}", **style
        )
    each = (~np.isnan(scores)).sum(0)
    show = EngFormatter(sep="")
    ax.set_xticks(places, [f"{show(n)} steps\n{count(int(k), 'setting')}" for n, k in zip(steps, each)])
    ax.set(xlabel="rung", ylabel="episode return", title=title)
    ax.margins(x=0.08)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    figure.legend(loc="outside lower center", frameon=False)
    return figure


def plot_lineage(
    parents: np.ndarray, returns: np.ndarray, steps: np.ndarray, line: np.ndarray, title: str = ""
) -> Figure:
    """Draws a population over time: a lane for every member, coloured by its return, and an arrow for every copy.

    The line of the winner, back to where it began, is orange. Where no episode ended, the colour is that before.

    Args:
        parents: [R, U] the member from which each continues after each update.
        returns: [R, U] mean returns of the updates, nan where no episode ended.
        steps: [U] environment steps of an agent after each update.
        line: [U] the member that the winner's line was in each update.
        title: first line of the heading.
    """
    num_members = len(parents)
    figure, ax = plt.subplots(figsize=(8, 1.6 + 0.28 * min(num_members, 32)), layout="constrained")
    edges, means = _in_columns(returns, steps)
    lanes = np.arange(num_members + 1) - 0.5
    image = ax.pcolormesh(edges, lanes, _held(means), cmap="YlGnBu", alpha=0.7, linewidth=0)
    child, update = np.nonzero(parents != np.arange(num_members)[:, None])
    parent, at = parents[child, update], steps[update] + _beside(update, steps)
    ax.vlines(at, parent, child, color="black", linewidth=0.8)
    ax.plot(at, parent, "o", color="black", markersize=2.5)
    for marker, chosen in (("v", child > parent), ("^", child < parent)):  # the axis points down
        ax.plot(at[chosen], child[chosen], marker, color="black", markersize=5)
    ax.plot([0, *np.repeat(steps[:-1], 2), steps[-1]], np.repeat(line, 2), color=WINNER, linewidth=2.5, zorder=3)
    ax.set(xlabel="environment steps of a member", ylabel="member", title=title, ylim=(num_members - 0.5, -0.5))
    ax.yaxis.set_major_locator(MaxNLocator(min(num_members, 16), integer=True))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.spines[["top", "right"]].set_visible(False)
    bar = figure.colorbar(image, ax=ax, label="episode return", format=EngFormatter(sep=""))
    bar.outline.set_visible(False)
    return figure


def plot_schedule(
    values: Mapping[str, np.ndarray], returns: np.ndarray, steps: np.ndarray, line: np.ndarray, title: str = ""
) -> Figure:
    """Draws the return and the explored hyperparameters over time, those of the winner's line in orange.

    Args:
        values: [R, U] of every explored field, by name.
        returns: [R, U] mean returns of the updates, nan where no episode ended.
        steps: [U] environment steps of an agent after each update.
        line: [U] the member that the winner's line was in each update.
        title: first line of the heading.
    """
    figure, axes = plt.subplots(
        len(values) + 1, figsize=(6.4, 1 + 1.7 * (len(values) + 1)), sharex=True, layout="constrained", squeeze=False
    )
    edges, means = _in_columns(returns, steps)
    _, mine = _in_columns(returns[line, np.arange(len(line))][None], steps)
    top, *others = axes[:, 0]
    for row, style in ((mine[0], {"color": WINNER, "linewidth": 2, "zorder": 3}), *((row, THIN) for row in means)):
        known = ~np.isnan(row)
        top.plot(edges[1:][known], row[known], **style)
    top.set_ylabel("episode return")
    for ax, (name, x) in zip(others, values.items()):
        _draw_field(ax, x, steps, line)
        ax.set_ylabel(in_words(name))
    for ax in axes[:, 0]:
        tidy(ax)
    axes[-1, 0].set_xlabel("environment steps of a member")
    top.plot([], [], color=WINNER, linewidth=2, label="line of the winner")
    top.plot([], [], color=OTHERS, linewidth=0.8, label="members")
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title, fontsize="medium")
    return figure


def plot_trials(study: Any, title: str = "") -> dict[str, Figure]:
    """Draws an Optuna study by Optuna's own plots, by name: history, slices, and the importances of several fields.

    Returns nothing for a study without a score.
    """
    from optuna.exceptions import ExperimentalWarning
    from optuna.visualization import matplotlib as plots

    done = [trial for trial in study.trials if trial.value is not None]
    varied = {name for name in done[0].params if len({t.params[name] for t in done}) > 1} if done else set()
    figures = {}
    with plt.rc_context(), warnings.catch_warnings():  # Optuna sets a style for the whole process
        warnings.simplefilter("ignore", ExperimentalWarning)
        if done:
            figures["history"] = _figure(plots.plot_optimization_history(study, target_name="score"), title)
        if varied:
            figures["slices"] = _figure(plots.plot_slice(study, params=sorted(varied), target_name="score"), title)
        if len(varied) > 1 and len(done) > 3:
            found = plots.plot_param_importances(study, params=sorted(varied), target_name="score")
            figures["importances"] = _figure(found, title)
    return figures


def _figure(axes: Any, title: str) -> Figure:
    """The figure of axes that Optuna drew, under our title."""
    axes = np.ravel(axes)
    figure = axes[0].figure
    beside = len(axes) == 1 and len(figure.axes) == 2  # one panel and its colour bar, whose grid has no height
    figure.set_layout_engine("tight" if beside else "constrained")
    for ax in axes:
        ax.set_title("", loc="left")
        ax.set_title("")
    figure.suptitle(title)
    return figure


def _draw_field(ax: Axes, values: np.ndarray, steps: np.ndarray, line: np.ndarray):
    """The values [R, U] of one field, with a logarithmic axis if they are positive and span a factor of five."""
    ax.step(steps, values.T, **THIN)
    ax.step(steps, values[line, np.arange(len(line))], color=WINNER, linewidth=2)
    known = values[np.isfinite(values)]
    if known.size and known.min() > 0 and known.max() > 5 * known.min():
        ax.set_yscale("log")


def _in_columns(returns: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges [C + 1] and means [R, C] of returns [R, U] in at most `MAX_COLUMNS` spans; nan where no episode ended."""
    spans = np.array_split(np.arange(len(steps)), min(len(steps), MAX_COLUMNS))
    known = ~np.isnan(returns)
    total, number = (np.stack([x[:, span].sum(1) for span in spans], 1) for x in (np.where(known, returns, 0), known))
    return np.array([0, *(steps[span[-1]] for span in spans)]), np.where(number, total / np.maximum(number, 1), np.nan)


def _held(means: np.ndarray) -> np.ndarray:
    """Means [R, C] with the one before in place of those that are nan."""
    known = np.where(np.isnan(means), 0, np.arange(means.shape[1]))
    return np.take_along_axis(means, np.maximum.accumulate(known, axis=1), axis=1)


def _beside(updates: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """How far copies [C], by their updates, are drawn beside each other, so that those of one update do not overlap."""
    known, number = np.unique(updates, return_counts=True)
    gaps = np.diff(steps[known], append=steps[-1] + 0.02 * steps[-1])
    width = min(0.01 * steps[-1], 0.8 * gaps.min(initial=np.inf) / number.max(initial=1))
    return width * np.array([(updates[:i] == update).sum() for i, update in enumerate(updates)], float)
