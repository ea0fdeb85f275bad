"""Pictures of results."""

import difflib
import textwrap

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
    figure, axes = _panels(_size(scores, panel))
    for j, ax in enumerate(axes):
        for i, color in zip(members, _colors(scores, line, len(members))):
            where = highest | _at(scores, line, i) | _at(scores, panel, j)
            curve = _curve(metrics.isel(where), scores.min().item(), statistic, confidence)
            _draw_line(ax, curve["step"], curve["value"], color, _label(scores, line, i))
            _draw_band(ax, curve["step"], curve["low"], curve["high"], color)
        ax.set_title(f"{_words(panel)} = {_label(scores, panel, j)}" if panel else "", fontsize="medium")
        ax.set(xlabel="environment steps", ylabel="episode return")
        ax.label_outer()
        _tidy(ax)
    interval = f" with {100 * confidence:g} % interval" if metrics.sizes["seed"] > 1 else ""
    notes = _notes(scores, statistic + interval, highest, line, panel)
    figure.suptitle(_heading(figure, title, notes), fontsize="medium")
    if line:
        some = f"\n({len(members)} of {_size(scores, line)})" if len(members) < _size(scores, line) else ""
        heading = " / ".join(map(_words, _names(scores, line))) + some
        place = "outside lower center" if len(_names(scores, line)) > 2 else "outside right center"
        figure.legend(*axes[0].get_legend_handles_labels(), loc=place, title=heading, frameon=False)
    return figure


def plot_heatmap(metrics, x, y, statistic="iqm", title="", ax=None):
    """Draws the final score, a statistic over seeds, for all values of two fields of a grid; the best is framed.

    Further fields stay at the best setting, which is named. Runs without a score count as the lowest of all, and cells
    say how many they are. Returns the matplotlib axes.
    """
    scores = _scores(metrics)
    for name in (x, y):
        if _names(scores, name) != [name] or name not in scores.dims:
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
    labels = [_label(scores, x, i) for i in range(columns)]
    slanted = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if max(map(len, labels)) > 7 else {}
    ax.set_xticks(range(columns), labels, **slanted)
    ax.set_yticks(range(rows), [_label(scores, y, i) for i in range(rows)])
    ax.set(xlabel=_words(x), ylabel=_words(y))
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
    scales = [*(_scale(ranked[name].values) for name in fields), _scale(ranked[statistic].values, may_be_log=False)]
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
    bars += [("seeds", shares["seeds"], "0.7"), ("interactions and rest", shares["rest"], "0.7")][num_seeds == 1 :]
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


def _names(scores, name) -> list[str]:
    """The fields that are meant by one's name, or by the dimension along which several vary together."""
    dims = swept_fields(scores)
    if name in dims:
        return [name]
    if name in dims.values():
        return [field for field, dim in dims.items() if dim == name]
    near = difflib.get_close_matches(str(name), dims, n=1)
    hint = f"did you mean {near[0]!r}? Swept: " if near else "swept: "
    raise ValueError(f"{name!r} was not swept ({hint}{', '.join(dims) or 'nothing'})")


def _dim(scores, name) -> str:
    return swept_fields(scores)[_names(scores, name)[0]]


def _size(scores, name) -> int:
    return 1 if name is None else scores.sizes[_dim(scores, name)]


def _at(scores, name, index) -> dict:
    return {} if name is None else {_dim(scores, name): index}


def _label(scores, name, index) -> str | None:
    """A field's value as text; those of several fields side by side."""
    return None if name is None else " / ".join(_show(scores[field].values[index]) for field in _names(scores, name))


def _best_index(scores, statistic) -> dict:
    """Where the best setting lies along every dimension."""
    value = aggregate(filled(scores), statistic, num_resamples=0)["value"]
    return {dim: int(i) for dim, i in value.argmax(list(value.dims)).items()} if value.dims else {}


def _choose_fields(scores, line, panel):
    """The fields of lines and panels: those given, or the first swept ones; None where there are no more."""
    dims = swept_fields(scores)
    alone = [name if list(dims.values()).count(dim) == 1 else dim for name, dim in dims.items()]
    taken = [_dim(scores, name) for name in (line, panel) if name is not None]
    free = [name for name in dict.fromkeys(alone) if _size(scores, name) > 1 and _dim(scores, name) not in taken]
    if line is None and free:
        line = free.pop(0)
    if panel is None and free and max(_size(scores, line), _size(scores, free[0])) <= 8:
        panel = free[0]
    if len(taken) > len(set(taken)):
        raise ValueError(f"line={line!r} and panel={panel!r} vary together (leave out panel)")
    if _size(scores, panel) > 12:
        raise ValueError(f"panel={panel!r} has {_size(scores, panel)} values, more than 12 (select some before)")
    return line, panel


def _choose_members(scores, line, highest, statistic, max_lines) -> list:
    """Which settings along a field are drawn, in order."""
    if max_lines is not None and not 1 <= max_lines <= len(COLORS):
        raise ValueError(f"max_lines={max_lines} must be from 1 to {len(COLORS)}: more cannot be told apart")
    if line is None:
        return [None]
    names, size = _names(scores, line), _size(scores, line)
    column = scores[names[0]].values
    members = np.argsort(column, kind="stable") if _is_number(column) else np.arange(size)
    if line in scores.dims and len(names) == 1:
        return list(members[np.linspace(0, size - 1, min(size, max_lines or 8)).round().astype(int)])
    others = {dim: i for dim, i in highest.items() if dim != _dim(scores, line)}
    value = aggregate(filled(scores), statistic, num_resamples=0)["value"].isel(others).values
    best = list(np.argsort(-value, kind="stable")[: max_lines or 5])
    return best if len(names) > 1 else [i for i in members if i in best]


def _colors(scores, line, number: int):
    """Colours of lines: a sequence for the values of a number, else ones that are easily told apart."""
    if line and len(_names(scores, line)) == 1 and _is_number(scores[line].values):
        return plt.get_cmap("viridis")(np.linspace(0, 0.87, number))
    return COLORS[:number]


def _curve(metrics, lowest: float, statistic, confidence) -> xarray.Dataset:
    """The learning curve of a setting, `aggregate`d over seeds, where half of them have one."""
    alive = ~lost(metrics)
    returns, counts = metrics["episode_return"].where(alive, lowest), metrics["num_episodes"].where(alive, 1)
    metrics = metrics.assign(episode_return=returns, num_episodes=counts)
    curve = learning_curve(metrics.isel(update=metrics["step"].notnull().values))
    found = aggregate(curve, statistic, confidence=confidence, num_resamples=1000)
    return found.isel(update=(2 * found["num_runs"] >= metrics.sizes["seed"]).values)


def _scale(column, may_be_log: bool = True):
    """Heights from 0 to 1 of a column's values, and its ticks as pairs of height and text."""
    values = np.unique(column)
    if not _is_number(values) or not np.isfinite(values).all() or len(values) == 1:
        order = sorted(values.tolist(), key=lambda x: (len(str(x)), x))  # "64,64" before "128,128"
        heights = dict(zip(order, np.linspace(0, 1, len(order)) if len(order) > 1 else [0.5]))
        return np.array([heights[x] for x in column.tolist()]), [(height, _show(x)) for x, height in heights.items()]
    low, high = values[[0, -1]]
    is_log = may_be_log and low > 0 and high >= 10 * low
    ticks = values
    if len(values) > 8:
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
    figure, axes = plt.subplots(rows, columns, sharex=True, sharey=True, squeeze=False, figsize=size, layout="constrained")
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
    dims = [_dim(scores, name) for name in drawn if name is not None]
    fields = {name: dim for name, dim in swept_fields(scores).items() if dim not in dims and scores.sizes[dim] > 1}
    values = ", ".join(f"{_words(name)} = {_label(scores, name, highest[dim])}" for name, dim in fields.items())
    num_seeds, missing = scores.sizes["seed"], int(scores.isnull().sum())
    notes = [f"{what.replace('iqm', 'interquartile mean')} of {num_seeds} seeds" if num_seeds > 1 else "one seed"]
    notes += [f"{'at the best' if drawn else 'best:'} {values}"] if values else []
    return notes + ([f"{missing} of {scores.size} runs have no score and count as the lowest"] if missing else [])


def _heading(figure, title: str, notes: list[str]) -> str:
    width = int(figure.get_figwidth() * 11)
    return "\n".join([*([title] if title else []), *textwrap.wrap("; ".join(notes), width)])


def _words(name: str) -> str:
    return name.removeprefix("env.").replace("_", " ")


def _show(value) -> str:
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)


def _short(score: float) -> str:
    """A score in about three digits."""
    if abs(score) >= 10_000:
        return EngFormatter(places=1, sep="")(score)
    return f"{score:.0f}" if abs(score) >= 100 else f"{score:.3g}"
