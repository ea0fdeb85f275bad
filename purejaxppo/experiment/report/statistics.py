"""What the scores of many runs say: aggregates with intervals, and comparisons of two settings.

A run without a score (it turned nan, or no episode ended) is never left out unseen. `aggregate` says how many there
are in `num_missing`; where settings are compared such a run counts as the worst: as the lowest score of the sweep
(`ranking`) or below every score (`probability_of_improvement`). A higher score is better.
"""

import math
from typing import NamedTuple

import numpy as np
import xarray
from scipy import stats

from purejaxppo.experiment.report.metrics import last_episodes

STATISTICS = {"iqm": lambda x, axis: stats.trim_mean(x, 0.25, axis=axis), "mean": np.mean, "median": np.median}


class Separation(NamedTuple):
    num_seeds: float  # that each setting needs; inf where the two do not differ
    num_more: float  # than the setting with fewer has
    probability: float  # of improvement, as estimated from the runs there are


def swept_fields(data) -> dict[str, str]:
    """The swept fields and the dimension along which each varies; those of paired settings share one."""
    fields = {}
    for dim in map(str, data.dims):
        names = [str(name) for name, x in data.coords.items() if x.dims == (dim,)]
        together = [name for name in names if name != dim or not dim.startswith("setting")]
        if dim not in ("seed", "updates"):
            fields |= dict.fromkeys(together or [dim], dim)
    return fields


def lost(metrics: xarray.Dataset) -> xarray.DataArray:
    """Which updates of a run come after it turned nan, as `failed_update` says.

    Without that they are those, before the run's end, of which no number is left; returns and lengths of episodes do
    not count, as they are nan wherever none ended.
    """
    returns = metrics["episode_return"]
    if "failed_update" in metrics:
        gone = (metrics["failed_update"] > 0) & (metrics["updates"] >= metrics["failed_update"])
    else:
        names = [name for name, x in metrics.items() if x.dtype.kind == "f" and not name.startswith("episode_")]
        gone = metrics[names].isnull().to_array().all("variable") if names else xarray.zeros_like(returns, bool)
    return (gone & metrics["step"].notnull()).transpose(*returns.dims)


def final_scores(metrics: xarray.Dataset, num_episodes: int = 100) -> xarray.DataArray:
    """Mean return of the last training episodes of each run; nan for runs that turned nan or ended no episode."""
    return last_episodes(metrics, num_episodes).where(~lost(metrics).any("updates"))


def area_under_curve(metrics: xarray.Dataset) -> xarray.DataArray:
    """Mean height of each run's learning curve over its environment steps, by trapezoids; nan for runs that turned nan.

    Every stretch of steps counts alike. (Weighting by episodes would count stretches of short ones more.) Where no
    episode ended the curve goes straight between its neighbours; up to the first finished episode it lies at the
    height of that one, not at 0, and likewise after the last.
    """
    heights = xarray.apply_ufunc(
        _mean_height, metrics["episode_return"], metrics["step"], input_core_dims=[["updates"]] * 2, vectorize=True
    )
    return heights.where(~lost(metrics).any("updates")).rename("area_under_curve")


def _mean_height(returns, steps):
    returns, steps = returns[~np.isnan(steps)], steps[~np.isnan(steps)]
    known = ~np.isnan(returns)
    if not known.any():
        return np.nan
    heights = np.interp(steps, steps[known], returns[known])
    return np.trapezoid(heights, steps) / (steps[-1] - steps[0]) if len(steps) > 1 else heights[0]


def aggregate(
    scores: xarray.DataArray, statistic="iqm", over="seed", confidence=0.95, num_resamples=2000, seed=0
) -> xarray.Dataset:
    """A statistic of all runs along `over` together, with a percentile bootstrap interval, for every setting.

    `statistic` is "iqm" (mean of the middle half, Agarwal et al., 2021), "mean" or "median", over the flattened runs.
    `over` is "seed" or, as ("env", "seed"), more; seeds are resampled within each of those, never across. Variables:
    `value`, `low`, `high`, `num_runs` with a score, which are those that count, and `num_missing`, those without.
    Where an environment has no score `value` is nan, and where one has fewer than two the interval is nan, as it is
    for `num_resamples=0`. Settings share the draws of the bootstrap: compare them by `probability_of_improvement`.
    """
    over = (over,) if isinstance(over, str) else tuple(over)
    check(scores, statistic, over)

    def pooled(*samples, axis):
        return STATISTICS[statistic](np.concatenate(samples, axis=axis), axis=axis)

    rest = [dim for dim in scores.dims if dim not in over]
    strata = [dim for dim in over if dim != "seed"]
    ordered = scores.astype(np.float64).transpose(*rest, *strata, "seed")
    num_seeds = scores.sizes["seed"]
    num_strata = math.prod(scores.sizes[dim] for dim in strata)
    values = np.sort(ordered.values.reshape(-1, num_strata, num_seeds), axis=-1)  # nan goes last
    counts = (~np.isnan(values)).sum(-1)
    result = np.full((3, len(values)), np.nan)
    for pattern in np.unique(counts, axis=0):
        members = (counts == pattern).all(1)
        if pattern.min(initial=num_seeds) > 0:
            samples = [values[members, k, :n] for k, n in enumerate(pattern)]
            result[:, members] = _bootstrap(pooled, samples, confidence, num_resamples, seed)
    like = ordered.isel({dim: 0 for dim in over}, drop=True)
    columns = dict(zip(("value", "low", "high"), result)) | {"num_runs": counts.sum(1)}
    columns["num_missing"] = num_strata * num_seeds - counts.sum(1)
    return xarray.Dataset({name: like.copy(data=x.reshape(like.shape)).rename(None) for name, x in columns.items()})


def _bootstrap(statistic, samples, confidence, num_resamples, seed):
    """Value, low and high of a statistic of samples [..., n], each resampled by itself."""
    value = statistic(*samples, axis=-1)
    if not num_resamples or min(x.shape[-1] for x in samples) < 2:
        return value, np.full_like(value, np.nan), np.full_like(value, np.nan)
    batch = max(1, 2_000_000 // sum(x.size for x in samples))  # resamples at a time: 16 MB
    settings = {"vectorized": True, "axis": -1, "method": "percentile", "batch": batch, "rng": seed}
    found = stats.bootstrap(samples, statistic, n_resamples=num_resamples, confidence_level=confidence, **settings)
    return value, found.confidence_interval.low, found.confidence_interval.high


def check(scores, statistic, over):
    """Refuses a statistic that is unknown, or dimensions to aggregate over that the scores have not."""
    if statistic not in STATISTICS:
        raise ValueError(f"statistic={statistic!r} is unknown (known: {', '.join(STATISTICS)})")
    if "seed" not in over:
        raise ValueError(f"over={over} must name seed, whose runs are resampled, as in ('env', 'seed')")
    for dim in over:
        if dim not in scores.dims:
            raise ValueError(f"the scores have no dimension {dim} (theirs: {', '.join(map(str, scores.dims))})")


def probability_of_improvement(a, b, confidence=0.95, num_resamples=2000, seed=0) -> xarray.Dataset:
    """How probably a run of `a` scores higher than one of `b`, P(a > b) + P(a = b) / 2, with a bootstrap interval.

    It is Mann and Whitney's U / (m n). `a` and `b` are scores of two settings along `seed`, or along `env` too, over
    which the probability is averaged (Agarwal et al., 2021). Variables: `value`, `low`, `high`.
    """
    samples = _samples(a, "a"), _samples(b, "b")
    if len(samples[0]) != len(samples[1]):
        raise ValueError(f"a has runs in {len(samples[0])} environments, b in {len(samples[1])}: give both the same")

    def statistic(*samples, axis):
        half = len(samples) // 2
        return np.mean([_win_rate(x, y) for x, y in zip(samples[:half], samples[half:])], axis=0)

    values = _bootstrap(statistic, [*samples[0], *samples[1]], confidence, num_resamples, seed)
    return xarray.Dataset({name: float(x) for name, x in zip(("value", "low", "high"), values)})


def _win_rate(x, y):
    with np.errstate(invalid="ignore"):  # the unused p-value of nothing but ties
        u = stats.mannwhitneyu(x, y, axis=-1, method="asymptotic").statistic
    return u / (x.shape[-1] * y.shape[-1])


def _samples(scores, name: str) -> list[np.ndarray]:
    """Scores of one setting as one array per environment, -inf for runs without one."""
    if not isinstance(scores, xarray.DataArray):
        scores = xarray.DataArray(np.asarray(scores, np.float64).reshape(-1), dims="seed")
    others = [dim for dim in scores.dims if dim not in ("env", "seed")]
    if others or "seed" not in scores.dims or not scores.size:
        raise ValueError(f"{name} has dimensions {scores.dims}: select one setting, so that seed is left, or env, seed")
    values = scores.transpose(..., "seed").values.reshape(-1, scores.sizes["seed"]).astype(np.float64)
    return list(np.where(np.isnan(values), -np.inf, values))


def seeds_to_separate(a, b, power=0.8, confidence=0.95) -> Separation:
    """Seeds per setting with which a two-sided Mann-Whitney test tells two settings apart, as often as `power`.

    n = (z_{(1 + confidence) / 2} + z_power)^2 / (6 (p - 1/2)^2), where p is the probability of improvement and both
    settings have n runs (Noether, 1987); for p near 0 or 1 it is somewhat too many. It is as uncertain as p is: a guide
    for what to run next, not a test.
    """
    samples = _samples(a, "a"), _samples(b, "b")
    if len(samples[0]) > 1 or len(samples[1]) > 1:
        raise ValueError("a and b have several environments: select one, as in scores.sel(env=...)")
    p = float(_win_rate(samples[0][0], samples[1][0]))
    z = stats.norm.ppf((1 + confidence) / 2) + stats.norm.ppf(power)
    needed = math.inf if p == 0.5 else float(math.ceil(z**2 / (6 * (p - 0.5) ** 2)))
    return Separation(needed, max(needed - min(len(x[0]) for x in samples), 0.0), p)


def filled(scores: xarray.DataArray) -> xarray.DataArray:
    """Scores in which runs without one have the lowest of all."""
    return scores.fillna(scores.min())
