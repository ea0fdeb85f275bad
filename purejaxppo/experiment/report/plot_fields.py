"""The swept fields in plots: their names and values, and which of them are lines or panels."""

import difflib
import textwrap
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import xarray
from matplotlib.figure import Figure

from purejaxppo.experiment.evaluations import EVALUATION_RETURN
from purejaxppo.experiment.report.statistics import (
    NO_SCORE,
    best_first,
    describe_scores,
    scores_of,
    swept_fields,
    value_of_settings,
)
from purejaxppo.text import count, in_words, show_value

MAX_LINES = 10  # more cannot be told apart


def scores_to_draw(metrics: xarray.Dataset) -> xarray.DataArray:
    """The scores of all runs, see `scores_of`.

    Raises ValueError if they cannot be drawn: without seeds, with several environments, or if no run has a score.
    """
    if "seed" not in metrics.dims:
        raise ValueError(f"metrics have no dimension seed (theirs: {', '.join(map(str, metrics.dims))})")
    if "env" in metrics.coords and np.unique(metrics["env"]).size > 1:
        raise ValueError("returns of several environments cannot be compared: select one, as in metrics.sel(env=...)")
    scores = scores_of(metrics)
    if scores.isnull().all():
        raise ValueError(NO_SCORE)
    return scores


class Field(NamedTuple):
    """What distinguishes lines or panels: a swept field, several that vary together, or nothing."""

    title: str = ""
    dim: str | None = None
    labels: list = [None]
    """Text of every value."""
    numbers: np.ndarray | None = None
    """The values, if it is one field of numbers."""
    grid: bool = True
    """Whether it is one field that has a dimension to itself."""


def find_field(scores: xarray.DataArray, name: str | None) -> Field:
    """The field of that name, or all fields along the dimension of that name; for None an empty `Field`.

    Raises ValueError for a name that was not swept.
    """
    if name is None:
        return Field()
    dims = swept_fields(scores)
    names = [name] if name in dims else [field for field, dim in dims.items() if dim == name]
    if not names:
        near = difflib.get_close_matches(str(name), dims, n=1)
        hint = f"did you mean {near[0]!r}? Swept: " if near else "swept: "
        raise ValueError(f"{name!r} was not swept ({hint}{', '.join(dims) or 'nothing'})")
    columns = [scores[name].values for name in names]
    labels = [" / ".join(map(show_value, row)) for row in zip(*columns)]
    numbers = columns[0] if len(names) == 1 and is_number(columns[0]) else None
    grid = list(dims.values()).count(dims[names[0]]) == 1
    return Field(" / ".join(map(in_words, names)), dims[names[0]], labels, numbers, grid)


def best_index(scores: xarray.DataArray, statistic: str) -> dict[str, int]:
    """The index of the best setting along every dimension but `seed`."""
    value, mean = (value_of_settings(scores, name) for name in (statistic, "mean"))
    first = best_first(value.values.ravel(), mean.values.ravel())[0]
    return {str(dim): int(i) for dim, i in zip(value.dims, np.unravel_index(first, value.shape))}


def scores_of_pair(scores: xarray.DataArray, x: str, y: str, statistic: str) -> xarray.Dataset:
    """The statistic over seeds of all values of two fields of a grid, with the other fields at the best setting.

    Variables of the result [y, x]: `value`, nan for a setting without any score, and `missing`, the runs without one.
    """
    values = value_of_settings(scores, statistic).rename("value").to_dataset()
    values["missing"] = scores.isnull().sum("seed")
    highest = best_index(scores, statistic)
    return values.isel({dim: i for dim, i in highest.items() if dim not in (x, y)}).transpose(y, x)


def varied_fields(scores: xarray.DataArray) -> list[str]:
    """The swept fields with more than one value."""
    return [name for name in swept_fields(scores) if np.unique(scores[name]).size > 1]


def fields_of_grid(scores: xarray.DataArray) -> list[str]:
    """The swept fields with more than one value that have a dimension to themselves."""
    return [name for name in varied_fields(scores) if find_field(scores, name).grid]


def choose_fields(scores: xarray.DataArray, line: str | None, panel: str | None) -> tuple[Field, Field]:
    """The fields of lines and of panels: those that are given, or else the first swept ones.

    Raises ValueError if both vary together, or if there would be more than 12 panels.
    """
    lines, panels = find_field(scores, line), find_field(scores, panel)
    dims = [lines.dim, panels.dim]
    if dims[0] and dims[0] == dims[1]:
        raise ValueError(f"line={line!r} and panel={panel!r} vary together (leave out panel)")
    swept = swept_fields(scores)
    free = [name if list(swept.values()).count(dim) == 1 else dim for name, dim in swept.items() if dim not in dims]
    free = [field for name in dict.fromkeys(free) if len((field := find_field(scores, name)).labels) > 1]
    if lines.dim is None and free:
        lines = free.pop(0)
    if panels.dim is None and free and max(len(lines.labels), len(free[0].labels)) <= 8:
        panels = free[0]
    if len(panels.labels) > 12:
        raise ValueError(
            f"panel={panels.title!r} has {len(panels.labels)} values, more than 12 (select some of them before)"
        )
    return lines, panels


def choose_members(
    scores: xarray.DataArray, lines: Field, highest: Mapping[str, int], statistic: str, max_lines: int | None
) -> list:
    """The indices of the values that are drawn as lines, in order.

    Args:
        scores: final scores.
        lines: the field of the lines.
        highest: the index of the best setting along every dimension, where the other fields stay.
        statistic: "iqm", "mean" or "median" over seeds; decides which settings of several fields are drawn.
        max_lines: most lines, from 1 to 10; by default 8 for a field, 5 for settings of several fields.
    """
    if max_lines is not None and not 1 <= max_lines <= MAX_LINES:
        raise ValueError(f"max_lines={max_lines} must be from 1 to {MAX_LINES}: more cannot be told apart")
    size = len(lines.labels)
    order = np.arange(size) if lines.numbers is None else np.argsort(lines.numbers, kind="stable")
    if lines.grid:
        return list(order[np.linspace(0, size - 1, min(size, max_lines or 8)).round().astype(int)])
    others = {dim: i for dim, i in highest.items() if dim != lines.dim}
    value, mean = (value_of_settings(scores, name).isel(others).values for name in (statistic, "mean"))
    best = list(best_first(value, mean)[: max_lines or 5])
    return best if lines.numbers is None else [i for i in order if i in best]


def is_number(column: np.ndarray) -> bool:
    """Whether a column holds numbers (not truth values or text)."""
    return column.dtype.kind in "iuf"


def make_notes(scores: xarray.DataArray, what: str, highest: Mapping[str, int], *drawn: str | None) -> list[str]:
    """Notes for a plot: the statistic, the values of fields that are not drawn, the number of runs without a score.

    Args:
        scores: see `scores_of`.
        what: the statistic, in words.
        highest: the index of the best setting along every dimension.
        *drawn: dimensions of the fields that are drawn.
    """
    fields = {name: dim for name, dim in swept_fields(scores).items() if dim not in drawn and scores.sizes[dim] > 1}
    values = [f"{in_words(name)} = {show_value(scores[name].values[highest[dim]])}" for name, dim in fields.items()]
    failed = scores.isnull().all("seed")
    num_seeds, missing = scores.sizes["seed"], int((scores.isnull() & ~failed).sum())
    notes = [f"{what.replace('iqm', 'interquartile mean')} of {num_seeds} seeds" if num_seeds > 1 else "one seed"]
    notes += [f"score: {describe_scores(scores)}"] if scores.name == EVALUATION_RETURN else []
    notes += [("at the best " if drawn else "best: ") + ", ".join(values)] if values else []
    notes += [f"runs without a score, counted as the lowest: {missing} of {scores.size}"] if missing else []
    return notes + ([f"failed, without any score: {count(int(failed.sum()), 'setting')}"] if failed.any() else [])


def make_heading(figure: Figure, title: str, notes: list[str]) -> str:
    """A title with notes below it, wrapped to the width of the figure, but never inside `field = value`."""
    width = int(figure.get_figwidth() * 11)
    wrapped = [line for note in notes for line in textwrap.wrap(note.replace(" = ", "\xa0=\xa0"), width)]
    return "\n".join([title, *wrapped] if title else wrapped)
