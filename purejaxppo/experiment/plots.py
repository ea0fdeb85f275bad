"""Pictures of results."""

import difflib
import textwrap
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import xarray
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, PercentFormatter
from scipy import stats

from purejaxppo.experiment.metrics import learning_curve
from purejaxppo.experiment.statistics import aggregate, filled, final_scores, importance, lost, rank, swept_fields

COLORS = "#0072b2 #e69f00 #009e73 #d55e00 #cc79a7 #56b4e9 #7a5230 #333333 #a6cee3 #999999".split()  # after Okabe, Ito


def plot_learning_curve(metrics: xarray.Dataset, title: str = "", ax=None):
    """Draws return against environment steps: the mean over runs with its 95 % interval, and each run thin behind it.

    `metrics` has dimensions (`run` or `seed`,) `update`. Returns the matplotlib axes.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
    curve = learning_curve(metrics)
    returns = curve.values.reshape(-1, curve.sizes["update"])
    counts = (~np.isnan(returns)).sum(0)
    shown = counts > 0
    steps, returns, counts = curve["step"].values[shown], returns[:, shown], counts[shown]
    if len(returns) > 1:
        ax.plot(steps, returns.T, color=COLORS[0], alpha=0.25, linewidth=0.7)
    mean = np.nanmean(returns, axis=0) if steps.size else steps
    _draw_line(ax, steps, mean, COLORS[0], "mean" if len(returns) > 1 else None)
    if len(returns) > 1 and steps.size:
        several = counts > 1
        half = np.nanstd(returns[:, several], axis=0, ddof=1) / np.sqrt(counts[several])
        half = half * stats.t.ppf(0.975, counts[several] - 1)
        band = mean[several] - half, mean[several] + half
        _draw_band(ax, steps[several], *band, COLORS[0], "95 % interval")
        ax.legend(frameon=False, loc="best", title=f"{len(returns)} runs")
    if not steps.size:
        ax.text(0.5, 0.5, "no episode ended", transform=ax.transAxes, ha="center")
    ax.set(xlabel="environment steps", ylabel="episode return", title=title)
    _tidy(ax)
    return ax


def plot_sweep(metrics, line=None, panel=None, statistic="iqm", title="") -> dict:
    """Every picture that the swept fields give something to, as name -> matplotlib figure.

    Learning curves always; of a grid of two fields a heat map; of more fields, or sampled ones, parallel coordinates
    and importance. Each environment has its own, since returns of several do not compare.
    """
    names = np.unique(metrics["env"]) if "env" in metrics.coords else []
    if len(names) > 1:
        parts = {name: metrics.isel({metrics["env"].dims[0]: metrics["env"].values == name}) for name in names}
        line, panel = (None if name == "env" else name for name in (line, panel))
        return {
            f"{kind}-{name}": figure
            for name, part in parts.items()
            for kind, figure in plot_sweep(part, line, panel, statistic, str(name)).items()
        }
    scores = _scores(metrics)
    fields = [name for name in swept_fields(scores) if np.unique(scores[name]).size > 1]
    grid = [name for name in fields if _field(scores, name).grid]
    figures = {"learning_curves": plot_curves(metrics, line, panel, statistic, title=title)}
    if len(grid) > 1:
        figures["heatmap"] = plot_heatmap(metrics, *grid[:2], statistic, title).figure
    if len(fields) > 2 or len(fields) > len(grid):
        figures["parallel"] = plot_parallel(metrics, statistic, title).figure
    if len(fields) > 1:
        figures["importance"] = plot_importance(metrics, title).figure
    return figures


def plot_curves(metrics, line=None, panel=None, statistic="iqm", confidence=0.95, max_lines=None, title=""):
    """Draws learning curves of a sweep, one line per value of the field `line`, one panel per value of `panel`.

    A line is a statistic over seeds with its interval (see `aggregate`). By default `line` is the first swept field and
    `panel` the second, if both have at most 8 values; "setting" means every setting of fields that vary together.
    Settings are never pooled: further fields stay at the best setting, which is named. Of more values than `max_lines`
    (8 by default), those at even distances are drawn; of settings of several fields (5) the best. A line begins where
    half of its runs have ended an episode; a run that turned nan goes on at the lowest final score of all. Returns the
    matplotlib figure.
    """
    scores = _scores(metrics)
    line, panel = _choose_fields(scores, line, panel)
    highest = _best_index(scores, statistic)
    members = _choose_members(scores, line, highest, statistic, max_lines)
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.87, len(members))) if line.numbers is not None else COLORS
    figure, axes = _panels(len(panel.labels))
    for j, ax in enumerate(axes):
        for i, color in zip(members, colors):
            where = {dim: k for dim, k in (highest | {line.dim: i, panel.dim: j}).items() if dim}
            curve = _curve(metrics.isel(where), scores.min().item(), statistic, confidence)
            _draw_line(ax, curve["step"], curve["value"], color, line.labels[i])
            _draw_band(ax, curve["step"], curve["low"], curve["high"], color)
        ax.set_title(f"{panel.title} = {panel.labels[j]}" if panel.dim else "", fontsize="medium")
        ax.set(xlabel="environment steps", ylabel="episode return")
        ax.label_outer()
        _tidy(ax)
    interval = f" with {100 * confidence:g} % interval" if metrics.sizes["seed"] > 1 else ""
    notes = _notes(scores, statistic + interval, highest, line.dim, panel.dim)
    if line.dim:
        below = line.title.count("/") > 1
        figure.set_figheight(figure.get_figheight() + below * 0.23 * (len(members) + 2))
        shown, size = len(members), len(line.labels)
        heading = line.title + (f"\n({shown} {'' if line.grid else 'best '}of {size})" if shown < size else "")
        place = "outside lower center" if below else "outside right center"
        figure.legend(*axes[0].get_legend_handles_labels(), loc=place, title=heading, frameon=False)
    figure.suptitle(_heading(figure, title, notes), fontsize="medium")
    return figure


def plot_heatmap(metrics, x, y, statistic="iqm", title="", ax=None):
    """Draws the final score, a statistic over seeds, for all values of two fields of a grid; the best is framed.

    Further fields stay at the best setting, which is named. Runs without a score count as the lowest of all, and cells
    say how many they are. Returns the matplotlib axes.
    """
    scores = _scores(metrics)
    fields = [_field(scores, name) for name in (x, y)]
    for name, field in zip((x, y), fields):
        if not field.grid:
            raise ValueError(f"{name!r} varies together with other fields, not in a grid (use plot_parallel)")
    if x == y:
        raise ValueError(f"x={x!r} and y={y!r} must be two fields")
    highest = _best_index(scores, statistic)
    values = aggregate(filled(scores), statistic, num_resamples=0)["value"].rename("value").to_dataset()
    values["missing"] = scores.isnull().sum("seed")
    values = values.isel({dim: i for dim, i in highest.items() if dim not in (x, y)}).transpose(y, x)
    rows, columns = values["value"].shape
    ax = ax or _axes(2.6 + 0.75 * columns, 1.7 + 0.5 * rows)
    image = ax.imshow(values["value"], cmap="YlGnBu", origin="lower", aspect="auto")
    for (j, i), value in np.ndenumerate(values["value"].values):
        missing = values["missing"].values[j, i]
        text = _short(value) + (f"\n{missing} missing" if missing else "")
        color = "white" if image.norm(value) > 0.55 else "black"
        ax.text(i, j, text, color=color, ha="center", va="center", fontsize="small", linespacing=1)
    corner = highest[x] - 0.5, highest[y] - 0.5
    ax.add_patch(plt.Rectangle(corner, 1, 1, fill=False, color=COLORS[3], linewidth=2.5, clip_on=False, zorder=3))
    slanted = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if max(map(len, fields[0].labels)) > 7 else {}
    ax.set_xticks(range(columns), fields[0].labels, **slanted)
    ax.set_yticks(range(rows), fields[1].labels)
    ax.set(xlabel=fields[0].title, ylabel=fields[1].title)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, label="episode return at the end", format=EngFormatter(sep=""))
    bar.outline.set_visible(False)
    ax.set_title(_heading(ax.figure, title, _notes(scores, statistic, highest, x, y)), fontsize="medium")
    return ax


def plot_parallel(metrics, statistic="iqm", title="", ax=None):
    """Draws every setting as a line through its values of all swept fields to its final score, the best on top.

    The darker a line the higher its rank; the best is orange. Positive numbers that span a factor of ten have a
    logarithmic axis. Runs without a score count as the lowest of all. Returns the matplotlib axes.
    """
    scores = _scores(metrics)
    ranked = rank(scores, statistic, num_resamples=0).isel(setting=slice(None, None, -1))
    fields = [name for name in swept_fields(scores) if np.unique(ranked[name]).size > 1]
    ax = ax or _axes(1.5 * len(fields) + 2.5, 3.8)
    scales = [*(_scale(ranked[name].values) for name in fields), _scale(ranked[statistic].values, is_score=True)]
    lines = np.stack([heights for heights, _ in scales], axis=1)
    for heights, color in zip(lines[:-1], plt.get_cmap("YlGnBu")(np.linspace(0.15, 1, len(lines) - 1))):
        ax.plot(heights, color=color, linewidth=1.2 if len(lines) <= 64 else 0.7, zorder=2)
    ax.plot(lines[-1], color=COLORS[3], linewidth=2.5, zorder=2)
    for i, (_, ticks) in enumerate(scales):
        ax.axvline(i, color="black", linewidth=0.8, zorder=2.5)
        side = {"ha": "left", "xytext": (5, 0)} if i == len(fields) else {"ha": "right", "xytext": (-5, 0)}
        look = {"fontsize": "small", "bbox": {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1}}
        for height, text in ticks:
            ax.annotate(text, (i, height), textcoords="offset points", va="center", zorder=3, **side, **look)
    ax.set_xticks(range(len(scales)), [*map(_words, fields), "episode return\nat the end"])
    ax.tick_params(length=0)
    ax.set(yticks=[], ylim=(-0.03, 1.03))
    ax.spines[:].set_visible(False)
    notes = _notes(scores, statistic, _best_index(scores, statistic))
    ax.set_title(_heading(ax.figure, title, notes), fontsize="medium")
    return ax


def plot_importance(metrics, title="", ax=None):
    """Draws how much of the variance of final scores each swept field explains by itself (see `importance`).

    Returns the matplotlib axes.
    """
    scores = _scores(metrics)
    shares = importance(scores).to_series()
    fields = shares.drop(["seeds", "rest"]).sort_values(ascending=False)
    bars = [(_words(name), share, COLORS[0]) for name, share in fields.items()]
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
    ax.set_title(_heading(ax.figure, title, notes), fontsize="medium")
    return ax


def _scores(metrics) -> xarray.DataArray:
    """Final scores, of which some picture can be made."""
    if "seed" not in metrics.dims:
        raise ValueError(f"metrics have no dimension seed (theirs: {', '.join(map(str, metrics.dims))})")
    if "env" in metrics.coords and np.unique(metrics["env"]).size > 1:
        raise ValueError("returns of several environments do not compare: select one, as in metrics.sel(env=...)")
    scores = final_scores(metrics)
    if scores.isnull().all():
        raise ValueError("no run has a score: no episode ended, or all turned nan")
    return scores


class _Field(NamedTuple):
    """What lines or panels are for: a swept field, several that vary together, or nothing."""

    title: str = ""
    dim: str | None = None
    labels: list = [None]  # of every value
    numbers: np.ndarray | None = None  # where it is one field of numbers
    grid: bool = True  # one field with a dimension of its own


def _field(scores, name) -> _Field:
    """The field of that name, or those along the dimension of that name; for None nothing."""
    if name is None:
        return _Field()
    dims = swept_fields(scores)
    names = [name] if name in dims else [field for field, dim in dims.items() if dim == name]
    if not names:
        near = difflib.get_close_matches(str(name), dims, n=1)
        hint = f"did you mean {near[0]!r}? Swept: " if near else "swept: "
        raise ValueError(f"{name!r} was not swept ({hint}{', '.join(dims) or 'nothing'})")
    columns = [scores[name].values for name in names]
    labels = [" / ".join(map(_show, row)) for row in zip(*columns)]
    numbers = columns[0] if len(names) == 1 and _is_number(columns[0]) else None
    grid = list(dims.values()).count(dims[names[0]]) == 1
    return _Field(" / ".join(map(_words, names)), dims[names[0]], labels, numbers, grid)


def _best_index(scores, statistic) -> dict:
    """Where the best setting lies along every dimension."""
    value = aggregate(filled(scores), statistic, num_resamples=0)["value"]
    return {dim: int(i) for dim, i in value.argmax(list(value.dims)).items()} if value.dims else {}


def _choose_fields(scores, line, panel) -> tuple[_Field, _Field]:
    """Of lines and of panels: those given, or the first swept ones."""
    fields = _field(scores, line), _field(scores, panel)
    dims = [field.dim for field in fields]
    if dims[0] and dims[0] == dims[1]:
        raise ValueError(f"line={line!r} and panel={panel!r} vary together (leave out panel)")
    swept = swept_fields(scores)
    free = [name if list(swept.values()).count(dim) == 1 else dim for name, dim in swept.items() if dim not in dims]
    free = [field for name in dict.fromkeys(free) if len((field := _field(scores, name)).labels) > 1]
    line, panel = fields
    if line.dim is None and free:
        line = free.pop(0)
    if panel.dim is None and free and max(len(line.labels), len(free[0].labels)) <= 8:
        panel = free[0]
    if len(panel.labels) > 12:
        raise ValueError(f"panel={panel.title!r} has {len(panel.labels)} values, more than 12 (select some before)")
    return line, panel


def _choose_members(scores, line: _Field, highest, statistic, max_lines) -> list:
    """Which values of a field are drawn, in order."""
    if max_lines is not None and not 1 <= max_lines <= len(COLORS):
        raise ValueError(f"max_lines={max_lines} must be from 1 to {len(COLORS)}: more cannot be told apart")
    size = len(line.labels)
    order = np.arange(size) if line.numbers is None else np.argsort(line.numbers, kind="stable")
    if line.grid:
        return list(order[np.linspace(0, size - 1, min(size, max_lines or 8)).round().astype(int)])
    others = {dim: i for dim, i in highest.items() if dim != line.dim}
    value = aggregate(filled(scores), statistic, num_resamples=0)["value"].isel(others).values
    best = list(np.argsort(-value, kind="stable")[: max_lines or 5])
    return best if line.numbers is None else [i for i in order if i in best]


def _curve(metrics, lowest: float, statistic, confidence) -> xarray.Dataset:
    """The learning curve of a setting, `aggregate`d over seeds, where half of them have one."""
    alive = ~lost(metrics)
    returns, counts = metrics["episode_return"].where(alive, lowest), metrics["num_episodes"].where(alive, 1)
    metrics = metrics.assign(episode_return=returns, num_episodes=counts)
    curve = learning_curve(metrics.isel(update=metrics["step"].notnull().values), num_points=50)
    found = aggregate(curve, statistic, confidence=confidence, num_resamples=1000)
    return found.isel(update=(2 * found["num_runs"] >= metrics.sizes["seed"]).values)


def _scale(column, is_score: bool = False):
    """Heights from 0 to 1 of a column's values, and its ticks as pairs of height and text; scores are never log."""
    values = np.unique(column)
    if not _is_number(values) or not np.isfinite(values).all() or len(values) == 1:
        order = sorted(values.tolist(), key=lambda x: (len(str(x)), x))  # "64,64" before "128,128"
        heights = dict(zip(order, np.linspace(0, 1, len(order)) if len(order) > 1 else [0.5]))
        return np.array([heights[x] for x in column.tolist()]), [(height, _show(x)) for x, height in heights.items()]
    low, high = values[[0, -1]]
    is_log = not is_score and low > 0 and high >= 10 * low
    ticks = values
    if len(values) > 8 or is_score:
        locator = LogLocator(subs=(1, 3)) if is_log else MaxNLocator(5, steps=[1, 2, 5, 10])
        ticks = [x for x in locator.tick_values(low, high) if low <= x <= high]
    transform = np.log if is_log else np.asarray
    heights = [(transform(x) - transform(low)) / (transform(high) - transform(low)) for x in (column, ticks)]
    return heights[0], list(zip(heights[1], map(_show, ticks)))


def _is_number(column) -> bool:
    return column.dtype.kind in "iuf"


def _axes(width: float, height: float):
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _panels(number: int):
    """A figure and its axes, side by side up to four, on common scales."""
    columns = min(number, 4)
    rows = -(-number // columns)
    size = (7, 4) if number == 1 else (2.6 * columns + 1.4, 2.4 * rows + 0.8)
    figure = plt.figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[number:]:
        ax.remove()
    return figure, list(axes.flat[:number])


def _draw_line(ax, steps, values, color, label=None):
    ax.plot(steps, values, color=color, linewidth=2, label=label)


def _draw_band(ax, steps, low, high, color, label=None):
    ax.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0, label=label)


def _tidy(ax):
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)


def _notes(scores, what: str, highest: dict, *drawn) -> list[str]:
    """What a reader must know: the statistic, where the fields lie that are not drawn, how many runs have no score."""
    fields = {name: dim for name, dim in swept_fields(scores).items() if dim not in drawn and scores.sizes[dim] > 1}
    values = [f"{_words(name)} = {_show(scores[name].values[highest[dim]])}" for name, dim in fields.items()]
    num_seeds, missing = scores.sizes["seed"], int(scores.isnull().sum())
    notes = [f"{what.replace('iqm', 'interquartile mean')} of {num_seeds} seeds" if num_seeds > 1 else "one seed"]
    notes += [("at the best " if drawn else "best: ") + ", ".join(values)] if values else []
    return notes + ([f"runs without a score, counted as the lowest: {missing} of {scores.size}"] if missing else [])


def _heading(figure, title: str, notes: list[str]) -> str:
    """A title and notes under it, each on its lines, without a break inside `field = value`."""
    width = int(figure.get_figwidth() * 11)
    wrapped = [line for note in notes for line in textwrap.wrap(note.replace(" = ", "\xa0=\xa0"), width)]
    return "\n".join([title, *wrapped] if title else wrapped)


def _words(name: str) -> str:
    return name.removeprefix("env.").replace("_", " ")


def _show(value) -> str:
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)


def _short(score: float) -> str:
    """A score in about three digits."""
    if abs(score) >= 10_000:
        return EngFormatter(places=1, sep="")(score)
    return f"{score:.0f}" if abs(score) >= 100 else f"{score:.3g}"
