"""Metrics as labelled arrays, and what is read off them."""

import numpy as np
import pandas
import xarray
from scipy import stats

from purejaxppo.config import Config


def label(metrics: dict, config: Config, updates_before: int = 0) -> xarray.Dataset:
    """Metrics [U] or [R, U] with names to their axes: (`run`,) `updates` counted from 1, and `step` along it.

    A vector of K numbers per update has a dimension of its own behind them, `NAME_index`. `step` counts the environment
    steps of one run, as a float64 that is exact up to 2**53.
    """
    shape = np.shape(metrics["learning_rate"])
    dims = ("run", "updates")[-len(shape) :]
    update = np.arange(1, shape[-1] + 1) + updates_before
    coords = {"updates": update.astype(np.int32), "step": ("updates", update * float(config.steps_per_update))}
    if len(shape) == 2:
        coords["run"] = np.arange(shape[0], dtype=np.int32)
    return xarray.Dataset({name: label_metric(name, dims, x) for name, x in metrics.items()}, coords)


def label_metric(name: str, dims: tuple[str, ...], values: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """The dimensions of a metric and its values: `dims`, and a dimension of its own for the numbers of a vector."""
    return (*dims, f"{name}_index")[: np.ndim(values)], np.asarray(values)


def split_vectors(metrics: xarray.Dataset) -> dict[str, xarray.DataArray]:
    """Metrics by name, each number of a vector as a metric of its own, `NAME_0`, `NAME_1` and so on."""
    numbers = {}
    for name, x in metrics.items():
        index = f"{name}_index"
        of_vector = {f"{name}_{i}": x.isel({index: i}) for i in range(x.sizes.get(index, 0))}
        numbers |= of_vector or {name: x}
    return numbers


def last_episodes(metrics: xarray.Dataset, num_episodes: int = 100) -> xarray.DataArray:
    """Mean return of the last `num_episodes` training episodes of each run; nan where none ended.

    Episodes are known by their update: of the oldest update that is needed only a share counts.
    """
    count = metrics["num_episodes"].astype(np.float64)
    newer = count.isel(updates=slice(None, None, -1)).cumsum("updates").isel(updates=slice(None, None, -1)) - count
    weight = np.clip(num_episodes - newer, 0, count)
    total = weight.sum("updates")
    return (metrics["episode_return"].fillna(0) * weight).sum("updates") / total.where(total > 0)


def learning_curve(metrics: xarray.Dataset, num_points: int = 100) -> xarray.DataArray:
    """Mean return per episode in about `num_points` equal spans of updates, each run apart; nan where none ended."""
    span = max(metrics.sizes["updates"] // num_points, 1)
    sums = xarray.Dataset(
        {"n": metrics["num_episodes"], "r": metrics["episode_return"].fillna(0) * metrics["num_episodes"]}
    )
    sums = sums.coarsen(updates=span, boundary="trim", coord_func={"updates": "max", "step": "max"}).sum()
    return (sums["r"] / sums["n"].where(sums["n"] > 0)).rename("episode_return")


def mean_interval(values, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean over the runs that have a value, and its Student t interval, which is nan for fewer than two."""
    values = np.asarray(values, np.float64).reshape(-1)
    values = values[~np.isnan(values)]
    if not values.size:
        return np.nan, np.nan, np.nan
    if values.size == 1:
        return float(values[0]), np.nan, np.nan
    half = stats.sem(values) * stats.t.ppf((1 + confidence) / 2, values.size - 1)
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def to_dataframe(metrics: xarray.Dataset) -> pandas.DataFrame:
    """Metrics as a table, one row per run and update; each number of a vector has a column, `NAME_0`, `NAME_1`, ..."""
    table = xarray.Dataset(split_vectors(metrics)).to_dataframe().reset_index()
    return table.dropna(subset="step").reset_index(drop=True)  # settings of a sweep may differ in their length
