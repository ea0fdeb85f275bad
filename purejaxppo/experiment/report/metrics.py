"""Metrics as labelled arrays, and the numbers computed from them."""

from collections.abc import Mapping

import numpy as np
import pandas
import scipy
import xarray
from numpy.typing import ArrayLike

from purejaxppo.config import Config

FEW_UPDATES = 64  # of a large sweep, more are read only where they are needed


def label(metrics: Mapping[str, ArrayLike], config: Config, updates_before: int = 0) -> xarray.Dataset:
    """Metrics [U] or [R, U] with labelled axes: (`run`,) `updates`, counted from 1, and `step` along `updates`.

    A vector of K numbers per update has one more dimension at the end, `NAME_index`. `step` counts the environment
    steps of one run, as a float64 that is exact up to 2**53. `updates_before` is the number of updates that came before
    these metrics. The shape of all metrics is that of `learning_rate`, which must be among them.
    """
    shape = np.shape(metrics["learning_rate"])
    dims = ("run", "updates")[-len(shape) :]
    update = np.arange(1, shape[-1] + 1) + updates_before
    coords = {"updates": update.astype(np.int32), "step": ("updates", update * float(config.steps_per_update))}
    if len(shape) == 2:
        coords["run"] = np.arange(shape[0], dtype=np.int32)
    return xarray.Dataset({name: label_metric(name, dims, x) for name, x in metrics.items()}, coords)


class History:
    """Metrics of all updates so far, in arrays that double when they are full; see `label`."""

    def __init__(self, config: Config, updates_before: int = 0):
        self.config, self.updates_before, self.length = config, updates_before, 0
        self._arrays: dict[str, np.ndarray] = {}  # updates first

    def append(self, metrics: Mapping[str, ArrayLike]):
        """Adds the metrics of some updates; where a metric is not reported, it is nan."""
        axis = np.ndim(metrics["learning_rate"]) - 1
        new = {name: np.moveaxis(np.asarray(x), axis, 0) for name, x in metrics.items()}
        end = self.length + len(new["learning_rate"])
        for name in {**self._arrays, **new}:
            self._arrays[name] = self._extended(self._arrays.get(name), new.get(name), end)
        self.length = end

    def to_dataset(self) -> xarray.Dataset:
        """All metrics with labels, as a copy."""
        axis = self._arrays["learning_rate"].ndim - 1
        arrays = {name: np.moveaxis(x[: self.length], 0, axis).copy() for name, x in self._arrays.items()}
        return label(arrays, self.config, self.updates_before)

    def _extended(self, old: np.ndarray | None, new: np.ndarray | None, end: int) -> np.ndarray:
        """The array of a metric up to `end`, with room for more; None stands for updates that do not report it."""
        known = [x for x in (old, new) if x is not None]
        lacking = new is None or (old is None and self.length > 0)
        dtype = np.result_type(*known, *[np.float32] * lacking)
        if old is None or old.dtype != dtype or len(old) < end:
            extended = np.empty((max(end, 2 * self.length), *known[0].shape[1:]), dtype)
            if self.length:
                extended[: self.length] = np.nan if old is None else old[: self.length]
            old = extended
        old[self.length : end] = np.nan if new is None else new
        return old


def label_metric(name: str, dims: tuple[str, ...], values: ArrayLike) -> tuple[tuple[str, ...], np.ndarray]:
    """The dimensions of a metric and its values: `dims`, and `NAME_index` if it is a vector per update."""
    return (*dims, f"{name}_index")[: np.ndim(values)], np.asarray(values)


def split_vectors(metrics: xarray.Dataset) -> dict[str, xarray.DataArray]:
    """Metrics by name, with each number of a vector as a separate metric: `NAME_0`, `NAME_1` and so on."""
    numbers = {}
    for name, x in metrics.items():
        index = f"{name}_index"
        of_vector = {f"{name}_{i}": x.isel({index: i}) for i in range(x.sizes.get(index, 0))}
        numbers |= of_vector or {name: x}
    return numbers


def last_episodes(
    metrics: xarray.Dataset, num_episodes: int = 100, needed: xarray.DataArray | bool = True
) -> xarray.DataArray:
    """Mean return of the last `num_episodes` training episodes of each run; nan where none ended.

    Metrics hold only the mean return of each update. So the oldest update that is needed counts with the weight of the
    episodes that are still missing.

    Args:
        metrics: with the dimension `updates`.
        num_episodes: most episodes that count.
        needed: whether each run is; the number of others may be wrong.
    """
    metrics = _newest_updates(metrics[["num_episodes", "episode_return"]], num_episodes, needed)
    count = metrics["num_episodes"].astype(np.float64)
    newer = count.isel(updates=slice(None, None, -1)).cumsum("updates").isel(updates=slice(None, None, -1)) - count
    weight = (num_episodes - newer).clip(0, count)
    total = weight.sum("updates")
    return (metrics["episode_return"].fillna(0) * weight).sum("updates") / total.where(total > 0)


def _newest_updates(metrics: xarray.Dataset, num_episodes: int, needed: xarray.DataArray | bool) -> xarray.Dataset:
    """The last updates in which so many episodes of each run ended that is needed; all if there are not so many."""
    length = FEW_UPDATES
    while length < metrics.sizes["updates"]:
        newest = metrics.isel(updates=slice(-length, None))
        enough = newest["num_episodes"].sum("updates") >= num_episodes
        if (enough | ~xarray.DataArray(needed)).all():
            return newest
        length *= 4
    return metrics


def mean_returns(metrics: Mapping[str, np.ndarray]) -> np.ndarray:
    """The mean return of the episodes of each run, [runs]; -inf for those that turned nan or ended no episode.

    `metrics` are [runs, updates].
    """
    number = metrics["num_episodes"].sum(1)
    total = np.nansum(metrics["episode_return"] * metrics["num_episodes"], axis=1)
    healthy = np.isfinite(metrics["learning_rate"]).all(1)
    return np.where((number > 0) & healthy, total / np.maximum(number, 1), -np.inf)


def learning_curve(metrics: xarray.Dataset, num_points: int = 100) -> xarray.DataArray:
    """Mean return per episode in about `num_points` equal spans of updates, for each run; nan where none ended."""
    span = max(metrics.sizes["updates"] // num_points, 1)
    sums = xarray.Dataset(
        {"n": metrics["num_episodes"], "r": metrics["episode_return"].fillna(0) * metrics["num_episodes"]}
    )
    sums = sums.coarsen(updates=span, boundary="trim", coord_func={"updates": "max", "step": "max"}).sum()
    return (sums["r"] / sums["n"].where(sums["n"] > 0)).rename("episode_return")


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float, float]:
    """Returns (mean, low, high): the mean over all values that are not nan, and its Student t interval.

    The interval is nan for fewer than two values, and so is the mean for none.
    """
    values = np.asarray(values, np.float64).reshape(-1)
    values = values[~np.isnan(values)]
    if not values.size:
        return np.nan, np.nan, np.nan
    if values.size == 1:
        return float(values[0]), np.nan, np.nan
    half = scipy.stats.sem(values) * scipy.stats.t.ppf((1 + confidence) / 2, values.size - 1)
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def to_dataframe(metrics: xarray.Dataset) -> pandas.DataFrame:
    """Metrics as a table, one row per run and update; each number of a vector has a column, `NAME_0`, `NAME_1`, ..."""
    table = xarray.Dataset(split_vectors(metrics)).to_dataframe().reset_index()
    return table.dropna(subset="step").reset_index(drop=True)  # settings of a sweep may differ in their length
