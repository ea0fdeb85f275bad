"""Which settings of a sweep are best, and which of its fields mattered.

Runs without a score count as the lowest of all (see `statistics`).
"""

import numpy as np
import xarray
from scipy import stats

from purejaxppo.experiment.report.statistics import STATISTICS, aggregate, check, filled, final_scores, swept_fields


def rank(scores, statistic="iqm", over="seed", confidence=0.95, num_resamples=2000, seed=0) -> xarray.Dataset:
    """All settings along one dimension `setting`, best first by `statistic`, the swept fields as its coordinates.

    `scores` may also be metrics, of which the `final_scores` are taken. Variables: `iqm`, `mean`, `median`, `low` and
    `high` of `statistic`, `num_runs` and `num_missing`. The coordinate `setting` counts in the order of the sweep.
    """
    rows = _rows(_scores(scores), over)
    found = aggregate(filled(rows), statistic, over, confidence, num_resamples, seed)
    ranked = found[["low", "high"]].assign(aggregate(rows, over=over, num_resamples=0)[["num_runs", "num_missing"]])
    for name in STATISTICS:
        ranked[name] = aggregate(filled(rows), name, over, num_resamples=0)["value"]
    order = np.argsort(-ranked[statistic].values, kind="stable")  # nan goes last
    return ranked.isel(setting=order)[["iqm", "low", "high", "mean", "median", "num_runs", "num_missing"]]


def _scores(scores):
    return final_scores(scores) if isinstance(scores, xarray.Dataset) else scores


def _rows(scores, over="seed"):
    """Scores [setting, ...]: all but `over` stacked, numbered, with the fields as coordinates."""
    over = (over,) if isinstance(over, str) else tuple(over)
    check(scores, "iqm", over)
    dims = [dim for dim in scores.dims if dim not in over]
    rows = scores.stack(row=dims, create_index=False) if dims else scores.expand_dims("row")
    rows = rows.drop_vars([name for name in rows.coords if name == "setting" or name not in swept_fields(scores)])
    rows = rows.rename(row="setting").transpose("setting", ...)
    return rows.assign_coords(setting=np.arange(len(rows)))


def best(scores, statistic="iqm", over="seed") -> dict:
    """The fields of the best setting by `rank`, each with its value."""
    first = rank(scores, statistic, over, num_resamples=0).isel(setting=0)
    fields = {name: x.item() for name, x in first.coords.items() if name != "setting"}
    return fields or {"setting": first["setting"].item()}


def as_table(ranked: xarray.Dataset, max_rows: int = 20) -> str:
    """A ranking as text in aligned columns."""
    shown = ranked.isel(setting=slice(max_rows))
    fields = [name for name in shown.coords if name != "setting"] or ["setting"]
    names = [*fields, *shown.data_vars]
    if not ranked["num_missing"].any():
        names.remove("num_missing")
    columns = [[name, *(x if isinstance(x, str) else f"{x:g}" for x in shown[name].values.tolist())] for name in names]
    widths = [max(map(len, column)) for column in columns]
    lines = ["  ".join(x.rjust(width) for x, width in zip(row, widths)) for row in zip(*columns)]
    more = ranked.sizes["setting"] - shown.sizes["setting"]
    lines += [f"... and {more} more"] if more else []
    lines += ["(missing runs turned nan or ended no episode; they count as the lowest score)"] * (
        "num_missing" in names
    )
    return "\n".join(lines)


def importance(scores) -> xarray.DataArray:
    """Share of the variance of all runs' scores that the values of each swept field explain by themselves.

    That is the main effect in an analysis of variance, less what chance would give: in a grid what the spread over
    seeds would; for fields that vary together, as in sampled settings, what the spread over the other settings would.
    Such fields are cut into at most five bins of equally many settings, and fields that go hand in hand all get the
    credit. `seeds` is the share of luck, `rest` what is left: interactions, and detail within a bin. With one seed
    luck cannot be told from the rest.
    """
    scores = _scores(scores)
    rows = filled(_rows(scores))
    values, means = rows.values, rows.values.mean(1)
    num_settings, num_seeds = values.shape
    total = ((values - values.mean()) ** 2).sum() or np.inf
    luck = values.var(1, ddof=1).mean() if num_seeds > 1 else 0.0
    dims = swept_fields(scores)
    shares = {}
    for name, dim in dims.items():
        together = list(dims.values()).count(dim) > 1
        group = _groups(rows[name].values, together)
        center = np.array([means[group == i].mean() for i in group])
        chance = luck
        if together:
            chance = num_seeds * ((means - center) ** 2).sum() / max(num_settings - group.max() - 1, 1)
        explained = num_seeds * ((center - values.mean()) ** 2).sum() - group.max() * chance
        shares[name] = max(explained, 0.0) / total
    left = max(1 - sum(shares.values()), 0.0) if np.isfinite(total) else 0.0
    shares["seeds"] = min(luck * (values.size - 1) / total, left)
    shares["rest"] = left - shares["seeds"]
    return xarray.DataArray(list(shares.values()), {"field": list(shares)}, name="importance")


def _groups(column, together: bool):
    """The group, from 0, of each setting: by value, or by rank where that would make too many groups."""
    values, group = np.unique(column, return_inverse=True)
    most = max(2, min(5, len(column) // 4))
    if not together or column.dtype.kind in "UO" or len(values) <= most:
        return group
    return np.unique((stats.rankdata(column, "min") - 1) * most // len(column), return_inverse=True)[1]
