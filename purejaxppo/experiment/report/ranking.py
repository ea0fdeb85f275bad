"""Ranking of the settings of a sweep, and importance of its fields.

Runs without a score count as the lowest of all (see `statistics`). A setting without any score has failed: it ranks
last and has no number.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy
import xarray

from purejaxppo.experiment.report.statistics import (
    NO_SCORE,
    STATISTICS,
    aggregate,
    best_first,
    check,
    filled,
    scores_of,
    swept_fields,
)
from purejaxppo.text import align


def rank(
    scores: xarray.DataArray | xarray.Dataset,
    statistic: str = "iqm",
    over: str | Sequence[str] = "seed",
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> xarray.Dataset:
    """Ranks all settings along one dimension `setting`, best first, with the swept fields as coordinates.

    Args:
        scores: one number per run, with the dimension `seed`; or metrics, whose `scores_of` are ranked.
        statistic: "iqm", "mean" or "median", which decides the order; the mean decides between equal ones.
        over: the dimension "seed", or several with it, such as ("env", "seed").
        confidence: level of the interval, between 0 and 1.
        num_resamples: draws of the bootstrap; 0 makes the interval nan.
        seed: random seed of the bootstrap.

    Returns:
        The variables `iqm`, `mean` and `median`, `low` and `high` of `statistic`, `num_runs` and `num_missing`; all but
        the last two are nan for a setting that failed. The coordinate `setting` is the position of the setting in the
        sweep, from 0.

    Raises:
        ValueError: for an unknown statistic or dimension, or an `over` without "seed".
    """
    rows = _rows(_scores(scores), over)
    found = aggregate(filled(rows), statistic, over, confidence, num_resamples, seed)
    ranked = found[["low", "high"]].assign(aggregate(rows, over=over, num_resamples=0)[["num_runs", "num_missing"]])
    for name in STATISTICS:
        ranked[name] = aggregate(filled(rows), name, over, num_resamples=0)["value"]
    numbers = [*STATISTICS, "low", "high"]
    ranked[numbers] = ranked[numbers].where(ranked["num_runs"] > 0)
    order = best_first(ranked[statistic].values, ranked["mean"].values)
    return ranked.isel(setting=order)[["iqm", "low", "high", "mean", "median", "num_runs", "num_missing"]]


def _scores(scores: xarray.DataArray | xarray.Dataset) -> xarray.DataArray:
    return scores_of(scores) if isinstance(scores, xarray.Dataset) else scores


def _rows(scores: xarray.DataArray, over: str | Sequence[str] = "seed") -> xarray.DataArray:
    """Scores [setting, ...]: all dimensions but `over` become numbered settings, with the fields as coordinates."""
    over = (over,) if isinstance(over, str) else tuple(over)
    check(scores, "iqm", over)
    dims = [dim for dim in scores.dims if dim not in over]
    rows = scores.stack(row=dims, create_index=False) if dims else scores.expand_dims("row")
    rows = rows.drop_vars([name for name in rows.coords if name == "setting" or name not in swept_fields(scores)])
    rows = rows.rename(row="setting").transpose("setting", ...)
    return rows.assign_coords(setting=np.arange(len(rows)))


def best(
    scores: xarray.DataArray | xarray.Dataset, statistic: str = "iqm", over: str | Sequence[str] = "seed"
) -> dict[str, Any]:
    """The fields of the setting that `rank` puts first, each with its value.

    Without swept fields it is {"setting": its position}. Raises ValueError if no run has a score.
    """
    first = rank(scores, statistic, over, num_resamples=0).isel(setting=0)
    if not first["num_runs"]:
        raise ValueError(NO_SCORE)
    fields = {str(name): x.item() for name, x in first.coords.items() if name != "setting"}
    return fields or {"setting": first["setting"].item()}


def as_table(ranked: xarray.Dataset, max_rows: int = 20) -> str:
    """A ranking from `rank` as text in aligned columns, with its first `max_rows` settings."""
    fields = [str(name) for name in ranked.coords if name != "setting"] or ["setting"]
    names = [*fields, *map(str, ranked.data_vars)]
    if not ranked["num_missing"].any():
        names.remove("num_missing")
    unscored = (ranked["num_runs"] == 0).values
    columns = [
        np.where(unscored & (name in [*STATISTICS, "low", "high"]), "none", ranked[name].astype(object)).tolist()
        for name in names
    ]
    lines = [align([dict(zip(names, row)) for row in zip(*columns)], max_rows)]
    if "num_missing" in names:
        why = "turned nan, ended no episode or were not evaluated"
        lines.append(f"(missing runs {why}; they count as the lowest score)")
    if unscored.any():
        lines.append("(none: no run of the setting has a score)")
    return "\n".join(lines)


def importance(scores: xarray.DataArray | xarray.Dataset) -> xarray.DataArray:
    """The share of the variance of all runs' scores that each swept field explains by itself, along `field`.

    This is the main effect in an analysis of variance, minus the expected effect of chance. In a grid, chance is the
    variance over seeds. For fields that vary together, as in sampled settings, it is the variance over the other
    settings. Such fields are cut into at most five bins with equal numbers of settings; correlated fields all get the
    credit for a common effect. The entry `seeds` is the share of the random seeds. `rest` is the remainder:
    interactions, and differences within a bin. With one seed the seed effect cannot be separated from the remainder,
    and `seeds` is 0.

    `scores` are one number per run, with the dimension `seed`; or metrics, whose `scores_of` are used.
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


def _groups(column: np.ndarray, together: bool) -> np.ndarray:
    """The group of each setting, from 0: by value, or by rank if there would be too many groups."""
    values, group = np.unique(column, return_inverse=True)
    most = max(2, min(5, len(column) // 4))
    if not together or column.dtype.kind in "UO" or len(values) <= most:
        return group
    return np.unique((scipy.stats.rankdata(column, "min") - 1) * most // len(column), return_inverse=True)[1]
