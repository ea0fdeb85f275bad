"""Interactive figures of plotly: learning curves, scores of fields, metrics of a run; see `page` for where they go."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray
from numpy.typing import ArrayLike

from purejaxppo.experiment.report.curve import COLORS, curve_of_runs, steps_of_failures
from purejaxppo.experiment.report.plot_fields import find_field, is_number, scores_of_pair
from purejaxppo.experiment.report.sweep_plots import curve_of_setting
from purejaxppo.text import in_words, printable, shorten, show_value

LINE_COLORS = COLORS[:6]  # which stand out from white and from black
GREY = "rgba(127,127,127,.5)"
DASHES = {"solid": "", "dash": "8 4", "dot": "2 4"}  # of plotly -> of SVG
MAX_TICKS = 8
MAX_LABEL = 20  # characters of a tick
MAX_POINTS = 400  # of a curve of a metric
MAX_AGENTS = 50  # with a thin line each


def line_style(index: int) -> tuple[str, str]:
    """The colour and the dashes of a line by its number; plotly's word for the dashes is a key of `DASHES`."""
    return LINE_COLORS[index % len(LINE_COLORS)], list(DASHES)[index // len(LINE_COLORS) % len(DASHES)]


def draw_curves(settings: Sequence[xarray.Dataset], labels: Sequence[str], lowest: float) -> go.Figure:
    """Learning curves of settings with their 95 % intervals over seeds; `meta` of a trace is the setting's number.

    Args:
        settings: the metrics of every setting, with the dimensions `seed` and `updates`.
        labels: a text for every setting.
        lowest: final score of all runs of the sweep, at which runs continue that turned nan.
    """
    figure = _figure("environment steps", "episode return", height=460)
    for i, (metrics, label) in enumerate(zip(settings, labels)):
        curve = curve_of_setting(metrics, lowest)
        steps, values, low, high = (curve[name].values for name in ("step", "value", "low", "high"))
        _add_curve(figure, steps, values, low, high, line_style(i), label, i)
    return figure


def draw_runs(metrics: xarray.Dataset) -> go.Figure:
    """The learning curve of a run: the mean over its agents with its 95 % interval, and every agent as a thin line.

    A cross on the horizontal axis marks where an agent turned nan. `metrics` has dimensions (`seed`,) `updates`.
    """
    figure = _figure("environment steps", "episode return", height=460)
    steps, returns, mean, low, high = curve_of_runs(metrics)
    for agent, heights in enumerate(returns[:MAX_AGENTS] if len(returns) > 1 else ()):
        style = {"color": COLORS[5], "width": 1}
        figure.add_scatter(
            x=steps, y=_short(heights), mode="lines", line=style, opacity=0.6, name=f"agent {agent}",
            hovertemplate="%{y:.4~g}", connectgaps=True,
        )  # fmt: skip
    label = "mean" if len(returns) > 1 else "return"
    if steps.size:  # the interval of two or three agents may be far wider than their returns
        margin = 0.05 * float(np.nanmax(returns) - np.nanmin(returns)) or 1.0
        figure.update_yaxes(range=[float(np.nanmin(returns)) - margin, float(np.nanmax(returns)) + margin])
    _add_curve(figure, steps, mean, low, high, (COLORS[0], "solid"), label)
    failed = steps_of_failures(metrics)
    if failed.size:
        marker = {"symbol": "x", "size": 10, "color": COLORS[3]}
        figure.add_scatter(
            x=failed, y=np.zeros(failed.size), yaxis="y2", mode="markers", marker=marker, cliponaxis=False,
            name="turned nan", hovertemplate="%{x:,} steps",
        )  # fmt: skip
        figure.update_layout(yaxis2={"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True})
    return figure


def draw_rungs(scores: np.ndarray, steps: Sequence[int], labels: Sequence[str]) -> go.Figure:
    """The score of every setting on every rung of successive halving; that of the first is thick.

    Args:
        scores: [settings, rungs], best first; nan where a setting did not get to the rung, -inf where it failed.
        steps: environment steps of a run at each rung.
        labels: a text for every setting.
    """
    figure = _figure("environment steps of a run", "episode return", height=420)
    for i, (row, label) in reversed(list(enumerate(zip(np.where(np.isfinite(scores), scores, np.nan), labels)))):
        style = {"color": COLORS[3], "width": 3} if i == 0 else {"color": COLORS[0], "width": 1}
        figure.add_scatter(
            x=list(steps), y=_short(row), mode="lines+markers", line=style, opacity=1 if i == 0 else 0.5,
            name=_text(label), hovertemplate="%{fullData.name}<br>%{x:,} steps: %{y:.4~g}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(type="log", tickvals=list(steps), ticktext=[f"{x:,}" for x in steps])
    return figure


def draw_members(values: np.ndarray, steps: np.ndarray, line: np.ndarray, name: str) -> go.Figure:
    """A hyperparameter of all members of a population, and in orange that of the winner's line.

    Args:
        values: [R, U].
        steps: [U] environment steps of a member after each update.
        line: [U] the member that the line was in each update.
        name: of the hyperparameter.
    """
    figure = _figure("environment steps of a member", "", height=300)
    figure.update_layout(title={"text": _text(name), "font": {"size": 14}, "x": 0, "xref": "paper"})
    if np.nanmin(values) > 0 and np.nanmax(values) > 10 * np.nanmin(values):
        figure.update_yaxes(type="log")
    shown = np.unique(np.linspace(0, len(steps) - 1, MAX_POINTS).round().astype(int))
    lines = [*((f"member {i}", x, GREY, 1) for i, x in enumerate(values[:MAX_AGENTS]))]
    lines.append(("line of the winner", values[line, np.arange(len(line))], COLORS[3], 3))
    for label, heights, color, width in lines:
        style = {"color": color, "width": width, "shape": "hv"}
        figure.add_scatter(
            x=steps[shown], y=_short(heights[shown]), mode="lines", line=style, name=label,
            hovertemplate="%{fullData.name}<br>%{x:,} steps: %{y:.4~g}<extra></extra>",
        )  # fmt: skip
    return figure


def draw_metric(values: xarray.DataArray, name: str) -> go.Figure:
    """A metric of a run: the mean over its agents, and the range of all agents, each the mean of some updates.

    Args:
        values: with dimensions (`seed`,) `updates`, and the coordinate `step`.
        name: of the metric.
    """
    span = -(-values.sizes["updates"] // MAX_POINTS)
    with np.errstate(all="ignore"):
        thin = values.astype(np.float64).where(np.isfinite(values))
        thin = thin.coarsen(updates=span, boundary="trim", coord_func={"updates": "max", "step": "max"}).mean()
    thin = thin if "seed" in thin.dims else thin.expand_dims("seed")
    thin = thin.isel(updates=thin.notnull().any("seed").values)
    figure = _figure("environment steps", "", height=240)
    figure.update_layout(title={"text": _text(name), "font": {"size": 14}, "x": 0, "xref": "paper"})
    mean, low, high = (getattr(thin, kind)("seed").values for kind in ("mean", "min", "max"))
    _add_curve(figure, thin["step"].values, mean, low, high, (COLORS[0], "solid"), name)
    return figure


def draw_field(ranked: xarray.Dataset, name: str, labels: Sequence[str]) -> go.Figure:
    """The scores of settings against their values of one field, with intervals; the best is marked.

    Args:
        ranked: settings with scores, best first, as `rank` orders them.
        name: of the field.
        labels: a text for every setting.
    """
    figure = _figure(in_words(name), "episode return at the end", height=320)
    ranked, labels = ranked.isel(setting=slice(None, None, -1)), labels[::-1]  # the best lies on top
    column, scores = ranked[name].values, ranked["iqm"].values
    is_axis = is_number(column) and bool(np.isfinite(column).all())
    low, high = (np.abs(ranked[end].values - scores) for end in ("low", "high"))
    errors = {"array": _short(high), "arrayminus": _short(low), "thickness": 1, "width": 0, "color": GREY}
    colors = np.where(np.arange(len(scores)) == len(scores) - 1, COLORS[3], COLORS[0])
    opacity, size = (0.75, 8) if len(scores) <= 100 else (0.5, 5)
    figure.add_scatter(
        x=column if is_axis else [_text(show_value(x)) for x in column.tolist()],
        y=_short(scores), error_y=errors if np.isfinite(low).any() else None, mode="markers",
        marker={"color": colors, "opacity": opacity, "size": size}, text=[_text(x) for x in labels],
        customdata=_interval(ranked["low"].values, ranked["high"].values),
        hovertemplate="%{text}<br>%{y:.4~g}%{customdata}<extra></extra>",
    )  # fmt: skip
    as_swept = column[np.argsort(ranked["setting"].values)].tolist()
    figure.update_xaxes(_axis_of(column) if is_axis else _categories([show_value(x) for x in as_swept]))
    return figure


def draw_pair(scores: xarray.DataArray, x: str, y: str) -> go.Figure:
    """The final scores of all values of two fields of a grid as a heat map, the other fields at the best setting.

    Args:
        scores: final scores, with a dimension for every field of the grid, and `seed`.
        x: field along the horizontal axis.
        y: field along the vertical axis.
    """
    cells = scores_of_pair(scores, x, y, "iqm")
    rows, columns = cells["value"].shape
    across, up = (find_field(scores, name).labels for name in (x, y))
    missing = np.where(cells["missing"] > 0, cells["missing"].astype(str).astype(object) + " runs missing", "")
    is_small = rows * columns <= 400
    figure = _figure(in_words(x), in_words(y), height=int(np.clip(150 + 34 * rows, 300, 640)))
    figure.add_heatmap(
        z=_short(cells["value"].values), colorscale="YlGnBu", customdata=missing,
        x=[_text(label) for label in across], y=[_text(label) for label in up],
        texttemplate="%{z:.3~s}" if is_small else None, xgap=1, ygap=1, hoverongaps=False,
        colorbar={"title": {"text": "return", "side": "right"}, "thickness": 12, "outlinewidth": 0},
        hovertemplate="%{xaxis.title.text} %{x}<br>%{yaxis.title.text} %{y}<br>%{z:.4~g}  %{customdata}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(_categories(across), showgrid=False)
    figure.update_yaxes(_categories(up), showgrid=False)
    return figure


def _add_curve(
    figure: go.Figure,
    steps: np.ndarray,
    values: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    style: tuple[str, str],
    label: str,
    meta: int | None = None,
):
    """Adds a line with its interval, where it has one, as two traces.

    Args:
        figure: where to draw.
        steps: environment steps [P].
        values: heights [P].
        low: lower ends [P], nan where there is no interval.
        high: upper ends [P].
        style: see `line_style`.
        label: name of the line.
        meta: number of the line, for those who choose lines.
    """
    color, dashes = style
    there = np.isfinite(low)
    if there.any():
        ends = np.concatenate([low[there], high[there][::-1]])
        figure.add_scatter(
            x=np.concatenate([steps[there], steps[there][::-1]]), y=_short(ends), mode="lines", fill="toself",
            line={"width": 0, "color": color}, fillcolor=_faint(color), hoverinfo="skip", meta=meta,
        )  # fmt: skip
    figure.add_scatter(
        x=steps, y=_short(values), mode="lines", line={"color": color, "dash": dashes, "width": 2.5},
        name=_text(label), customdata=_interval(low, high), meta=meta,
        hovertemplate="%{fullData.name}<br>%{x:,.0f} steps: %{y:.4~g}%{customdata}<extra></extra>",
    )  # fmt: skip


def _figure(x: str, y: str, height: int) -> go.Figure:
    """An empty figure without colours of its own, so that it suits a light page and a dark one."""
    clear = "rgba(0,0,0,0)"
    return go.Figure(
        layout={
            "template": "none", "paper_bgcolor": clear, "plot_bgcolor": clear, "height": height, "showlegend": False,
            "modebar": {"bgcolor": clear},
            "margin": {"l": 60, "r": 12, "t": 34, "b": 54}, "hovermode": "closest",
            "font": {"family": "system-ui, sans-serif", "size": 13},
            "xaxis": {"title": {"text": _text(x)}, "zeroline": False, "exponentformat": "SI", "automargin": True},
            "yaxis": {"title": {"text": _text(y)}, "zeroline": False, "exponentformat": "SI", "automargin": True},
        }
    )  # fmt: skip


def _axis_of(column: np.ndarray) -> dict[str, Any]:
    """The axis of a field of numbers: logarithmic over a factor of ten, with few values as its ticks."""
    values = np.unique(column)
    is_log = len(values) > 1 and values[0] > 0 and values[-1] >= 10 * values[0]
    ticks: Mapping[str, Any] = {"tickvals": values, "ticktext": [show_value(x) for x in values.tolist()]}
    if len(values) > MAX_TICKS:
        ticks = {"dtick": 1} if is_log and values[-1] >= 100 * values[0] else {}
    return {"type": "log" if is_log else "linear", "exponentformat": "e", **ticks}


def _categories(labels: Sequence[str]) -> dict[str, Any]:
    """The axis of a field of texts, in the order of `labels`. Long texts are cut; what hovers over a point has all."""
    different = list(dict.fromkeys(labels))
    names = [_text(label) for label in different]
    axis = {"type": "category", "categoryorder": "array", "categoryarray": names}
    if max(map(len, different)) <= MAX_LABEL:
        return axis
    return axis | {"tickvals": names, "ticktext": [_text(shorten(label, MAX_LABEL)) for label in different]}


def _interval(low: np.ndarray, high: np.ndarray) -> list[str]:
    """For every point the end of its hover text."""
    return [f" [{a:.4g}, {b:.4g}]" if a == a else "" for a, b in zip(low.tolist(), high.tolist())]


def _short(values: ArrayLike) -> np.ndarray:
    return np.asarray(values, np.float32)


def _faint(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},.18)"


def _text(text: str) -> str:
    """Text that plotly shows as it is, though it reads some tags of HTML."""
    return html.escape(printable(text), quote=False)
