"""The rungs of successive halving: which settings are compared there, by what, and which go on."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from purejaxppo.checks import check_whole
from purejaxppo.experiment.evaluations import EVALUATION_RETURN
from purejaxppo.experiment.report.metrics import mean_returns
from purejaxppo.experiment.report.statistics import STATISTICS, describe_scores
from purejaxppo.experiment.sweeps.slices import Slice, by_run
from purejaxppo.experiment.sweeps.sweep import Sweep
from purejaxppo.text import count

# What scores are made of; the learning rate says which runs failed.
NEEDED = (EVALUATION_RETURN, "episode_return", "num_episodes", "learning_rate")


class Ladder:
    """Which settings are promoted: the rule of asynchronous successive halving (Li et al., 2020, algorithm 2)."""

    def __init__(self, rungs: tuple[int, ...], eta: int, num_settings: int):
        self.rungs, self.eta = rungs, eta
        self.scores = np.full((num_settings, len(rungs)), np.nan)
        self.num_updates = np.zeros(num_settings, int)
        self.active: list[int] = []

    def next_settings(self, num_places: int) -> list[int]:
        """The settings to train in this round: active ones, then promoted and new ones in the free places."""
        waiting = [i for i in self._promoted() + list(np.flatnonzero(self.num_updates == 0)) if i not in self.active]
        self.active += [int(i) for i in waiting[: num_places - len(self.active)]]
        return list(self.active)

    def climb(self, settings: Sequence[int], scores: ArrayLike):
        """Counts the updates of one round for some settings, and their scores if they reach a rung."""
        for setting, score in zip(settings, np.asarray(scores)):
            self.num_updates[setting] += self.rungs[0]
            if self.num_updates[setting] in self.rungs:
                self.scores[setting, self.rungs.index(self.num_updates[setting])] = score
                self.active.remove(setting)

    def finished(self) -> list[int]:
        """Settings on the last rung."""
        return [int(i) for i in np.flatnonzero(~np.isnan(self.scores[:, -1]))]

    def progress(self) -> str:
        """The best score so far, and how many settings stand on each rung, as text."""
        best = np.nanmax(self.scores, initial=-np.inf)
        reached = (~np.isnan(self.scores)).sum(0)
        return f"best {best:.4g}  rungs {' '.join(map(str, reached))}"

    def _promoted(self) -> list[int]:
        """Settings that wait on a rung and are among its best, from the highest rung down."""
        found = []
        for rung in reversed(range(len(self.rungs) - 1)):
            order = np.argsort(-self.scores[:, rung], kind="stable")  # nan goes last
            best = order[: (~np.isnan(self.scores[:, rung])).sum() // self.eta]
            healthy = self.scores[best, rung] > -np.inf
            found += [i for i in best[healthy] if self.num_updates[i] == self.rungs[rung]]
        return found


def score_of(metrics: Mapping[str, np.ndarray], done: int, length: int) -> float:
    """The score of a setting after `done` updates: the interquartile mean over its seeds of `returns_at`."""
    return float(STATISTICS["iqm"](returns_at(metrics, done, length), axis=0))


def returns_at(metrics: Mapping[str, np.ndarray], done: int, length: int) -> np.ndarray:
    """The returns by which runs are compared, [runs]; -inf for those that turned nan or have none.

    Args:
        metrics: of the runs, [runs, updates]. If they were evaluated, the newest evaluation counts, or else the
            episodes that ended in the last updates.
        done: updates after which they are compared.
        length: number of the last updates.
    """
    if EVALUATION_RETURN not in metrics:
        return mean_returns({name: x[:, done - length : done] for name, x in metrics.items()})
    returns, healthy = metrics[EVALUATION_RETURN][:, :done], np.isfinite(metrics["learning_rate"][:, :done]).all(1)
    known = np.isfinite(returns)
    newest = done - 1 - known[:, ::-1].argmax(1)
    return np.where(healthy & known.any(1), returns[np.arange(len(returns)), newest], -np.inf)


def scores_on_rungs(sweep: Sweep, slices: Sequence[Slice], rungs: Sequence[int]) -> np.ndarray:
    """The score of every setting on every rung that it has reached in its slices, [settings, rungs]; others are nan."""
    found, scores = by_run(slices), np.full((len(sweep.table), len(rungs)), np.nan)
    read = {x.name: {name: np.asarray(x.metrics[name]) for name in NEEDED if name in x.metrics} for x in slices}
    for setting in range(len(scores)):
        runs = [found[name] for name in sweep.runs([setting]) if name in found]
        if len(runs) < sweep.num_seeds:
            continue
        done = min(slice_.num_updates for slice_, _ in runs)
        names = set.intersection(*(set(read[slice_.name]) for slice_, _ in runs))
        metrics = {name: np.stack([read[slice_.name][name][row, :done] for slice_, row in runs]) for name in names}
        for rung, updates in enumerate(rungs):
            if updates <= done:
                scores[setting, rung] = score_of(metrics, updates, rungs[0])
    return scores


def last_scores(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of rungs that each setting has reached, and its score on the last of them; nan if it has failed.

    `scores` are [settings, rungs], nan where a setting did not get to the rung, -inf where it failed.
    """
    reached = (~np.isnan(scores)).sum(1)
    last = np.take_along_axis(scores, np.maximum(reached - 1, 0)[:, None], 1)[:, 0]
    return reached, np.where(np.isfinite(last), last, np.nan)


def best_first(scores: np.ndarray) -> list[int]:
    """The settings by the highest rung and the score there, best first; those that have failed come last."""
    reached, last = last_scores(scores)
    failed = np.isnan(last)
    return sorted(range(len(last)), key=lambda i: (failed[i], *((0, 0) if failed[i] else (-reached[i], -last[i]))))


def describe_criterion(sweep: Sweep, rungs: Sequence[int]) -> str:
    """By what settings are compared, in words."""
    if sweep.evaluate_every:
        return describe_scores(evaluated=True)
    return f"the mean return of the training episodes of the last {count(rungs[0], 'update')}"


def choose_rungs(sweep: Sweep, num_rungs: int | None, eta: int) -> tuple[int, ...]:
    """The numbers of updates after which settings are compared.

    Args:
        sweep: has the settings.
        num_rungs: how many; by default up to 4.
        eta: the ratio of one to the one before.

    Raises:
        ValueError: for too few settings or updates, or settings that need different programs.
    """
    check_whole("eta", eta, at_least=2)
    if num_rungs is None:
        num_rungs = max(n for n in range(1, 5) if eta ** (n - 1) <= len(sweep.table))
    check_whole("num_rungs", num_rungs)
    groups = sweep.groups()
    if len(groups) > 1:
        raise ValueError(
            f"the settings need {len(groups)} programs, but halving uses one for all (sweep hyperparameters and "
            "parameters of the environment only)"
        )
    factor, num_updates = eta ** (num_rungs - 1), groups[0].config.num_updates
    if len(sweep.table) < factor:
        raise ValueError(
            f"num_rungs={num_rungs} needs eta^(num_rungs - 1) = {factor} settings, so that one reaches the end, but "
            f"there are {len(sweep.table)} (try fewer rungs)"
        )
    if num_updates < factor:
        raise ValueError(f"num_rungs={num_rungs} needs {factor} updates, but num_updates={num_updates}")
    first = num_updates // factor
    if sweep.evaluate_every and sweep.evaluate_every > first:
        raise ValueError(
            f"evaluate_every={sweep.evaluate_every} must be at most {first}, the updates after which settings are "
            "compared first by their evaluations"
        )
    return tuple(first * eta**k for k in range(num_rungs))
