"""Statistics of the scores of many runs: aggregates with intervals, and comparisons of two settings.

A run without a score (it turned nan, or no episode ended) is never dropped silently. `aggregate` counts such runs in
`num_missing`. Comparisons of settings count them as the worst: as the lowest score of the sweep (`ranking`), or below
every score (`probability_of_improvement`). A higher score is better.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import scipy
import xarray
from numpy.typing import ArrayLike

from purejaxppo.evaluate import EPISODES
from purejaxppo.experiment.evaluations import EVALUATION_RETURN
from purejaxppo.experiment.report.metrics import last_episodes
from purejaxppo.text import count, quote

NO_SCORE = "no run has a score: no episode ended, or all turned nan"
STATISTICS = {"iqm": lambda x, axis: scipy.stats.trim_mean(x, 0.25, axis=axis), "mean": np.mean, "median": np.median}


class Separation(NamedTuple):
    """Seeds that are needed to tell two settings apart."""

    num_seeds: float
    """Seeds that each setting needs; inf if the two do not differ."""
    num_more: float
    """Seeds that the setting with fewer seeds still lacks."""
    probability: float
    """Probability of improvement, estimated from the given runs."""


def swept_fields(data: xarray.DataArray | xarray.Dataset) -> dict[str, str]:
    """The swept fields, each with the dimension along which it varies; fields of paired settings share a dimension."""
    fields: dict[str, str] = {}
    for dim in map(str, data.dims):
        names = [str(name) for name, x in data.coords.items() if x.dims == (dim,)]
        together = [name for name in names if name != dim or not dim.startswith("setting")]
        if dim not in ("seed", "updates"):
            fields |= dict.fromkeys(together or [dim], dim)
    return fields


def lost(metrics: xarray.Dataset) -> xarray.DataArray:
    """Whether each update of each run came at or after the one in which the run turned nan, by `failed_update`.

    Without that metric it is true for updates before the run's end whose metrics are all nan. Returns and lengths of
    episodes do not count there, because they are nan in any update in which no episode ended.
    """
    if "failed_update" not in metrics:
        return _silent(metrics)
    gone = (metrics["failed_update"] > 0) & (metrics["updates"] >= metrics["failed_update"])
    return (gone & metrics["step"].notnull()).transpose(*metrics["episode_return"].dims)


def without_lost(metrics: xarray.Dataset) -> xarray.Dataset:
    """The metrics without the returns and episodes of updates that are `lost`."""
    alive = ~lost(metrics)
    returns, counts = metrics["episode_return"].where(alive), metrics["num_episodes"].where(alive, 0)
    return metrics.assign(episode_return=returns, num_episodes=counts)


def unfinished(metrics: xarray.Dataset) -> xarray.DataArray:
    """Whether each run of a sweep has updates to make yet; a run that turned nan has none."""
    return _silent(metrics).any("updates") & (metrics["failed_update"] == 0)


def _silent(metrics: xarray.Dataset) -> xarray.DataArray:
    """Whether each update of each run, before its end, has no metrics but perhaps those of episodes."""
    returns = metrics["episode_return"]
    names = [n for n, x in metrics.items() if x.dtype.kind == "f" and x.dims == returns.dims]
    names = [name for name in names if not str(name).startswith("episode_")]
    silent = metrics[names].isnull().to_array().all("variable") if names else xarray.zeros_like(returns, bool)
    return (silent & metrics["step"].notnull()).transpose(*returns.dims)


def final_scores(metrics: xarray.Dataset, num_episodes: int = 100) -> xarray.DataArray:
    """Mean return of the last `num_episodes` training episodes of each run; nan if it turned nan or ended none."""
    alive = ~lost(metrics).any("updates")
    return last_episodes(metrics, num_episodes, needed=alive).where(alive)


def count_scored(metrics: xarray.Dataset, num_episodes: int = 100) -> str:
    """How many episodes the `final_scores` of a setting's runs are means of, in words, such as "100 episodes"."""
    ended = np.atleast_1d(metrics["num_episodes"].sum("updates").values)
    ended = ended[~np.atleast_1d(lost(metrics).any("updates").values)]
    fewest, most = (int(min(f(ended, initial=x), num_episodes)) for f, x in ((np.min, num_episodes), (np.max, 0)))
    if not most:
        return "episodes"
    return count(most, "episode") if fewest == most else f"{fewest} to {count(most, 'episode')}"


def scores_of(metrics: xarray.Dataset) -> xarray.DataArray:
    """The score of each run of a sweep, by which settings are ranked: that of `describe_scores`.

    It is the newest `evaluation_return` if any run has been evaluated, otherwise that of `final_scores`; nan for a run
    that turned nan, or has not been evaluated yet.
    """
    if EVALUATION_RETURN not in metrics or metrics[EVALUATION_RETURN].isnull().all():
        return final_scores(metrics)
    returns = metrics[EVALUATION_RETURN]
    place = returns.notnull().isel(updates=slice(None, None, -1)).argmax("updates")  # from the end
    newest = returns.isel(updates=returns.sizes["updates"] - 1 - place)
    newest = newest.drop_vars([name for name in ("updates", "step") if name in newest.coords])
    return newest.where(~lost(metrics).any("updates"))


def describe_scores(scores: xarray.DataArray | None = None, *, evaluated: bool = False) -> str:
    """What the scores of `scores_of` are, in words, or what they would be for runs that are `evaluated`."""
    if evaluated or (scores is not None and scores.name == EVALUATION_RETURN):
        return f"the mean return of {EPISODES} fresh episodes in the newest evaluation"
    return "the return of the last 100 training episodes"


def area_under_curve(metrics: xarray.Dataset) -> xarray.DataArray:
    """Mean height of each run's learning curve over its environment steps, by trapezoids; nan for runs that turned nan.

    All environment steps have the same weight. (Weighting by episodes would favour stretches of short episodes.) Where
    no episode ended, the curve is a straight line between its neighbours. Before the first finished episode it has the
    height of that episode, not 0, and after the last one the height of the last.
    """
    heights = xarray.apply_ufunc(
        _mean_height, metrics["episode_return"], metrics["step"], input_core_dims=[["updates"]] * 2, vectorize=True
    )
    return heights.where(~lost(metrics).any("updates")).rename("area_under_curve")


def _mean_height(returns: np.ndarray, steps: np.ndarray) -> float:
    returns, steps = returns[~np.isnan(steps)], steps[~np.isnan(steps)]
    known = ~np.isnan(returns)
    if not known.any():
        return np.nan
    heights = np.interp(steps, steps[known], returns[known])
    return np.trapezoid(heights, steps) / (steps[-1] - steps[0]) if len(steps) > 1 else heights[0]


def aggregate(
    scores: xarray.DataArray,
    statistic: str = "iqm",
    over: str | Sequence[str] = "seed",
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> xarray.Dataset:
    """A statistic of all runs along `over` together, with a percentile bootstrap interval, for every setting.

    Variables of the result: `value`, `low`, `high`, `num_runs` (runs with a score, the only ones that count) and
    `num_missing` (runs without one). If an environment has no score, `value` is nan; if one has fewer than two, the
    interval is nan. Settings share the draws of the bootstrap, so do not compare their intervals: use
    `probability_of_improvement`. Raises ValueError for an unknown statistic or dimension.

    Args:
        scores: one score per run, with a dimension `seed`.
        statistic: "iqm" (mean of the middle half, Agarwal et al., 2021), "mean" or "median", over the flattened runs.
        over: dimensions to aggregate over: "seed", or more, as in ("env", "seed"); seeds are resampled within each
            entry of the others, never across.
        confidence: level of the interval, between 0 and 1.
        num_resamples: bootstrap resamples; with 0 the interval is nan.
        seed: random seed of the bootstrap.
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


def _bootstrap(
    statistic: Callable, samples: Sequence[np.ndarray], confidence: float, num_resamples: int, seed: int
) -> tuple:
    """Value, low and high of a statistic of samples [..., n], each of which is resampled separately."""
    value = statistic(*samples, axis=-1)
    if not num_resamples or min(x.shape[-1] for x in samples) < 2:
        return value, np.full_like(value, np.nan), np.full_like(value, np.nan)
    batch = max(1, 2_000_000 // sum(x.size for x in samples))  # resamples at a time: 16 MB
    options = {"vectorized": True, "axis": -1, "method": "percentile", "batch": batch, "rng": seed}
    found = scipy.stats.bootstrap(samples, statistic, n_resamples=num_resamples, confidence_level=confidence, **options)
    return value, found.confidence_interval.low, found.confidence_interval.high


def check(scores: xarray.DataArray, statistic: str, over: Sequence[str]) -> None:
    """Raises ValueError for an unknown statistic, or for dimensions in `over` that the scores lack."""
    if statistic not in STATISTICS:
        raise ValueError(f"statistic={quote(statistic)} is unknown (known: {', '.join(STATISTICS)})")
    if "seed" not in over:
        raise ValueError(f"over={over} must name seed, whose runs are resampled, as in ('env', 'seed')")
    for dim in over:
        if dim not in scores.dims:
            raise ValueError(f"the scores have no dimension {dim} (theirs: {', '.join(map(str, scores.dims))})")


def probability_of_improvement(
    a: xarray.DataArray | ArrayLike,
    b: xarray.DataArray | ArrayLike,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> xarray.Dataset:
    """Probability that a run of `a` scores higher than a run of `b`, P(a > b) + P(a = b) / 2, with its interval.

    It is Mann and Whitney's U / (m n), averaged over environments (Agarwal et al., 2021), with a percentile bootstrap
    interval. Where every run of one setting scores higher, the interval has no width, however few the runs are.
    Variables of the result: `value`, `low`, `high`. Raises ValueError if the scores hold more than one setting, or
    different numbers of environments.

    Args:
        a: scores of one setting along `seed`, or along `env` and `seed`.
        b: scores of the other setting, in the same environments.
        confidence: level of the interval, between 0 and 1.
        num_resamples: bootstrap resamples; with 0 the interval is nan.
        seed: random seed of the bootstrap.
    """
    samples = _samples(a, "a"), _samples(b, "b")
    if len(samples[0]) != len(samples[1]):
        raise ValueError(
            f"a has runs in {len(samples[0])} environments, b in {len(samples[1])}: select the same ones in both"
        )

    def statistic(*samples, axis):
        half = len(samples) // 2
        return np.mean([_win_rate(x, y) for x, y in zip(samples[:half], samples[half:])], axis=0)

    values = _bootstrap(statistic, [*samples[0], *samples[1]], confidence, num_resamples, seed)
    return xarray.Dataset({name: float(x) for name, x in zip(("value", "low", "high"), values)})


def improvements(
    scores: xarray.DataArray, field: str, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> dict[str, xarray.Dataset]:
    """The probability of improvement of every value of a swept field over the first one, averaged over other fields.

    The keys are "VALUE > FIRST"; see `probability_of_improvement` for the values. Raises ValueError if the field is
    not a dimension of the scores, as when it was paired with others.

    Args:
        scores: one score per run, with the dimensions `field` and `seed`.
        field: a swept field, such as "loss".
        confidence: level of the intervals, between 0 and 1.
        num_resamples: bootstrap resamples; with 0 the intervals are nan.
        seed: random seed of the bootstrap.
    """
    if field not in scores.dims:
        raise ValueError(f"field={field!r} is no dimension of the scores (theirs: {', '.join(map(str, scores.dims))})")
    others = [dim for dim in scores.dims if dim not in (field, "seed")]
    rows = scores.transpose(field, *others, "seed").values
    rows = rows.reshape(len(rows), -1, scores.sizes["seed"])
    first, *rest = (xarray.DataArray(x, dims=("env", "seed")) for x in rows)
    names = [str(name) for name in scores[field].values]
    compare = partial(
        probability_of_improvement, b=first, confidence=confidence, num_resamples=num_resamples, seed=seed
    )
    return {f"{name} > {names[0]}": compare(x) for name, x in zip(names[1:], rest)}


def _win_rate(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # the p-value, which is not used, is nan if all scores tie
        u = scipy.stats.mannwhitneyu(x, y, axis=-1, method="asymptotic").statistic
    return u / (x.shape[-1] * y.shape[-1])


def _samples(scores: xarray.DataArray | ArrayLike, name: str) -> list[np.ndarray]:
    """Scores of one setting as one array per environment, -inf for runs without one."""
    if not isinstance(scores, xarray.DataArray):
        scores = xarray.DataArray(np.asarray(scores, np.float64).reshape(-1), dims="seed")
    others = [dim for dim in scores.dims if dim not in ("env", "seed")]
    if others or "seed" not in scores.dims or not scores.size:
        raise ValueError(
            f"{name} has dimensions {scores.dims}: select one setting, so that only seed, or env and seed, remain"
        )
    values = scores.transpose(..., "seed").values.reshape(-1, scores.sizes["seed"]).astype(np.float64)
    return list(np.where(np.isnan(values), -np.inf, values))


def seeds_to_separate(
    a: xarray.DataArray | ArrayLike, b: xarray.DataArray | ArrayLike, power: float = 0.8, confidence: float = 0.95
) -> Separation:
    """Seeds per setting for which a two-sided Mann-Whitney test tells two settings apart with probability `power`.

    n = (z_{(1 + confidence) / 2} + z_power)^2 / (6 (p - 1/2)^2), where p is the probability of improvement and both
    settings have n runs (Noether, 1987); for p near 0 or 1 this is somewhat too many. It is as uncertain as p is: a
    guide for what to run next, not a test. Raises ValueError for scores of several settings or environments.

    Args:
        a: scores of one setting along `seed`.
        b: scores of the other setting.
        power: probability that the test finds the difference, between 0 and 1.
        confidence: one minus the significance level of the test.
    """
    samples = _samples(a, "a"), _samples(b, "b")
    if len(samples[0]) > 1 or len(samples[1]) > 1:
        raise ValueError("a and b have several environments: select one, as in scores.sel(env=...)")
    p = float(_win_rate(samples[0][0], samples[1][0]))
    z = scipy.stats.norm.ppf((1 + confidence) / 2) + scipy.stats.norm.ppf(power)
    needed = math.inf if p == 0.5 else float(math.ceil(z**2 / (6 * (p - 0.5) ** 2)))
    return Separation(needed, max(needed - min(len(x[0]) for x in samples), 0.0), p)


def value_of_settings(scores: xarray.DataArray, statistic: str) -> xarray.DataArray:
    """A statistic over seeds for every setting: runs without a score are `filled`, a setting without any has nan."""
    return aggregate(filled(scores), statistic, num_resamples=0)["value"].where(scores.notnull().any("seed"))


def best_first(values: np.ndarray, means: np.ndarray) -> np.ndarray:
    """The positions of settings by their values [settings], the highest first; means decide between equal ones."""
    return np.lexsort((-means, -values))  # the last key counts first; nan goes last


def filled(scores: xarray.DataArray) -> xarray.DataArray:
    """The scores, with the lowest of all in place of those that are nan."""
    return scores.fillna(scores.min())
