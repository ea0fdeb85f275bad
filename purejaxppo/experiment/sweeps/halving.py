"""Successive halving: settings that score badly early leave their place in the batch to others."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from purejaxppo.batched import batched, causes, reported_failures, seed_keys
from purejaxppo.checks import check_whole
from purejaxppo.experiment.jax_setup import num_cores
from purejaxppo.experiment.loop import check_on_interrupt, end, noted_interrupt, step_bar, warn
from purejaxppo.experiment.program import (
    Program,
    best_slice_size,
    compile_training,
    first_state,
)
from purejaxppo.experiment.report.failures import describe_failure, join_failures, leaves_of, name_causes
from purejaxppo.experiment.report.statistics import NO_SCORE, STATISTICS
from purejaxppo.experiment.sweeps.columns import run_arguments
from purejaxppo.experiment.sweeps.sweep import Sweep, check_sweep, make_group
from purejaxppo.ppo import PPO, TrainState, make_ppo
from purejaxppo.summary import FAILURE
from purejaxppo.text import show_setting


@dataclass(frozen=True)
class Halving:
    """The result of successive halving."""

    sweep: Sweep
    ppo: PPO
    """Batched over runs."""
    rungs: tuple[int, ...]
    """Numbers of updates after which settings are compared."""
    scores: np.ndarray
    """[settings, rungs]; nan if a setting did not reach the rung, -inf if no episode ended or a run turned nan."""
    states: TrainState
    """Of all runs, [settings * seeds], each after as many updates as it made; seeds vary fastest."""
    num_updates: int
    """Updates of all runs together."""
    failed_metric: np.ndarray
    """[settings * seeds], what was not finite first in a run that turned nan, "" for others."""
    interrupted: bool = False
    """Whether a signal ended the call."""

    def ranked(self) -> list[dict]:
        """Settings with the `updates` of their last comparison and their `score` there, best first.

        A setting that failed goes last and has no score: a run of it turned nan, or ended no episode. So does, after an
        interrupt, a setting that was not compared yet.
        """
        reached = (~np.isnan(self.scores)).sum(1)
        rows = [
            row | {"updates": self.rungs[number - 1] if number else 0, "score": float(scores[number - 1])}
            for row, number, scores in zip(self.sweep.table.rows(), reached, self.scores)
        ]
        failed = [row | {"score": np.nan} for row in rows if not np.isfinite(row["score"])]
        scored = [row for row in rows if np.isfinite(row["score"])]
        return sorted(scored, key=lambda row: (row["updates"], row["score"]), reverse=True) + failed

    def best(self) -> dict:
        """The setting with the highest score among those on the highest rung. Raises ValueError if none has a score."""
        first = self.ranked()[0]
        if np.isnan(first["score"]):
            raise ValueError(NO_SCORE)
        return {name: first[name] for name in self.sweep.table.names}

    def failed(self) -> list[str]:
        """A sentence for every run that turned nan."""
        rows, updates = self.sweep.table.rows(), np.asarray(self.states.num_updates) + 1  # frozen before the failure
        names = [show_setting(rows[setting]) + f" seed={seed}" for setting, seed in self.sweep.runs().values()]
        return [
            describe_failure(name.strip(), update, metric)
            for name, update, metric in zip(names, updates.tolist(), self.failed_metric.tolist())
            if metric
        ]

    def __repr__(self) -> str:
        return f"Halving of {len(self.sweep.table)} settings on {self.sweep.env}, rungs at {self.rungs} updates"

    def state(self, seed: int = 0, **setting: Any) -> TrainState:
        """The state of one run. Raises ValueError if no setting fits, or more than one."""
        if not 0 <= seed < self.sweep.num_seeds:
            raise ValueError(f"seed={seed} must be from 0 to {self.sweep.num_seeds - 1}")
        return self.states[self.sweep.table.index(**setting) * self.sweep.num_seeds + seed]


def successive_halving(
    sweep: Sweep,
    *,
    num_rungs: int = 4,
    eta: int = 3,
    num_places: int | None = None,
    progress: bool = True,
    make: Callable = make_ppo,
    on_interrupt: Literal["raise", "return"] = "raise",
) -> Halving:
    """Trains the settings of a sweep as long as they are among the best (Li et al., 2020, in rounds of a batch).

    After r, r eta, r eta^2, ... updates (the rungs) a setting is compared with all that have reached the rung before:
    by the interquartile mean over its seeds of the mean return in the last r updates. It is promoted if it is in the
    best 1 / `eta` of them. A free place goes to the setting on the highest rung that is promoted, or else to the next
    one that has not started. Settings on the last rung train to the end of the run. The same call gives the same
    result. An interrupt (Ctrl-C, SIGTERM) ends the call after the current round, as in `fit`: `Interrupted` is raised
    with the `result` so far, or this result is returned. A warning names the runs that turned nan. Raises ValueError if
    settings need different programs, or if there are too few settings or updates.

    Args:
        sweep: the settings and seeds.
        num_rungs: how often a setting is compared at most.
        eta: the inverse of the fraction that is promoted.
        num_places: settings that train side by side, by default all.
        progress: whether to show a progress bar.
        make: `make(env, config)` makes the PPO.
        on_interrupt: what the call does after an interrupt: "raise" or "return".
    """
    check_sweep(sweep)
    check_on_interrupt(on_interrupt)
    ladder = Ladder(_rungs(sweep, num_rungs, eta), eta, len(sweep.table))
    num_places = len(sweep.table) if num_places is None else num_places
    check_whole("num_places", num_places, at_most=len(sweep.table), of="the settings")
    (group,) = sweep.groups()
    ppo = make_group(group, make)
    many = batched(ppo)
    seeds, *columns = run_arguments(sweep, ppo, list(sweep.runs().values()))
    states = first_state(many, seed_keys(jax.random.key(sweep.seed), jnp.asarray(seeds)), *columns)
    on_cpu = jax.devices()[0].platform == "cpu"
    num_threads, num_runs = num_cores() if on_cpu else 1, num_places * sweep.num_seeds
    size = best_slice_size(num_runs, num_threads, group.config) if on_cpu else num_runs
    with reported_failures():
        program = compile_training(many, states[:size], ladder.rungs[0], slice_size=size)
    failed_metric = np.full(sweep.num_runs, "", object)

    def train(settings, length):
        nonlocal states
        runs = np.add.outer(np.array(settings) * sweep.num_seeds, np.arange(sweep.num_seeds)).ravel()
        states, scores, failed_metric[runs] = train_runs(program, states, runs, length, pool)
        bar.update(length * len(runs) * group.config.steps_per_update)
        return STATISTICS["iqm"](scores.reshape(-1, sweep.num_seeds), axis=1)

    with (
        ThreadPoolExecutor(num_threads) as pool,
        step_bar(progress=progress) as bar,
        noted_interrupt() as interrupt,
    ):
        while (settings := ladder.next_settings(num_places)) and not interrupt.is_set():
            ladder.climb(settings, train(settings, ladder.rungs[0]))
        left = group.config.num_updates - ladder.rungs[-1]
        while left and ladder.finished() and not interrupt.is_set():
            length = min(left, ladder.rungs[0])
            train(ladder.finished(), length)
            left -= length
    result = Halving(
        sweep, many, ladder.rungs, ladder.scores, states, int(states.num_updates.sum()), failed_metric,
        interrupt.is_set(),
    )  # fmt: skip
    failed = result.failed()
    if failed:
        warn(join_failures(failed, sweep.num_runs))
    reached = f"successive_halving was interrupted; {len(ladder.finished())} settings have reached the last rung"
    return end(result, result.interrupted, on_interrupt, reached)


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

    def climb(self, settings: Sequence[int], scores: Sequence[float]):
        """Counts the updates of one round for some settings, and their scores if they reach a rung."""
        for setting, score in zip(settings, scores):
            self.num_updates[setting] += self.rungs[0]
            if self.num_updates[setting] in self.rungs:
                self.scores[setting, self.rungs.index(self.num_updates[setting])] = score
                self.active.remove(setting)

    def finished(self) -> list[int]:
        """Settings on the last rung."""
        return [int(i) for i in np.flatnonzero(~np.isnan(self.scores[:, -1]))]

    def _promoted(self) -> list[int]:
        """Settings that wait on a rung and are among its best, from the highest rung down."""
        found = []
        for rung in reversed(range(len(self.rungs) - 1)):
            order = np.argsort(-self.scores[:, rung], kind="stable")  # nan goes last
            best = order[: (~np.isnan(self.scores[:, rung])).sum() // self.eta]
            healthy = self.scores[best, rung] > -np.inf
            found += [i for i in best[healthy] if self.num_updates[i] == self.rungs[rung]]
        return found


def train_runs(
    program: Program, states: TrainState, runs: np.ndarray, length: int, pool: ThreadPoolExecutor
) -> tuple[TrainState, np.ndarray, np.ndarray]:
    """Trains some runs of a batch in slices of the program's size; the last slice repeats its last run.

    Args:
        program: trains a slice.
        states: of all runs of the batch.
        runs: the indices of those to train.
        length: updates to make.
        pool: the threads that train slices side by side.

    Returns:
        The states of all runs; and of the trained ones, [runs] each, the mean returns in these updates, -inf for those
        that turned nan or ended no episode, and what was not finite first, "" for runs that are fine.
    """
    size = program.slice_size
    slices = [runs[i : i + size] for i in range(0, len(runs), size)]
    slices = [np.append(indices, np.repeat(indices[-1], size - len(indices))) for indices in slices]
    trained = list(pool.map(lambda indices: program(states[indices], length, donate=True), slices))
    returns, failed = [], []
    for indices, (new, metrics) in zip(slices, trained):
        states = jax.tree.map(lambda old, some, indices=indices: old.at[indices].set(some), states, new)
        count = metrics["num_episodes"].sum(1)
        total = np.nansum(metrics["episode_return"] * metrics["num_episodes"], axis=1)
        healthy = np.isfinite(metrics["learning_rate"]).all(1)
        failed.append(name_causes(metrics[FAILURE][:, -1], causes(metrics, leaves_of(states))))
        returns.append(np.where((count > 0) & healthy, total / np.maximum(count, 1), -np.inf))
    return states, np.concatenate(returns)[: len(runs)], np.concatenate(failed)[: len(runs)]


def _rungs(sweep: Sweep, num_rungs: int, eta: int) -> tuple[int, ...]:
    check_whole("num_rungs", num_rungs)
    check_whole("eta", eta, at_least=2)
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
    return tuple(num_updates // factor * eta**k for k in range(num_rungs))
