"""Plots of a sweep: learning curves, heat map, parallel coordinates, importance."""

import matplotlib.pyplot as plt
import numpy as np
import xarray
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, PercentFormatter

from purejaxppo.experiment.report.curve import (
    COLORS,
    draw_band,
    draw_failures,
    draw_line,
    figure_of,
    steps_of_failures,
    tidy,
)
from purejaxppo.experiment.report.metrics import learning_curve
from purejaxppo.experiment.report.plot_fields import (
    best_index,
    choose_fields,
    choose_members,
    fields_of_grid,
    find_field,
    is_number,
    make_heading,
    make_notes,
    scores_of_pair,
    scores_to_draw,
    varied_fields,
)
from purejaxppo.experiment.report.ranking import importance, rank
from purejaxppo.experiment.report.statistics import aggregate, lost, swept_fields
from purejaxppo.text import in_words, show_value

MAX_NUMBERS = 400  # in the cells of a heat map; more take long to draw, and cannot be read


def plot_sweep(
    metrics: xarray.Dataset,
    line: str | None = None,
    panel: str | None = None,
    statistic: str = "iqm",
    title: str = "",
) -> dict[str, Figure]:
    """Draws all plots that suit the swept fields; returns them by name.

    These are always learning curves; a heat map for a grid of at least two fields; parallel coordinates for more than
    two fields or sampled ones; importance for at least two fields. Every environment has separate plots, because
    returns of different environments are not comparable.

    Args:
        metrics: of a sweep, with the dimensions of its table, `seed` and `updates`.
        line: field whose values are the lines of the learning curves, see `plot_curves`.
        panel: field whose values are their panels.
        statistic: "iqm", "mean" or "median" over seeds, see `aggregate`.
        title: heading of every plot; with several environments their names are the headings.
    """
    names = np.unique(metrics["env"]) if "env" in metrics.coords else []
    if len(names) > 1:
        env_metrics = {name: metrics.isel({metrics["env"].dims[0]: metrics["env"].values == name}) for name in names}
        line, panel = (None if name == "env" else name for name in (line, panel))
        return {
            f"{kind}-{name}": figure
            for name, selected in env_metrics.items()
            for kind, figure in plot_sweep(selected, line, panel, statistic, str(name)).items()
        }
    scores = scores_to_draw(metrics)
    fields = varied_fields(scores)
    grid = fields_of_grid(scores)
    figures = {"learning_curves": plot_curves(metrics, line, panel, statistic, title=title)}
    if len(grid) > 1:
        figures["heatmap"] = plot_heatmap(metrics, statistic=statistic, title=title)
    if len(fields) > 2 or len(fields) > len(grid):
        figures["parallel"] = plot_parallel(metrics, statistic, title)
    if len(fields) > 1:
        figures["importance"] = plot_importance(metrics, title)
    return figures


def plot_curves(
    metrics: xarray.Dataset,
    line: str | None = None,
    panel: str | None = None,
    statistic: str = "iqm",
    confidence: float = 0.95,
    max_lines: int | None = None,
    title: str = "",
) -> Figure:
    """Draws learning curves of a sweep, one line per value of the field `line`, one panel per value of `panel`.

    A line is a statistic over seeds with its interval (see `aggregate`). It starts where half of its runs have ended an
    episode; a run that turned nan continues at the lowest final score of all. Once all runs of a setting have turned
    nan, its line ends, with a cross on the horizontal axis. Settings are never pooled: the other fields stay at the
    best setting, which the heading names. Raises ValueError for a field that was not swept, for two
    fields that vary together, and if no run has a score.

    Args:
        metrics: of a sweep of one environment, with the dimensions of its table, `seed` and `updates`.
        line: field whose values are lines, by default the first swept field; "setting" means every setting of fields
            that vary together.
        panel: field whose values are panels, at most 12; by default the second swept field if it and `line` have at
            most 8 values.
        statistic: "iqm", "mean" or "median" over seeds.
        confidence: level of the intervals, between 0 and 1.
        max_lines: maximum lines per panel, from 1 to 10: evenly spaced values of one field (8 by default), or the best
            settings of fields that vary together (5 by default).
        title: first line of the heading.
    """
    scores = scores_to_draw(metrics)
    lines, panels = choose_fields(scores, line, panel)
    highest = best_index(scores, statistic)
    members = choose_members(scores, lines, highest, statistic, max_lines)
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.87, len(members))) if lines.numbers is not None else COLORS
    figure, axes = _panels(len(panels.labels))
    for j, ax in enumerate(axes):
        for i, color in zip(members, colors):
            where = {dim: k for dim, k in (highest | {lines.dim: i, panels.dim: j}).items() if dim}
            setting = metrics.isel(where)
            curve = curve_of_setting(setting, scores.min().item(), statistic, confidence)
            ended = steps_of_failures(setting)
            failed = ended.size == setting.sizes["seed"]
            curve = curve.isel(updates=(curve["step"] < ended.max()).values) if failed else curve
            draw_line(ax, curve["step"], curve["value"], color, f"{lines.labels[i] or ''}{' (failed)' * failed}")
            draw_failures(ax, ended.max(keepdims=True) if failed else [], color)
            draw_band(ax, curve["step"], curve["low"], curve["high"], color)
        ax.set_title(f"{panels.title} = {panels.labels[j]}" if panels.dim else "", fontsize="medium")
        ax.set(xlabel="environment steps", ylabel="episode return")
        ax.label_outer()
        tidy(ax)
    interval = f" with {100 * confidence:g} % interval" if metrics.sizes["seed"] > 1 else ""
    notes = make_notes(scores, statistic + interval, highest, lines.dim, panels.dim)
    if lines.dim:
        below = lines.title.count("/") > 1
        figure.set_figheight(figure.get_figheight() + below * 0.23 * (len(members) + 2))
        shown, size = len(members), len(lines.labels)
        heading = lines.title + (f"\n({shown} {'' if lines.grid else 'best '}of {size})" if shown < size else "")
        place = "outside lower center" if below else "outside right center"
        figure.legend(*axes[0].get_legend_handles_labels(), loc=place, title=heading, frameon=False)
    figure.suptitle(make_heading(figure, title, notes), fontsize="medium")
    return figure


def plot_heatmap(
    metrics: xarray.Dataset,
    x: str | None = None,
    y: str | None = None,
    statistic: str = "iqm",
    title: str = "",
    ax: Axes | None = None,
) -> Figure:
    """Draws the final score, a statistic over seeds, for all values of two fields of a grid; the best is framed.

    The other fields stay at the best setting, which the heading names. Runs without a score count as the lowest of all;
    a cell states how many it has, and is grey if it has failed, without any score. More than 400 cells have no text.
    Raises ValueError unless `x` and `y` are two fields of a grid and some run has a score.

    Args:
        metrics: of a sweep of one environment, with the dimensions of its table, `seed` and `updates`.
        x: field along the horizontal axis, by default the first free field of the grid.
        y: field along the vertical axis, by default the next one.
        statistic: "iqm", "mean" or "median" over seeds.
        title: first line of the heading.
        ax: where to draw; by default a new figure.
    """
    scores = scores_to_draw(metrics)
    free = [name for name in fields_of_grid(scores) if name not in (x, y)]
    if (x is None) + (y is None) > len(free):
        raise ValueError("a heat map needs two swept fields of a grid (plot_curves draws one, plot_parallel all)")
    x = free.pop(0) if x is None else x
    y = free.pop(0) if y is None else y
    fields = [find_field(scores, name) for name in (x, y)]
    for name, field in zip((x, y), fields):
        if not field.grid:
            raise ValueError(f"{name!r} varies together with other fields, not in a grid (use plot_parallel)")
    if x == y:
        raise ValueError(f"x={x!r} and y={y!r} must be two fields")
    highest = best_index(scores, statistic)
    values = scores_of_pair(scores, x, y, statistic)
    rows, columns = values["value"].shape
    is_small = rows * columns <= MAX_NUMBERS
    ax = ax or _axes(2.6 + (0.75 if is_small else 0.3) * columns, 1.7 + (0.5 if is_small else 0.3) * rows)
    image = ax.imshow(values["value"], plt.get_cmap("YlGnBu").with_extremes(bad="0.85"), origin="lower", aspect="auto")
    for (j, i), value in np.ndenumerate(values["value"].values) if is_small else ():
        missing = values["missing"].values[j, i]
        text = "failed" if np.isnan(value) else _short(value) + (f"\n{missing} missing" if missing else "")
        color = "white" if np.asarray(image.norm(value)) > 0.55 else "black"  # black where it is nan
        ax.text(i, j, text, color=color, ha="center", va="center", fontsize="small", linespacing=1)
    corner = highest[x] - 0.5, highest[y] - 0.5
    ax.add_patch(Rectangle(corner, 1, 1, fill=False, color=COLORS[3], linewidth=2.5, clip_on=False, zorder=3))
    slanted = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if max(map(len, fields[0].labels)) > 7 else {}
    ax.set_xticks(range(columns), fields[0].labels, **slanted)
    ax.set_yticks(range(rows), fields[1].labels)
    ax.set(xlabel=fields[0].title, ylabel=fields[1].title)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, label="episode return at the end", format=EngFormatter(sep=""))
    bar.outline.set_visible(False)
    ax.set_title(make_heading(figure_of(ax), title, make_notes(scores, statistic, highest, x, y)), fontsize="medium")
    return figure_of(ax)


def plot_parallel(metrics: xarray.Dataset, statistic: str = "iqm", title: str = "", ax: Axes | None = None) -> Figure:
    """Draws every setting as a line through its values of all swept fields to its final score, the best on top.

    The darker a line the higher its rank; the best is orange. Positive numbers that span a factor of ten have a
    logarithmic axis. Runs without a score count as the lowest of all; a setting without any is a dashed line to
    "failed".

    Args:
        metrics: of a sweep of one environment, with the dimensions of its table, `seed` and `updates`.
        statistic: "iqm", "mean" or "median" over seeds.
        title: first line of the heading.
        ax: where to draw; by default a new figure.
    """
    scores = scores_to_draw(metrics)
    ranked = rank(scores, statistic, num_resamples=0).isel(setting=slice(None, None, -1))
    fields = [name for name in swept_fields(scores) if np.unique(ranked[name]).size > 1]
    ax = ax or _axes(1.5 * len(fields) + 2.5, 3.8)
    failed = (ranked["num_runs"] == 0).values
    scales = [_scale(ranked[name].values) for name in fields]
    heights, ticks = _scale(ranked[statistic].values[~failed], is_score=True)
    below = np.full(len(failed), -0.1)
    below[~failed] = heights
    scales.append((below, [*ticks, *[(-0.1, "failed")] * int(failed.any())]))
    lines = np.stack([heights for heights, _ in scales], axis=1)
    for heights in lines[failed]:
        ax.plot(heights, color="0.6", linestyle="--", linewidth=1, zorder=1.5)
    lines = lines[~failed]
    for heights, color in zip(lines[:-1], plt.get_cmap("YlGnBu")(np.linspace(0.15, 1, len(lines) - 1))):
        ax.plot(heights, color=color, linewidth=1.2 if len(lines) <= 64 else 0.7, zorder=2)
    ax.plot(lines[-1], color=COLORS[3], linewidth=2.5, zorder=2)
    for i, (_, ticks) in enumerate(scales):
        ax.axvline(i, color="black", linewidth=0.8, zorder=2.5)
        side = {"ha": "left", "xytext": (5, 0)} if i == len(fields) else {"ha": "right", "xytext": (-5, 0)}
        style = {"fontsize": "small", "bbox": {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1}}
        for height, text in ticks:
            ax.annotate(text, (i, height), textcoords="offset points", va="center", zorder=3, **side, **style)
    ax.set_xticks(range(len(scales)), [*map(in_words, fields), "episode return\nat the end"])
    ax.tick_params(length=0)
    ax.set(yticks=[], ylim=(-0.13 if failed.any() else -0.03, 1.03))
    ax.spines[:].set_visible(False)
    notes = make_notes(scores, statistic, best_index(scores, statistic))
    ax.set_title(make_heading(figure_of(ax), title, notes), fontsize="medium")
    return figure_of(ax)


def plot_importance(metrics: xarray.Dataset, title: str = "", ax: Axes | None = None) -> Figure:
    """Draws how much of the variance of final scores each swept field explains by itself (see `importance`).

    Draws into `ax`, or by default into a new figure.
    """
    scores = scores_to_draw(metrics)
    shares = importance(scores).to_series()
    fields = shares.drop(["seeds", "rest"]).sort_values(ascending=False)
    bars = [(in_words(str(name)), share, COLORS[0]) for name, share in fields.items()]
    num_seeds = scores.sizes["seed"]
    if num_seeds > 1:
        bars.append(("seeds", shares["seeds"], "0.7"))
    bars.append(("interactions and rest", shares["rest"], "0.7"))
    ax = ax or _axes(6, 0.9 + 0.34 * len(bars))
    names, lengths, colors = zip(*bars)
    drawn = ax.barh(names, lengths, color=colors, height=0.65)
    ax.bar_label(drawn, [f"{100 * x:.0f} %" for x in lengths], padding=4, fontsize="small")
    ax.invert_yaxis()
    ax.set(xlabel="share of the variance of the episode return at the end", xlim=(0, 1.12 * max(*lengths, 0.01)))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    notes = [f"{scores.size // num_seeds} settings, {num_seeds} seed{'s' if num_seeds > 1 else ''} each"]
    missing = int(scores.isnull().sum())
    notes += [f"runs without a score, counted as the lowest: {missing} of {scores.size}"] if missing else []
    ax.set_title(make_heading(figure_of(ax), title, notes), fontsize="medium")
    return figure_of(ax)


def curve_of_setting(
    metrics: xarray.Dataset, lowest: float, statistic: str = "iqm", confidence: float = 0.95, num_points: int = 50
) -> xarray.Dataset:
    """The learning curve of a setting, by `aggregate` over seeds, from where at least half of them have a value.

    Args:
        metrics: of one setting, with the dimensions `seed` and `updates`.
        lowest: final score of all runs of the sweep, at which a run continues that turned nan.
        statistic: "iqm", "mean" or "median" over seeds.
        confidence: level of the interval, between 0 and 1.
        num_points: see `learning_curve`.
    """
    alive = ~lost(metrics)
    returns, counts = metrics["episode_return"].where(alive, lowest), metrics["num_episodes"].where(alive, 1)
    metrics = metrics.assign(episode_return=returns, num_episodes=counts)
    curve = learning_curve(metrics.isel(updates=metrics["step"].notnull().values), num_points)
    found = aggregate(curve, statistic, confidence=confidence, num_resamples=1000)
    return found.isel(updates=(2 * found["num_runs"] >= metrics.sizes["seed"]).values)


def _scale(column: np.ndarray, is_score: bool = False) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Heights from 0 to 1 of a column's values, and its ticks as (height, text); scores never have a log scale."""
    values = np.unique(column)
    if not is_number(values) or not np.isfinite(values).all() or len(values) == 1:
        order = sorted(values.tolist(), key=lambda x: (len(str(x)), x))  # "64,64" before "128,128"
        heights = dict(zip(order, np.linspace(0, 1, len(order)) if len(order) > 1 else [0.5]))
        return np.array([heights[x] for x in column.tolist()]), [
            (height, show_value(x)) for x, height in heights.items()
        ]
    low, high = values[[0, -1]]
    is_log = not is_score and low > 0 and high >= 10 * low
    ticks = values
    if len(values) > 8 or is_score:
        locator = LogLocator(subs=(1, 3)) if is_log else MaxNLocator(5, steps=[1, 2, 5, 10])
        ticks = [x for x in locator.tick_values(low, high) if low <= x <= high]
    transform = np.log if is_log else np.asarray
    heights = [(transform(x) - transform(low)) / (transform(high) - transform(low)) for x in (column, ticks)]
    return heights[0], list(zip(heights[1], map(show_value, ticks)))


def _axes(width: float, height: float) -> Axes:
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _panels(number: int) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, at most four in a row, on common scales."""
    columns = min(number, 4)
    rows = -(-number // columns)
    size = (7, 4) if number == 1 else (2.6 * columns + 1.4, 2.4 * rows + 0.8)
    figure = plt.figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[number:]:
        ax.remove()
    return figure, list(axes.flat[:number])


def _short(score: float) -> str:
    """A score in about three digits."""
    if abs(score) >= 10_000:
        return EngFormatter(places=1, sep="")(score)
    return f"{score:.0f}" if abs(score) >= 100 else f"{score:.3g}"
