"""The swept fields as pictures show them: names, values, and which are drawn where."""

import difflib
import textwrap
from typing import NamedTuple

import numpy as np
import xarray

from purejaxppo.experiment.report.statistics import aggregate, filled, final_scores, swept_fields
from purejaxppo.text import in_words, show_value

MAX_LINES = 10  # that can be told apart


def scores_to_draw(metrics) -> xarray.DataArray:
    """Final scores, of which some picture can be made."""
    if "seed" not in metrics.dims:
        raise ValueError(f"metrics have no dimension seed (theirs: {', '.join(map(str, metrics.dims))})")
    if "env" in metrics.coords and np.unique(metrics["env"]).size > 1:
        raise ValueError("returns of several environments do not compare: select one, as in metrics.sel(env=...)")
    scores = final_scores(metrics)
    if scores.isnull().all():
        raise ValueError("no run has a score: no episode ended, or all turned nan")
    return scores


class Field(NamedTuple):
    """What lines or panels are for: a swept field, several that vary together, or nothing."""

    title: str = ""
    dim: str | None = None
    labels: list = [None]  # of every value
    numbers: np.ndarray | None = None  # where it is one field of numbers
    grid: bool = True  # one field with a dimension of its own


def find_field(scores, name) -> Field:
    """The field of that name, or those along the dimension of that name; for None nothing."""
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


def best_index(scores, statistic) -> dict:
    """Where the best setting lies along every dimension."""
    value = aggregate(filled(scores), statistic, num_resamples=0)["value"]
    return {dim: int(i) for dim, i in value.argmax(list(value.dims)).items()} if value.dims else {}


def choose_fields(scores, line, panel) -> tuple[Field, Field]:
    """Of lines and of panels: those given, or the first swept ones."""
    fields = find_field(scores, line), find_field(scores, panel)
    dims = [field.dim for field in fields]
    if dims[0] and dims[0] == dims[1]:
        raise ValueError(f"line={line!r} and panel={panel!r} vary together (leave out panel)")
    swept = swept_fields(scores)
    free = [name if list(swept.values()).count(dim) == 1 else dim for name, dim in swept.items() if dim not in dims]
    free = [field for name in dict.fromkeys(free) if len((field := find_field(scores, name)).labels) > 1]
    line, panel = fields
    if line.dim is None and free:
        line = free.pop(0)
    if panel.dim is None and free and max(len(line.labels), len(free[0].labels)) <= 8:
        panel = free[0]
    if len(panel.labels) > 12:
        raise ValueError(f"panel={panel.title!r} has {len(panel.labels)} values, more than 12 (select some before)")
    return line, panel


def choose_members(scores, line: Field, highest, statistic, max_lines) -> list:
    """Which values of a field are drawn, in order."""
    if max_lines is not None and not 1 <= max_lines <= MAX_LINES:
        raise ValueError(f"max_lines={max_lines} must be from 1 to {MAX_LINES}: more cannot be told apart")
    size = len(line.labels)
    order = np.arange(size) if line.numbers is None else np.argsort(line.numbers, kind="stable")
    if line.grid:
        return list(order[np.linspace(0, size - 1, min(size, max_lines or 8)).round().astype(int)])
    others = {dim: i for dim, i in highest.items() if dim != line.dim}
    value = aggregate(filled(scores), statistic, num_resamples=0)["value"].isel(others).values
    best = list(np.argsort(-value, kind="stable")[: max_lines or 5])
    return best if line.numbers is None else [i for i in order if i in best]


def is_number(column) -> bool:
    """Whether a column holds numbers."""
    return column.dtype.kind in "iuf"


def make_notes(scores, what: str, highest: dict, *drawn) -> list[str]:
    """What a reader must know: the statistic, where the fields lie that are not drawn, how many runs have no score."""
    fields = {name: dim for name, dim in swept_fields(scores).items() if dim not in drawn and scores.sizes[dim] > 1}
    values = [f"{in_words(name)} = {show_value(scores[name].values[highest[dim]])}" for name, dim in fields.items()]
    num_seeds, missing = scores.sizes["seed"], int(scores.isnull().sum())
    notes = [f"{what.replace('iqm', 'interquartile mean')} of {num_seeds} seeds" if num_seeds > 1 else "one seed"]
    notes += [("at the best " if drawn else "best: ") + ", ".join(values)] if values else []
    return notes + ([f"runs without a score, counted as the lowest: {missing} of {scores.size}"] if missing else [])


def make_heading(figure, title: str, notes: list[str]) -> str:
    """A title and notes under it, each on its lines, without a break inside `field = value`."""
    width = int(figure.get_figwidth() * 11)
    wrapped = [line for note in notes for line in textwrap.wrap(note.replace(" = ", "\xa0=\xa0"), width)]
    return "\n".join([title, *wrapped] if title else wrapped)
